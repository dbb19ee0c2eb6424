"""One file of a log: written at its end, read from its start.

Contract: one thread writes, another one may read meanwhile; they share the `Segment` alone, whose extent is one value.
A write that fails leaves the file as it was. Reading follows what is appended, and hands whatever is not a good event
to the one who asked, with its bytes.
"""

from __future__ import annotations

import contextlib
import copy
import os
from pathlib import Path
from typing import NamedTuple, Protocol

from kong_metering.eventlog import files
from kong_metering.eventlog.format import (
    MAX_PAYLOAD_BYTES,
    RECORD_HEADER_BYTES,
    SEGMENT_HEADER_BYTES,
    StoredEvent,
    claimed_record_bytes,
    is_segment_header,
    next_record,
    parse_events,
    segment_header,
    segment_name,
)

# What was just read had better be in the processor's cache when it is parsed.
_READ_BYTES = 128 * 1024
_NO_LIMIT = 1 << 62


class Extent(NamedTuple):
    """How far a segment goes: to below event `end`, in `size` bytes."""

    end: int
    size: int


class Segment:
    """A segment as its log knows it: it holds events `first` to below `end`, in its first `size` bytes.

    `is_sealed` tells that nothing is appended to it any more: its extent is the last one.
    """

    def __init__(self, path: Path, first: int, end: int, size: int) -> None:
        self.path = path
        self.first = first
        self.extent = Extent(end, size)
        self.is_sealed = True

    @property
    def end(self) -> int:
        """The number behind its last event."""
        return self.extent.end

    @property
    def size(self) -> int:
        """How many bytes of the file count."""
        return self.extent.size


class OnDamage(Protocol):
    """Told of a stretch that is no good event."""

    def __call__(self, segment: Segment, offset: int, data: bytes, first: int, end: int) -> None:
        """Take the bytes found at `offset`, where events `first` to below `end` are missing; either may be none."""


