"""Finding out what is in a log's directory, as a crash may have left it.

Contract: before anybody else uses the log. Reads its newest segment, however many there are; nothing on disk is changed
for a view. What is behind the last good event is kept in `damaged/` before it is cut off.
"""

from __future__ import annotations

import contextlib
import errno
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from kong_metering.eventlog.damage import Damage, DamageKeeper, DamageKind
from kong_metering.eventlog.format import (
    SEGMENT_HEADER_BYTES,
    Position,
    is_segment_header,
    is_torn,
    next_record,
    parse_events,
    segment_first,
    segment_header,
    segment_name,
)
from kong_metering.eventlog.position import Settled
from kong_metering.eventlog.segment import Extent, Segment, SegmentWriter

if TYPE_CHECKING:
    from kong_metering.eventlog.damage import Patience

_NO_END = 1 << 63


class Recovery:
    """What was found: the segments in order, what is settled, the next event's number, and whom to append with.

    `writer` is None when the next append has to begin a segment.
    """

    def __init__(self, directory: Path, position: Position | None, damage: DamageKeeper, patience: Patience) -> None:
        """Look; `position` is what is known of how far the log is done, None when nothing is.

        Raises `SpoolFormatError` when the log is of a format that this version does not know, nothing is changed then;
        and the system's `OSError`.
        """
        self.segments = _found_segments(directory)
        self.writer: SegmentWriter | None = None
        self.settled = Settled(position.done if position else 0)
        self._damage = damage
        # No number that was sent is used again, though the events may not have reached the disk.
        marked = position.marks[-1].last if position and position.marks else 0
        start = end = self.next = max(self.settled.done, marked) + 1
        if self.segments:
            start = self.segments[0].first
            end = self._recover_newest(patience)
            self.next = max(self.next, end)
        if start > self.settled.done + 1:
            # Without a position, what is before the first segment was done, for all that is known.
            if position:
                self._lose(self.settled.done + 1, start)
            self.settled = Settled(start - 1)
        self._lose(end, self.next)
        self.settled = self.settled.up_to(self.settled.done)

    def _recover_newest(self, patience: Patience) -> int:
        """Find the number behind the last good event of the newest segment, and go on with it if it is whole."""
        newest = self.segments[-1]
        try:
            data = newest.path.read_bytes()
        except OSError as error:
            # One that is gone is its owner's doing, while we looked.
            if error.errno == errno.ENOENT or not patience.is_over(newest.path, error):
                raise
            patience.forget(newest.path)
            return self._set_aside(Damage(DamageKind.UNREADABLE, newest.path.name, 0, newest.size, 1, None))
        has_header = is_segment_header(data, newest.first)
        newest.extent = _end_of_good(data, newest.first)
        if newest.end == newest.first:
            return self._set_aside_bytes(data)
        if self._keep_tail(data[newest.size :]) and has_header and newest.end >= self.next and not self._damage.is_view:
            # Else, or if it cannot be, a new one is begun.
            with contextlib.suppress(OSError):
                self.writer = SegmentWriter.resume(newest)
        return newest.end

    def _set_aside_bytes(self, data: bytes) -> int:
        """Take a segment without a single good event out of the log; give the number to go on with."""
        newest = self.segments[-1]
        header = segment_header(newest.first)
        if header.startswith(data) and not self._damage.is_view:
            # A file that was just being made: it never had anything in it.
            newest.path.unlink()
        if header.startswith(data):
            return self.segments.pop().first
        is_write = data.startswith(header) and is_torn(data[len(header) :])
        kind = DamageKind.TORN if is_write else DamageKind.UNREADABLE
        return self._set_aside(Damage(kind, newest.path.name, 0, len(data), int(not is_write), None))

    def _set_aside(self, damage: Damage) -> int:
        newest = self.segments.pop()
        kept_in = self._damage.move(newest, self.settled.done)
        self._damage.add(replace(damage, kept_in=kept_in))
        if kept_in or self._damage.is_view:
            return newest.first
        # It has to stay, and so has its name.
        self.settled = self.settled.with_gap(newest.first, newest.first + 1)
        return newest.first + 1

    def _keep_tail(self, tail: bytes) -> bool:
        """Set what is behind the last good event aside; False when it has to stay where it is."""
        if not tail:
            return True
        newest = self.segments[-1]
        kind = DamageKind.TORN if is_torn(tail) else DamageKind.UNREADABLE
        kept_in = self._damage.copy(newest, newest.size, tail)
        events = int(kind is DamageKind.UNREADABLE)
        self._damage.add(Damage(kind, newest.path.name, newest.size, len(tail), events, kept_in))
        return kept_in is not None

    def _lose(self, first: int, end: int) -> None:
        """Take note of events that are not there, with no trace of them."""
        first = max(first, self.settled.done + 1)
        if first < end:
            self.settled = self.settled.with_gap(first, end)
            self._damage.add(Damage(DamageKind.MISSING, segment_name(first), 0, 0, end - first, None))


def _found_segments(directory: Path) -> list[Segment]:
    """List the segments; the end of the newest one, and whether it is whole, is not known yet."""
    sizes: dict[int, int] = {}
    with os.scandir(directory) as entries:
        for entry in entries:
            first = segment_first(entry.name)
            # A view may see its owner remove a file just now.
            with contextlib.suppress(FileNotFoundError):
                if first is not None and entry.is_file(follow_symlinks=False):
                    sizes[first] = entry.stat().st_size
    firsts = sorted(sizes)
    return [
        Segment(directory / segment_name(first), first, end, sizes[first])
        for first, end in zip(firsts, [*firsts[1:], _NO_END], strict=False)
    ]


def _end_of_good(data: bytes, first: int) -> Extent:
    """Tell how far the good events of a segment go that may be damaged."""
    sequence, offset = first, SEGMENT_HEADER_BYTES
    while True:
        events, offset = parse_events(data, offset, sequence, _NO_END, _NO_END)
        sequence += len(events)
        record = next_record(data, offset, sequence, _NO_END)
        if record is None:
            return Extent(sequence, offset)
        sequence, offset = record.sequence + 1, record.end
