"""Whether the torture test's account adds up. Pure: what was put, what arrived and who was killed in, findings out.

What must hold:

- Each event whose `put` returned was taken by the endpoint or is a dead letter. Where what is not written yet is in the
  process's own memory, those that were put less than `allowance` before the SIGKILL may be missing.
- No id has two contents, and nobody's event is there that he did not put (the one after the last that he told of is:
  he was killed before he could).
- No event is in two processes' requests at the same time. A request ends with its answer, or its process's death.
- An event comes again after the endpoint took it only if it may not have been noted before its sender was killed: it
  was answered less than `NOTING_SECONDS` before, or one that was put before it was not settled (a log's position is a
  number: what stands behind an event that waits comes again with it).
- Where a queue has an order, each process's events arrive for the first time in the order in which they were put, but
  for `MOST_AHEAD` that may be tried ahead of others while nothing gets through, and those that were put less than
  `overtaking` before the SIGKILL: where others do not see what a killed process left in memory, one may send what its
  log has while another one sends what it had not written.
- Only what the endpoint refuses is a dead letter; nothing waits in the end; nothing unreadable came.
"""

from __future__ import annotations

import bisect
import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from kong_metering_torture.events import Name, Put

# How long a process may take from an answer to the note of it on disk, where many share few cores.
NOTING_SECONDS = 1.0
# How long after a process's first event its logs may still be in the making.
STARTING_SECONDS = 0.1
# One event further behind is tried while nothing gets through, one more after a minute, and after an hour.
MOST_AHEAD = 3
_NEVER = float("inf")


class Fate(Enum):
    """What the endpoint made of a request."""

    TAKEN = "taken"
    REFUSED = "refused"
    FAILED = "failed"
    UNANSWERED = "unanswered"


class Arrival(NamedTuple):
    """An event in a request that the endpoint read whole; times by the monotonic clock, `place` its place there."""

    name: Name
    content: bytes
    process: str
    start: float
    end: float
    place: int
    fate: Fate


@dataclass(frozen=True)
class Evidence:
    """Everything that the verdict rests on.

    `contents` has those of the events that were put, `letters` those of dead letters; `kills` the time of each
    process's SIGKILL; `unordered` the queues that promise no order.
    """

    puts: Sequence[Put]
    contents: Mapping[Name, bytes]
    arrivals: Sequence[Arrival]
    letters: Sequence[tuple[Name, bytes]]
    kills: Mapping[str, float]
    allowance: float = 0.0
    overtaking: float = 0.0
    unordered: frozenset[int] = frozenset()
    waiting: int = 0
    unreadable: int = 0


@dataclass(frozen=True)
class Verdict:
    """What was counted, and what is wrong: by the rule that it breaks, all of which are named, in words."""

    counts: Mapping[str, int | float]
    wrong: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        """True if nothing is wrong."""
        return not any(self.wrong.values())


def judge(evidence: Evidence) -> Verdict:
    """Compare what was put with what arrived."""
    by_name: dict[Name, list[Arrival]] = defaultdict(list)
    for arrival in sorted(evidence.arrivals, key=lambda one: (one.start, one.place)):
        by_name[arrival.name].append(arrival)
    taken = Counter(one.name for one in evidence.arrivals if one.fate is Fate.TAKEN)
    letters = Counter(name for name, _ in evidence.letters)
    found = taken.keys() | letters.keys()
    missing = {put: _before_kill(put, evidence) for put in evidence.puts if put.name not in found}
    excused = {put: age for put, age in missing.items() if age < evidence.allowance}
    lost = {put: age for put, age in missing.items() if put not in excused}
    begun = _begun(evidence.puts)
    again = list(_again(evidence, by_name))
    wrong = {
        "accepted events lost": [
            f"{put.name.id}, put {age * 1000:.2f} ms before the SIGKILL" for put, age in lost.items()
        ],
        "ids with two contents": list(_two_contents(evidence)),
        "events that nobody put": list(_not_put(evidence, by_name, letters)),
        "events in flight by two processes at a time": list(_overlapping(evidence, by_name)),
        "taken again, though it was noted": [one.words for one in again if not one.is_allowed],
        "out of order": list(_out_of_order(evidence, by_name)),
        "dead letters that nobody refused": [name.id for name in letters if not name.is_bad],
        "still waiting": [f"{evidence.waiting} events"] if evidence.waiting else [],
        "unreadable requests": [f"{evidence.unreadable} requests"] if evidence.unreadable else [],
    }
    counts = {
        "SIGKILLs": len(evidence.kills),
        "events whose put returned": len(evidence.puts),
        "  taken by the endpoint": len(taken),
        "  dead letters": len(letters),
        "  missing, which is allowed": len(excused),
        "  the oldest of them, ms before the SIGKILL": round(max(excused.values(), default=0.0) * 1000, 2),
        "  lost, put in the first 100 ms of a process": sum(
            put.at - begun[put.name.process] < STARTING_SECONDS for put in lost
        ),
        "  lost, others": sum(put.at - begun[put.name.process] >= STARTING_SECONDS for put in lost),
        "  the oldest of these others, ms before the SIGKILL": round(
            max((age for put, age in lost.items() if put.at - begun[put.name.process] >= STARTING_SECONDS), default=0.0)
            * 1000,
            2,
        ),
        "events whose put had not returned, taken or dead letters": len(found - {put.name for put in evidence.puts}),
        "events that arrived more than once": sum(len(arrivals) > 1 for arrivals in by_name.values()),
        "events that were taken more than once": sum(count > 1 for count in taken.values()),
        "  behind one that waited": sum(one.is_behind_another for one in again),
        "  others, the longest time from answer to SIGKILL, ms": round(
            max((one.seconds_before_kill for one in again if not one.is_behind_another), default=0.0) * 1000, 1
        ),
        "dead letters that are there twice": sum(count > 1 for count in letters.values()),
    }
    return Verdict(counts, wrong)


