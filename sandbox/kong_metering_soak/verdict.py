"""Whether a soak's account adds up. Pure: records in, findings out.

What must hold:

- Every request whose log phase was answered has its event at the collector or among the dead letters; but for those
  that a process answered less than `GRACE_SECONDS` before it was killed with SIGKILL, which may have one.
- No event is there that no request asked for, and none went to another endpoint or with another entity's token.
- An id never has two contents, and a request never two ids. The same event sent twice is allowed, and counted.
- No good event is among the dead letters: only those that the endpoint was told to refuse, or a firewall to dislike.
- Each process's own account adds up: accepted + adopted = delivered + dead letters + dropped + left + waiting.
- Nothing waits at the end.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kong_metering_soak.traffic import Asked

GRACE_SECONDS = 0.010
_READ_LATE_SECONDS = 1.0


@dataclass(frozen=True)
class Answered:
    """A log phase that a plugin server answered: which request, when (monotonic clock), and which process.

    `access_pid` is the process that had answered the request's access phase, None if nobody did.
    """

    number: int
    request_id: str
    at: float
    pid: int
    access_pid: int | None = None


@dataclass(frozen=True)
class Killed:
    """A process that got SIGKILL without a warning, and when (monotonic clock)."""

    pid: int
    at: float


@dataclass(frozen=True)
class Event:
    """An event, at the collector or among the dead letters; `number` is None when it names no request of ours.

    `route` is whose endpoint and token it came with, None when they do not belong together; `reason` says why it is a
    dead letter, None for one that was collected.
    """

    number: int | None
    id: str
    subject: str
    route: str | None
    reason: str | None = None


@dataclass(frozen=True)
class ProcessAccount:
    """What a process says of its events; `source` tells where."""

    pid: int
    source: str
    came: Mapping[str, int]
    went: Mapping[str, int]

    @property
    def holds(self) -> bool:
        """Whether it adds up; what is worked out from the other counts, and so adds up always, is not below zero."""
        counts = (*self.came.values(), *self.went.values())
        return sum(self.came.values()) == sum(self.went.values()) and min(counts, default=0) >= 0


@dataclass(frozen=True)
class Evidence:
    """Everything that the verdict rests on. `asked` has the requests that were sent, by number."""

    asked: Mapping[int, Asked]
    answered: Sequence[Answered]
    collected: Sequence[Event]
    letters: Sequence[Event]
    killed: Sequence[Killed] = ()
    accounts: Sequence[ProcessAccount] = ()
    duplicates: int = 0
    conflicts: int = 0
    waiting: int = 0


@dataclass(frozen=True)
class Missing:
    """A request without an event, and how long before its process's SIGKILL it was answered, endless if it got none."""

    answered: Answered
    seconds_before_kill: float


@dataclass(frozen=True)
class Verdict:
    """What was found; `lost` and `violations` are empty when all holds. `excused` are missing, and may be.

    `buried_good` counts the dead letters that are none of those that were planted; each is a violation too.
    """

    due: int
    collected: int
    letters: Mapping[str, int]
    buried_good: int
    unanswered: int
    in_grace: int
    lost: tuple[Missing, ...]
    excused: tuple[Missing, ...]
    violations: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """Whether nothing is lost and nothing is wrong."""
        return not self.lost and not self.violations


def judge(evidence: Evidence) -> Verdict:
    """Compare what was answered with what arrived."""
    due = [answered for answered in evidence.answered if _is_due(evidence, answered)]
    found = {event.number for event in (*evidence.collected, *evidence.letters)}
    killed = defaultdict(list)
    for kill in evidence.killed:
        killed[kill.pid].append(kill.at)
    before = {answered: _seconds_before(answered, killed[answered.pid]) for answered in due}
    missing = [Missing(answered, before[answered]) for answered in due if answered.number not in found]
    return Verdict(
        due=len(due),
        collected=len(evidence.collected),
        letters=Counter(event.reason or "" for event in evidence.letters),
        buried_good=sum(_blame(letter, evidence.asked) is not None for letter in evidence.letters),
        unanswered=len(found - {answered.number for answered in evidence.answered}),
        in_grace=sum(seconds < GRACE_SECONDS for seconds in before.values()),
        lost=tuple(one for one in missing if one.seconds_before_kill >= GRACE_SECONDS),
        excused=tuple(one for one in missing if one.seconds_before_kill < GRACE_SECONDS),
        violations=tuple(_violations(evidence)),
    )


def _is_due(evidence: Evidence, answered: Answered) -> bool:
    asked = evidence.asked.get(answered.number)
    return asked is not None and asked.subject is not None


def _seconds_before(answered: Answered, kills: Sequence[float]) -> float:
    """Tell how long before its process's SIGKILL, if it got one, a request was answered; `kills` are those of its id.

    Below zero: it had been answered before, and was read afterwards. Further below it is another process's kill, which
    had the same id.
    """
    return min((at - answered.at for at in kills if at - answered.at > -_READ_LATE_SECONDS), default=float("inf"))


def _violations(evidence: Evidence) -> Iterable[str]:
    events = (*evidence.collected, *evidence.letters)
    yield from filter(None, (_objection(event, evidence.asked) for event in events))
    yield from filter(None, (_blame(letter, evidence.asked) for letter in evidence.letters))
    yield from _identity_troubles(events)
    if evidence.conflicts:
        yield f"{evidence.conflicts} events came with the id of another one, and other content"
    if evidence.waiting:
        yield f"{evidence.waiting} events still wait, though the endpoint works"
    for account in evidence.accounts:
        if not account.holds:
            yield f"process {account.pid} does not add up: {said(account)}"


def _objection(event: Event, all_asked: Mapping[int, Asked]) -> str | None:
    """Say what is wrong with an event, next to the request that it names; None when nothing is."""
    asked = None if event.number is None else all_asked.get(event.number)
    if asked is None or asked.subject is None:
        return f"event {event.id} is there, and no request asked for it"
    if event.subject != asked.subject:
        return f"event {event.id} bills {event.subject}, request {event.number} was {asked.subject}'s"
    if event.route != asked.route:
        return f"event {event.id} of {asked.route} went to {event.route or 'nobody we know'}"
    return None


def _blame(letter: Event, all_asked: Mapping[int, Asked]) -> str | None:
    """Say what is wrong with a dead letter; None when its event was planted to become one."""
    asked = None if letter.number is None else all_asked.get(letter.number)
    if asked is None or asked.is_planted:
        return None
    return f"event {letter.id} is good, and is among the dead letters: {letter.reason}"


def _identity_troubles(events: Iterable[Event]) -> Iterable[str]:
    ids, numbers = defaultdict(set), defaultdict(set)
    for event in events:
        ids[event.number].add(event.id)
        numbers[event.id].add((event.number, event.subject))
    yield from (f"request {number} has the ids {sorted(found)}" for number, found in ids.items() if len(found) > 1)
    yield from (f"id {name} has two contents" for name, found in numbers.items() if len(found) > 1)


def said(account: ProcessAccount) -> str:
    """Write an account as an equation."""
    came, went = (
        " + ".join(f"{count} {name}" for name, count in side.items()) for side in (account.came, account.went)
    )
    return f"{came} {'=' if account.holds else '≠'} {went}"
