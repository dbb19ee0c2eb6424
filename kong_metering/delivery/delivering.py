"""Carries out what a trial decides: events are read, noted as sent, sent, and settled or rejected by the outcome.

Contract: workers' queues and delivery by hand drive it alike. `step` may be called by several threads at a time; the
lock is held over the trial only, which is pure, and never over the disk or the network. What `post` or the stock raises
goes to the caller, and the events of that step stay in hand: nothing is settled but what was answered.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING, Protocol

from kong_metering.reasons import Buried
from kong_metering.trial.batching import MAX_EVENT_BYTES
from kong_metering.trial.decisions import Answered, Send, Take
from kong_metering.trial.outcome import Delivered, Outcome, surely_did_not_arrive
from kong_metering.trial.trial import Trial

if TYPE_CHECKING:
    from kong_metering.clock import Clock
    from kong_metering.delivery.source import Entry, Source
    from kong_metering.eventlog.format import Mark
    from kong_metering.reasons import Dropped
    from kong_metering.trial.decisions import Decision, Rules
    from kong_metering.trial.parts import Part

Post = Callable[[Sequence[bytes]], Outcome]
MarkSent = Callable[["Source", list["Entry"]], Sequence["Mark"]]


@dataclass(frozen=True)
class Sending:
    """Events that are about to go out: those that may, those that may not any more, and the sources' notes of it."""

    fresh: list[Entry]
    stale: list[Entry]
    why_stale: str = ""
    notes: Sequence[tuple[Source, Sequence[Mark]]] = ()


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
        too_large = [entry for entry in entries if len(entry.event) > MAX_EVENT_BYTES]
        fitting = [entry for entry in entries if entry not in too_large] if too_large else entries
        if fitting:
            with self._lock:
                self._trial.take(fitting, self._clock.monotonic())
        for entry in too_large:
            words = f"an event of {len(entry.event)} bytes is too large to be sent"
            self._stock.reject([entry], Buried.TOO_LARGE, words)

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


def noted(entries: Sequence[Entry], now_ms: int, dedupe_window: float, mark_sent: MarkSent) -> Sending:
    """Have the sources note, by `mark_sent`, that events are about to go out; return those that may.

    What went out without an answer longer ago than the endpoint recognises duplicate ids (`dedupe_window`, seconds) may
    not: if it did arrive, it would be billed twice. Raises what `mark_sent` raises.
    """
    too_old_ms = now_ms - int(dedupe_window * 1000)
    stale = [each for source, run in by_source(entries) for each in source.sent_before(run, too_old_ms)]
    fresh = [entry for entry in entries if entry not in stale] if stale else list(entries)
    why_stale = f"sent more than {dedupe_window / 3600:g} hours ago without an answer, and may have arrived"
    return Sending(fresh, stale, why_stale, [(source, mark_sent(source, run)) for source, run in by_source(fresh)])


def by_source(entries: Sequence[Entry]) -> list[tuple[Source, list[Entry]]]:
    """Return the runs of events of one source each, in order."""
    return [(source, list(run)) for source, run in groupby(entries, attrgetter("source"))]
