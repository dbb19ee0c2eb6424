"""Parts: events that are sent together, a batch or a piece of one, and the line in which they stand. Pure."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from kong_metering.trial.blame import Seen, Suspicion

T = TypeVar("T")


@dataclass(eq=False)
class Part(Generic[T]):
    """Events that are sent together, and how they fared; `items` is for whoever sends them, the rest for the trial.

    `places`: where each one stands in the order of all; `batch`: with which others it was taken. `since`: when they
    were first sent (monotonic). `failures`, `refusals`: of this very part. `is_searched`: something was found to be
    wrong with the part that it is a piece of. `may_have_arrived`: the endpoint may hold each of them. `seen`: what the
    trial had seen of the endpoint when they first failed, `passes_then` when a single one first failed alone.
    `suspicion`: of a single one that is under suspicion.
    """

    items: list[T]
    places: Sequence[int]
    batch: int
    since: float | None = None
    failures: int = 0
    refusals: int = 0
    is_searched: bool = False
    may_have_arrived: bool = False
    not_before: float = -math.inf
    generation: int = 0
    round: int = 0
    is_last_try: bool = False
    seen: Seen | None = None
    passes_then: int | None = None
    suspicion: Suspicion | None = field(default=None, repr=False)

    def sent(self, now: float, *, generation: int, round: int, is_last_try: bool) -> None:  # noqa: A002 - the field's name
        """Note that it goes out."""
        if self.since is None:
            self.since = now
        self.generation = generation
        self.round = round
        self.is_last_try = is_last_try

    def failed(self, *, is_refusal: bool, may_have_arrived: bool, seen: Seen) -> None:
        """Count a failure; `seen`: what the trial has seen of the endpoint by now."""
        self.failures += 1
        self.refusals += is_refusal
        self.may_have_arrived |= may_have_arrived
        self.seen = self.seen or seen

    def let_go(self, items: Sequence[T]) -> list[int]:
        """Let events go (by identity); return where they stood."""
        gone = {id(item) for item in items}
        pairs = list(zip(self.places, self.items, strict=True))
        self.places = [place for place, item in pairs if id(item) not in gone]
        self.items = [item for _, item in pairs if id(item) not in gone]
        return [place for place, item in pairs if id(item) in gone]

    def end_pause(self, now: float) -> None:
        """Have it be sent from now on."""
        self.not_before = min(self.not_before, now)

    def acquit(self) -> None:
        """Forget how it fared, but for whether it may have arrived."""
        self.suspicion = self.seen = self.passes_then = None
        self.failures = self.refusals = 0
        self.is_searched = False
        self.not_before = -math.inf

    def pick(self, indexes: Sequence[int]) -> Part[T]:
        """Return a part of some of its events, with its history but for the failures."""
        return self._with([self.items[index] for index in indexes], [self.places[index] for index in indexes])

    def pieces(self, *bounds: int) -> list[Part[T]]:
        """Return the parts that cuts before these indexes make; those without an event are left out."""
        edges = [0, *bounds, len(self.items)]
        return [self._with(self.items[a:b], self.places[a:b]) for a, b in itertools.pairwise(edges) if b > a]

    def _with(self, items: list[T], places: Sequence[int]) -> Part[T]:
        return Part(
            items,
            places,
            self.batch,
            self.since,
            is_searched=self.is_searched,
            may_have_arrived=self.may_have_arrived,
            is_last_try=self.is_last_try,
            seen=self.seen,
        )


def thirds(size: int) -> list[int]:
    """Return where to cut a batch of two or more in three, or in two where it is small.

    Finding one bad event among n by thirds takes 3·log3(n) requests, fewer than the 2·log2(n) that halves take.
    """
    count = 2 if size in (2, 4) else 3
    piece, larger = divmod(size, count)
    return [number * piece + min(number, larger) for number in range(1, count) if number < size]


class Line(Generic[T]):
    """Parts in the order of their events."""

    def __init__(self) -> None:
        self._parts: list[Part[T]] = []
        self.events = 0

    def __iter__(self) -> Iterator[Part[T]]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    @property
    def front(self) -> Part[T]:
        """The oldest part."""
        return self._parts[0]

    def add(self, *parts: Part[T]) -> None:
        """Line parts up in their places."""
        for part in parts:
            bisect.insort(self._parts, part, key=_place)
            self.events += len(part.items)

    def remove(self, part: Part[T]) -> None:
        """Take a part out."""
        self._parts.remove(part)
        self.events -= len(part.items)

    def at(self, depth: int) -> tuple[Part[T], int]:
        """Return the part that has the event with so many in front of it, and its index there."""
        for part in self._parts:
            if depth < len(part.items):
                return part, depth
            depth -= len(part.items)
        raise IndexError(depth)

    def depths_in_doubt(self) -> list[int]:
        """Return how many events stand in front of each one that the endpoint may hold."""
        flags = [part.may_have_arrived for part in self._parts for _ in part.items]
        return [depth for depth, may_have_arrived in enumerate(flags) if may_have_arrived]

    def join(self, size: int, *, keep_front: bool) -> None:
        """Make parts of `size`, the last one smaller; `keep_front` leaves the oldest part as it is."""
        kept = 1 if keep_front else 0
        joined = self._parts[:kept]
        for part in self._parts[kept:]:
            room = size - len(joined[-1].items) if len(joined) > kept else 0
            pieces = part.pieces(*range(room, len(part.items), size))
            if room > 0:
                joined[-1] = _joined(joined[-1], pieces.pop(0))
            joined += pieces
        self._parts = joined

    def clear(self) -> list[Part[T]]:
        """Take all parts out."""
        parts, self._parts, self.events = self._parts, [], 0
        return parts


def _place(part: Part[T]) -> int:
    return part.places[0]


def _joined(one: Part[T], other: Part[T]) -> Part[T]:
    """Make one part of two; whoever joins them has noted their failures before."""
    return Part(
        one.items + other.items,
        [*one.places, *other.places],
        one.batch,
        one.since if other.since is None or one.since is None else min(one.since, other.since),
        is_searched=one.is_searched or other.is_searched,
        may_have_arrived=one.may_have_arrived and other.may_have_arrived,
        seen=one.seen if other.seen is None or one.seen is None else min(one.seen, other.seen),
    )


def in_order(parts: Iterable[Part[T]]) -> list[T]:
    """Return the events of parts in their order."""
    pairs = [pair for part in parts for pair in zip(part.places, part.items, strict=True)]
    return [item for _, item in sorted(pairs, key=lambda pair: pair[0])]
