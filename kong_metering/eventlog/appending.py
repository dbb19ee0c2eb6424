"""The end of a log: what is written, into which segment, and the numbers that events get.

Contract: `append` runs in one thread at a time, the writer's; `seal` in the one that reads. Neither waits for the
other. The file that is appended to is handed over with its `SegmentWriter`. It lies in `_resting`: whoever takes it
out, by a deque's `pop`, which is one step, is alone with it, and only `append` puts one there. So no descriptor is
closed while it is written to, and nothing is written to a segment once `seal` told that it is sealed.

What a reader sees of an append comes in this order: the bytes; the segment's extent (its end and size, one value, so
that no event is looked for behind the bytes), and if the segment is new, its place in the list; `next`.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kong_metering.eventlog.format import MAX_PAYLOAD_BYTES, encode_records, segment_name
from kong_metering.eventlog.segment import Segment, SegmentWriter

if TYPE_CHECKING:
    from kong_metering.eventlog.recovery import Recovery


class Appender:
    """Writes events behind the last one.

    `segments` are those of the log, in order: `append` adds at the end of the list, the reading side takes out. `next`
    is the number of the next event. `written` is what is to be synced.
    """

    def __init__(self, directory: Path, found: Recovery, written: dict[Path, None], segment_bytes: int) -> None:
        """Go on behind what was found."""
        self.segments = found.segments
        self.next = found.next
        self._directory = directory
        self._written = written
        self._segment_bytes = segment_bytes
        # A file that could not be written, if it could not be removed either: a disk may be read-only all of a sudden.
        self._unwritten: Path | None = None
        self._resting = deque([found.writer] if found.writer else [])
        # What the next append has to seal, because it was asked for while one was running.
        self._to_seal: Segment | None = None
        self.rest()

    def append(self, events: Sequence[bytes], now_ms: int) -> range:
        """Write the events, all or none, and give their sequence numbers. Raises what `EventLog.append` raises."""
        first, end = self.next, self.next + len(events)
        if first == end:
            return range(first, end)
        if max(map(len, events)) > MAX_PAYLOAD_BYTES:
            raise ValueError(f"an event of more than {MAX_PAYLOAD_BYTES} bytes")
        records = encode_records(events, first, now_ms)
        try:
            writer = self._resting.pop()
        except IndexError:
            writer = None
        try:
            writer = self._written_by(writer, records, first, end)
            self.next = end
        finally:
            if writer:
                self._resting.append(writer)
        return range(first, end)

    def _written_by(self, writer: SegmentWriter | None, records: bytes, first: int, end: int) -> SegmentWriter:
        """Write the records with this writer, or begin a segment; give the writer to go on with."""
        if writer and self._has_room(writer, len(records)) and writer.wake():
            writer.append(records, end)
            self._written[writer.segment.path] = None
            return writer
        # A group that is larger than a segment has one of its own, so that it is written whole or not at all.
        new = self._created(records, first, end)
        if writer:
            writer.close()
        self.segments.append(new.segment)
        self._written[new.segment.path] = None
        self._written[self._directory] = None
        return new

    def _created(self, records: bytes, first: int, end: int) -> SegmentWriter:
        """Begin a segment, in the place of one that could not be written."""
        path = self._directory / segment_name(first)
        if path == self._unwritten:
            path.unlink(missing_ok=True)
        try:
            new = SegmentWriter.create(self._directory, records, first, end)
        except FileExistsError:
            raise  # not ours: nothing of it is to be lost
        except OSError:
            self._unwritten = path
            raise
        self._unwritten = None
        return new

    def _has_room(self, writer: SegmentWriter, size: int) -> bool:
        return writer.segment is not self._to_seal and writer.segment.size + size <= self._segment_bytes

    def rest(self) -> None:
        """Hold no descriptor until the next append; on its thread."""
        with contextlib.suppress(IndexError):
            writer = self._resting.pop()
            writer.rest()
            self._resting.append(writer)

    def seal(self, segment: Segment) -> bool:
        """Have nothing appended to this segment any more; False while an append runs: the next one begins another."""
        if not segment.is_sealed:
            self._to_seal = segment
            with contextlib.suppress(IndexError):
                # If it is that of a newer one by now, that one is short: not put back, since `append` alone may do so.
                self._resting.pop().close()
        return segment.is_sealed

    def close(self) -> None:
        """Let go of the file; no append runs any more."""
        while self._resting:
            self._resting.pop().close()
