"""A simulated world for a trial: a virtual clock, an endpoint that is a function, a queue of numbers; no threads."""

from __future__ import annotations

import heapq
import itertools
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from kong_metering.trial.decisions import Answered, Note, Pause, Rules, Send, Take
from kong_metering.trial.outcome import Delivered, Failed, Outcome, Rejected
from kong_metering.trial.trial import Trial

if TYPE_CHECKING:
    from kong_metering.reasons import Dropped
    from kong_metering.trial.parts import Part

Endpoint = Callable[[list[int]], Outcome]

RULES = Rules(
    batch_size=100,
    in_flight=1,
    initial_retry_delay=0.01,
    max_retry_delay=60.0,
    max_retry_time=60.0,
    failure_threshold=0,
    breaker_cooldown=60.0,
    keeps=True,
)
DELIVERED = Delivered()
DOWN = Failed("answered 503", "503")
HANGS = Failed("no answer", "ReadTimeout")
RESETS = Failed("reset", "ConnectionResetError")
UNREACHABLE = Failed("refused", "ConnectionRefusedError", may_have_arrived=False)
FORBIDDEN = Failed("answered 403", "403", is_misconfigured=True, may_have_arrived=False)
NOT_FOUND = Failed("answered 404", "404", is_misconfigured=True, may_have_arrived=False)
UNAUTHORIZED = Failed("answered 401", "401", is_misconfigured=True, may_have_arrived=False)
TOO_MANY = Failed("answered 429", "429", retry_after=5.0, may_have_arrived=False)
LIMITED = Failed("answered 429", "429", may_have_arrived=False)
CUT_OFF = Failed("broken pipe", "BrokenPipeError", may_have_arrived=False, is_begun=True)
BAD = Rejected("answered 400")
# What an event can be the reason for.
ABOUT_AN_EVENT = (BAD, FORBIDDEN, RESETS, HANGS, DOWN, NOT_FOUND, UNAUTHORIZED, LIMITED, TOO_MANY, CUT_OFF)
ALL_FAILURES = (UNREACHABLE, *ABOUT_AN_EVENT)


def take_all(_: list[int]) -> Outcome:
    return DELIVERED


def choking(bad: Iterable[int], outcome: Outcome = DOWN) -> Endpoint:
    """Make an endpoint that gives this answer to whatever has one of these events in it."""
    bad = set(bad)
    return lambda events: DELIVERED if bad.isdisjoint(events) else outcome


class World:
    """Runs one trial; all that comes of it is kept for looking at."""

    def __init__(
        self,
        endpoint: Endpoint = take_all,
        *,
        takes: float = 0.001,
        stumbles: Callable[[], bool] = lambda: False,
        **rules: float,
    ) -> None:
        """Begin; `stumbles` tells of each part that is to be sent whether it comes back without an answer."""
        self.rules = replace(RULES, **rules)  # type: ignore[arg-type]
        self.endpoint = endpoint
        self.takes = takes
        self._stumbles = stumbles
        self.now = 1000.0
        self.trial: Trial[int] = Trial(self.rules, self.now)
        self.queue: deque[int] = deque()
        self.put_so_far = 0
        self.requests: list[list[int]] = []
        self.sent_at: list[float] = []
        self.delivered: list[int] = []
        self.refused: dict[int, str] = {}
        self.given_up: dict[int, Dropped | None] = {}
        self.notes: list[Note] = []
        self.words: list[str] = []
        self.most_held = 0
        self.in_doubt: set[int] = set()
        self._order = itertools.count()
        self._out: list[tuple[float, int, Part[int], Outcome]] = []

    def put(self, count: int) -> None:
        """Let so many more events come."""
        self.queue.extend(range(self.put_so_far, self.put_so_far + count))
        self.put_so_far += count

    def step(self, until: float) -> bool:
        """Let the trial decide once, or time pass; False when nothing is left to happen until then."""
        decision = self.trial.next(self.now, len(self.queue))
        match decision:
            case Take(limit):
                assert 0 < limit <= len(self.queue)
                self.trial.take([self.queue.popleft() for _ in range(limit)], self.now)
                self.most_held = max(self.most_held, len(self.trial.unsettled()))
            case Send(part):
                self._post(part)
            case Answered():
                assert decision.given_up
                self._account(decision)
            case Pause(moment):
                assert moment is None or moment > self.now
                return self._pass_time(moment, until)
        return True

    def run(self, *, seconds: float = 1e6, until: Callable[[], bool] = lambda: False) -> World:
        """Go on until nothing happens any more, for so long, or until a condition holds."""
        end = self.now + seconds
        while not until() and self.now < end and not self.is_done and self.step(end):
            pass
        return self

    @property
    def is_done(self) -> bool:
        return len(self.delivered) + len(self.refused) + len(self.given_up) == self.put_so_far

    def reconfigure(self, **rules: float) -> None:
        self.rules = replace(self.rules, **rules)  # type: ignore[arg-type]
        self.trial.reconfigure(self.rules, self.now)

    def texts(self, kind: str) -> list[str]:
        return [note.text for note in self.notes if note.kind == kind]

    @property
    def late(self) -> list[int]:
        """Events that were delivered after a younger one."""
        late, newest = [], -1
        for event in self.delivered:
            late += [event] if event < newest else []
            newest = max(newest, event)
        return late

    def check_account(self) -> None:
        """Each event is in exactly one place."""
        ends = Counter([*self.delivered, *self.refused, *self.given_up, *self.trial.unsettled(), *self.queue])
        assert ends == Counter(range(self.put_so_far))

    def _post(self, part: Part[int]) -> None:
        assert part.items
        assert len(part.items) <= self.rules.batch_size
        if self._stumbles():
            self.trial.recall(part)
            return
        self.requests.append(list(part.items))
        self.sent_at.append(self.now)
        heapq.heappush(self._out, (self.now + self.takes, next(self._order), part, self.endpoint(list(part.items))))

    def _pass_time(self, moment: float | None, until: float) -> bool:
        moments = [*([moment] if moment is not None else []), *(out[0] for out in self._out[:1])]
        if not moments or min(moments) > until:
            self.now = until if moments else self.now
            return False
        self.now = max(self.now, min(moments))
        if self._out and self._out[0][0] <= self.now:
            _, _, part, outcome = heapq.heappop(self._out)
            if isinstance(outcome, Failed) and outcome.may_have_arrived:
                self.in_doubt.update(part.items)
            answered = self.trial.answer(part, outcome, self.now)
            if isinstance(outcome, Delivered):
                assert list(answered.settled) == list(part.items)
            self._account(answered)
        return True

    def _account(self, answered: Answered[int]) -> None:
        self.delivered += answered.settled
        self.in_doubt.difference_update(answered.settled)
        self.refused.update(answered.refused)
        self.given_up.update(dict.fromkeys(answered.given_up, answered.reason))
        self.words += [answered.words] if answered.words else []
        self.notes += answered.notes
