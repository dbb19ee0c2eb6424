"""One thread appends to a log while another one reads, settles, marks, saves and drops: neither disturbs the other."""

from __future__ import annotations

import errno
import os
import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import pytest

from kong_metering.eventlog.damage import Patience
from kong_metering.eventlog.format import SEGMENT_HEADER_BYTES
from kong_metering.eventlog.log import DamageKind, EventLog
from tests.unit.eventlog.helpers import NOW, filled, overwrite, payload, payloads, read_all, segments, sequences

if TYPE_CHECKING:
    from typing_extensions import Self

EVENTS = 6000


@pytest.fixture(autouse=True)
def _switching_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


class Appending:
    """Appends events in a thread of its own, in groups of all sizes, until there are so many; keeps what it raised."""

    def __init__(self, log: EventLog, events: int = EVENTS) -> None:
        self.errors: list[BaseException] = []
        self._log = log
        self._events = events
        self._thread = threading.Thread(target=self._run)

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def _run(self) -> None:
        chance = random.Random(7)  # noqa: S311
        try:
            while (first := self._log.next_sequence) <= self._events:
                group = payloads(first, min(chance.randint(1, 9), self._events + 1 - first))
                assert self._log.append(group, NOW + first) == range(first, first + len(group))
        except BaseException as error:  # noqa: BLE001 - handed to the test
            self.errors.append(error)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._thread.join()
        assert self.errors == []


@pytest.mark.parametrize("segment_bytes", [100, 1500, 20_000])
def test_each_event_is_read_once_and_in_order_and_its_space_freed(tmp_path: Path, segment_bytes: int) -> None:
    log = EventLog.open(tmp_path, segment_bytes=segment_bytes)
    chance = random.Random(segment_bytes)  # noqa: S311
    found = 0
    with Appending(log):
        while found < EVENTS:
            batch = log.read(found, chance.randint(1, 200), 1 << 30)
            assert [(event.sequence, event.payload) for event in batch] == [
                (number, payload(number)) for number in range(found + 1, found + 1 + len(batch))
            ]
            assert 0 <= log.waiting_after(found) - len(batch) <= EVENTS - found
            if not batch:
                continue
            found = batch[-1].sequence
            log.mark_ambiguous(batch[0].sequence, found, NOW)
            log.save_position()
            log.done(found - chance.randint(0, len(batch) - 1))
            oldest = log.oldest()
            assert oldest is None or oldest.sequence == log.done_up_to + 1
    assert log.take_damage() == []
    log.done(EVENTS)
    log.close()
    assert segments(tmp_path) == []
    assert EventLog.open(tmp_path).next_sequence == EVENTS + 1


def test_dropped_events_are_counted_and_all_others_read(tmp_path: Path) -> None:
    """Also when what is dropped is the segment that is appended to."""
    log = EventLog.open(tmp_path, segment_bytes=3000)
    counts = {"read": 0, "dropped": 0}
    with Appending(log) as appending:
        while appending.is_running or log.waiting:
            counts["dropped"] += log.drop_oldest_segment()
            batch = log.read(log.done_up_to, 5, 1 << 30)
            assert [event.payload for event in batch] == [payload(event.sequence) for event in batch]
            counts["read"] += len(batch)
            if batch:
                log.done(batch[-1].sequence)
    assert counts["read"] + counts["dropped"] == EVENTS
    assert min(counts.values()) > 0
    log.close()
    assert segments(tmp_path) == []


def test_ages_are_told_only_of_events_that_were_there(tmp_path: Path) -> None:
    log = EventLog.open(tmp_path, segment_bytes=3000)
    with Appending(log) as appending:
        while appending.is_running or log.waiting:
            limit = log.next_sequence
            last = log.last_older_than(log.done_up_to, NOW + limit)
            # A group has the time of its first event.
            assert last < limit + 9
            log.done(last)
            if not appending.is_running:
                log.done(log.next_sequence - 1)


def test_whatever_was_written_is_noted_for_the_sync(tmp_path: Path) -> None:
    """A third thread takes the notes, as the syncer does."""
    log = EventLog.open(tmp_path, segment_bytes=1500)
    synced: set[str] = set()
    ended = threading.Event()

    def sync() -> None:
        while not ended.is_set():
            log.unsynced().sync()

    def fdatasync(descriptor: int) -> None:
        synced.add(Path(f"/proc/self/fd/{descriptor}").readlink().name)

    with mock.patch.object(os, "fdatasync", fdatasync):
        syncer = threading.Thread(target=sync)
        syncer.start()
        with Appending(log) as appending:
            while appending.is_running:
                log.save_position()
        ended.set()
        syncer.join()
        log.sync()
    assert synced == {"position", *(path.name for path in segments(tmp_path))}


@contextmanager
def while_writing(step: Callable[[], None]) -> Iterator[None]:
    """Let the reading side do this in the middle of the next append."""
    pwrite = os.pwrite

    def interrupted(descriptor: int, data: bytes, offset: int) -> int:
        patch.stop()
        step()
        return pwrite(descriptor, data, offset)

    patch = mock.patch.object(os, "pwrite", interrupted)
    patch.start()
    try:
        yield
    finally:
        patch.stop()


