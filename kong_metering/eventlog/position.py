"""How far a log is settled, which of its events were sent without an answer, and the file that remembers that.

`Settled` and `Marks` are pure. Contract of the file: one thread at a time. Its space is taken when it is made, so that
it can be written on a full disk. A write that is cut short leaves the position of the write before; a file that cannot
be made is tried again at each save. One that the disk does not give any more counts as lost, and is made anew; so is
one that takes no write.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from kong_metering.eventlog import files
from kong_metering.eventlog.format import (
    MAX_MARKS,
    POSITION_BYTES,
    Mark,
    Position,
    decode_position,
    encode_slot,
    slot_offset,
)

if TYPE_CHECKING:
    from kong_metering.eventlog.damage import Patience


class Settled(NamedTuple):
    """All events up to `done`, and stretches above it that cannot be read: `gaps`, first to below end, in order."""

    done: int = 0
    gaps: tuple[tuple[int, int], ...] = ()

    def next_after(self, sequence: int) -> int:
        """Tell the first number above this one that is to be read."""
        following = max(sequence, self.done) + 1
        for first, end in self.gaps:
            if first <= following < end:
                following = end
        return following

    def waiting(self, end: int, after: int = 0) -> int:
        """Count the events above `after` and below `end` that are to be read."""
        start = max(after, self.done) + 1
        gaps = sum(max(0, min(gap_end, end) - max(first, start)) for first, gap_end in self.gaps) if self.gaps else 0
        return max(0, end - start - gaps)

    def unreadable(self, after: int) -> int:
        """Count the events above `after` that cannot be read."""
        start = max(after, self.done) + 1
        return sum(max(0, end - max(first, start)) for first, end in self.gaps)

    def up_to(self, sequence: int) -> Settled:
        """Have all up to this number done, and what cannot be read right behind it."""
        done = self.next_after(sequence) - 1
        return Settled(done, tuple((first, end) for first, end in self.gaps if end > done + 1))

    def with_gap(self, first: int, end: int) -> Settled:
        """Count events `first` to below `end` as unreadable."""
        first = max(first, self.done + 1)
        if first >= end:
            return self
        apart = [gap for gap in self.gaps if gap[1] < first or gap[0] > end]
        joined = [(first, end), *(gap for gap in self.gaps if gap not in apart)]
        gap = min(start for start, _ in joined), max(stop for _, stop in joined)
        return Settled(self.done, tuple(sorted([*apart, gap])))


class Marks:
    """The marks of one log: ranges of numbers that do not overlap, in order, `MAX_MARKS` at most."""

    def __init__(self, marks: Sequence[Mark] = ()) -> None:
        self._marks = list(marks)

    def all(self) -> tuple[Mark, ...]:
        """Give all marks in order."""
        return tuple(self._marks)

    def time_of(self, sequence: int) -> int | None:
        """Tell the time of the mark that covers this number, None if none does."""
        return next((mark.time_ms for mark in self._marks if mark.first <= sequence <= mark.last), None)

    def add(self, first: int, last: int, time_ms: int) -> list[Mark]:
        """Mark the numbers from first to last that are not marked yet; give the marks that are new."""
        new: list[Mark] = []
        for mark in self._marks:
            if mark.last < first or mark.first > last:
                continue
            if first < mark.first:
                new.append(Mark(first, mark.first - 1, time_ms))
            first = mark.last + 1
        if first <= last:
            new.append(Mark(first, last, time_ms))
        if new:
            self._marks = _limited(_joined(sorted([*self._marks, *new], key=_first)))
        return new

    def remove(self, gone: Mark) -> None:
        """Take the marks off the numbers that this one covers."""
        self._marks = [part for mark in self._marks for part in _without(mark, gone)]

    def correct(self, as_now: Callable[[int], int]) -> None:
        """Have the times be what this makes of them."""
        self._marks = [replace(mark, time_ms=as_now(mark.time_ms)) for mark in self._marks]

    def forget_up_to(self, sequence: int) -> None:
        """Take the marks off all numbers up to this one."""
        if self._marks and self._marks[0].first <= sequence:
            self.remove(Mark(self._marks[0].first, sequence, 0))


def _first(mark: Mark) -> int:
    return mark.first


def _without(mark: Mark, gone: Mark) -> list[Mark]:
    if gone.last < mark.first or gone.first > mark.last:
        return [mark]
    parts = (Mark(mark.first, gone.first - 1, mark.time_ms), Mark(gone.last + 1, mark.last, mark.time_ms))
    return [part for part in parts if part.first <= part.last]


def _joined(marks: Sequence[Mark]) -> list[Mark]:
    """Make one of neighbours that have the same time."""
    joined = list(marks[:1])
    for mark in marks[1:]:
        before = joined[-1]
        if mark.first == before.last + 1 and mark.time_ms == before.time_ms:
            joined[-1] = Mark(before.first, mark.last, mark.time_ms)
        else:
            joined.append(mark)
    return joined


def _limited(marks: list[Mark]) -> list[Mark]:
    """Join the neighbours that are nearest to each other, at the earlier of their times, until there are few enough."""
    while len(marks) > MAX_MARKS:
        gaps = [after.first - before.last for before, after in pairwise(marks)]
        nearest = gaps.index(min(gaps))
        before, after = marks[nearest : nearest + 2]
        marks[nearest : nearest + 2] = [Mark(before.first, after.last, min(before.time_ms, after.time_ms))]
    return marks


# What says nothing about this file in particular.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class PositionFile:
    """One position file; `was_lost` tells that there was none, or that nothing in it was good."""

    def __init__(self, path: Path, patience: Patience) -> None:
        """Read what is there.

        Raises `SpoolFormatError` when it is of a format that this version does not know; and the system's `OSError`
        when it cannot be read now.
        """
        self.path = path
        self._descriptor: int | None = None
        self._was_made = False
        self._is_lost = False
        try:
            data = path.read_bytes()
        except OSError as error:
            if not patience.is_over(path, error):
                raise
            data, self._is_lost = b"", True
        patience.forget(path)
        found = decode_position(data)
        self.was_lost = found is None
        self.position, self._turn = found or (Position(), 0)

    @property
    def was_made(self) -> bool:
        """Whether the file was saved to already, and so is there for sure."""
        return self._was_made

    def save(self, position: Position) -> None:
        """Write the position in place of the older of the two that the file holds.

        Raises the system's `OSError`; the file still holds an earlier position then.
        """
        if self._is_lost:
            self.path.unlink(missing_ok=True)
            self._is_lost = False
        turn = self._turn + 1
        slot, offset = encode_slot(position, turn), slot_offset(turn)
        try:
            if self._descriptor is None:
                self._descriptor = _preallocated(self.path)
            files.write_at(self._descriptor, slot, offset)
        except OSError as error:
            if error.errno in _NO_ROOM:
                raise
            # It may be this file alone.
            self.close()
            files.write_file(self.path, bytes(offset) + slot.ljust(POSITION_BYTES - offset, b"\0"))
        self._was_made = True
        self._turn = turn

    def close(self) -> None:
        """Let go of the file until the next save."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _preallocated(path: Path) -> int:
    descriptor = files.open_file(path)
    try:
        files.take_space(descriptor, POSITION_BYTES)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
