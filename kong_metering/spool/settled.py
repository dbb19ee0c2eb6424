"""Which events of a log need not be read (again). Pure values."""

from __future__ import annotations

from typing import NamedTuple


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
        """Have events `first` to below `end` be such that cannot be read."""
        first = max(first, self.done + 1)
        if first >= end:
            return self
        apart = [gap for gap in self.gaps if gap[1] < first or gap[0] > end]
        joined = [(first, end), *(gap for gap in self.gaps if gap not in apart)]
        gap = min(start for start, _ in joined), max(stop for _, stop in joined)
        return Settled(self.done, tuple(sorted([*apart, gap])))
