"""Delivering logs by hand: the same trial as a server's queues, until nothing is left or the endpoint will not have it.

Contract: whatever kills it, each event is in a log, delivered, or a dead letter, and what was sent without an answer is
known as such. An event leaves its log when the endpoint took it, or when its dead letter is on disk. What was sent
without an answer longer ago than the deduplication window is not sent again. What the disk refuses ends it (`OSError`,
`SpoolError`), as an interruption does (`Interrupted`); `close` leaves the logs for whoever comes next.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kong_metering.backlog.logsource import LogSource
from kong_metering.backlog.stock import Sending, by_source, note_undelivered, noted
from kong_metering.clock import EpochClock, SystemClock
from kong_metering.commands.endurance import Endurance
from kong_metering.commands.words import shown
from kong_metering.errors import DISK_ERRORS
from kong_metering.eventlog.log import DamageKind
from kong_metering.plurals import form
from kong_metering.reasons import Buried
from kong_metering.spool.deadletters import DeadLetter
from kong_metering.spool.times import SpoolTimes
from kong_metering.trial.decisions import Pause, Rules

if TYPE_CHECKING:
    from pathlib import Path

    from kong_metering.backlog.source import Entry, Source
    from kong_metering.clock import Clock
    from kong_metering.commands.interruption import Interruption
    from kong_metering.commands.output import Advance
    from kong_metering.delivery.delivering import Delivering, Post
    from kong_metering.eventlog.log import Damage
    from kong_metering.reasons import Dropped
    from kong_metering.spool.deadletters import DeadLetters
    from kong_metering.spool.directory import HeldLog
    from kong_metering.spool.identity import QueueIdentity
    from kong_metering.trial.outcome import Outcome

_FIRST_PAUSE = 0.5
_LONGEST_PAUSE = 4.0
_BATCH_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True)
class Timing:
    """The clock, and how to wait; times in seconds."""

    clock: Clock = field(default_factory=SystemClock)
    sleep: Callable[[float], None] = time.sleep


class Account:
    """What became of the events so far; what goes wrong is told once for each kind."""

    def __init__(self, advance: Advance, note: Callable[[str], None]) -> None:
        self.delivered = 0
        self.dead_letters: Counter[Buried] = Counter()
        self._advance = advance
        self._note = note
        self._noted: set[str] = set()

    def deliver(self, events: int) -> None:
        """Count events that the endpoint took."""
        self.delivered += events
        self._advance(events)

    def bury(self, reason: Buried, events: int, *, waited: int) -> None:
        """Count events that became dead letters; so many of them were counted as waiting."""
        self.dead_letters[reason] += events
        self._advance(waited)

    def drop(self, reason: Dropped, events: int, message: str) -> None:
        """Never called: by hand nothing is given up."""
        raise AssertionError(f"{events} events dropped ({reason}): {message}")

    def say(self, kind: str, message: str, level: int = logging.ERROR) -> None:  # noqa: ARG002 - a person reads all
        """Tell what goes wrong."""
        if kind not in self._noted:
            self._noted.add(kind)
            self._note(shown(message[0].upper() + message[1:]))

    def say_recovery(self, seconds: float) -> None:
        """Tell nothing: the count goes on."""


class HeldEvents:
    """The events of one queue, in the logs that this process holds."""

    def __init__(  # noqa: PLR0913 - what it is made of
        self,
        logs: Sequence[HeldLog],
        dead_letters: DeadLetters,
        account: Account,
        *,
        root: Path,
        clock: Clock,
        dedupe_window: float,
    ) -> None:
        """Take the logs, the one with the oldest events first. Raises one of `DISK_ERRORS`."""
        self._dead_letters = dead_letters
        self._account = account
        self._clock = EpochClock(clock)
        self._times = SpoolTimes(root, clock)
        self._dedupe_window = dedupe_window
        # Whether events are left because nobody knows yet how long ago they went out.
        self.is_unsure = False
        self._sources = sorted(map(LogSource, logs), key=lambda source: source.oldest_ms() or 0)
        self._owners: dict[Source, QueueIdentity] = {
            source: source.held.identity for source in self._sources if source.held.identity
        }
        for source in self._sources:
            self._bury_damage(source)

    @property
    def unread(self) -> int:
        """How many events were not read yet."""
        return sum(source.unread for source in self._sources if not source.is_held)

    @property
    def waiting(self) -> int:
        """How many events wait, those that were read included."""
        return sum(source.waiting for source in self._sources)

    def read(self, limit: int) -> list[Entry]:
        """Read the next events."""
        for source in self._sources:
            if source.unread and not source.is_held:
                entries = source.read(limit, _BATCH_BYTES)
                self._bury_damage(source)
                if entries:
                    return entries
        return []

    def begin_send(self, entries: Sequence[Entry]) -> Sending:
        """Note on disk that events are about to go out; whatever happens from then on, the log says so."""
        window = self._times.now().window(self._dedupe_window)
        sending = noted(entries, window, self._dedupe_window, lambda source, run: source.mark_sent(run, window.now_ms))
        self.is_unsure |= sending.unsure
        return sending

    def did_not_arrive(self, sending: Sending) -> None:
        """Take that note back."""
        for source, marks in sending.notes:
            source.unmark(marks)

    def give_back(self, entries: Sequence[Entry]) -> None:
        """Leave events where nobody knows yet how long ago they went out; what cannot be noted ends it."""
        for source, run in by_source(entries):
            source.give_back(run)

    def settle(self, entries: Sequence[Entry]) -> int:
        """Let events go that need not wait any longer; give how many were there still."""
        return sum(source.settle(run) for source, run in by_source(entries))

    def reject(self, entries: Sequence[Entry], reason: Buried, words: str) -> None:
        """Make dead letters of events."""
        now_ms = self._clock.wall_ms()
        letters = [
            DeadLetter(reason.value, words, self._owners[each.source], each.accepted_ms or now_ms, each.event)
            for each in entries
        ]
        self._dead_letters.add(letters, now_ms)
        note_undelivered(entries)
        self._account.bury(reason, len(letters), waited=self.settle(entries))

    def _bury_damage(self, source: LogSource) -> None:
        """Keep a dead letter of each stretch that could not be read, which tells where its bytes are."""
        found, lost = source.take_damage()
        damages = [damage for damage in found if damage.kind is not DamageKind.TORN and damage.events]
        owner = self._owners[source]
        letters = [DeadLetter(Buried.UNREADABLE.value, _damage_told(damage), owner, 0, b"") for damage in damages]
        self._dead_letters.add(letters, self._clock.wall_ms())
        if damages:
            self._account.bury(Buried.UNREADABLE, sum(damage.events for damage in damages), waited=lost)

    def close(self) -> None:
        """Leave what waits so that nothing that was delivered comes again with it, as far as the disk allows."""
        for source in self._sources:
            with contextlib.suppress(*DISK_ERRORS):
                source.close_in_order()


def rules_by_hand(batch_size: int) -> Rules:
    """Return how events are sent and tried again while somebody waits for it."""
    return Rules(
        batch_size=batch_size,
        in_flight=1,
        initial_retry_delay=_FIRST_PAUSE,
        max_retry_delay=_LONGEST_PAUSE,
        max_retry_time=math.inf,
        failure_threshold=0,
        breaker_cooldown=0.0,
        keeps=True,
        expects_more=False,
    )


class HandDelivery:
    """Delivers held events in order."""

    def __init__(
        self, delivering: Delivering, events: HeldEvents, post: Post, interruption: Interruption, timing: Timing
    ) -> None:
        self._delivering = delivering
        self._events = events
        self._send = post
        self._interruption = interruption
        self._timing = timing
        self._endurance = Endurance(timing.clock)

    def run(self) -> str | None:
        """Deliver until nothing waits; tell why it ended before that, None if it did not.

        Raises `Interrupted`, and one of `DISK_ERRORS`.
        """
        while True:
            self._interruption.check()
            decision = self._delivering.step(self._events.unread, self._post)
            if isinstance(decision, Pause):
                if decision.until is None:
                    return None
                self._endurance.count_pause()
                if not self._endurance.has_ended:
                    self._pause(self._endurance.pause_until(decision.until))
            if self._endurance.has_ended:
                return self._endurance.reason

    def _post(self, events: Sequence[bytes]) -> Outcome:
        with self._interruption.allowed():
            outcome = self._send(events)
        self._endurance.count(outcome)
        return outcome

    def _pause(self, until: float) -> None:
        with self._interruption.allowed():
            self._timing.sleep(max(0.0, until - self._timing.clock.monotonic()))


def _damage_told(damage: Damage) -> str:
    kept = f", its bytes are kept in {damage.kept_in}" if damage.kept_in else ""
    length = f"{damage.length} {form(damage.length, 'byte')}"
    lost = f"{damage.events} events lost" if damage.events > 1 else "an event lost"
    return f"{lost}, {damage.kind.value}: {length} at {damage.offset} of {damage.segment}{kept}"
