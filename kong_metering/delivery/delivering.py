"""Carries out what a trial decides: events are read, noted as sent, sent, and settled or rejected by the outcome.

Contract: a server's queues and delivery by hand drive it alike. `step` may be called by several threads at a time; the
lock is held over the trial only, which is pure, and never over the disk or the network. What `post` or the stock raises
goes to the caller, and the events of that step stay in hand: what was not answered is sent by a later step, and of what
was answered the rest is done by a later step, nothing of it sent again.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from kong_metering.outages import Outage
from kong_metering.reasons import Buried
from kong_metering.trial.batching import MAX_EVENT_BYTES
from kong_metering.trial.decisions import Answered, Note, Send, Take
from kong_metering.trial.outcome import Delivered, Outcome, surely_did_not_arrive
from kong_metering.trial.trial import Trial

if TYPE_CHECKING:
    from kong_metering.backlog.source import Entry
    from kong_metering.backlog.stock import Sending, Stock
    from kong_metering.clock import Clock
    from kong_metering.reasons import Dropped
    from kong_metering.trial.decisions import Decision, Rules
    from kong_metering.trial.parts import Part

Post = Callable[[Sequence[bytes]], Outcome]


class Account(Protocol):
    """Who is told what became of the events."""

    def deliver(self, events: int) -> None:
        """Count events that the endpoint took."""
        ...

    def drop(self, reason: Dropped, events: int, message: str) -> None:
        """Say that events are given up, and count them."""
        ...

    def say(self, kind: str, message: str, level: int = logging.ERROR) -> None:
        """Say what goes wrong, or that it works again."""
        ...

    def say_recovery(self, seconds: float) -> None:
        """Say that the endpoint works again, after it took nothing for so long."""
        ...


class Delivering:
    """The delivery of one queue's events to one endpoint."""

    def __init__(self, rules: Rules, stock: Stock, *, clock: Clock, account: Account) -> None:
        self._stock = stock
        self._clock = clock
        self._account = account
        self._lock = threading.Lock()
        # How many requests were for events that had failed before.
        self._retries = 0
        self._trial: Trial[Entry] = Trial(rules, clock.monotonic())
        self._outage = Outage()
        # What was answered, and could not be carried out to its end.
        self._unfinished: deque[Answered[Entry]] = deque()

    def told(self) -> dict[str, Any]:
        """Return how it stands with the endpoint, and when the oldest event in hand was accepted (epoch, ms)."""
        with self._lock:
            now, trial = self._clock.monotonic(), self._trial
            pause = trial.free_at - now
            return {
                "condition": trial.condition.value,
                "next_try_in_seconds": round(pause, 3) if pause > 0 else 0,
                "suspects": trial.suspects,
                "retries": self._retries,
                "oldest_in_hand_ms": next((entry.accepted_ms for entry in trial.unsettled()), None),
            }

    @property
    def lined_up(self) -> int:
        """How many events in hand are to be sent, besides those that are out."""
        return self._trial.lined_up

    def reconfigure(self, rules: Rules) -> None:
        """Go by a newer configuration: what failed before counts for nothing."""
        with self._lock:
            self._trial.reconfigure(rules, self._clock.monotonic())

    def try_now(self) -> None:
        """End all pauses."""
        with self._lock:
            self._trial.try_now(self._clock.monotonic())

    def close(self) -> None:
        """Send each part once more at most."""
        with self._lock:
            self._trial.close()

    def step(self, ready: int, post: Post) -> Decision[Entry]:
        """Carry out one decision, a request at most, and return it; `ready`: how many events may be read now.

        A pause is for the caller to make.
        """
        with self._lock:
            decision = self._unfinished.popleft() if self._unfinished else self._next(ready)
            if isinstance(decision, Send) and (decision.part.failures or decision.part.is_searched):
                self._retries += 1
        if isinstance(decision, Send):
            self._send(decision.part, post)
        elif isinstance(decision, Take):
            self._take(decision.limit)
        elif isinstance(decision, Answered):
            self._carry_out(decision)
        return decision

    def _next(self, ready: int) -> Decision[Entry]:
        return self._trial.next(self._clock.monotonic(), ready)

    def _take(self, limit: int) -> None:
        entries = self._stock.read(limit)
        too_large = [entry for entry in entries if len(entry.event) > MAX_EVENT_BYTES]
        fitting = [entry for entry in entries if entry not in too_large] if too_large else entries
        if fitting:
            with self._lock:
                self._trial.take(fitting, self._clock.monotonic())
        for entry in too_large:
            words = f"an event of {len(entry.event)} bytes is too large to be sent"
            self._stock.reject([entry], Buried.TOO_LARGE, words)

    def _send(self, part: Part[Entry], post: Post) -> None:
        try:
            sending = self._begin_send(part)
            if not sending.fresh:
                return
            outcome = post([entry.event for entry in sending.fresh])
        except Exception:
            with self._lock:
                self._trial.recall(part)
            raise
        try:
            if surely_did_not_arrive(outcome):
                self._stock.did_not_arrive(sending)
        finally:
            self._answer(part, outcome)

    def _begin_send(self, part: Part[Entry]) -> Sending:
        sending = self._stock.begin_send(part.items)
        if sending.stale:
            with self._lock:
                self._trial.withdraw(part, sending.stale)
            self._stock.reject(sending.stale, Buried.AMBIGUOUS, sending.why_stale)
        if sending.held:
            with self._lock:
                self._trial.withdraw(part, sending.held)
            self._stock.give_back(sending.held)
        return sending

    def _answer(self, part: Part[Entry], outcome: Outcome) -> None:
        now = self._clock.monotonic()
        with self._lock:
            lasted = self._outage_over(part, outcome, now)
            answered = self._trial.answer(part, outcome, now)
        if isinstance(outcome, Delivered) and outcome.note:
            answered.notes.insert(0, Note(f"note:{outcome.note}", outcome.note, logging.WARNING))
        try:
            if lasted is not None:
                self._account.say_recovery(lasted)
        finally:
            self._carry_out(answered)

    def _outage_over(self, part: Part[Entry], outcome: Outcome, now: float) -> float | None:
        """Return for how long nothing got through, if this has; what one event under suspicion does is no sign."""
        if isinstance(outcome, Delivered):
            return self._outage.works(now)
        if part.suspicion is None:
            self._outage.fails(now)
        return None

    def _carry_out(self, answered: Answered[Entry]) -> None:
        try:
            self._carry_out_rest(answered)
        except Exception:
            with self._lock:
                self._unfinished.append(answered)
            raise

    def _carry_out_rest(self, answered: Answered[Entry]) -> None:
        """Do what is left to be done; what was begun is not done twice, but for what is settled."""
        while answered.notes:
            note = answered.notes.pop(0)
            self._account.say(note.kind, note.text, note.level)
        if answered.settled and (settled := self._stock.settle(answered.settled)):
            self._account.deliver(settled)
        while answered.refused:
            entry, words = answered.refused.pop(0)
            self._stock.reject([entry], Buried.REJECTED, words)
        if answered.reason and (settled := self._stock.settle(answered.given_up)):
            self._account.drop(answered.reason, settled, answered.words)
