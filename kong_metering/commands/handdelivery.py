"""Delivering a log by hand: read, mark, send, settle, in order, until it is empty or the endpoint will not have it.

Contract: whatever kills it, each event is in the log, delivered, or a dead letter, and what was sent without an answer
is known as such. An event leaves the log when the endpoint took it, or when its dead letter is on disk. What was sent
without an answer longer ago than the deduplication window is not sent again.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import TYPE_CHECKING, Protocol

from kong_metering.delivery import policy
from kong_metering.delivery.outcome import Delivered, Failed, Outcome, Rejected
from kong_metering.spool.deadletters import DeadLetter
from kong_metering.spool.log import Damage, DamageKind
from kong_metering.stats import Buried

if TYPE_CHECKING:
    from kong_metering.commands.interruption import Interruption
    from kong_metering.commands.output import Advance
    from kong_metering.spool.deadletters import DeadLetters
    from kong_metering.spool.format import Mark, StoredEvent
    from kong_metering.spool.identity import QueueIdentity
    from kong_metering.spool.log import EventLog

TRIES = 5
_FIRST_PAUSE = 0.5
_LONGEST_PAUSE = 60.0
_BATCH_BYTES = 4 * 1024 * 1024


class Sender(Protocol):
    """What delivers a batch."""

    def send(self, events: Sequence[bytes]) -> Outcome:
        """Send the events together and tell what came of it."""
        ...


@dataclass
class Account:
    """What became of the events so far."""

    delivered: int = 0
    dead_letters: Counter[Buried] = field(default_factory=Counter)


@dataclass(frozen=True)
class Means:
    """What a delivery by hand needs besides the log."""

    sender: Sender
    dead_letters: DeadLetters
    interruption: Interruption
    batch_size: int
    dedupe_window: float
    account: Account
    advance: Advance


class HandDelivery:
    """Delivers one log that this process holds."""

    def __init__(self, log: EventLog, queue: QueueIdentity, means: Means) -> None:
        self._log = log
        self._queue = queue
        self._means = means
        # Without a position nobody knows what was sent: any of it may have been, since it was accepted.
        self._doubts_all = log.was_position_lost
        self._batch: list[StoredEvent] = []
        # What became of events of the batch, by number; None was delivered.
        self._settled: dict[int, DeadLetter | None] = {}

    def run(self) -> Failed | None:
        """Deliver until nothing waits; tell which failure ended it before, None if none did.

        Raises `Interrupted`, and the system's `OSError` for the disk.
        """
        while True:
            self._means.interruption.check()
            self._batch = self._log.read(self._log.done_up_to, self._means.batch_size, _BATCH_BYTES)
            self._bury_damage()
            if not self._batch:
                # Only damage was left, if anything was.
                self._log.done(self._log.next_sequence - 1)
                return None
            if failed := self._deliver_batch():
                return failed

    # -- one batch --------------------------------------------------------------------------------------------------

    def _deliver_batch(self) -> Failed | None:
        self._settled = {}
        fresh = [event for event in self._batch if not self._is_too_late(event)]
        self._give_up([event for event in self._batch if self._is_too_late(event)], Buried.AMBIGUOUS, self._too_late)
        self._settle()
        parts = [fresh] if fresh else []
        while parts:
            part = parts.pop(0)
            outcome = self._send(part)
            if isinstance(outcome, Failed):
                return outcome
            if isinstance(outcome, Delivered):
                self._settled |= {event.sequence: None for event in part}
            else:
                bad, rest = policy.isolate(part, outcome)
                self._give_up(bad, Buried.REJECTED, outcome.reason)
                parts[:0] = rest
            self._settle()
        return None

    def _is_too_late(self, event: StoredEvent) -> bool:
        sent_ms = self._log.sent_at(event.sequence)
        if sent_ms is None and self._doubts_all:
            sent_ms = event.time_ms
        return sent_ms is not None and sent_ms < _now_ms() - self._means.dedupe_window * 1000

    @property
    def _too_late(self) -> str:
        hours = self._means.dedupe_window / 3600
        return f"sent more than {hours:g} hours ago without an answer, and may have arrived"

    def _give_up(self, events: Sequence[StoredEvent], reason: Buried, answer: str) -> None:
        for event in events:
            self._settled[event.sequence] = DeadLetter(reason.value, answer, self._queue, event.time_ms, event.payload)

    def _settle(self) -> None:
        """Take the events at the head of the batch of which it is known what became of them out of the log."""
        head = list(takewhile(lambda event: event.sequence in self._settled, self._batch))
        if not head:
            return
        letters = [letter for event in head if (letter := self._settled.pop(event.sequence))]
        self._means.dead_letters.add(letters, _now_ms())
        self._log.done(head[-1].sequence)
        self._log.save_position()
        self._batch = self._batch[len(head) :]
        self._means.account.delivered += len(head) - len(letters)
        self._means.account.dead_letters.update(Buried(letter.reason) for letter in letters)
        self._means.advance(len(head))

    # -- one request ------------------------------------------------------------------------------------------------

    def _send(self, events: Sequence[StoredEvent]) -> Outcome:
        """Send events together, again and again if need be; a failure is one that stays."""
        failures = 0
        while True:
            outcome = self._try_to_send(events)
            if not isinstance(outcome, Failed):
                return outcome
            failures += 1
            if outcome.is_misconfigured or failures == TRIES:
                return outcome
            with self._means.interruption.allowed():
                time.sleep(_pause(failures, outcome.retry_after))
            if any(map(self._is_too_late, events)):
                return outcome

    def _try_to_send(self, events: Sequence[StoredEvent]) -> Outcome:
        marks = [mark for run in _runs(events) for mark in self._log.mark_ambiguous(*run, _now_ms())]
        self._log.save_position()
        # From here on they may arrive, and whatever comes now, the log says so.
        with self._means.interruption.allowed():
            outcome = self._means.sender.send([event.payload for event in events])
        if isinstance(outcome, Rejected) or (isinstance(outcome, Failed) and not outcome.may_have_arrived):
            self._unmark(marks)
        return outcome

    def _unmark(self, marks: Sequence[Mark]) -> None:
        self._log.unmark(marks)
        self._log.save_position()

    # -- damage -----------------------------------------------------------------------------------------------------

    def _bury_damage(self) -> None:
        """Keep a dead letter of each stretch that could not be read, which tells where its bytes are."""
        damaged = [damage for damage in self._log.take_damage() if damage.kind is not DamageKind.TORN]
        letters = [
            DeadLetter(Buried.UNREADABLE.value, _damage_told(damage), self._queue, 0, b"")
            for damage in damaged
            if damage.events
        ]
        self._means.dead_letters.add(letters, _now_ms())
        lost = sum(damage.events for damage in damaged)
        self._means.account.dead_letters[Buried.UNREADABLE] += lost
        self._means.advance(lost)


def _pause(failures: int, retry_after: float | None) -> float:
    """Tell how long to wait after so many failures: twice as long each time, and as long as the endpoint asks for."""
    return min(_LONGEST_PAUSE, max(_FIRST_PAUSE * 2.0 ** (failures - 1), retry_after or 0.0))


def _damage_told(damage: Damage) -> str:
    kept = f", its bytes are kept in {damage.kept_in}" if damage.kept_in else ""
    lost = f"{damage.events} events lost" if damage.events > 1 else "an event lost"
    return f"{lost}, {damage.kind.value}: {damage.length} bytes at {damage.offset} of {damage.segment}{kept}"


def _runs(events: Sequence[StoredEvent]) -> list[tuple[int, int]]:
    """Give the stretches of numbers without a hole: first and last."""
    runs: list[tuple[int, int]] = []
    last = -math.inf
    for event in events:
        if event.sequence == last + 1:
            runs[-1] = (runs[-1][0], event.sequence)
        else:
            runs.append((event.sequence, event.sequence))
        last = event.sequence
    return runs


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
