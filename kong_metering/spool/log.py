"""The events of one queue, on disk in the order in which they came, until they are done.

Contract: a log is a directory that one process owns and one thread at a time uses; the caller locks. Events are opaque
bytes; each has a sequence number that goes up by one and is never used twice.

- An event whose `append` returned survives the death of the process. It survives a power cut once a `sync` returned
  that began afterwards: `unsynced` takes note of what is to be synced, and `Unsynced.sync` needs no lock.
- `append` is all or nothing. When it raises, the log is as it was before and can be used.
- `read` gives events in order, each as it was accepted or not at all: what is damaged is passed over, its bytes are
  kept in `damaged/`, and `take_damage` tells of it. A flipped bit costs one event at most.
- `done` frees space by unlinking segments, which also a full disk allows. What was done after the last
  `save_position` is done again after a crash: save it before a batch is sent, with the mark of that batch, and no
  event is sent twice without being known as one that may have arrived.
- `open` reads one segment, however many there are.

Files: segments and `position` as `format.py` describes them, and `damaged/`, made when there is something for it.
"""

from __future__ import annotations

import bisect
import contextlib
import errno
import os
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from operator import attrgetter
from pathlib import Path

from kong_metering.spool import files
from kong_metering.spool.format import (
    MAX_PAYLOAD_BYTES,
    SEGMENT_HEADER_BYTES,
    Mark,
    Position,
    StoredEvent,
    encode_records,
    is_segment_header,
    is_torn,
    next_record,
    parse_events,
    segment_first,
    segment_header,
    segment_name,
)
from kong_metering.spool.marks import Marks
from kong_metering.spool.position import PositionFile
from kong_metering.spool.segment import Segment, SegmentReader, SegmentWriter
from kong_metering.spool.unsynced import Unsynced

POSITION = "position"
DAMAGED = "damaged"
SEGMENT_BYTES = 4 * 1024 * 1024

_NO_END = 1 << 63
# What `last_older_than` reads at a time: mostly one of the first events decides.
_SCAN_EVENTS = (1, 20, 100, 500, 500)
_SCAN_BYTES = 1024 * 1024


class DamageKind(str, Enum):
    """What was found in place of good events."""

    # The end of a write that a crash cut short; the events in it were not acknowledged.
    TORN = "torn"
    # Bytes that are no good event.
    UNREADABLE = "unreadable"
    # Nothing: a file is not there, or shorter than it was.
    MISSING = "missing"


@dataclass(frozen=True)
class Damage:
    """A stretch of a log that cannot be read.

    `events` are the waiting events that are lost with it, at least; `kept_in` is the file with its bytes, None when
    there were none or they could not be kept.
    """

    kind: DamageKind
    segment: str
    offset: int
    length: int
    events: int
    kept_in: Path | None


