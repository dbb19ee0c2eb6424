"""An inbox takes events at once, gives them in order, and outlives its process."""

from __future__ import annotations

import errno
import itertools
import mmap
import os
import shutil
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kong_metering.errors import InboxError
from kong_metering.inbox.inbox import Inbox
from kong_metering.inbox.place import Place, RingFile
from kong_metering.inbox.queues import decode_list
from kong_metering.inbox.ring import HEADER_BYTES, Ring
from tests.unit.inbox.helpers import OTHER, QUEUE, unread

if TYPE_CHECKING:
    from tests.support.loglines import LogLines

RING = 4096
OVERFLOW = 10_000
# As the key of a log.
KEY = "0" * 32


def no_wake() -> None:
    """Nobody sleeps."""


@pytest.fixture
def place(tmp_path: Path) -> Place:
    root, shared = tmp_path / "spool", tmp_path / "shm"
    root.mkdir()
    shared.mkdir()
    return Place(shared, root)


def opened(place: Place) -> Inbox:
    return Inbox.open(place, no_wake, ring_bytes=RING, overflow_bytes=OVERFLOW)


class MemoryRings:
    """Rings in memory files that nobody finds."""

    def create(self, capacity: int = RING) -> tuple[RingFile, Ring]:
        descriptor = os.memfd_create("ring")
        os.ftruncate(descriptor, HEADER_BYTES + capacity)
        memory = mmap.mmap(descriptor, HEADER_BYTES + capacity)
        return RingFile(Path("memory"), "1-ab", descriptor, lambda: None), Ring(memory)

    def orphans(self) -> Iterator[RingFile]:
        raise NotImplementedError

    def lists(self) -> Iterator[tuple[str, bytes]]:
        raise NotImplementedError


def file_of(place: Place, inbox: Inbox) -> Path:
    return place.path / f"{inbox.name}.ring"


def take(inbox: Inbox, limit: int) -> list[tuple[int, bytes]]:
    drained = inbox.drain(limit)
    inbox.advance(drained)
    return drained.events


def test_what_was_appended_is_in_the_file_until_it_is_advanced_past(place: Place) -> None:
    inbox = opened(place)
    assert inbox.append(7, b"one")
    assert inbox.append(8, b"two")
    assert unread(file_of(place, inbox).read_bytes()) == [(7, b"one"), (8, b"two")]
    inbox.advance(inbox.drain(1))
    assert unread(file_of(place, inbox).read_bytes()) == [(8, b"two")]
    assert inbox.waiting == 1


def test_behind_the_ring_it_tells_whose_the_events_are_and_where_their_logs(place: Place) -> None:
    inbox = opened(place)
    inbox.open_queue(7, QUEUE)
    inbox.open_queue(8, OTHER)
    inbox.log_opened(7, Path("/spool/proc-1-ab") / KEY)
    for _ in range(3):
        inbox.open_queue(7, QUEUE)
        inbox.log_opened(7, Path("/spool/proc-1-ab") / KEY)
    listed = file_of(place, inbox).read_bytes()[HEADER_BYTES + RING :]
    assert listed.count(b"queue") == 3
    queues = decode_list(listed).queues
    assert (queues[7].identity, queues[7].directory) == (QUEUE, f"proc-1-ab/{KEY}")
    assert (queues[8].identity, queues[8].directory) == (OTHER, None)


def test_a_full_ring_overflows_into_memory_in_order_and_refuses_beyond_that(place: Place) -> None:
    inbox = opened(place)
    taken = list(itertools.takewhile(lambda number: inbox.append(number, b"x" * 100), itertools.count()))
    in_ring = RING // 128
    assert len(taken) == in_ring + OVERFLOW // 100
    # Room in the ring is not used before what is behind it has left.
    assert [number for number, _ in take(inbox, in_ring)] == taken[:in_ring]
    assert not inbox.append(0, b"x" * 100)
    assert inbox.waiting == OVERFLOW // 100
    assert [number for number, _ in take(inbox, 1000)] == taken[in_ring:]
    assert inbox.append(1, b"x" * 100)
    assert len(unread(file_of(place, inbox).read_bytes())) == 1