def test_a_segment_that_is_dropped_while_it_is_appended_to_keeps_what_comes(tmp_path: Path) -> None:
    log = filled(tmp_path, 10, segment_bytes=100_000)
    dropped: list[int] = []
    with while_writing(lambda: dropped.append(log.drop_oldest_segment())):
        log.append(payloads(11, 2), NOW)
    assert dropped == [10]
    assert sequences(log) == [11, 12]
    log.append(payloads(13, 1), NOW)
    assert [int(path.stem) for path in segments(tmp_path)] == [1, 13], "another one was begun"
    log.done(12)
    assert [int(path.stem) for path in segments(tmp_path)] == [13]
    assert sequences(log) == [13]


def test_a_segment_that_is_dropped_while_an_append_fails_is_not_appended_to(tmp_path: Path) -> None:
    log = filled(tmp_path, 10, segment_bytes=100_000)

    def drop_and_fail() -> None:
        log.drop_oldest_segment()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with while_writing(drop_and_fail), pytest.raises(OSError, match="No space left"):
        log.append(payloads(11, 2), NOW)
    assert log.waiting == 0
    assert log.append(payloads(11, 1), NOW) == range(11, 12)
    log.done(10)
    assert sequences(log) == [11]
    assert log.drop_oldest_segment() == 1
    assert segments(tmp_path) == []


@pytest.mark.parametrize("error", [errno.EUCLEAN, errno.EBADMSG, errno.ENOENT])
def test_the_newest_segment_is_set_aside_while_it_is_appended_to(tmp_path: Path, error: int) -> None:
    log = filled(tmp_path, 10, segment_bytes=100_000)
    (bad,) = segments(tmp_path)

    def fail_to_read() -> None:
        with unreadable(bad, error), pytest.raises(OSError, match=os.strerror(error)):
            log.read(0, 100, 1 << 30)

    with while_writing(fail_to_read):
        assert log.append(payloads(11, 2), NOW) == range(11, 13)
    assert log.take_damage() == [], "not while it is written to"
    log.append(payloads(13, 2), NOW)
    with unreadable(bad, error):
        assert sequences(log) == [13, 14]
        log.append(payloads(15, 1), NOW)
    (damage,) = log.take_damage()
    assert (damage.kind, damage.events, damage.kept_in) == (
        DamageKind.UNREADABLE,
        12,
        tmp_path / "damaged" / bad.name,
    )
    assert sequences(log) == [13, 14, 15]
    log.done(15)
    assert log.waiting == 0


def test_damage_at_the_end_is_passed_while_more_is_appended(tmp_path: Path) -> None:
    log = filled(tmp_path, 10, segment_bytes=100_000)
    (path,) = segments(tmp_path)
    overwrite(path, path.stat().st_size - 1, b"?" if path.read_bytes()[-1:] != b"?" else b"!")
    pread = os.pread

    def appending(descriptor: int, size: int, offset: int) -> bytes:
        data = pread(descriptor, size, offset)
        if offset > SEGMENT_HEADER_BYTES:
            # When the damage is looked at: before, it would only be in the middle.
            log.append(payloads(log.next_sequence, 2), NOW)
        return data

    with mock.patch.object(os, "pread", appending):
        found = log.read(0, 100, 1 << 30)
    assert [event.sequence for event in found] == list(range(1, 10))
    assert log.next_sequence > 11
    assert sequences(log) == [*range(1, 10), *range(11, log.next_sequence)]
    (damage,) = log.take_damage()
    assert damage.events == 1


def test_segments_that_vanish_under_both_cost_their_events_and_nothing_else(tmp_path: Path) -> None:
    log = EventLog.open(tmp_path, segment_bytes=5000, patience=Patience(0))
    found, lost, vanished = list[int](), 0, 0
    with Appending(log) as appending:
        while appending.is_running or log.waiting:
            newest = next(reversed(segments(tmp_path)), None)
            if newest and vanished < 50 and log.next_sequence > 100 * vanished:
                vanished += 1
                newest.unlink(missing_ok=True)
            try:
                batch = log.read(found[-1] if found else 0, 50, 1 << 30)
            except FileNotFoundError:
                continue
            assert [event.payload for event in batch] == [payload(event.sequence) for event in batch]
            found += [event.sequence for event in batch]
            lost += sum(damage.events for damage in log.take_damage())
            if batch:
                log.done(found[-1])
    lost += sum(damage.events for damage in log.take_damage())
    assert found == sorted(set(found))
    assert len(found) + lost == EVENTS
    assert len(found) > EVENTS / 3
    assert read_all(log) == []


@contextmanager
def unreadable(path: Path, error: int) -> Iterator[None]:
    """Let the disk answer so when this file is opened to be read."""
    real = os.open

    def failing(name: str | Path, flags: int, mode: int = 0o777) -> int:
        if Path(name) == path and flags & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(error, os.strerror(error))
        return real(name, flags, mode)

    with mock.patch.object(os, "open", failing):
        yield
