"""The events that a trial has in hand: in line, set apart, or out. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from kong_metering.trial.blame import Evidence
from kong_metering.trial.parts import Line, Part, in_order

T = TypeVar("T")


@dataclass(eq=False)
class _Case(Generic[T]):
    """Events that the endpoint named, each alone, the places of the rest of their batch, and its words."""

    named: list[Part[T]]
    rest: set[int]
    words: str


class Hand(Generic[T]):
    """Each event is in one place: `line` (to be sent, in order), `suspects` (each alone), named by the endpoint, `out`.

    Failures of what is cut up or joined are noted in `evidence`.
    """

    def __init__(self) -> None:
        self.evidence = Evidence()
        self.line: Line[T] = Line()
        self.suspects: list[Part[T]] = []
        self.out: list[Part[T]] = []
        self._cases: list[_Case[T]] = []
        self._places = 0
        self._batches = 0

    @property
    def events(self) -> int:
        """How many there are."""
        named = sum(len(case.named) for case in self._cases)
        return self.line.events + len(self.suspects) + named + sum(len(part.items) for part in self.out)

    @property
    def unsettled(self) -> list[T]:
        """All of them, in order."""
        named = [part for case in self._cases for part in case.named]
        return in_order([*self.line, *self.suspects, *named, *self.out])

    def take(self, items: Sequence[T], size: int) -> None:
        """Line events up behind the others, in parts of up to `size`."""
        for start in range(0, len(items), size):
            self._batches += 1
            piece = list(items[start : start + size])
            self.line.add(Part(piece, range(self._places, self._places + len(piece)), self._batches))
            self._places += len(piece)

    def end_pauses(self, now: float) -> None:
        """Have each part be sent from now on."""
        for part in (*self.line, *self.suspects):
            part.end_pause(now)

    # -- cutting and joining ------------------------------------------------------------------------------------------

    def cut(self, part: Part[T], *bounds: int) -> None:
        """Line the pieces of a part up that stands nowhere."""
        self._shelve(part)
        self.line.add(*part.pieces(*bounds))

    def at_most(self, part: Part[T], size: int) -> Part[T]:
        """Leave the first events of a part in the line as a part of their own, and return it."""
        if len(part.items) <= size:
            return part
        self.line.remove(part)
        self._shelve(part)
        first, rest = part.pieces(size)
        self.line.add(first, rest)
        return first

    def alone(self, depth: int) -> Part[T]:
        """Leave the event with so many in front of it as a part of its own, and return it."""
        part, index = self.line.at(depth)
        if len(part.items) == 1:
            return part
        self.line.remove(part)
        self.cut(part, index, index + 1)
        return self.line.at(depth)[0]

    def join(self, size: int, *, keep_front: bool = False) -> None:
        """Make larger parts, up to `size`, of neighbours in the line; `keep_front` leaves the oldest one as it is."""
        for part in self.line:
            if not (keep_front and part is self.line.front):
                self._shelve(part)
        self.line.join(size, keep_front=keep_front)

    def _shelve(self, part: Part[T]) -> None:
        self.evidence.shelve(part.places, part.failures, part.refusals)
        part.failures = part.refusals = 0

    # -- setting apart, and back --------------------------------------------------------------------------------------

    def set_named_apart(self, part: Part[T], named: Sequence[int], words: str) -> None:
        """Set events of a part apart that the endpoint named, and line the rest up."""
        self._shelve(part)
        rest = part.pick([index for index in range(len(part.items)) if index not in set(named)])
        rest.is_searched = True
        self.line.add(rest)
        self._cases.append(_Case([part.pick([index]) for index in named], set(rest.places), words))

    def named_beside(self, places: Sequence[int]) -> list[tuple[Part[T], str]]:
        """Take out what the endpoint named in batches that had these events too; with its words."""
        cases = [case for case in self._cases if not case.rest.isdisjoint(places)]
        self._cases = [case for case in self._cases if case not in cases]
        return [(part, case.words) for case in cases for part in case.named]

    def _let_go_of_cases(self, places: Sequence[int]) -> None:
        """Line events that the endpoint named up again where nothing of their batch is left to get through."""
        for case in self._cases:
            case.rest.difference_update(places)
            if not case.rest:
                self.line.add(*case.named)
        self._cases = [case for case in self._cases if case.rest]

    def recall_named(self) -> None:
        """Let events that the endpoint named stand in the line again."""
        cases, self._cases = self._cases, []
        for case in cases:
            self.line.add(*case.named)

    def recall_suspects(self) -> None:
        """Let events under suspicion stand in the line again."""
        suspects, self.suspects = self.suspects, []
        self.line.add(*suspects)

    def acquit_all(self, size: int) -> None:
        """Line all up again that is not out, as if nothing had failed."""
        self.evidence = Evidence()
        self.recall_named()
        self.recall_suspects()
        for part in self.line:
            part.acquit()
        self.join(size)

    def forget(self, parts: Sequence[Part[T]]) -> None:
        """Note that events are gone without being delivered."""
        for part in parts:
            self.forget_places(part.places)

    def forget_places(self, places: Sequence[int]) -> None:
        """Note that the events at these places are gone without being delivered."""
        self.evidence.forget(places)
        self._let_go_of_cases(places)

    def batch_mates(self, part: Part[T]) -> list[Part[T]]:
        """Take the other parts of a part's batch out of the line."""
        mates = [other for other in self.line if other.batch == part.batch]
        for mate in mates:
            self.line.remove(mate)
        return mates
