"""Which events were sent, and when, without it being known whether they arrived.

Pure. Ranges of sequence numbers that do not overlap, in order, `MAX_MARKS` at most.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

from kong_metering.spool.format import MAX_MARKS, Mark


class Marks:
    """The marks of one log."""

    def __init__(self, marks: Sequence[Mark] = ()) -> None:
        self._marks = list(marks)

    @property
    def end(self) -> int:
        """The number behind the last one that is marked; 0 without marks."""
        return self._marks[-1].last + 1 if self._marks else 0

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
