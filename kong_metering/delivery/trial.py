"""What to send next, and whose fault a failure is: answers and a clock's reading in, decisions out. Pure.

An answer says something about an event only if the endpoint is seen to take others. So:

- While nothing gets through it is the endpoint, or the configuration, whatever it answers. All waits, in order; the
  oldest event probes (`probing`), with growing pauses. When something gets through batches go again.
- While requests fail at random, as often as they did lately, what failed is sent again as it is, with short pauses.
- Where others get through, what goes on failing is cut up until one event is alone, set apart, and tried between the
  others until it gets through or is found to be to blame (`blame`). Events that the endpoint names are set apart at
  once, and refused when the rest of their batch got through.

Contract: whoever drives it calls one method at a time. `next` tells what to do; a part that was sent comes back by
`answer`, sooner or later, and what was asked for by `take`. It holds a batch and `REACH` events more at most (with many
in flight: these and `REACH`), whatever fails.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from kong_metering.delivery.blame import OUTAGE_CHANCE, Evidence, Test
from kong_metering.delivery.decisions import Answered, Decision, Note, Pause, Rules, Send, Take
from kong_metering.delivery.outcome import Delivered, Failed, Outcome, Rejected
from kong_metering.delivery.parts import Line, Part, in_order, thirds
from kong_metering.delivery.probing import IN_A_ROW, Silence
from kong_metering.delivery.retrying import Breaker, gives_up, retry_delay
from kong_metering.stats import Dropped

__all__ = ["Answered", "Decision", "Note", "Part", "Pause", "Rules", "Send", "Take", "Trial"]

T = TypeVar("T")

# How many events are held besides a batch: under suspicion, or to reach behind bad ones in a row.
REACH = 100
# While an event is under suspicion what waits is sent in so many parts at least: each is a witness.
_WITNESSES = 32
# Where others fail as often as this, there are enough of them.
_MANY_FAILURES = 0.5
# One in so many events under suspicion is tried for each request of others that gets through, but one at least.
_SUSPECTS_A_TURN = 10


@dataclass(eq=False)
class _Case(Generic[T]):
    """Events that the endpoint named, each alone, and the places of the rest of their batch."""

    named: list[Part[T]]
    rest: set[int]
    words: str


class Trial(Generic[T]):
    """The events that one queue has in hand, and what is known of the endpoint; an event may be anything."""

    def __init__(self, rules: Rules, now: float) -> None:
        self._rules = rules
        self._line: Line[T] = Line()
        self._suspects: list[Part[T]] = []
        self._cases: list[_Case[T]] = []
        self._out: list[Part[T]] = []
        self._evidence = Evidence()
        self._silence = Silence()
        self._breaker = Breaker()
        self._places = 0
        self._batches = 0
        self._generation = 0
        self._works_since = now
        self._turns = 0
        self._is_closing = False
        self._is_over = False

    # -- what to do next ----------------------------------------------------------------------------------------------

    def next(self, now: float, ready: int) -> Decision[T]:
        """Return what to do now; `ready`: how many events may leave the queue by the batching rule."""
        if len(self._out) >= self._rules.in_flight or self._is_over:
            return Pause(None)
        if self._is_closing:
            return self._next_at_the_end(now, ready)
        if self._breaker.is_open and not self._rules.keeps:
            return self._next_behind_breaker(now, ready)
        until = max(self._silence.until, self._breaker.probe_at(self._rules))
        if until > now:
            return Pause(until) if self._holds or ready else Pause(None)
        if self._silence.is_probing and self._line:
            return self._next_probe(now, ready)
        return self._next_in_turn(now, ready)

    def take(self, items: Sequence[T], now: float) -> None:  # noqa: ARG002 - time may come to matter here
        """Take events in, in their order; those that `next` asked for, or fewer."""
        self._batches += 1
        size = self._rules.batch_size
        for start in range(0, len(items), size):
            piece = list(items[start : start + size])
            self._line.add(Part(piece, range(self._places, self._places + len(piece)), self._batches))
            self._places += len(piece)

    @property
    def _holds(self) -> int:
        named = sum(len(case.named) for case in self._cases)
        out = sum(len(part.items) for part in self._out)
        return self._line.events + len(self._suspects) + named + out

    @property
    def _room(self) -> int:
        rules = self._rules
        return rules.batch_size * rules.in_flight + REACH - self._holds

    def _send(self, part: Part[T], now: float) -> Send[T]:
        if part.since is None:
            part.since = now
        part.generation = self._generation
        part.round = self._silence.rounds
        part.is_last_try = self._is_closing
        self._breaker.probe(now)
        self._out.append(part)
        return Send(part)

    def _send_from_line(self, part: Part[T], now: float) -> Send[T]:
        self._line.remove(part)
        return self._send(part, now)

    def _next_in_turn(self, now: float, ready: int) -> Decision[T]:
        suspect = self._suspect_in_turn()
        if suspect is not None:
            self._turns -= 1
            self._suspects.remove(suspect)
            return self._send(suspect, now)
        part = self._first_free(now)
        size = self._size(ready)
        if part is not None:
            return self._send_from_line(self._at_most(part, size), now)
        if ready and (not self._line or self._rules.in_flight > 1) and self._room > 0:
            free = self._rules.in_flight - len(self._out)
            return Take(min(ready, self._room, size * free))
        if self._line:
            in_order = self._rules.in_flight == 1
            return Pause(self._line.front.not_before if in_order else min(part.not_before for part in self._line))
        return self._next_without_others(now)

    def _first_free(self, now: float) -> Part[T] | None:
        """Return the oldest part that may go now; in order, none overtakes it."""
        if self._rules.in_flight == 1:
            return self._line.front if self._line and self._line.front.not_before <= now else None
        return next((part for part in self._line if part.not_before <= now), None)

    def _size(self, ready: int) -> int:
        """Return how many events may go in a request: few while an event is under suspicion and few others wait."""
        size = self._rules.batch_size
        if not self._suspects or self._evidence.failure_share >= _MANY_FAILURES:
            return size
        return max(1, min(size, (self._line.events + ready) // _WITNESSES))

    def _suspect_in_turn(self) -> Part[T] | None:
        if not self._suspects or self._turns <= 0:
            return None
        passes = self._evidence.passes
        return next((part for part in self._suspects if _test(part).passes < passes and _test(part).wait <= 0), None)

    def _next_without_others(self, now: float) -> Decision[T]:
        """Try an event under suspicion once in a while where nothing else waits."""
        if not self._suspects:
            return Pause(None)
        part = min(self._suspects, key=lambda part: part.not_before)
        if part.not_before > now:
            return Pause(part.not_before)
        self._suspects.remove(part)
        return self._send(part, now)

    def _next_probe(self, now: float, ready: int) -> Decision[T]:
        if any(part.round == self._silence.rounds for part in self._out):
            return Pause(None)
        if not self._silence.is_others_turn:
            return self._send_from_line(self._alone(0), now)
        depth = self._other_depth()
        if depth is not None and depth >= self._line.events and ready and self._room > 0:
            return Take(min(depth + 1 - self._line.events, ready, self._room))
        depth = None if depth is None else min(depth, self._line.events - 1)
        if not depth:
            self._end_round(now, None)
            return Pause(self._silence.until)
        return self._send_from_line(self._alone(depth), now)

    def _other_depth(self) -> int | None:
        depth = self._silence.depth()
        if not self._silence.leaves_doubt:
            return depth
        if depth < self._line.events and self._line.at(depth)[0].may_have_arrived:
            return depth
        return self._silence.careful_depth()

    def _next_behind_breaker(self, now: float, ready: int) -> Decision[T]:
        """Give up what comes, until it is time for a probe: the oldest batch, tried once."""
        if not self._line:
            return Take(min(ready, self._rules.batch_size)) if ready else Pause(None)
        if self._breaker.probe_at(self._rules) <= now:
            return self._send_from_line(self._line.front, now)
        shed = in_order(self._line.clear())
        return Answered(given_up=shed, reason=Dropped.BREAKER_OPEN, words=_BREAKER_IS_OPEN)

    def _next_at_the_end(self, now: float, ready: int) -> Decision[T]:
        part = next((part for part in self._line if not part.is_last_try), None)
        if part is not None:
            return self._send_from_line(self._at_most(part, self._rules.batch_size), now)
        return Take(min(ready, self._rules.batch_size)) if ready and self._room > 0 else Pause(None)

    # -- cutting ------------------------------------------------------------------------------------------------------

    def _cut(self, part: Part[T], *bounds: int) -> list[Part[T]]:
        """Cut a part that stands nowhere."""
        self._evidence.shelve(part.places, part.failures, part.refusals)
        return part.pieces(*bounds)

    def _at_most(self, part: Part[T], size: int) -> Part[T]:
        """Leave the first events of a part in the line as a part of their own."""
        if len(part.items) <= size:
            return part
        self._line.remove(part)
        pieces = self._cut(part, size)
        self._line.add(*pieces)
        return pieces[0]

    def _alone(self, depth: int) -> Part[T]:
        """Leave one event of the line as a part of its own."""
        part, index = self._line.at(depth)
        if len(part.items) == 1:
            return part
        self._line.remove(part)
        self._line.add(*self._cut(part, index, index + 1))
        return self._line.at(depth)[0]

    # -- what an answer means -----------------------------------------------------------------------------------------

    def answer(self, part: Part[T], outcome: Outcome, now: float) -> Answered[T]:
        """Return what becomes of events now that a part was answered; of its own, and of others."""
        self._out.remove(part)
        answered: Answered[T] = Answered()
        if isinstance(outcome, Delivered):
            self._delivered(part, now, answered)
        elif part.generation != self._generation:
            part.may_have_arrived |= _may_have_arrived(outcome)
            self._line.add(part)
        else:
            self._failed(part, outcome, now, answered)
        return answered

    def withdraw(self, part: Part[T], items: Sequence[T]) -> bool:
        """Let events of a part that was to be sent go, by identity; False if none is left: it is not to be answered."""
        gone = {id(item) for item in items}
        left = [index for index, item in enumerate(part.items) if id(item) not in gone]
        self._evidence.forget([place for index, place in enumerate(part.places) if index not in set(left)])
        part.items, part.places = [part.items[index] for index in left], [part.places[index] for index in left]
        if not left:
            self._out.remove(part)
        return bool(left)

    def reconfigure(self, rules: Rules, now: float) -> None:
        """Go by a newer configuration: what failed before counts for nothing, all stands in order again, at once."""
        self._rules = rules
        self._generation += 1
        self._evidence, self._silence, self._breaker = Evidence(), Silence(), Breaker()
        self._works_since = now
        self._line_up_all()

    def close(self) -> None:
        """Send each part once more at most; what fails is left, with `keeps`, and nothing is sent after it."""
        self._is_closing = True
        if not self._rules.keeps:
            self._line.add(*self._suspects)
            self._suspects = []
        self._recall_named()
        self._join(keep_front=False)

    def unsettled(self) -> list[T]:
        """Return all events in hand, in order; those that are out too."""
        named = [part for case in self._cases for part in case.named]
        return in_order([*self._line, *self._suspects, *named, *self._out])

    def _line_up_all(self) -> None:
        self._recall_named()
        parts = [*self._suspects, *self._line.clear()]
        self._suspects = []
        for part in parts:
            part.test = part.seen = part.passes_then = None
            part.failures = part.refusals = 0
            part.is_searched = False
            part.not_before = -math.inf
        self._line.add(*parts)
        self._join(keep_front=False)

    def _join(self, *, keep_front: bool) -> None:
        for part in self._line:
            if not (keep_front and part is self._line.front):
                self._evidence.shelve(part.places, part.failures, part.refusals)
                part.failures = part.refusals = 0
        self._line.join(self._rules.batch_size, keep_front=keep_front)

    def _delivered(self, part: Part[T], now: float, answered: Answered[T]) -> None:
        answered.settled = part.items
        if part.generation != self._generation:
            return
        self._evidence.passed(part.places, part.failures, part.refusals)
        self._works_since = now
        if self._breaker.succeeded():
            answered.notes.append(_CLOSED)
        self._believe(part, answered)
        if self._silence.is_probing and self._line:
            self._join(keep_front=self._line.front.places[0] < part.places[0])
        self._silence.end()
        if part.test is None:
            self._count_other()
            self._turns = max(1, len(self._suspects) // _SUSPECTS_A_TURN)

    def _count_other(self) -> None:
        for suspect in self._suspects:
            _test(suspect).wait -= 1

    def _failed(self, part: Part[T], outcome: Failed | Rejected, now: float, answered: Answered[T]) -> None:
        is_refusal = isinstance(outcome, Rejected)
        part.failures += 1
        part.refusals += is_refusal
        part.may_have_arrived |= _may_have_arrived(outcome)
        part.seen = part.seen or self._evidence.seen
        if is_refusal and not self._rules.keeps and self._breaker.succeeded():
            answered.notes.append(_CLOSED)
        if part.is_last_try or self._is_closing:
            self._failed_at_the_end(part, outcome, answered)
            return
        answered.notes.append(_failure(part, outcome))
        if part.test is not None:
            self._suspect_failed(part, outcome, now, answered)
            return
        self._count_other()
        self._silence.failures += 1
        if not self._had_its_time(part, outcome, now, answered):
            self._try_again(part, outcome, now, answered)

    def _try_again(self, part: Part[T], outcome: Failed | Rejected, now: float, answered: Answered[T]) -> None:
        retry_after = _retry_after(outcome)
        if self._silence.is_probing and part.round < self._silence.rounds:
            self._line.add(part)
        elif self._evidence.is_plausible(max(part.failures, self._silence.failures)):
            part.not_before = now + retry_delay(self._rules, 1, retry_after)
            self._line.add(part)
            if retry_after is not None:
                self._silence.until = part.not_before
        elif len(part.items) > 1:
            self._search(part, outcome, now)
        elif self._stands_out(part, outcome):
            self._set_apart(part, outcome, now, answered)
        else:
            self._probe_failed(part, outcome, now)

    # -- several events that fail together ----------------------------------------------------------------------------

    def _search(self, part: Part[T], outcome: Failed | Rejected, now: float) -> None:
        """Take a part that fails apart, or, where that is the first trouble seen, let its oldest event probe."""
        is_refusal, has_worked = isinstance(outcome, Rejected), self._evidence.passes > 0
        named = _named(part, outcome) if self._silence.failures <= IN_A_ROW else []
        if named and (has_worked or not part.is_searched):
            self._set_named_apart(part, named, outcome.reason)
            return
        if part.is_searched or (is_refusal and has_worked):
            part.is_searched = True
            self._line.add(*self._cut(part, *thirds(len(part.items))))
            self._silence.is_probing = False
        else:
            part.is_searched = True
            self._line.add(part)
            self._begin_probing(outcome)
        if not (is_refusal and has_worked):
            self._end_round(now, _retry_after(outcome))

    def _set_named_apart(self, part: Part[T], named: list[int], words: str) -> None:
        self._evidence.shelve(part.places, part.failures, part.refusals)
        rest = part.pick([index for index in range(len(part.items)) if index not in set(named)])
        rest.is_searched = True
        self._line.add(rest)
        self._cases.append(_Case([part.pick([index]) for index in named], set(rest.places), words))

    def _believe(self, part: Part[T], answered: Answered[T]) -> None:
        """Refuse what the endpoint named, now that other events of the same batch got through."""
        for case in [case for case in self._cases if not case.rest.isdisjoint(part.places)]:
            self._cases.remove(case)
            for named in case.named:
                self._refuse(named, case.words, answered)

    def _recall_named(self) -> None:
        """Let events that the endpoint named stand in the line again: nothing of the rest got through."""
        cases, self._cases = self._cases, []
        for case in cases:
            self._line.add(*case.named)

    # -- one event that fails -----------------------------------------------------------------------------------------

    def _begin_probing(self, outcome: Failed | Rejected) -> None:
        self._silence.is_probing = True
        self._silence.leaves_doubt = _may_have_arrived(outcome)
        self._recall_named()

    def _probe_failed(self, part: Part[T], outcome: Failed | Rejected, now: float) -> None:
        if part.passes_then is None:
            part.passes_then = self._evidence.passes
        part.is_searched = False
        self._line.add(part)
        is_other = self._silence.is_others_turn
        self._begin_probing(outcome)
        retry_after = _retry_after(outcome)
        if is_other or (isinstance(outcome, Failed) and outcome.is_about_no_event):
            self._end_round(now, retry_after)
        else:
            self._silence.is_others_turn = True
            self._silence.retry_after = retry_after

    def _end_round(self, now: float, retry_after: float | None) -> None:
        silence = self._silence
        asked = max(retry_after or 0.0, silence.retry_after or 0.0)
        if not self._evidence.is_plausible(silence.failures, OUTAGE_CHANCE):
            silence.pauses += 1
        silence.pause(now + retry_delay(self._rules, max(1, silence.pauses), asked))

    def _stands_out(self, part: Part[T], outcome: Failed | Rejected) -> bool:
        """Return whether others got through since this one failed alone: now it fails again."""
        if isinstance(outcome, Failed) and outcome.is_about_no_event:
            return False
        return part.passes_then is not None and self._evidence.passes > part.passes_then

    def _set_apart(self, part: Part[T], outcome: Failed | Rejected, now: float, answered: Answered[T]) -> None:
        test = Test(part.seen or self._evidence.seen, self._evidence.passes)
        part.test = test
        was_refused = part.refusals == part.failures
        for _ in range(2):  # before the others got through, and after
            test.count(is_refusal=was_refused, passes=self._evidence.passes, words=outcome.reason)
        self._silence.end()
        answered.notes.append(Note("suspect", f"an event fails while others are delivered: {outcome.reason}", _WARNING))
        self._judge(part, test, outcome, now, answered)

    def _suspect_failed(self, part: Part[T], outcome: Failed | Rejected, now: float, answered: Answered[T]) -> None:
        test = _test(part)
        passes = self._evidence.passes
        is_about_it = not (isinstance(outcome, Failed) and outcome.is_about_no_event)
        if is_about_it and passes > test.passes:
            test.count(is_refusal=isinstance(outcome, Rejected), passes=passes, words=outcome.reason)
        self._judge(part, test, outcome, now, answered)

    def _judge(self, part: Part[T], test: Test, outcome: Failed | Rejected, now: float, answered: Answered[T]) -> None:
        if self._evidence.blames(test):
            self._refuse(part, test.words, answered)
        elif not self._rules.keeps and gives_up(self._rules, now - max(part.since or now, self._works_since)):
            self._give_up([part], Dropped.RETRY_TIME_EXCEEDED, outcome, answered)
        else:
            test.wait = self._evidence.next_wait(test)
            part.not_before = now + retry_delay(self._rules, part.failures, _retry_after(outcome))
            self._suspects.append(part)

    # -- what ends without being delivered ----------------------------------------------------------------------------

    def _refuse(self, part: Part[T], words: str, answered: Answered[T]) -> None:
        self._evidence.forget(part.places)
        answered.refused += [(item, words) for item in part.items]

    def _had_its_time(self, part: Part[T], outcome: Failed | Rejected, now: float, answered: Answered[T]) -> bool:
        """Count a batch that failed for too long; True if it is given up."""
        exceeded = gives_up(self._rules, now - max(part.since or now, self._works_since))
        was_open = self._breaker.is_open
        if not (exceeded or was_open) or (isinstance(outcome, Rejected) and len(part.items) > 1):
            return False
        if self._breaker.failed(self._rules, now):
            answered.notes.append(Note("breaker opened", _OPENED))
        if self._rules.keeps:
            if exceeded:
                self._works_since = now
                answered.notes.append(Note("kept", f"{_KEPT}: {outcome.reason}"))
            return False
        if isinstance(outcome, Rejected) and self._evidence.passes > (part.seen or self._evidence.seen).passes:
            self._refuse(part, outcome.reason, answered)
            return True
        batch = [other for other in self._line if other.batch == part.batch]
        for other in batch:
            self._line.remove(other)
        self._silence.end()
        reason = Dropped.BREAKER_OPEN if was_open else Dropped.RETRY_TIME_EXCEEDED
        self._give_up([part, *batch], reason, outcome, answered)
        return True

    def _failed_at_the_end(self, part: Part[T], outcome: Failed | Rejected, answered: Answered[T]) -> None:
        part.is_last_try = True
        if isinstance(outcome, Rejected) and len(part.items) > 1:
            part.is_last_try = False  # each piece is another part
            self._line.add(*self._cut(part, *thirds(len(part.items))))
        elif self._rules.keeps:
            self._is_over = isinstance(outcome, Failed)
            self._line.add(part)
        elif isinstance(outcome, Rejected) and self._evidence.passes:
            self._refuse(part, outcome.reason, answered)
        else:
            self._give_up([part], Dropped.PROCESS_ENDED, outcome, answered)

    def _give_up(
        self, parts: Sequence[Part[T]], reason: Dropped, outcome: Failed | Rejected, answered: Answered[T]
    ) -> None:
        for part in parts:
            self._evidence.forget(part.places)
        answered.given_up = in_order(parts)
        answered.reason = reason
        answered.words = f"{len(answered.given_up)} events were lost, {_WHY[reason]}: {outcome.reason}"


_WARNING = logging.WARNING
_CLOSED = Note("breaker closed", "the endpoint works again, the circuit breaker closed", logging.INFO)
_OPENED = "too many batches failed in a row, the circuit breaker opened"
_KEPT = "max_retry_time is exceeded, events are kept until it works again"
_BREAKER_IS_OPEN = "the circuit breaker is open, events are dropped"
_WHY = {
    Dropped.PROCESS_ENDED: "the process ended before they were delivered",
    Dropped.BREAKER_OPEN: "the circuit breaker is open",
    Dropped.RETRY_TIME_EXCEEDED: "max_retry_time is exceeded",
}


def _failure(part: Part[T], outcome: Failed | Rejected) -> Note:
    is_misconfigured = isinstance(outcome, Failed) and outcome.is_misconfigured
    kind = outcome.kind if isinstance(outcome, Failed) else "refused"
    text = f"could not deliver {len(part.items)} events, will try again: {outcome.reason}"
    return Note(f"failed:{kind}", text, logging.ERROR if is_misconfigured else logging.WARNING)


def _may_have_arrived(outcome: Failed | Rejected) -> bool:
    return isinstance(outcome, Failed) and outcome.may_have_arrived


def _retry_after(outcome: Failed | Rejected) -> float | None:
    return outcome.retry_after if isinstance(outcome, Failed) else None


def _named(part: Part[T], outcome: Failed | Rejected) -> list[int]:
    """Return which events of a part the endpoint named; none where it named all."""
    indexes = outcome.indexes if isinstance(outcome, Rejected) else ()
    named = sorted({index for index in indexes if index < len(part.items)})
    return named if len(named) < len(part.items) else []


def _test(part: Part[T]) -> Test:
    """Return the test of an event under suspicion."""
    if part.test is None:
        raise ValueError(part)
    return part.test
