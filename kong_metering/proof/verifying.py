"""Finds out what became of events that were delivered: each is asked for by its id, in batches.

Contract: memory is bounded whatever the number of events. What is not there at first is looked for among the events
that still wait and the dead letters (which stand in settled segments too), and asked for again when `settle_seconds`
are over, since OpenMeter shows an event 1.6 to 2.6 s after it took it; only then is it missing. More than
`MOST_CANDIDATES` that are not there end the look: so much is wrong that the rest need not be asked for.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

import orjson

from kong_metering.proof.parking import Parking

if TYPE_CHECKING:
    from kong_metering.proof.api import Stored
    from kong_metering.proof.asking import Asked, Asker

MOST_CANDIDATES = 100_000
BATCH = 100
SAMPLE = 100
_MOST_NAMES = 10_000
_CHUNK = 10_000

T = TypeVar("T")

# Given ids, tells which of them wait or are dead letters.
StillHere = Callable[[Collection[str]], Collection[str]]


@dataclass
class Findings:
    """What was found; each event that was judged counts as one of `counts`.

    `confirmed`: stored, and OpenMeter will count it. `missing`: not stored. `unassigned`: stored, but its subject is no
    customer's. `invalid`: stored, and not counted for another reason. `unknown`: could not be asked for.
    `doubled` of the stored ones are stored more than once. `left_out` wait, or are dead letters.
    """

    counts: Counter[str] = field(default_factory=Counter)
    doubled: int = 0
    left_out: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    subjects: Counter[str] = field(default_factory=Counter)
    missing_ids: list[str] = field(default_factory=list)
    is_cut_short: bool = False

    @property
    def stored(self) -> int:
        """How many are stored, whether they will be counted or not: where none is, OpenMeter may only be behind."""
        return self.counts["confirmed"] + self.counts["unassigned"] + self.counts["invalid"]

    def judge(self, stored: list[Stored]) -> None:
        """Count an event that is stored."""
        first = stored[0]
        self.doubled += len(stored) > 1
        for fault in first.faults:
            self._count_reason(fault)
        if first.is_unassigned and (first.subject in self.subjects or len(self.subjects) < _MOST_NAMES):
            self.subjects[first.subject] += 1
        self.counts["invalid" if first.faults else "unassigned" if first.is_unassigned else "confirmed"] += 1

    def give_up(self, reason: str) -> None:
        """Count an event that could not be asked for."""
        self.counts["unknown"] += 1
        self._count_reason(reason)

    def miss(self, event_id: str) -> None:
        """Count an event that is missing."""
        self.counts["missing"] += 1
        if len(self.missing_ids) < SAMPLE:
            self.missing_ids.append(event_id)

    def _count_reason(self, reason: str) -> None:
        if reason in self.reasons or len(self.reasons) < SAMPLE:
            self.reasons[reason] += 1


class Verification:
    """One look at what became of events; `missing` are those that are to be sent again."""

    def __init__(
        self,
        asker: Asker,
        still_here: StillHere,
        wait: Callable[[float], None],
        *,
        settle_seconds: float,
    ) -> None:
        """Take what waits for some seconds."""
        self.findings = Findings()
        self._asker = asker
        self._still_here = still_here
        self._wait = wait
        self._settle_seconds = settle_seconds
        self._files = ExitStack()
        self.missing = self._files.enter_context(Parking())

    def __enter__(self) -> Verification:  # noqa: PYI034 - no Self before Python 3.11
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.close()

    def run(self, events: Iterable[bytes]) -> None:
        """Find out about events. Raises `CannotAsk`, and the system's `OSError`."""
        with Parking() as absent, Parking() as suspects:
            self._look(events, absent)
            if absent.count:
                self._sort_out(absent, suspects)
                self._wait(self._settle_seconds)
                self._look_again(suspects)

    def leave_out(self, undelivered: Iterable[bytes]) -> None:
        """Count those of events that are known not to be delivered which wait, or are dead letters."""
        for chunk in _batched(map(identified, undelivered), _CHUNK):
            self.findings.left_out += len(self._still_here({event_id for event_id, _ in chunk if event_id}))

    def recheck(self, events: Iterable[bytes]) -> int:
        """Look again for missing ones that were sent again, when they have settled; tell how many are there."""
        self._wait(self._settle_seconds)
        arrived = 0
        for batch in _batched(map(identified, events), BATCH):
            asked = self._asker.ask([each for each, _ in batch])
            for event_id, _ in batch:
                if stored := asked.stored.get(event_id):
                    self.findings.counts["missing"] -= 1
                    self.findings.judge(stored)
                    arrived += 1
                    if event_id in self.findings.missing_ids:
                        self.findings.missing_ids.remove(event_id)
        return arrived

    def _look(self, events: Iterable[bytes], absent: Parking) -> None:
        for batch in _batched(map(identified, events), BATCH):
            for event in self._judged(batch):
                absent.add(event)
            if absent.count >= MOST_CANDIDATES:
                self.findings.is_cut_short = True
                return

    def _sort_out(self, absent: Parking, suspects: Parking) -> None:
        """Leave out what waits, or is a dead letter."""
        for chunk in _batched(map(identified, absent.events()), _CHUNK):
            here = self._still_here({event_id for event_id, _ in chunk})
            for event_id, event in chunk:
                if event_id in here:
                    self.findings.left_out += 1
                else:
                    suspects.add(event)

    def _look_again(self, suspects: Parking) -> None:
        for batch in _batched(map(identified, suspects.events()), BATCH):
            for event in self._judged(batch):
                self.missing.add(event)
                self.findings.miss(identified(event)[0])

    def _judged(self, batch: list[tuple[str, bytes]]) -> Iterator[bytes]:
        """Count the events of a batch that are stored or unknown, and give the others."""
        named = [(event_id, event) for event_id, event in batch if event_id]
        for _ in range(len(batch) - len(named)):
            self.findings.give_up("the event has no id")
        asked: Asked = self._asker.ask([event_id for event_id, _ in named])
        for event_id, event in named:
            if stored := asked.stored.get(event_id):
                self.findings.judge(stored)
            elif event_id in asked.unknown:
                self.findings.give_up(asked.unknown[event_id])
            else:
                yield event


def identified(event: bytes) -> tuple[str, bytes]:
    """Return an event with its id; without one the id is empty."""
    try:
        event_id = orjson.loads(event)["id"]
    except (ValueError, KeyError, TypeError):
        return "", event
    return (event_id if isinstance(event_id, str) else ""), event


def _batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    rest = iter(items)
    while batch := list(itertools.islice(rest, size)):
        yield batch