def test_an_event_too_large_for_the_ring_goes_behind_it(place: Place) -> None:
    inbox = opened(place)
    events = [(1, b"small"), (1, b"L" * 5000), (1, b"small too")]
    assert all(inbox.append(number, event) for number, event in events)
    assert not inbox.append(1, b"L" * 5000)
    assert take(inbox, 10) == events


@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("append"), st.integers(0, 900)),
            st.tuples(st.just("drain"), st.integers(1, 9)),
            st.tuples(st.just("advance"), st.integers(1, 9)),
            st.tuples(st.just("move"), st.just(0)),
        ),
        max_size=60,
    )
)
def test_it_is_a_queue_whatever_the_ring_has_room_for_and_wherever_it_moves(steps: list[tuple[str, int]]) -> None:
    inbox = Inbox.in_memory(no_wake, ring_bytes=2048, overflow_bytes=4000)
    model = deque[tuple[int, bytes]]()
    for number, (step, size) in enumerate(steps):
        if step == "move":
            inbox.move(MemoryRings(), survives_supervisor=False)
        elif step == "append":
            if inbox.append(number, bytes(size)):
                model.append((number, bytes(size)))
            else:
                assert sum(len(event) for _, event in model) + size > 4000
        else:
            drained = inbox.drain(size)
            assert drained.events == list(model)[:size]
            if step == "advance":
                inbox.advance(drained)
                for _ in drained.events:
                    model.popleft()
        assert inbox.waiting == len(model)


@pytest.mark.parametrize("moves", [False, True])
def test_producers_and_the_consumer_run_at_once_and_no_wake_up_is_lost(*, moves: bool) -> None:
    bell = threading.Semaphore(0)
    inbox = Inbox.in_memory(bell.release, ring_bytes=4096, overflow_bytes=1 << 30)
    each, producers = 5000, 3

    def append_all(queue: int) -> None:
        for number in range(each):
            assert inbox.append(queue, b"%d" % number)

    threads = [threading.Thread(target=append_all, args=(queue,)) for queue in range(producers)]
    has_ended = threading.Event()

    def move_around() -> None:
        while moves and not has_ended.is_set():
            inbox.move(MemoryRings(), survives_supervisor=False)

    mover = threading.Thread(target=move_around)
    for thread in (*threads, mover):
        thread.start()
    taken: list[tuple[int, bytes]] = []
    while len(taken) < each * producers:
        # A wake-up that is lost would have it sleep for good.
        if inbox.may_sleep():
            assert bell.acquire(timeout=20)
        taken += take(inbox, 50)
    has_ended.set()
    for thread in (*threads, mover):
        thread.join()
    for queue in range(producers):
        assert [event for one, event in taken if one == queue] == [b"%d" % number for number in range(each)]


def test_it_wakes_a_consumer_that_sleeps_and_no_other() -> None:
    rings: list[str] = []
    inbox = Inbox.in_memory(lambda: rings.append("ring"))
    inbox.append(1, b"a")
    assert not inbox.may_sleep()
    inbox.append(1, b"b")
    take(inbox, 9)
    assert rings == []
    assert inbox.may_sleep()
    inbox.append(1, b"c")
    inbox.append(1, b"d")
    assert rings == ["ring"]


def test_closing_removes_an_empty_one_and_leaves_one_with_events(place: Place) -> None:
    empty, other = opened(place), opened(place)
    other.append(1, b"left")
    left = file_of(place, other)
    empty.close()
    other.close()
    assert list(place.path.iterdir()) == [left]
    assert unread(left.read_bytes()) == [(1, b"left")]
    assert not empty.append(1, b"x")
    assert not other.append(1, b"x")


def test_closing_removes_it_though_the_spool_was_removed_and_made_anew(tmp_path: Path, place: Place) -> None:
    inbox = opened(place)
    (tmp_path / "spool").rename(tmp_path / "other")
    (tmp_path / "spool").mkdir()
    inbox.close()
    assert list((tmp_path / "shm").iterdir()) == []


