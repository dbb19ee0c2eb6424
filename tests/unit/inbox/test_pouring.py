"""What a dead process's ring has goes into its logs, each event once, and then it can be adopted."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from zlib import crc32

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kong_metering.inbox.inbox import Inbox
from kong_metering.inbox.place import Place
from kong_metering.inbox.pouring import Poured, Pouring
from kong_metering.inbox.ring import HEADER_BYTES
from kong_metering.inbox.unpoured import count_unpoured
from kong_metering.spool import locks
from kong_metering.spool.delivered import Delivered
from kong_metering.spool.directory import HeldLog, SpoolDirectory
from tests.unit.eventlog.helpers import NOW, failing_writes, overwrite, payload, payloads, read_all, segments
from tests.unit.inbox.helpers import OTHER, QUEUE

if TYPE_CHECKING:
    from kong_metering.eventlog.log import EventLog
    from kong_metering.spool.identity import QueueIdentity

RING = 64 * 1024


class Life:
    """A process with a spool and an inbox, until it dies."""

    def __init__(self, root: Path, place: Place) -> None:
        self.directory = SpoolDirectory(root, delivered=Delivered(root, lambda: NOW))
        self.inbox = Inbox.open(place, lambda: None, ring_bytes=RING)
        self.logs: dict[int, HeldLog] = {}

    def open(self, number: int, identity: QueueIdentity) -> EventLog:
        self.inbox.open_queue(number, identity)
        self.logs[number] = held = self.directory.log_for(identity)
        self.inbox.log_opened(number, held.directory)
        return held.log

    def append(self, number: int, events: list[bytes]) -> None:
        for event in events:
            assert self.inbox.append(number, event)

    def write(self, number: int, events: list[bytes]) -> None:
        """Do what the writer does before it advances."""
        self.logs[number].log.append(events, NOW)

    def die(self) -> None:
        """Leave what a SIGKILL leaves: files as they are, and no locks."""
        file = self.inbox._file
        assert file is not None
        file.release()
        self.inbox._file = None
        if self.directory._own is not None:
            os.close(self.directory._own_lock)


class World:
    """A spool, a place for rings, and who looks after them."""

    def __init__(self, path: Path) -> None:
        self.root, shared = path / "spool", path / "shm"
        self.root.mkdir(parents=True)
        shared.mkdir()
        self.place = Place(shared, self.root)
        self.pouring = Pouring([self.place], self.root, lambda: NOW + 1)
        self.heir = SpoolDirectory(self.root)

    def life(self) -> Life:
        return Life(self.root, self.place)

    def rings(self) -> list[Path]:
        return sorted(self.place.path.glob("*")) if self.place.path.exists() else []

    def adopt(self) -> dict[QueueIdentity | None, list[bytes]]:
        """Adopt all, and give what is in the logs, by their owners, in the order in which they were adopted."""
        found: dict[QueueIdentity | None, list[bytes]] = {}
        for held in self.heir.adopt(held_back=self.pouring.held_back).logs:
            found.setdefault(held.identity, []).extend(event.payload for event in read_all(held.log))
        return found


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.heir.close()


def counts(poured: Poured) -> tuple[int, int, int]:
    assert poured.unpoured == []
    return poured.rings, poured.events, poured.left_out


def test_events_go_behind_what_the_log_had_and_are_adopted(world: World) -> None:
    life = world.life()
    life.open(7, QUEUE)
    life.write(7, payloads(0, 10))
    life.append(7, payloads(10, 5))
    life.die()
    assert counts(world.pouring.pour()) == (1, 5, 0)
    assert world.rings() == []
    assert world.adopt() == {QUEUE: payloads(0, 15)}


def test_a_living_process_s_ring_is_left_alone(world: World) -> None:
    life = world.life()
    life.open(7, QUEUE)
    life.append(7, payloads(0, 3))
    assert counts(world.pouring.pour()) == (0, 0, 0)
    assert len(world.rings()) == 1


@pytest.mark.parametrize("written", range(7))
def test_what_the_log_has_already_is_left_out(world: World, written: int) -> None:
    life = world.life()
    life.open(7, QUEUE)
    life.write(7, payloads(0, 4))
    life.append(7, payloads(4, 6))
    life.write(7, payloads(4, written))
    life.die()
    assert counts(world.pouring.pour()) == (1, 6 - written, written)
    assert world.adopt() == {QUEUE: payloads(0, 10)}


def test_what_the_log_has_delivered_already_is_left_out_too(world: World) -> None:
    life = world.life()
    log = life.open(7, QUEUE)
    life.append(7, payloads(0, 6))
    life.write(7, payloads(0, 4))
    log.done(3)
    log.save_position()
    life.die()
    assert counts(world.pouring.pour()) == (1, 2, 4)
    assert world.adopt() == {QUEUE: payloads(3, 3)}


@pytest.mark.parametrize("what_goes", ["a segment", "all segments", "the log"])
def test_what_was_delivered_and_taken_out_of_the_log_before_it_left_the_ring_is_not_poured(
    world: World, what_goes: str
) -> None:
    """As when the disk hangs for the next queue's events, and the process is killed then."""
    life = world.life()
    log = life.open(7, QUEUE)
    life.append(7, payloads(0, 6))
    life.write(7, payloads(0, 4))
    log.done(4)
    log.begin_segment()
    life.write(7, payloads(4, 2))
    waiting = 1
    if what_goes != "a segment":
        waiting = 0
        log.done(6)
        log.begin_segment()
    if what_goes == "the log":
        life.directory.retire(life.logs[7])
        assert not log.directory.exists()
    else:
        log.done(5)
        log.save_position()
    life.die()
    assert count_unpoured(world.place, world.root) == {}
    assert counts(world.pouring.pour()) == (1, 0, 6)
    assert world.adopt() == ({QUEUE: payloads(5, 1)} if waiting else {})


