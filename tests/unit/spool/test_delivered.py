"""What was delivered stays for a while: moved when it is settled, and removed by age and by the spool's bound."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

from kong_metering.eventlog import files
from kong_metering.eventlog.log import EventLog
from kong_metering.spool.delivered import (
    DELIVERED,
    Delivered,
    mark_checked,
    read_segment,
    undelivered_of,
    verifying,
)
from kong_metering.spool.directory import HeldLog, SpoolDirectory
from kong_metering.spool.identity import FILES, QueueIdentity
from kong_metering.upkeep.retention import bytes_used, forget_delivered
from tests.unit.eventlog.helpers import NOW, overwrite, payload, payloads, segments

QUEUE = QueueIdentity("7b5c", "metering", "https://ingest.example/events")
OTHER = QueueIdentity("7b5c", "metering", "https://elsewhere.example/events")
LARGE = 100_000


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "spool"


@pytest.fixture
def delivered(root: Path) -> Delivered:
    """Give what is kept, by a clock that goes on by one each time it is looked at."""
    times = count(NOW)
    return Delivered(root, lambda: next(times))


@pytest.fixture
def spool(root: Path, delivered: Delivered) -> Iterator[SpoolDirectory]:
    spool = SpoolDirectory(root, delivered=delivered)
    yield spool
    spool.close()


def kept(delivered: Delivered) -> list[bytes]:
    return [event.payload for segment in delivered.segments() for event in segment.events()]


def undelivered(delivered: Delivered) -> list[bytes]:
    return [
        event.payload
        for segment in delivered.segments()
        for event in segment.events()
        if event in segment.undelivered()
    ]


def settled(spool: SpoolDirectory, count: int, identity: QueueIdentity = QUEUE) -> HeldLog:
    """Give a log of ours in which so many events are done."""
    held = spool.log_for(identity)
    held.log.append(payloads(1, count), NOW)
    held.log.done(count)
    return held


def segment_after_segment(held: HeldLog, count: int) -> None:
    """Settle events of which 41 fill a segment."""
    for number in range(count):
        held.log.append([b"%d" % number + b"x" * LARGE], NOW + number)
        held.log.done(number + 1)


def test_a_settled_segment_is_moved_with_its_name_its_time_and_whose_it_is(
    spool: SpoolDirectory, delivered: Delivered
) -> None:
    held = spool.log_for(QUEUE)
    segment_after_segment(held, 50)
    (segment,) = delivered.segments()
    assert (segment.kept_ms, segment.first, segment.is_checked) == (NOW, 1, False)
    assert (segment.part, segment.log) == (held.directory.parent.name, held.directory.name)
    assert [event.sequence for event in segment.events()] == list(range(1, 42))
    assert [queue.identity for queue in delivered.queues()] == [QUEUE]
    assert len(segments(held.directory)) == 1


def test_the_last_segment_is_kept_when_its_log_is_retired(spool: SpoolDirectory, delivered: Delivered) -> None:
    held = settled(spool, 7)
    assert delivered.segments() == []
    spool.retire(held)
    assert kept(delivered) == payloads(1, 7)
    assert not held.directory.exists()


def test_what_waits_is_not_kept(spool: SpoolDirectory, delivered: Delivered) -> None:
    held = spool.log_for(QUEUE)
    held.log.append(payloads(1, 7), NOW)
    held.log.done(6)
    spool.retire(held)
    assert delivered.segments() == []
    assert [event.payload for event in EventLog.view(held.directory).read(0, 10, 1 << 20)] == [payload(7)]


def test_a_segment_begins_when_it_is_asked_for_so_that_few_events_can_be_read_back(
    spool: SpoolDirectory, delivered: Delivered
) -> None:
    held = settled(spool, 3)
    held.log.begin_segment()
    assert kept(delivered) == payloads(1, 3)
    held.log.append(payloads(4, 2), NOW)
    held.log.begin_segment()
    assert len(segments(held.directory)) == 1
    assert [event.payload for event in held.log.read(0, 10, 1 << 20)] == payloads(4, 2)


def test_what_was_dropped_is_not_kept(spool: SpoolDirectory, delivered: Delivered) -> None:
    held = spool.log_for(QUEUE)
    held.log.append(payloads(1, 7), NOW)
    assert held.log.drop_oldest_segment() == 7
    held.log.append(payloads(8, 2), NOW)
    held.log.done(9)
    spool.retire(held)
    assert kept(delivered) == payloads(8, 2)


def test_what_was_settled_without_being_delivered_is_known_in_the_log_and_when_it_is_kept(
    spool: SpoolDirectory, delivered: Delivered
) -> None:
    held = spool.log_for(QUEUE)
    held.log.append(payloads(1, 7), NOW)
    held.log.note_undelivered([(2, payload(2)), (5, payload(5))])
    held.log.done(7)
    noted = undelivered_of(held.directory, 1)
    assert [event.sequence for event in read_segment(segments(held.directory)[0], 1) if event in noted] == [2, 5]
    assert delivered.queues() == []
    spool.retire(held)
    assert undelivered(delivered) == [payload(2), payload(5)]
    assert kept(delivered) == payloads(1, 7)


def test_a_log_that_has_the_name_of_one_before_it_has_none_of_its_notes(
    spool: SpoolDirectory, delivered: Delivered
) -> None:
    for start in (1, 101):
        held = spool.log_for(QUEUE)
        held.log.append(payloads(start, 3), NOW)
        if start == 1:
            held.log.note_undelivered([(1, payload(1))])
        held.log.done(3)
        spool.retire(held)
    assert {segment.log for segment in delivered.segments()} == {QUEUE.key}
    assert undelivered(delivered) == [payload(1)]


def test_a_note_that_a_crash_has_cut_short_costs_none_of_the_others(
    spool: SpoolDirectory, delivered: Delivered
) -> None:
    held = spool.log_for(QUEUE)
    held.log.append(payloads(1, 7), NOW)
    held.log.note_undelivered([(2, payload(2))])
    (notes,) = delivered.directory.glob("*/*.undelivered")
    notes.write_bytes(notes.read_bytes() + b"torn")
    assert len(notes.read_bytes()) == 20
    held.log.note_undelivered([(5, payload(5))])
    held.log.done(7)
    spool.retire(held)
    assert undelivered(delivered) == [payload(2), payload(5)]


def test_notes_go_with_their_segment_and_stay_with_one_that_is_in_its_log(
    spool: SpoolDirectory, delivered: Delivered
) -> None:
    held = spool.log_for(QUEUE)
    held.log.append(payloads(1, 3), NOW)
    held.log.note_undelivered([(2, payload(2))])
    held.log.done(3)
    held.log.begin_segment()
    held.log.append(payloads(4, 2), NOW)
    held.log.note_undelivered([(4, payload(4))])
    delivered.remove(delivered.segments())
    (notes,) = delivered.directory.glob("*/*.undelivered")
    assert delivered.queues() == []
    held.log.done(5)
    spool.retire(held)
    assert undelivered(delivered) == [payload(4)]
    assert [queue.identity for queue in delivered.queues()] == [QUEUE]
    delivered.remove(delivered.segments())
    assert list(delivered.directory.iterdir()) == []
    assert not notes.exists()


def test_where_nothing_can_be_noted_all_of_a_segment_counts_as_delivered(root: Path, spool: SpoolDirectory) -> None:
    held = spool.log_for(QUEUE)
    held.log.append(payloads(1, 3), NOW)
    (root / DELIVERED).write_bytes(b"somebody else's")
    held.log.note_undelivered([(2, payload(2))])
    noted = undelivered_of(held.directory, 1)
    assert [event for event in held.log.read(0, 10, 1 << 20) if event in noted] == []


def test_what_a_dead_process_had_delivered_is_kept_by_the_next_one(root: Path, delivered: Delivered) -> None:
    dead = SpoolDirectory(root)
    held = dead.log_for(QUEUE)
    held.log.append(payloads(1, 5), NOW)
    held.log.save_position()
    dead.close()
    spool = SpoolDirectory(root, delivered=delivered)
    (held,) = spool.adopt().logs
    held.log.done(5)
    spool.retire(held)
    spool.close()
    assert kept(delivered) == payloads(1, 5)


def test_of_a_log_that_became_another_queues_nothing_is_kept(spool: SpoolDirectory, delivered: Delivered) -> None:
    """What it had delivered before went to another endpoint, which would be missing at the new one."""
    held = spool.log_for(OTHER)
    held.log.append(payloads(1, 5), NOW)
    held = spool.reassign(held, QUEUE)
    held.log.done(5)
    spool.retire(held)
    assert delivered.queues() == []


def test_where_nothing_can_be_kept_the_segment_is_removed_as_before(root: Path, spool: SpoolDirectory) -> None:
    files.make_directory(root)
    (root / DELIVERED).write_bytes(b"somebody else's")
    held = settled(spool, 7)
    spool.retire(held)
    assert not held.directory.exists()


def test_damage_in_a_kept_segment_costs_what_is_damaged(spool: SpoolDirectory, delivered: Delivered) -> None:
    spool.retire(settled(spool, 7))
    (segment,) = delivered.segments()
    at = segment.path.read_bytes().index(payload(3))
    overwrite(segment.path, at + 5, b"\xff\x00\xff")
    assert kept(delivered) == payloads(1, 2) + payloads(4, 4)


def test_what_was_read_back_is_known_as_such(spool: SpoolDirectory, delivered: Delivered) -> None:
    spool.retire(settled(spool, 7))
    (segment,) = delivered.segments()
    mark_checked(segment)
    mark_checked(segment)
    (checked,) = delivered.segments()
    assert checked.is_checked
    assert kept(delivered) == payloads(1, 7)


def test_one_at_a_time_verifies_a_queue(spool: SpoolDirectory, delivered: Delivered) -> None:
    spool.retire(settled(spool, 7))
    (queue,) = delivered.queues()
    with verifying(queue.directory) as mine, verifying(queue.directory) as theirs:
        assert (mine, theirs) == (True, False)
    with verifying(queue.directory) as mine:
        assert mine


def test_the_oldest_go_by_age_and_by_bytes_and_take_their_directory_along(
    root: Path, spool: SpoolDirectory, delivered: Delivered
) -> None:
    for queue in (QUEUE, OTHER, QUEUE):
        spool.retire(settled(spool, 7, queue))
    first, _, last = delivered.segments()
    used = bytes_used(root)
    assert used == sum(segment.size for segment in delivered.segments())
    assert forget_delivered(delivered, NOW, 0) == 0
    assert forget_delivered(delivered, NOW + 1, 0) == first.size
    assert forget_delivered(delivered, 0, 1) > 0
    assert delivered.segments() == [last]
    assert [queue.identity for queue in delivered.queues()] == [QUEUE]
    assert forget_delivered(delivered, NOW + 10, 0) == last.size
    assert list((root / DELIVERED).iterdir()) == []


def test_what_is_moved_there_in_the_moment_in_which_the_directory_would_go_still_has_its_owner(
    spool: SpoolDirectory, delivered: Delivered, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = settled(spool, 3)
    held.log.begin_segment()
    held.log.append(payloads(4, 1), NOW)
    held.log.done(4)
    remove = Path.rmdir

    def late(path: Path) -> None:
        # Another process's, or thread's, at that moment.
        monkeypatch.undo()
        held.log.begin_segment()
        remove(path)

    monkeypatch.setattr(Path, "rmdir", late)
    delivered.remove(delivered.segments())
    assert kept(delivered) == [payload(4)]
    assert [queue.identity for queue in delivered.queues()] == [QUEUE]


def test_who_dies_while_it_removes_the_directory_leaves_it_fit_for_use(
    spool: SpoolDirectory, delivered: Delivered
) -> None:
    held = settled(spool, 3)
    held.log.begin_segment()
    (queue,) = delivered.queues()
    for name in FILES:
        (queue.directory / name).unlink()
    held.log.append(payloads(4, 1), NOW)
    held.log.done(4)
    held.log.begin_segment()
    assert [queue.identity for queue in delivered.queues()] == [QUEUE]