def _before_kill(put: Put, evidence: Evidence) -> float:
    """Tell how long before its process's SIGKILL an event was put; endless if that got none."""
    return evidence.kills.get(put.name.process, _NEVER) - put.at


def _begun(puts: Iterable[Put]) -> dict[str, float]:
    """Tell when each process put its first event."""
    begun: dict[str, float] = {}
    for put in puts:
        begun[put.name.process] = min(put.at, begun.get(put.name.process, _NEVER))
    return begun


def _two_contents(evidence: Evidence) -> Iterator[str]:
    contents: dict[Name, set[bytes]] = defaultdict(set)
    found = ((arrival.name, arrival.content) for arrival in evidence.arrivals)
    for name, content in itertools.chain(evidence.contents.items(), found, evidence.letters):
        contents[name].add(content)
    yield from (name.id for name, several in contents.items() if len(several) > 1)


def _not_put(evidence: Evidence, arrived: Iterable[Name], buried: Iterable[Name]) -> Iterator[str]:
    known = {put.name for put in evidence.puts}
    told = Counter(put.name.process for put in evidence.puts)
    unknown = {name for name in (*arrived, *buried) if name not in known}
    yield from (name.id for name in unknown if name.number != told[name.process])


def _overlapping(evidence: Evidence, by_name: Mapping[Name, Sequence[Arrival]]) -> Iterator[str]:
    for name, arrivals in by_name.items():
        for one, other in itertools.combinations(arrivals, 2):
            end = min(one.end, evidence.kills.get(one.process, _NEVER))
            if one.process != other.process and other.start < end:
                yield f"{name.id}, by {one.process} and {other.process} for {(end - other.start) * 1000:.2f} ms"
                break


class _Again(NamedTuple):
    """An event that came again after it was taken: how long before its sender's SIGKILL, and what stood before it."""

    words: str
    seconds_before_kill: float
    is_behind_another: bool
    is_allowed: bool


def _again(evidence: Evidence, by_name: Mapping[Name, Sequence[Arrival]]) -> Iterator[_Again]:
    settled = _Settled(by_name)
    for name, arrivals in by_name.items():
        for one, other in itertools.pairwise(arrivals):
            if one.fate is Fate.TAKEN:
                killed = evidence.kills.get(one.process, _NEVER)
                yield _Again(
                    f"{name.id}, taken {(killed - one.end) * 1000:.0f} ms before the SIGKILL of {one.process}",
                    killed - one.end,
                    settled.waits_before(name, killed),
                    other.process != one.process
                    and (killed - one.end < NOTING_SECONDS or settled.waits_before(name, killed - NOTING_SECONDS)),
                )


class _Settled:
    """When the events of each log were settled."""

    def __init__(self, by_name: Mapping[Name, Sequence[Arrival]]) -> None:
        self._numbers: dict[tuple[str, int], list[int]] = defaultdict(list)
        # The latest time at which an event up to that one was settled.
        self._latest: dict[tuple[str, int], list[float]] = {}
        for name in sorted(by_name):
            log = name.process, name.queue
            before = self._latest.setdefault(log, [])
            self._numbers[log].append(name.number)
            before.append(max(before[-1] if before else 0.0, _settled_at(by_name[name])))

    def waits_before(self, name: Name, time: float) -> bool:
        """Return whether an event that stands before this one in its log was not settled at this time."""
        log = name.process, name.queue
        index = bisect.bisect_left(self._numbers[log], name.number)
        return index > 0 and self._latest[log][index - 1] > time


def _settled_at(arrivals: Sequence[Arrival]) -> float:
    """Tell when an event was settled: not before it came for the last time, whoever took it before."""
    return arrivals[-1].end


def _out_of_order(evidence: Evidence, by_name: Mapping[Name, Sequence[Arrival]]) -> Iterator[str]:
    arrived: dict[tuple[str, int], list[int]] = defaultdict(list)
    last = {name for name, at in evidence.puts if evidence.kills.get(name.process, _NEVER) - at < evidence.overtaking}
    for name in sorted(by_name.keys() - last, key=lambda name: (by_name[name][0].start, by_name[name][0].place)):
        before = arrived[name.process, name.queue]
        ahead = before[bisect.bisect(before, name.number) :]
        if len(ahead) > MOST_AHEAD and name.queue not in evidence.unordered:
            yield f"{name.id} arrived after {len(ahead)} newer ones, {ahead[-1]} among them"
        bisect.insort(before, name.number)