@pytest.mark.parametrize("written", [5, 6])
def test_what_was_delivered_before_it_left_the_ring_is_not_poured_where_nothing_is_kept(
    world: World, written: int
) -> None:
    """With `--keep-delivered 0`: the writer goes on in a new segment, and the one before is delivered and gone."""
    life = world.life()
    life.directory = SpoolDirectory(world.root)
    log = life.open(7, QUEUE)
    life.append(7, payloads(0, 8))
    life.write(7, payloads(0, 4))
    log.done(4)
    log.begin_segment()
    life.write(7, payloads(4, written - 4))
    assert len(segments(log.directory)) == 1
    log.save_position()
    life.die()
    assert count_unpoured(world.place, world.root) == {QUEUE: 8 - written}
    assert counts(world.pouring.pour()) == (1, 8 - written, written)
    assert world.adopt() == {QUEUE: payloads(4, 4)}


@given(
    written=st.lists(st.sampled_from([b"a", b"b"]), max_size=8),
    appended=st.lists(st.sampled_from([b"a", b"b"]), max_size=8),
)
def test_the_longest_run_is_left_out(
    tmp_path_factory: pytest.TempPathFactory, written: list[bytes], appended: list[bytes]
) -> None:
    world = World(tmp_path_factory.mktemp("world"))
    life = world.life()
    life.open(7, QUEUE)
    life.write(7, written)
    life.append(7, appended)
    life.die()
    world.pouring.pour()
    lengths = range(min(len(written), len(appended)), -1, -1)
    known = next(length for length in lengths if written[len(written) - length :] == appended[:length])
    expected = written + appended[known:]
    assert world.adopt() == ({QUEUE: expected} if expected else {})
    world.heir.close()


def test_queues_do_not_mix(world: World) -> None:
    life = world.life()
    life.open(7, QUEUE)
    life.open(8, OTHER)
    for number in range(20):
        life.append(7 + number % 2, [payload(number)])
    life.die()
    assert counts(world.pouring.pour()) == (1, 20, 0)
    assert world.adopt() == {
        QUEUE: [payload(number) for number in range(0, 20, 2)],
        OTHER: [payload(number) for number in range(1, 20, 2)],
    }


