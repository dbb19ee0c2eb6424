"""The events of a queue in memory (`--no-spool`), within Kong's parameters; nothing outlives the process.

Contract: that of `backlog.py`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from kong_metering.backlog.source import Entry, MemorySource
from kong_metering.backlog.stock import Sending
from kong_metering.plurals import counted
from kong_metering.reasons import Buried, Dropped
from kong_metering.trial import batching

if TYPE_CHECKING:
    from kong_metering.account import QueueAccount
    from kong_metering.clock import Clock
    from kong_metering.config import Queue


class MemoryBacklog:
    """Events in memory, within Kong's parameters: beyond them the oldest are dropped. Nothing outlives the process."""

    keeps = False
    disk_state = "none"
    letters_pending = 0
    known_oldest_ms = None
    hangs_for = 0.0

    def __init__(self, settings: Queue, clock: Clock, account: QueueAccount, *, adaptive_batch: int = 1) -> None:
        self._adaptive_batch = adaptive_batch
        self._clock = clock
        self._account = account
        self._source = MemorySource()
        self._on_ready: Callable[[], None] = lambda: None
        self._heir: MemoryBacklog | None = None
        self._has_warned = False
        self._is_dropping = False
        self.reconfigure(settings)

    def on_ready(self, callback: Callable[[], None]) -> None:
        """Have this called when there is more to read."""
        self._on_ready = callback

    def reconfigure(self, settings: Queue) -> None:
        """Go by other parameters from now on."""
        self._settings = settings
        self._thresholds = batching.thresholds(settings, self._adaptive_batch)

    @property
    def unread(self) -> int:
        """How many events can be read now."""
        return self._source.unread

    @property
    def unread_bytes(self) -> int:
        """The bytes of what can be read now."""
        return self._source.unread_bytes

    def put(self, event: bytes) -> None:
        """Take an event in, and drop the oldest ones if it needs their place."""
        if len(event) > self._thresholds.largest:
            self._account.drop(Dropped.EVENT_TOO_LARGE, 1, f"an event of {len(event)} bytes is too large")
            return
        if self._source.unread >= self._thresholds.roomy:
            self._make_room(len(event))
        # Counted when it is there: those before it may have been read, and delivered, in this moment.
        waiting = self._source.add([event], self._clock.monotonic())
        if self._heir is not None:
            self._pass_on(self._heir)  # it has come in between
        elif waiting == 1 or waiting >= self._thresholds.wakes_at:
            self._on_ready()

    def oldest_at(self) -> float | None:
        """Tell when the first of the unread came (monotonic); None when there is none."""
        return self._source.oldest_at()

    def read(self, limit: int) -> list[Entry]:
        """Read the next events."""
        entries = self._source.read(limit, batching.MAX_BATCH_BYTES)
        if self._has_warned and not batching.is_nearly_full(self._settings, self.unread, self.unread_bytes):
            self._has_warned = False
        if self._is_dropping:
            self._is_dropping = False
            self._account.say("resumed", "resumed processing", logging.INFO)
        return entries

    def begin_send(self, entries: Sequence[Entry]) -> Sending:
        """Give them all: nothing is known of what was sent before this process."""
        return Sending(list(entries), [])

    def did_not_arrive(self, sending: Sending) -> None:
        """Do nothing: nobody would ask."""

    def give_back(self, entries: Sequence[Entry]) -> None:
        """Do nothing: none are held back."""

    def settle(self, entries: Sequence[Entry]) -> int:
        """Let events go."""
        return self._source.settle(entries)

    def reject(self, entries: Sequence[Entry], reason: Buried, words: str) -> None:
        """Drop events that will not be delivered."""
        dropped = Dropped.EVENT_TOO_LARGE if reason is Buried.TOO_LARGE else Dropped.REJECTED
        if settled := self.settle(entries):
            self._account.drop(dropped, settled, words)

    def hand_over(self, heir: MemoryBacklog) -> None:
        """Give all events to another queue's backlog, those too that still come; none may be on its way."""
        self._heir = heir
        self._pass_on(heir)

    def _pass_on(self, heir: MemoryBacklog) -> None:
        for event in self._source.take_out():
            self._account.move(1, heir._account)
            heir.put(event)

    def try_again(self) -> None:
        """Do nothing: there is no disk."""

    def end(self, *, is_written: bool) -> None:  # noqa: ARG002 - nothing is written here
        """Drop what still waits."""
        if left := self._source.end():
            message = f"{counted(left, 'event was', 'events were')} not delivered before the process ended"
            self._account.drop(Dropped.PROCESS_ENDED, left, message)

    def _make_room(self, size: int) -> None:
        settings = self._settings
        if not self._has_warned and batching.is_nearly_full(settings, self.unread, self.unread_bytes):
            self._has_warned = True
            self._account.say("capacity", f"at {batching.CAPACITY_WARNING:.0%} capacity", logging.WARNING)
        by_entries = self._source.forget_oldest(settings.max_entries - 1, math.inf)
        max_bytes = math.inf if settings.max_bytes is None else settings.max_bytes - size
        by_bytes = self._source.forget_oldest(math.inf, max_bytes)
        if by_entries:
            message = "full, dropping the oldest events until delivery works again"
            self._account.drop(Dropped.QUEUE_FULL, by_entries, message)
        if by_bytes:
            message = "byte capacity exceeded, dropping the oldest events"
            self._account.drop(Dropped.QUEUE_BYTES_FULL, by_bytes, message)
        self._is_dropping = self._is_dropping or bool(by_entries or by_bytes)