class SegmentWriter:
    """Appends to one segment; between two appends it may rest, and holds no descriptor then."""

    def __init__(self, segment: Segment, descriptor: int) -> None:
        segment.is_sealed = False
        self.segment = segment
        self._descriptor: int | None = descriptor

    @classmethod
    def create(cls, directory: Path, records: bytes, first: int, end: int) -> SegmentWriter:
        """Make a segment with its first records, all or nothing; the caller has the directory synced, some time.

        Raises the system's `OSError`, for a full disk for one; there is no new file then, or one that does not count.
        """
        path = directory / segment_name(first)
        data = segment_header(first) + records
        descriptor = files.create_file(path)
        try:
            files.write_at(descriptor, data, 0)
        except OSError:
            os.close(descriptor)
            with contextlib.suppress(OSError):
                path.unlink()
            raise
        return cls(Segment(path, first, end, len(data)), descriptor)

    @classmethod
    def resume(cls, segment: Segment) -> SegmentWriter:
        """Go on with a segment that ends with a good event, after cutting off what is behind `segment.size`.

        Raises the system's `OSError`.
        """
        descriptor = files.open_file(segment.path)
        try:
            os.ftruncate(descriptor, segment.size)
        except OSError:
            os.close(descriptor)
            raise
        return cls(segment, descriptor)

    def wake(self) -> bool:
        """Have the file open for `append`; False when it is not there any more. Raises the system's `OSError`."""
        if self._descriptor is None:
            try:
                self._descriptor = os.open(self.segment.path, os.O_RDWR | os.O_CLOEXEC)
            except FileNotFoundError:
                return False
        return True

    def rest(self) -> None:
        """Hold no descriptor until `wake`."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            # What the system has to say of it then, `sync` hears as well.
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def append(self, records: bytes, end: int) -> None:
        """Add records, the last of them numbered `end` - 1, all or nothing; it has to be awake.

        Raises the system's `OSError`; what was written of them is cut off again then.
        """
        size = self.segment.extent.size
        descriptor = self._descriptor
        assert descriptor is not None  # noqa: S101 - `wake`
        try:
            files.write_at(descriptor, records, size)
        except OSError:
            # Should this fail too, reading and the next append still go by the segment's size.
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, size)
            raise
        self.segment.extent = Extent(end, size + len(records))

    def close(self) -> None:
        """Let go of the file, and so seal the segment."""
        self.rest()
        self.segment.is_sealed = True


class SegmentReader:
    """Reads one segment from its start on; `next` is the sequence number of the event that comes next.

    Raises `SpoolFormatError` when the segment is of a format that this version does not know; and the system's
    `OSError`.
    """

    def __init__(self, segment: Segment, on_damage: OnDamage) -> None:
        self.segment = segment
        self.next = segment.first
        # As it was when the last call began: what is appended during one is for the next.
        self._extent = segment.extent
        self._on_damage = on_damage
        self._buffer = b""
        # Where the buffer starts in the file, and where the next record starts in the buffer.
        self._start, self._at = SEGMENT_HEADER_BYTES, 0
        self._descriptor: int | None = None
        try:
            self._check_header()
        except BaseException:
            self.close()
            raise

    def read(self, max_events: int, max_bytes: int, before: int = _NO_LIMIT) -> list[StoredEvent]:
        """Read on: up to `max_events` events below `before` with up to `max_bytes` of payload, all in this segment.

        An error behind good events is raised by the next call.
        """
        self._extent = self.segment.extent
        events: list[StoredEvent] = []
        try:
            self._read_on(events, max_events, max_bytes, min(before, self._extent.end))
        except OSError:
            if not events:
                raise
        return events

    def _read_on(self, events: list[StoredEvent], max_events: int, max_bytes: int, end: int) -> None:
        if self._at == len(self._buffer):
            self._fill()
        while len(events) < max_events and self.next < end:
            start, wanted = self._at, min(max_events - len(events), end - self.next)
            found, self._at = parse_events(self._buffer, start, self.next, wanted, max_bytes)
            events += found
            self.next += len(found)
            if len(found) == wanted:
                continue
            max_bytes -= self._at - start - RECORD_HEADER_BYTES * len(found)
            if not self._fill():
                if self._is_good():
                    break
                self._pass_damage()

    def skip_to(self, sequence: int) -> None:
        """Read on until `next` is this sequence number, or a later one if that event is not there."""
        while self.next < min(sequence, self.segment.end):
            self.read(1000, _NO_LIMIT, before=sequence)

    def twin(self) -> SegmentReader:
        """Make another reader that stands where this one does."""
        twin = copy.copy(self)
        twin._descriptor = None if self._descriptor is None else os.dup(self._descriptor)  # noqa: SLF001 - our own
        return twin

    def rest(self) -> None:
        """Hold no descriptor and no bytes until the next read, which goes on where the last one ended."""
        self.close()
        self._buffer, self._start, self._at = b"", self._start + self._at, 0

    def close(self) -> None:
        """Let go of the file."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _opened(self) -> int:
        if self._descriptor is None:
            self._descriptor = os.open(self.segment.path, os.O_RDONLY | os.O_CLOEXEC)
        return self._descriptor

    def _check_header(self) -> None:
        header = os.pread(self._opened(), SEGMENT_HEADER_BYTES, 0)
        if not is_segment_header(header, self.segment.first):
            self._on_damage(self.segment, 0, header, self.next, self.next)

    def _fill(self) -> bool:
        """Have the whole next record in the buffer; False when it is there already, or there is no more to read."""
        have = len(self._buffer) - self._at
        claimed = claimed_record_bytes(self._buffer, self._at)
        if have >= claimed:
            return False
        start = self._start + self._at
        wanted = min(max(claimed, _READ_BYTES), self._extent.size - start)
        if wanted <= have:
            return False
        self._buffer, self._start, self._at = self._bytes_at(start, wanted, min(claimed, wanted)), start, 0
        return len(self._buffer) > have

    def _bytes_at(self, start: int, wanted: int, least: int) -> bytes:
        """Read as many as wanted, or fewer at the end of the file or before a place that cannot be read.

        Raises the system's `OSError` when there are not the `least` before that place.
        """
        descriptor = self._opened()
        data = os.pread(descriptor, wanted, start)
        while len(data) < least and (more := os.pread(descriptor, wanted - len(data), start + len(data))):
            data += more
        return data

    def _is_good(self) -> bool:
        """Whether the next record is good, and it was only a limit that ended the reading."""
        return bool(parse_events(self._buffer, self._at, self.next, 1, MAX_PAYLOAD_BYTES)[0])

    def _pass_damage(self) -> None:
        """Go on behind whatever is here instead of the next event."""
        start, sequence = self._start + self._at, self.next
        end, size = self._extent
        rest = max(0, size - start)
        self._buffer, self._start = self._bytes_at(start, rest, rest), start
        record = next_record(self._buffer, 0, sequence, end)
        self._at, self.next = (record.start, record.sequence) if record else (len(self._buffer), end)
        self._on_damage(self.segment, start, self._buffer[: self._at], sequence, self.next)