def test_two_numbers_of_one_queue_stay_in_order(world: World) -> None:
    life = world.life()
    life.open(7, QUEUE)
    life.inbox.open_queue(9, QUEUE)
    for number in range(10):
        life.append(9 if number % 2 else 7, [payload(number)])
    life.die()
    world.pouring.pour()
    assert world.adopt() == {QUEUE: payloads(0, 10)}


def test_a_queue_that_had_no_log_yet_gets_one_in_a_part_named_after_the_ring(world: World) -> None:
    life = world.life()
    name = life.inbox.name
    life.inbox.open_queue(7, QUEUE)
    life.append(7, payloads(0, 5))
    life.die()
    assert counts(world.pouring.pour()) == (1, 5, 0)
    assert (world.root / f"proc-{name}" / QUEUE.key).is_dir()
    assert world.adopt() == {QUEUE: payloads(0, 5)}


def test_a_log_that_is_gone_is_made_anew(world: World) -> None:
    life = world.life()
    log = life.open(7, QUEUE)
    life.write(7, payloads(0, 5))
    life.append(7, payloads(5, 5))
    log.done(5)
    life.directory.retire(life.logs[7])
    life.die()
    assert counts(world.pouring.pour()) == (1, 5, 0)
    assert world.adopt() == {QUEUE: payloads(5, 5)}


@pytest.mark.parametrize("is_settled", [False, True])
def test_a_log_that_somebody_adopted_already_is_compared_and_not_touched(world: World, *, is_settled: bool) -> None:
    life = world.life()
    life.open(7, QUEUE)
    life.append(7, payloads(0, 8))
    life.write(7, payloads(0, 5))
    life.die()
    adopted = world.heir.adopt().logs[0]
    if is_settled:
        adopted.log.done(5)
        adopted.log.save_position()
    before = [path.read_bytes() for path in segments(adopted.directory)]
    assert counts(world.pouring.pour()) == (1, 3, 5)
    assert [path.read_bytes() for path in segments(adopted.directory)] == before
    assert world.adopt() == {QUEUE: payloads(5, 3)}


def test_what_was_poured_for_it_and_adopted_is_not_poured_again(world: World) -> None:
    life = world.life()
    life.inbox.open_queue(7, QUEUE)
    life.append(7, payloads(0, 8))
    life.die()
    ring = world.rings()[0]
    kept = ring.read_bytes()
    world.pouring.pour()
    world.adopt()
    # As after a death between the pouring and the removal, and an adoption by one who does not see the ring.
    world.place.path.mkdir(0o700)
    ring.write_bytes(kept)
    assert counts(world.pouring.pour()) == (1, 0, 8)
    assert world.adopt() == {}


def test_what_was_poured_by_one_who_died_before_the_end_is_not_adopted_before_another_one_ended_it(
    world: World,
) -> None:
    life = world.life()
    life.inbox.open_queue(7, QUEUE)
    life.append(7, payloads(0, 8))
    life.die()
    ring = world.rings()[0]
    kept = ring.read_bytes()
    world.pouring.pour()
    world.place.path.mkdir(0o700)
    ring.write_bytes(kept)
    assert world.adopt() == {}
    assert counts(world.pouring.pour()) == (1, 0, 8)
    assert world.adopt() == {QUEUE: payloads(0, 8)}


def test_no_log_is_adopted_while_its_ring_is_not_poured(world: World) -> None:
    life = world.life()
    life.open(7, QUEUE)
    life.write(7, payloads(0, 3))
    life.append(7, payloads(3, 3))
    life.die()
    assert world.adopt() == {}
    world.pouring.pour()
    assert world.adopt() == {QUEUE: payloads(0, 6)}


