"""Carries out what a trial decides: events are read, sent, and settled or rejected by what came of it.

Contract: workers' queues and delivery by hand drive it alike. `step` may be called by several threads at a time; the
lock is held over the trial only, which is pure, and never over the disk or the network. What `post` or the stock raises
goes to the caller, and the events of that step stay in hand: nothing is settled but what was answered.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from kong_metering.delivery.decisions import Answered, Send, Take
from kong_metering.delivery.outcome import Delivered, Outcome, surely_did_not_arrive
from kong_metering.delivery.trial import Trial
from kong_metering.stats import Buried

if TYPE_CHECKING:
    from kong_metering.clock import Clock
    from kong_metering.delivery.decisions import Decision, Rules
    from kong_metering.delivery.parts import Part
    from kong_metering.delivery.sending import Sending
    from kong_metering.delivery.source import Entry
    from kong_metering.stats import Dropped

Post = Callable[[Sequence[bytes]], Outcome]


class Stock(Protocol):
    """Where the events wait."""

    def read(self, limit: int) -> list[Entry]:
        """Read the next events."""
        ...

    def begin_send(self, entries: Sequence[Entry]) -> Sending:
        """Note that events are about to go out."""
        ...

    def did_not_arrive(self, sending: Sending) -> None:
        """Note that the endpoint surely has none of them."""
        ...

    def settle(self, entries: Sequence[Entry]) -> int:
        """Let events go that need not wait any longer; give how many were there still (who ended has the others)."""
        ...

    def reject(self, entries: Sequence[Entry], reason: Buried, words: str) -> None:
        """Settle and account for events that will not be delivered."""
        ...


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


class Delivering:
    """The delivery of one queue's events to one endpoint."""

    def __init__(self, rules: Rules, stock: Stock, *, clock: Clock, account: Account) -> None:
        self._stock = stock
        self._clock = clock
        self._account = account
        self._lock = threading.Lock()
        self._trial: Trial[Entry] = Trial(rules, clock.monotonic())

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
            decision = self._trial.next(self._clock.monotonic(), ready)
        if isinstance(decision, Send):
            self._send(decision.part, post)
        elif isinstance(decision, Take):
            self._take(decision.limit)
        elif isinstance(decision, Answered):
            self._carry_out(decision)
        return decision

    def _take(self, limit: int) -> None:
        entries = self._stock.read(limit)
        if entries:
            with self._lock:
                self._trial.take(entries, self._clock.monotonic())

    def _send(self, part: Part[Entry], post: Post) -> None:
        sending = self._stock.begin_send(part.items)
        if sending.stale:
            with self._lock:
                self._trial.withdraw(part, sending.stale)
            self._stock.reject(sending.stale, Buried.AMBIGUOUS, sending.why_stale)
        if not sending.fresh:
            return
        outcome = post([entry.event for entry in sending.fresh])
        if isinstance(outcome, Delivered) and outcome.note:
            self._account.say(f"note:{outcome.note}", outcome.note, logging.WARNING)
        if surely_did_not_arrive(outcome):
            self._stock.did_not_arrive(sending)
        with self._lock:
            answered = self._trial.answer(part, outcome, self._clock.monotonic())
        self._carry_out(answered)

    def _carry_out(self, answered: Answered[Entry]) -> None:
        for note in answered.notes:
            self._account.say(note.kind, note.text, note.level)
        if answered.settled and (settled := self._stock.settle(answered.settled)):
            self._account.deliver(settled)
        for entry, words in answered.refused:
            self._stock.reject([entry], Buried.REJECTED, words)
        if answered.reason and (settled := self._stock.settle(answered.given_up)):
            self._account.drop(answered.reason, settled, answered.words)
