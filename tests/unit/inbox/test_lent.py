"""Rings in the supervisor's memory: as those in shared memory, for the one server that it is lent to."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from kong_metering.app import rings_in
from kong_metering.errors import InboxError
from kong_metering.host.keeping import Keeping
from kong_metering.inbox.inbox import Inbox
from kong_metering.inbox.lent import LentRings
from kong_metering.inbox.pouring import Pouring
from kong_metering.inbox.ring import HEADER_BYTES
from kong_metering.memoryfile import Use
from kong_metering.spool.directory import SpoolDirectory
from tests.unit.inbox.helpers import QUEUE, unread

RING = 4096


@pytest.fixture
def keeping() -> Iterator[Keeping]:
    keeping = Keeping()
    yield keeping
    keeping.close()


def no_wake() -> None:
    """Nobody sleeps."""


def lent_to(process: int, keeping: Keeping) -> LentRings:
    lent = keeping.lend()
    keeping.lent_to(process, lent)
    return rings_in(lent)


def opened(rings: LentRings) -> Inbox:
    return Inbox.open(rings, no_wake, survives_supervisor=False, ring_bytes=RING)


def die_with(keeping: Keeping, process: int, *events: bytes) -> None:
    """Have a process put events of a queue without a log yet, and be killed."""
    inbox = opened(lent_to(process, keeping))
    inbox.open_queue(7, QUEUE)
    for event in events:
        assert inbox.append(7, event)
    keeping.reclaim(process)


def events_in(root: Path) -> list[bytes]:
    spool = SpoolDirectory(root)
    logs = spool.adopt().logs
    found = [each.payload for held in logs for each in held.log.read(0, 1000, 1 << 20)]
    spool.close()
    return found


def test_what_was_appended_is_left_for_the_next_process_and_poured_once(keeping: Keeping, tmp_path: Path) -> None:
    die_with(keeping, 1, b"one", b"two")
    rings = lent_to(2, keeping)
    (left,) = rings.orphans()
    assert unread(_contents(rings)) == [(7, b"one"), (7, b"two")]
    pouring = Pouring([rings], tmp_path, lambda: 1)
    poured = pouring.pour()
    assert (poured.rings, poured.events, poured.unpoured) == (1, 2, [])
    assert events_in(tmp_path) == [b"one", b"two"]
    assert pouring.pour().rings == 0
    assert left.stem in next(tmp_path.glob("proc-*")).name
    keeping.reclaim(2)
    assert keeping.lend().left == ()


def _contents(rings: LentRings) -> bytes:
    for ring in rings.orphans():
        return ring.read()
    return b""


@pytest.mark.parametrize("state", ["no event", "no header", "no ring"])
def test_what_holds_no_event_is_returned_before_the_disk_is_needed(
    keeping: Keeping, tmp_path: Path, state: str
) -> None:
    lent = keeping.lend()
    memory = lent.empty_for(Use.EVENTS)
    assert memory is not None
    keeping.lent_to(1, lent)
    if state == "no event":
        inbox = opened(rings_in(lent))
        inbox.open_queue(7, QUEUE)
        inbox.append(7, b"written")
        inbox.advance(inbox.drain(1))
    elif state == "no header":  # it was killed as soon as the space was taken
        os.ftruncate(memory.descriptor, HEADER_BYTES + RING)
    else:  # a line for its list came after it was closed
        os.write(memory.descriptor, b"a line of the list\n")
    keeping.reclaim(1)
    rings = lent_to(2, keeping)
    assert os.fstat(memory.descriptor).st_size == 0
    poured = Pouring([rings], tmp_path, lambda: 1).pour()
    assert (poured.rings, poured.unpoured, list(tmp_path.iterdir())) == (0, [], [])


def test_who_is_killed_before_all_is_poured_leaves_it_to_the_next_one(keeping: Keeping, tmp_path: Path) -> None:
    die_with(keeping, 1, b"one")
    die_with(keeping, 2, b"two")
    rings = lent_to(3, keeping)
    assert Pouring([rings], tmp_path, lambda: 1).pour().events == 2
    assert sorted(events_in(tmp_path)) == [b"one", b"two"]


def test_what_cannot_be_poured_stays(keeping: Keeping, tmp_path: Path) -> None:
    die_with(keeping, 1, b"one")
    rings = lent_to(2, keeping)
    (tmp_path / "spool").write_bytes(b"no directory")
    (unpoured,) = Pouring([rings], tmp_path / "spool", lambda: 1).pour().unpoured
    assert "memory of the supervisor" in str(unpoured.path)
    keeping.reclaim(2)
    assert len(keeping.lend().left) == 1


def test_its_own_and_what_is_left_hold_logs_back(keeping: Keeping, tmp_path: Path) -> None:
    for process in (1, 2):
        rings = lent_to(process, keeping)
        inbox = opened(rings)
        inbox.open_queue(7, QUEUE)
        inbox.log_opened(7, tmp_path / f"proc-{process}" / QUEUE.key)
        inbox.append(7, b"x")
        if process == 1:
            keeping.reclaim(process)
    held_back = Pouring([rings], tmp_path, lambda: 1).held_back()
    assert tmp_path / "proc-1" / QUEUE.key in held_back
    assert tmp_path / "proc-2" / QUEUE.key in held_back
    assert tmp_path / "proc-3" / QUEUE.key not in held_back


def test_closing_gives_an_empty_one_back_and_leaves_one_with_events(keeping: Keeping, tmp_path: Path) -> None:
    for process, events in ((1, 0), (2, 1)):
        inbox = opened(lent_to(process, keeping))
        inbox.open_queue(7, QUEUE)
        for _ in range(events):
            inbox.append(7, b"x")
        inbox.close()
        keeping.reclaim(process)
    rings = lent_to(3, keeping)
    assert [unread(ring.read()) for ring in rings.orphans()] == [[(7, b"x")]]
    assert Pouring([rings], tmp_path, lambda: 1).pour().events == 1


def test_no_descriptor_is_left_open(keeping: Keeping, tmp_path: Path) -> None:
    die_with(keeping, 1, b"one")
    rings = lent_to(2, keeping)
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - a count
    inbox = opened(rings)
    Pouring([rings], tmp_path, lambda: 1).pour()
    inbox.close()
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_without_a_descriptor_it_is_said_and_nothing_is_left_in_it(
    keeping: Keeping, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(_: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    die_with(keeping, 1, b"one")
    rings = lent_to(2, keeping)
    with monkeypatch.context() as patch:
        patch.setattr(os, "dup", refuse)
        with pytest.raises(InboxError, match=r"^the supervisor's memory cannot be used: Too many open files$"):
            rings.create(RING)
        (unpoured,) = Pouring([rings], tmp_path, lambda: 1).pour().unpoured
        assert "Too many open files" in unpoured.reason
    assert Pouring([rings], tmp_path, lambda: 1).pour().events == 1
    keeping.reclaim(2)
    assert keeping.lend().left == ()


def test_without_a_memory_that_is_said() -> None:
    with pytest.raises(InboxError, match=r"^the supervisor got no memory from the system$"):
        LentRings(None, []).create(RING)


def test_a_memory_without_its_space_is_given_back(keeping: Keeping, monkeypatch: pytest.MonkeyPatch) -> None:
    def take_a_part(descriptor: int, offset: int, length: int) -> None:
        os.ftruncate(descriptor, offset + length // 2)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", take_a_part)
    rings = lent_to(1, keeping)
    with pytest.raises(InboxError, match=r"^the supervisor's memory cannot be used: No space left on device$"):
        rings.create(RING)
    keeping.reclaim(1)
    assert keeping.lend().left == ()


def test_the_space_is_taken_at_once(keeping: Keeping) -> None:
    lent = keeping.lend()
    opened(rings_in(lent))
    memory = lent.empty_for(Use.EVENTS)
    assert memory is not None
    assert os.fstat(memory.descriptor).st_blocks * 512 >= HEADER_BYTES + RING