def test_an_owner_that_the_list_does_not_tell_any_more_costs_no_event(world: World) -> None:
    life = world.life()
    life.inbox.open_queue(7, QUEUE)
    life.append(7, payloads(0, 5))
    life.die()
    overwrite(world.rings()[0], HEADER_BYTES + RING + 12, b"#")
    assert counts(world.pouring.pour()) == (1, 5, 0)
    assert world.adopt() == {None: payloads(0, 5)}


def test_a_disk_that_fails_leaves_the_ring_and_lets_the_log_be_adopted(world: World) -> None:
    life = world.life()
    log = life.open(7, QUEUE)
    log.save_position()
    life.append(7, payloads(0, 8))
    life.write(7, payloads(0, 5))
    life.die()
    with failing_writes():
        poured = world.pouring.pour()
    assert [(one.path, "No space left" in one.reason) for one in poured.unpoured] == [(world.rings()[0], True)]
    adopted = world.heir.adopt(held_back=world.pouring.held_back).logs
    assert [event.payload for event in read_all(adopted[0].log)] == payloads(0, 5)
    # Delivered, and gone without a trace: the ring knows what was in it.
    adopted[0].log.done(5)
    world.heir.retire(adopted[0])
    assert counts(world.pouring.pour()) == (1, 3, 0)
    assert world.adopt() == {QUEUE: payloads(5, 3)}


def test_one_queue_whose_log_fails_does_not_keep_the_others(world: World) -> None:
    life = world.life()
    life.open(7, QUEUE)
    life.open(8, OTHER)
    life.append(7, payloads(0, 3))
    life.append(8, payloads(3, 3))
    life.die()
    (life.logs[7].directory / locks.LOCK).unlink()
    (life.logs[7].directory / locks.LOCK).mkdir()
    poured = world.pouring.pour()
    assert (poured.rings, poured.events, len(poured.unpoured)) == (0, 3, 1)
    (life.logs[7].directory / locks.LOCK).rmdir()
    assert counts(world.pouring.pour()) == (1, 3, 0)
    assert world.adopt() == {QUEUE: payloads(0, 3), OTHER: payloads(3, 3)}


def test_a_ring_of_another_version_is_left_untouched(world: World) -> None:
    life = world.life()
    life.inbox.open_queue(7, QUEUE)
    life.append(7, payloads(0, 3))
    life.die()
    ring = world.rings()[0]
    start = ring.read_bytes()[:8] + (9).to_bytes(4, "little")
    overwrite(ring, 0, start + crc32(start).to_bytes(4, "little"))
    before = ring.read_bytes()
    poured = world.pouring.pour()
    assert [(one.path, "version 9" in one.reason) for one in poured.unpoured] == [(ring, True)]
    assert ring.read_bytes() == before


@pytest.mark.parametrize("length", [0, 100, HEADER_BYTES])
def test_a_ring_without_a_good_header_is_kept_on_disk_for_people(world: World, length: int) -> None:
    world.life().die()
    ring = world.rings()[0]
    bad = b"#" * length
    ring.write_bytes(bad)
    poured = world.pouring.pour()
    kept = world.root / "damaged" / ring.name
    assert [(one.path, str(kept) in one.reason) for one in poured.unpoured] == [(ring, True)]
    assert kept.read_bytes() == bad
    assert world.rings() == []


def test_a_log_with_a_torn_end_is_mended_and_that_is_told(world: World) -> None:
    life = world.life()
    life.open(7, QUEUE)
    life.append(7, payloads(0, 6))
    life.write(7, payloads(0, 4))
    life.die()
    segment = segments(life.logs[7].directory)[0]
    segment.write_bytes(segment.read_bytes()[:-5])
    poured = world.pouring.pour()
    assert counts(poured) == (1, 3, 3)
    assert [damage.kind.value for damage in poured.damage] == ["torn"]
    assert world.adopt() == {QUEUE: payloads(0, 6)}


def test_a_place_that_cannot_be_used_is_told(world: World) -> None:
    world.place.path.mkdir()
    world.place.path.chmod(0o755)
    assert ["0755" in one.reason for one in world.pouring.pour().unpoured] == [True]
    assert world.adopt() == {}