def test_what_is_in_it_moves_with_its_owners_and_nothing_is_left_behind(tmp_path: Path, place: Place) -> None:
    inbox = opened(place)
    inbox.open_queue(7, QUEUE)
    # Round the end of the ring.
    while inbox.append(7, b"x" * 900) and inbox.waiting < 4:
        pass
    take(inbox, 3)
    assert inbox.append(7, b"y" * 900)
    left, drained = file_of(place, inbox), inbox.drain(1)
    (tmp_path / "new").mkdir()
    other = Place(tmp_path / "shm", tmp_path / "new")
    inbox.move(other, survives_supervisor=True)
    assert inbox.is_held_by(other)
    assert not inbox.is_held_by(place)
    assert not left.parent.exists()
    data = file_of(other, inbox).read_bytes()
    assert unread(data) == [(7, b"x" * 900), (7, b"y" * 900)]
    assert decode_list(data[HEADER_BYTES + RING :]).queues[7].identity == QUEUE
    # What was drained before is taken out of where it is now.
    inbox.advance(drained)
    assert unread(file_of(other, inbox).read_bytes()) == [(7, b"y" * 900)]
    inbox.open_queue(8, OTHER)
    assert decode_list(file_of(other, inbox).read_bytes()[HEADER_BYTES + RING :]).queues[8].identity == OTHER
    # Nobody takes it for a dead process's.
    assert list(other.orphans()) == []
    take(inbox, 9)
    inbox.close()
    assert list((tmp_path / "shm").iterdir()) == []


def test_where_it_cannot_move_it_stays(tmp_path: Path, place: Place) -> None:
    inbox = opened(place)
    inbox.append(7, b"one")
    with pytest.raises(InboxError, match="No such file or directory"):
        inbox.move(Place(tmp_path / "none", tmp_path), survives_supervisor=True)
    inbox.open_queue(7, QUEUE)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with mock.patch.object(RingFile, "add_line", side_effect=full), pytest.raises(InboxError, match="No space left"):
        inbox.move(place, survives_supervisor=True)
    assert inbox.is_held_by(place)
    assert list(place.path.iterdir()) == [file_of(place, inbox)]
    assert unread(file_of(place, inbox).read_bytes()) == [(7, b"one")]


def test_what_has_moved_is_not_found_a_second_time_where_the_old_file_could_not_be_removed(place: Place) -> None:
    """Nor where the process is killed before it removes that."""
    inbox = opened(place)
    inbox.append(7, b"one")
    old = file_of(place, inbox)
    with mock.patch.object(os, "unlink", side_effect=OSError(errno.EMFILE, os.strerror(errno.EMFILE))):
        inbox.move(place, survives_supervisor=True)
    assert unread(old.read_bytes()) == []
    assert unread(file_of(place, inbox).read_bytes()) == [(7, b"one")]


def test_who_comes_late_to_the_end_moves_nothing(tmp_path: Path, place: Place) -> None:
    inbox = opened(place)
    inbox.close()
    with pytest.raises(InboxError, match="the process ends"):
        inbox.move(place, survives_supervisor=True)
    assert list((tmp_path / "shm").iterdir()) == []


def test_the_end_says_nothing_of_a_file_whose_directory_somebody_has_just_removed(place: Place, log: LogLines) -> None:
    inbox = opened(place)
    shutil.rmtree(place.path)
    inbox.close()
    assert log.lines == []


def test_a_place_without_a_ring_that_somebody_removed_does_not_hold_it(place: Place) -> None:
    inbox = opened(place)
    assert inbox.is_held_by(place)
    file_of(place, inbox).rename(place.path / "1-ab.ring")
    file_of(place, inbox).touch()
    assert not inbox.is_held_by(place)


def test_without_a_place_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(InboxError, match="cannot be used: No such file or directory"):
        opened(Place(tmp_path / "none", tmp_path))


def test_one_in_memory_ends_with_the_process(tmp_path: Path) -> None:
    inbox = Inbox.in_memory(no_wake, ring_bytes=RING, overflow_bytes=OVERFLOW)
    inbox.open_queue(1, QUEUE)
    inbox.log_opened(1, tmp_path / "proc-1-ab" / KEY)
    assert inbox.append(1, b"x")
    assert inbox.lost_with_process(1, 1) == 1
    assert take(inbox, 9) == [(1, b"x")]
    inbox.close()
    assert (inbox.name, inbox.survives_supervisor) == (None, False)
