"""What the spool may keep: beyond its bytes and its age the oldest events are dropped, and counted."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kong_metering.spool.deadletters import DEAD_LETTERS, DeadLetters
from kong_metering.stats import Snapshot
from kong_metering.trial.outcome import Delivered, Outcome
from kong_metering.upkeep.retention import bytes_used, drop_beyond_age, drop_beyond_bytes
from tests.support.waiting import wait_until
from tests.unit.delivery.fakes import (
    DOWN,
    IDENTITY,
    Refusing,
    SteeredClock,
    down,
    letters,
    on_disk,
    take_all,
)

if TYPE_CHECKING:
    from tests.support.loglines import LogLines
    from tests.unit.delivery.conftest import ProcessMaker
    from tests.unit.delivery.fakes import Process, SpooledQueue

pytestmark = pytest.mark.slow
MIB = 1024 * 1024
NOW_MS = 1_800_000_000_000
OTHER = replace(IDENTITY, entity_id="22222222-other", name="other")


def large(count: int, first: int = 0) -> list[bytes]:
    return [b"%05d" % number + b"x" * 100_000 for number in range(first, first + count)]


def put_one_by_one(it: SpooledQueue, events: list[bytes]) -> None:
    for start in range(0, len(events), 10):
        it.put_on_disk(*events[start : start + 10])


def dropped_down_to(process: Process, max_bytes: int) -> int:
    """Wait until the spool is within its bound, and what went is counted; tell how many events those were."""
    wait_until(lambda: bytes_used(process.root) <= max_bytes, "the spool is within its bound")
    # The round in which they go is over when another one is.
    process.wait_for_a_round()
    return process.account().dropped["spool_bytes_full"]


@dataclass
class FakeLog:
    """A log with segments of one byte, each with one event, accepted at these times."""

    times: list[int]
    is_readable: bool = True
    is_stuck: bool = False
    dropped: list[int] = field(default_factory=list)

    def oldest_ms(self) -> int | None:
        if not self.is_readable:
            raise OSError
        return self.times[0] if self.times else None

    def bytes_on_disk(self) -> int:
        return len(self.times)

    def drop_segment(self) -> None:
        if not self.is_stuck and self.times:
            self.dropped.append(self.times.pop(0))

    def drop_older_than(self, time_ms: int) -> int:
        piece = [time for time in self.times if time < time_ms][:2]
        self.times = self.times[len(piece) :]
        return len(piece)


def test_the_oldest_segments_of_all_logs_go_first() -> None:
    logs = [FakeLog([3, 6, 9]), FakeLog([1, 2, 8]), FakeLog([])]
    drop_beyond_bytes(logs, 4)
    assert [log.times for log in logs] == [[9], [8], []]


@pytest.mark.parametrize("excess", [0, -5])
def test_nothing_goes_while_there_is_room(excess: int) -> None:
    log = FakeLog([1, 2])
    drop_beyond_bytes([log], excess)
    assert log.times == [1, 2]


def test_a_log_that_cannot_be_read_or_frees_nothing_does_not_keep_others_from_it() -> None:
    logs = [FakeLog([1, 2], is_stuck=True), FakeLog([5], is_readable=False), FakeLog([3, 4])]
    drop_beyond_bytes(logs, 100)
    assert [log.times for log in logs] == [[1, 2], [], []]


def test_only_what_is_older_than_the_age_is_dropped() -> None:
    logs = [
        FakeLog([*range(NOW_MS - 5, NOW_MS), NOW_MS, NOW_MS + 2]),
        FakeLog([NOW_MS - 5], is_readable=False),
        FakeLog([]),
    ]
    drop_beyond_age(logs, NOW_MS)
    assert [log.times for log in logs] == [[NOW_MS, NOW_MS + 2], [NOW_MS - 5], []]


def test_events_from_before_the_clock_was_ever_set_have_no_age() -> None:
    log = FakeLog([5_000, NOW_MS])
    drop_beyond_age([log], NOW_MS)
    assert log.times == [5_000, NOW_MS]


def test_beyond_its_bytes_the_oldest_events_are_dropped_and_counted(
    process: ProcessMaker, root: Path, log: LogLines
) -> None:
    it = process(max_bytes=10 * MIB).open(down())
    put_one_by_one(it, large(200))
    dropped = dropped_down_to(it.process, 10 * MIB)
    assert it.process.account().waiting == it.queue.waiting
    assert len(log.with_text("were dropped, the oldest: the spool is at --spool-max-bytes")) == 1
    # The first one is on its way, and lives on in memory.
    assert on_disk(root) == large(200)[dropped + 1 :]
    it.endpoint.decide = take_all
    assert it.process.settle() == Snapshot(accepted=200, delivered=200 - dropped, dropped={"spool_bytes_full": dropped})
    assert it.endpoint.delivered == [large(1)[0], *large(200)[dropped + 1 :]]


@pytest.mark.parametrize("is_delivered", [True, False])
def test_events_on_their_way_are_not_counted_twice_when_their_segment_goes(
    process: ProcessMaker, root: Path, *, is_delivered: bool
) -> None:
    it = process(max_bytes=5 * MIB).open(max_batch_size=20)
    it.endpoint.hold()
    put_one_by_one(it, large(100))
    it.endpoint.wait_for_request()
    sent = it.endpoint.requests[0]
    dropped = dropped_down_to(it.process, 5 * MIB)
    assert not set(sent) & set(on_disk(root))
    if is_delivered:
        it.endpoint.let_go()
        assert it.process.settle() == Snapshot(
            accepted=100, delivered=100 - dropped, dropped={"spool_bytes_full": dropped}
        )
        assert it.endpoint.delivered[: len(sent)] == sent
    else:
        # They are written once more, so that they are there for the next process.
        assert it.process.close() == Snapshot(accepted=100, left=100 - dropped, dropped={"spool_bytes_full": dropped})
        assert set(sent) < set(on_disk(root))
        it.endpoint.let_go()


def test_dead_letters_count_too(process: ProcessMaker, root: Path) -> None:
    it = process(max_bytes=8 * MIB).open(max_batch_size=1)
    # One letter goes for the other until a quarter of the room is left to them. Without others that get through nobody
    # would know whose fault it is.
    it.endpoint.decide = Refusing(*large(60))
    put_one_by_one(it, [event for bad in large(60) for event in (bad, b"good")])
    while set(on_disk(root)) & set(large(60)):
        it.put_on_disk(b"witness")
    account = it.process.settle()
    assert account.dead_letters == {"rejected": 60}
    assert account.delivered == account.accepted - 60
    assert account.dead_letters_dropped == 60 - len(letters(root)) == DeadLetters(root / DEAD_LETTERS).dropped_ever > 0
    assert 1 * MIB < bytes_used(root) < 4 * MIB


def test_what_is_too_old_is_dropped_and_nothing_else(
    process: ProcessMaker, steered: SteeredClock, log: LogLines
) -> None:
    it = process(max_age=3600.0).open(down(), max_batch_size=5)
    it.put_on_disk(*[b"old %d" % number for number in range(100)])
    it.endpoint.wait_for_request()
    steered.advance(3000)
    it.put_on_disk(*[b"new %d" % number for number in range(100)])
    steered.advance(700)
    wait_until(lambda: it.process.account().dropped == {"spool_age_exceeded": 95}, "the old ones are dropped")
    assert len(log.with_text("they are older than --spool-max-age")) == 1
    it.endpoint.decide = take_all
    assert it.process.settle().delivered == 105
    assert it.endpoint.delivered[5:] == [b"new %d" % number for number in range(100)]


@pytest.mark.parametrize("options", [{"max_bytes": 10 * MIB}, {"max_age": 3600.0}])
def test_events_whose_queue_is_not_open_are_bounded_as_well(
    process: ProcessMaker, root: Path, steered: SteeredClock, log: LogLines, options: dict[str, float]
) -> None:
    it = process().open(down(), OTHER)
    put_one_by_one(it, large(200))
    it.process.close()
    steered.advance(3700)
    looking = process(**options)
    own = looking.open()
    own.endpoint.hold()
    own.put_on_disk(*large(5, first=1000))
    looking.look_at_free_logs()
    wait_until(lambda: looking.account().dropped, "they are dropped")
    if "max_bytes" in options:
        dropped = dropped_down_to(looking, 10 * MIB)
    else:
        wait_until(lambda: looking.account().dropped == {"spool_age_exceeded": 200}, "all of them")
        dropped = 200
    own.endpoint.let_go()
    assert looking.settle().adopted == dropped
    assert looking.account().delivered == 5
    assert on_disk(root) == large(200)[dropped:]
    assert log.with_text("queue other for https://ingest.test/events: ")


def test_what_waits_for_an_instance_is_said_once_an_hour(
    process: ProcessMaker, root: Path, steered: SteeredClock, log: LogLines
) -> None:
    it = process().open(down(), OTHER)
    it.put_on_disk(b"1", b"2", b"3")
    it.process.close()
    looking = process()
    for _ in range(3):
        steered.advance(61)
        looking.wait_for_a_round()
    said = "3 events wait on disk until an instance of the plugin starts"
    assert len(log.with_text(said)) == 1
    assert looking.spooler.waiting_for_instances() == {"other for https://ingest.test/events": 3}
    steered.advance(3600)
    looking.wait_for_a_round()
    wait_until(lambda: len(log.with_text(said)) == 2, "it is said again")
    assert on_disk(root) == [b"1", b"2", b"3"]
    right = looking.open(identity=OTHER)
    assert looking.settle(adopted=3) == Snapshot(adopted=3, delivered=3)
    assert right.endpoint.delivered == [b"1", b"2", b"3"]
    looking.look_at_free_logs()
    assert looking.spooler.waiting_for_instances() == {}


def test_bounds_are_kept_while_the_queue_delivers(process: ProcessMaker, root: Path) -> None:
    it = process(max_bytes=6 * MIB).open(max_batch_size=3, initial_retry_delay=0.001)
    answers: Iterator[Outcome] = itertools.cycle([DOWN, Delivered(), Delivered()])
    it.endpoint.decide = lambda _: next(answers)
    put_one_by_one(it, large(300))
    account = it.process.settle()
    assert account.delivered + sum(account.dropped.values()) == 300
    assert it.endpoint.delivered == sorted(set(it.endpoint.delivered))
    assert on_disk(root) == []


def test_what_was_delivered_goes_before_what_waits(process: ProcessMaker, root: Path) -> None:
    it = process(max_bytes=10 * MIB, keep_delivered=3600.0).open(max_batch_size=10)
    put_one_by_one(it, large(84))
    it.process.settle()
    wait_until(lambda: delivered_bytes(root) > 4 * MIB, "a segment is kept")
    it.endpoint.decide = lambda _: DOWN
    put_one_by_one(it, large(80, 84))
    wait_until(lambda: bytes_used(root) <= 10 * MIB, "the spool is within its bound")
    it.process.wait_for_a_round()
    assert it.process.account().dropped == {}
    assert it.queue.waiting == 80


def test_what_was_delivered_goes_when_it_is_old(process: ProcessMaker, root: Path) -> None:
    it = process(keep_delivered=3600.0).open(max_batch_size=10)
    put_one_by_one(it, large(84))
    it.process.settle()
    wait_until(lambda: delivered_bytes(root) > 4 * MIB, "a segment is kept")
    it.process.clock.advance(3601)
    it.process.spooler._bounds._bounds_at = 0.0
    wait_until(lambda: delivered_bytes(root) == 0, "nothing is kept any more")


def delivered_bytes(root: Path) -> int:
    return sum(path.stat().st_size for path in root.glob("delivered/*/*.seg"))