class EventLog:
    """One queue's log."""

    def __init__(self, directory: Path, position: PositionFile, segment_bytes: int, *, is_view: bool) -> None:
        self.directory = directory
        self._position = position
        self._segment_bytes = segment_bytes
        self._is_view = is_view
        self._segments: list[Segment] = []
        self._writer: SegmentWriter | None = None
        self._reader: SegmentReader | None = None
        self._oldest: StoredEvent | None = None
        # Where `last_older_than` stopped the last time: number and time.
        self._younger = (0, 0)
        # What was written since the last sync, in order, and what a sync that failed gave back, from any thread.
        self._unsynced: dict[Path, None] = {}
        self._failed: deque[Path] = deque()
        self._is_closed = False
        self._done = position.position.done
        self._next = self._done + 1
        self._marks = Marks(position.position.marks)
        # Stretches of sequence numbers above `_done` that are known to be unreadable: first to below end, in order.
        self._gaps: list[tuple[int, int]] = []
        self._damage: list[Damage] = []
        self._known_damage: set[tuple[int, int]] = set()

    @classmethod
    def open(cls, directory: Path, *, segment_bytes: int = SEGMENT_BYTES, sync_first: Sequence[Path] = ()) -> EventLog:
        """Open the log in a directory that this process owns, as a crash may have left it, or a new one.

        `sync_first` is what has to survive a power cut as well, so that the events are of use: the first `unsynced`
        has it, before the events.

        Raises `SpoolFormatError` when it is of a format that this version does not know, nothing is changed then; and
        the system's `OSError`.
        """
        return cls._opened(directory, segment_bytes, sync_first, is_view=False)

    @classmethod
    def view(cls, directory: Path) -> EventLog:
        """Open the log for reading alone, beside the process that owns it: nothing on disk is changed.

        It shows what was there when it was opened; what its owner is done with meanwhile may be missing.

        Raises `SpoolFormatError` when it is of a format that this version does not know; and the system's `OSError`.
        """
        return cls._opened(directory, SEGMENT_BYTES, (), is_view=True)

    @classmethod
    def _opened(cls, directory: Path, segment_bytes: int, sync_first: Sequence[Path], *, is_view: bool) -> EventLog:
        log = cls(directory, PositionFile(directory / POSITION), segment_bytes, is_view=is_view)
        try:
            log._recover(sync_first)
        except BaseException:
            log._let_go()
            raise
        return log

    @property
    def was_position_lost(self) -> bool:
        """Whether it is not known how far the log was done: events in it may have been delivered long ago."""
        return self._position.was_lost and self._done + 1 < self._next

    @property
    def next_sequence(self) -> int:
        """The sequence number that the next event gets."""
        return self._next

    @property
    def done_up_to(self) -> int:
        """The sequence number up to which all is done."""
        return self._done

    @property
    def waiting(self) -> int:
        """How many events are not done; damage that was not read yet counts as events."""
        return self.waiting_after(self._done)

    def waiting_after(self, sequence: int) -> int:
        """Tell how many events above `sequence` are not done; damage that was not read yet counts as events."""
        after = max(sequence, self._done)
        return self._next - 1 - after - self.gaps_after(after)

    def gaps_after(self, sequence: int) -> int:
        """Tell how many events above `sequence` are known to be unreadable."""
        after = max(sequence, self._done)
        return sum(end - max(first, after + 1) for first, end in self._gaps if end > after + 1)

    @property
    def bytes_on_disk(self) -> int:
        """The size of all segments."""
        return sum(segment.size for segment in self._segments)

    def append(self, events: Sequence[bytes], now_ms: int) -> range:
        """Write the events and give their sequence numbers; `now_ms` is the wall clock's, in milliseconds.

        Raises the system's `OSError`, for a full disk for one, and `ValueError` for an event of more than
        `MAX_PAYLOAD_BYTES`; none of the events is in the log then.
        """
        if not events:
            return range(self._next, self._next)
        if max(map(len, events)) > MAX_PAYLOAD_BYTES:
            raise ValueError(f"an event of more than {MAX_PAYLOAD_BYTES} bytes")
        first, end = self._next, self._next + len(events)
        records = encode_records(events, first, now_ms)
        if self._writer and self._writer.segment.size + len(records) <= self._segment_bytes:
            self._writer.append(records, end)
            self._unsynced[self._writer.segment.path] = None
        else:
            # A group that is larger than a segment has one of its own, so that it is written whole or not at all.
            writer = SegmentWriter.create(self.directory, records, first, end)
            self._seal()
            self._writer = writer
            self._segments.append(writer.segment)
            self._unsynced |= {writer.segment.path: None, self.directory: None}
        self._next = end
        return range(first, end)

    def unsynced(self) -> Unsynced:
        """Take note of what has to be synced, so that all that was written until now survives a power cut.

        The caller has it synced: the next call gives only what was written since, and what failed.
        """
        return Unsynced.take(self._unsynced, self._failed)

    def sync(self) -> None:
        """Have all that was appended, and the last position saved, survive a power cut.

        Raises the system's `OSError`.
        """
        self.unsynced().sync()

    def read(self, after: int, max_events: int, max_bytes: int) -> list[StoredEvent]:
        """Read events in order from the first one above `after` that is not done.

        There are up to `max_events` with up to `max_bytes` of payload, but at least one if one waits. Reading on where
        the last call ended costs least; anywhere else costs reading a segment from its start.

        Raises `SpoolFormatError` when a segment is of a format that this version does not know; and the system's
        `OSError`, after which it can be tried again.
        """
        events: list[StoredEvent] = []
        sequence = self._behind_gaps(max(after, self._done) + 1)
        while max_bytes > 0 and sequence < self._next:
            found = self._read_some(sequence, max_events - len(events), max_bytes, needs_one=not events)
            events += found
            next_one = self._behind_gaps(found[-1].sequence + 1 if found else sequence)
            if next_one in (sequence, self._next) or len(events) == max_events:
                break
            max_bytes -= sum(len(event.payload) for event in found)
            sequence = next_one
        return events

    def oldest(self) -> StoredEvent | None:
        """Give the first event that is not done, None when nothing waits.

        Raises what `read` raises.
        """
        if self._oldest is None or self._oldest.sequence <= self._done:
            with self._reading_elsewhere(self._done + 1):
                self._oldest = next(iter(self.read(self._done, 1, 1)), None)
        return self._oldest

    def last_older_than(self, after: int, time_ms: int) -> int:
        """Tell up to which number all events above `after` were appended before this time; `after` when none was.

        Looks at the times in the order of the events and stops at the first that is not older, so that a clock that
        was set back hides what comes behind. What is done or damaged is passed as if it were older. Looks at some
        1,000 events, or 5 MB, at most: when there may be more, call again with what it gave. Raises what `read`
        raises.
        """
        after = max(after, self._done)
        sequence = self._behind_gaps(after + 1)
        younger, its_time = self._younger
        if sequence == younger and its_time >= time_ms:
            return sequence - 1
        with self._reading_elsewhere(sequence):
            for count in _SCAN_EVENTS:
                found = self.read(after, count, _SCAN_BYTES)
                stop = next((event for event in found if event.time_ms >= time_ms), None)
                if stop:
                    self._younger = (stop.sequence, stop.time_ms)
                    return stop.sequence - 1
                if not found:
                    return max(after, self._next - 1)
                after = found[-1].sequence
        return after

    def done(self, up_to: int) -> None:
        """Remember that all events up to this sequence number need not be read again, and free their space.

        Never raises for the disk's sake: what cannot be removed now is removed later.
        """
        if up_to >= self._next:
            raise ValueError(f"{up_to} was not appended yet: the next sequence number is {self._next}")
        if up_to <= self._done:
            return
        self._done = self._behind_gaps(up_to + 1) - 1
        self._gaps = [(max(first, self._done + 1), end) for first, end in self._gaps if end > self._done + 1]
        self._marks.forget_up_to(self._done)
        self._remove_done_segments()

    def save_position(self) -> None:
        """Write down how far the log is done, and the marks, for after a crash; works on a full disk as well.

        Raises the system's `OSError`.
        """
        if not self._position.is_open:
            self._unsynced[self.directory] = None
        self._unsynced[self._position.path] = None
        self._position.save(Position(self._done, self._marks.all()))

    def mark_ambiguous(self, first: int, last: int, time_ms: int) -> list[Mark]:
        """Remember that these events are being sent at this time, and so may arrive though no answer does.

        An event that is marked keeps the earlier time. Gives the marks that are new, for `unmark` when an answer tells
        that the events did not arrive. `save_position` writes marks down; there is room for `MAX_MARKS`, and beyond
        that neighbours are joined, which can only mark too many events, at too early a time.
        """
        return self._marks.add(first, last, time_ms)

    def unmark(self, marks: Sequence[Mark]) -> None:
        """Forget marks that `mark_ambiguous` gave: their events did not arrive."""
        for mark in marks:
            self._marks.remove(mark)

    @property
    def marks(self) -> tuple[Mark, ...]:
        """The marks of events that are not done, in order."""
        return self._marks.all()

    def sent_at(self, sequence: int) -> int | None:
        """Tell when the event was first sent, in milliseconds, if it was and may have arrived; else None."""
        return self._marks.time_of(sequence)

    def drop_oldest_segment(self) -> int:
        """Give up the events of the oldest segment with events that are not done; tell how many those are.

        Nothing is dropped and 0 given when nothing waits.
        """
        oldest = next((segment for segment in self._segments if segment.end > self._done + 1), None)
        if oldest is None:
            return 0
        before = self.waiting
        if self._writer and self._writer.segment is oldest:
            self._seal()
        self.done(oldest.end - 1)
        return before - self.waiting

    def take_damage(self) -> list[Damage]:
        """Give what was found damaged since the last call."""
        taken, self._damage = self._damage, []
        return taken

    def close(self) -> None:
        """Save the position, if that can be, and let go of all files; what is done entirely is removed.

        Again, it does nothing: the log may be another process's by then.
        """
        if self._is_closed:
            return
        self._is_closed = True
        self._seal()
        if not self._is_view:
            # A position that cannot be saved means that events are sent again, with the same ids.
            with contextlib.suppress(OSError):
                self.save_position()
            self._remove_done_segments()
        self._let_go()

    # ------------------------------------------------------------------------------------------------------ opening

    def _recover(self, sync_first: Sequence[Path]) -> None:
        """Find out what is there, as a crash may have left it."""
        self._find_segments()
        self._recover_newest()
        self._start_and_end()
        if self._is_view:
            return
        # Nobody knows what was synced.
        segments = (segment.path for segment in self._segments)
        self._unsynced = dict.fromkeys((*sync_first, self.directory, *segments))
        # While there is room: later the disk may be full.
        with contextlib.suppress(OSError):
            self.save_position()
        self._remove_done_segments()

    def _find_segments(self) -> None:
        sizes: dict[int, int] = {}
        with os.scandir(self.directory) as entries:
            for entry in entries:
                first = segment_first(entry.name)
                # A view may see its owner remove a file just now.
                with contextlib.suppress(FileNotFoundError):
                    if first is not None and entry.is_file(follow_symlinks=False):
                        sizes[first] = entry.stat().st_size
        firsts = sorted(sizes)
        self._segments = [
            Segment(self.directory / segment_name(first), first, end, sizes[first])
            for first, end in zip(firsts, [*firsts[1:], _NO_END], strict=False)
        ]

    def _recover_newest(self) -> None:
        """Find the end of the log: that of the good events in its newest segment."""
        if not self._segments:
            self._next = max(self._done + 1, self._marks.end)
            return
        newest = self._segments[-1]
        data = newest.path.read_bytes()
        has_header = is_segment_header(data, newest.first)
        newest.end, newest.size = _end_of_good(data, newest.first)
        self._next = max(newest.end, self._done + 1, self._marks.end)
        if newest.end == newest.first:
            self._set_newest_aside(data)
        elif self._is_tail_kept(data[newest.size :]) and has_header and newest.end == self._next and not self._is_view:
            self._writer = SegmentWriter.resume(newest)

    def _set_newest_aside(self, data: bytes) -> None:
        """Take a segment without a single good event out of the log."""
        newest = self._segments.pop()
        header = segment_header(newest.first)
        kind = DamageKind.TORN if data.startswith(header) and is_torn(data[len(header) :]) else DamageKind.UNREADABLE
        if not header.startswith(data):
            kept_in = self._moved(newest)
            events = int(kind is DamageKind.UNREADABLE)
            self._damage.append(Damage(kind, newest.path.name, 0, len(data), events, kept_in))
        elif not self._is_view:
            # A file that was just being made: it never had anything in it.
            newest.path.unlink()

    def _is_tail_kept(self, tail: bytes) -> bool:
        """Set what is behind the last good event aside; False when it has to stay where it is."""
        newest = self._segments[-1]
        if not tail:
            return True
        kind = DamageKind.TORN if is_torn(tail) else DamageKind.UNREADABLE
        kept_in = self._copied(newest, newest.size, tail)
        events = int(kind is DamageKind.UNREADABLE)
        self._damage.append(Damage(kind, newest.path.name, newest.size, len(tail), events, kept_in))
        return kept_in is not None

    def _start_and_end(self) -> None:
        """Go past events whose segments are not there any more, at the start of the log and at its end."""
        first = self._segments[0].first if self._segments else self._next
        if first > self._done + 1:
            # Without a position, what is before the first segment was done, for all that is known.
            if not self._position.was_lost:
                self._lose(self._done + 1, first)
            self._done = first - 1
            self._gaps.clear()
            self._marks.forget_up_to(self._done)
        end = max(self._done + 1, self._segments[-1].end if self._segments else first)
        if end < self._next:
            self._lose(end, self._next)

    # ------------------------------------------------------------------------------------------------------ reading

    def _read_some(self, sequence: int, max_events: int, max_bytes: int, *, needs_one: bool) -> list[StoredEvent]:
        """Read from one segment; none are given when there is only damage, or the next event is too large."""
        segment = self._segment_of(sequence)
        try:
            reader = self._reader_at(segment, sequence)
            return reader.read(max_events, max_bytes) or (reader.read(1, MAX_PAYLOAD_BYTES) if needs_one else [])
        except OSError as error:
            self._end_reading()
            if error.errno not in (errno.ENOENT, errno.EIO):
                raise
            self._abandon(segment, sequence)
            return []

    def _segment_of(self, sequence: int) -> Segment:
        index = bisect.bisect_right(self._segments, sequence, key=attrgetter("first")) - 1
        return self._segments[index]

    def _reader_at(self, segment: Segment, sequence: int) -> SegmentReader:
        reader = self._reader
        if reader is None or reader.segment is not segment or reader.next > sequence:
            self._end_reading()
            self._reader = reader = SegmentReader(segment, self._found_damage)
        if reader.next < sequence:
            reader.skip_to(sequence)
        return reader

    @contextlib.contextmanager
    def _reading_elsewhere(self, sequence: int) -> Iterator[None]:
        """Let `read` read from here on, and go on afterwards where it was."""
        kept = self._reader
        # From the start of the segment it may be thousands of events.
        is_near = kept is not None and kept.segment.first <= kept.next <= sequence < kept.segment.end
        self._reader = kept.twin() if kept and is_near else None
        try:
            yield
        finally:
            self._end_reading()
            self._reader = kept

    def _end_reading(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _behind_gaps(self, sequence: int) -> int:
        for first, end in self._gaps:
            if first <= sequence < end:
                sequence = end
        return sequence

    # ------------------------------------------------------------------------------------------------------- damage

    def _found_damage(self, segment: Segment, offset: int, data: bytes, first: int, end: int) -> None:
        """Take note of damage that reading came upon, once; events that are done already are no loss."""
        if (segment.first, offset) in self._known_damage or first < end <= self._done + 1:
            return
        self._known_damage.add((segment.first, offset))
        kind = DamageKind.UNREADABLE if data else DamageKind.MISSING
        kept_in = self._copied(segment, offset, data) if data else None
        events = self._add_gap(first, end)
        self._damage.append(Damage(kind, segment.path.name, offset, len(data), events, kept_in))

    def _abandon(self, segment: Segment, sequence: int) -> None:
        """Take a segment that the system does not give us any more out of the log, from this event on."""
        if self._writer and self._writer.segment is segment:
            self._seal()
        self._segments.remove(segment)
        events, kept_in = self._add_gap(sequence, segment.end), self._moved(segment)
        kind = DamageKind.UNREADABLE if kept_in else DamageKind.MISSING
        self._damage.append(Damage(kind, segment.path.name, 0, segment.size, events, kept_in))

    def _lose(self, first: int, end: int) -> None:
        """Take note of events that are not there, with no trace of them."""
        self._damage.append(Damage(DamageKind.MISSING, segment_name(first), 0, 0, self._add_gap(first, end), None))

    def _add_gap(self, first: int, end: int) -> int:
        """Remember that events `first` to below `end` cannot be read; tell how many that was not known of."""
        before = self.waiting
        first = max(first, self._done + 1)
        if first < end:
            others = [gap for gap in self._gaps if not first <= gap[0] < end]
            self._gaps = sorted([*others, (first, end)])
        return before - self.waiting

    def _moved(self, segment: Segment) -> Path | None:
        """Keep a whole file in `damaged/`; None when that cannot be."""
        if self._is_view:
            return None
        target = self.directory / DAMAGED / segment.path.name
        try:
            files.make_directory(target.parent)
            segment.path.replace(target)
        except OSError:
            return None
        return target

    def _copied(self, segment: Segment, offset: int, data: bytes) -> Path | None:
        """Keep these bytes of a segment in `damaged/`; None when that cannot be."""
        if self._is_view:
            return None
        target = self.directory / DAMAGED / f"{segment.path.stem}-{offset}.bytes"
        try:
            # On the disk itself: what is copied may be cut off next.
            is_new = files.make_directory(target.parent)
            files.write_file(target, data, is_lasting=True)
            if is_new:
                files.sync(self.directory)
        except OSError:
            return self._linked(segment)
        return target

    def _linked(self, segment: Segment) -> Path | None:
        """Keep the whole segment by a second name: that asks for no space on a full disk."""
        target = self.directory / DAMAGED / segment.path.name
        try:
            os.link(segment.path, target)
        except FileExistsError:
            return target
        except OSError:
            return None
        return target

    # ------------------------------------------------------------------------------------------------------ segments

    def _let_go(self) -> None:
        self._seal()
        self._end_reading()
        self._position.close()

    def _seal(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _remove_done_segments(self) -> None:
        """Unlink the segments in which all is done, except the one that is appended to."""
        if self._is_view or not self._has_done_segment():
            return
        # Both slots, so that damage to one of them does not make done events look like missing ones.
        with contextlib.suppress(OSError):
            self.save_position()
            self.save_position()
        while self._has_done_segment():
            segment = self._segments[0]
            if self._reader and self._reader.segment is segment:
                self._end_reading()
            try:
                segment.path.unlink(missing_ok=True)
            except OSError:
                return
            del self._segments[0]
            self._unsynced.pop(segment.path, None)
            self._known_damage = {known for known in self._known_damage if known[0] > segment.first}

    def _has_done_segment(self) -> bool:
        if not self._segments or self._segments[0].end > self._done + 1:
            return False
        return self._writer is None or self._writer.segment is not self._segments[0]


def _end_of_good(data: bytes, first: int) -> tuple[int, int]:
    """Tell the sequence number and the offset behind the last good event of a segment that may be damaged."""
    sequence, offset = first, SEGMENT_HEADER_BYTES
    while True:
        events, offset = parse_events(data, offset, sequence, _NO_END, _NO_END)
        sequence += len(events)
        record = next_record(data, offset, sequence, _NO_END)
        if record is None:
            return sequence, offset
        sequence, offset = record.sequence + 1, record.end
