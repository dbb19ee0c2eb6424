"""Where the events of a queue wait: what the queue needs of such a place, and the one in memory.

Contract: any thread may call anything. Events come out in the order in which they went in. An event that was taken
still waits until it is settled, whatever happens to it in between.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from kong_metering.delivery import policy
from kong_metering.stats import Dropped

if TYPE_CHECKING:
    from kong_metering.config import Queue
    from kong_metering.delivery.account import QueueAccount


class Entry(NamedTuple):
    """An event that waits: since when (monotonic); and on disk: its number there, its log, when it was accepted."""

    event: bytes
    queued_at: float
    sequence: int = 0
    log: Any = None
    accepted_ms: int = 0


@dataclass(frozen=True)
class Sending:
    """Events that are about to be sent; `marks` is the backlog's own note of it."""

    entries: list[Entry]
    marks: Sequence[Any] = ()


class Backlog(Protocol):
    """The events of one queue that are not delivered yet."""

    @property
    def keeps(self) -> bool:
        """Whether events outlive the process and every outage here, so that there is never a need to give them up."""
        ...

    @property
    def largest(self) -> int:
        """The bytes of the largest event that can be taken in."""
        ...

    @property
    def waiting(self) -> int:
        """How many events wait, those that were taken included."""
        ...

    def on_ready(self, callback: Callable[[], None]) -> None:
        """Have this called when there is more to take, by other means than `add`."""
        ...

    def reconfigure(self, settings: Queue) -> None:
        """Go by other parameters from now on."""
        ...

    def add(self, event: bytes, now: float) -> bool:
        """Take an event in; True when that makes a batch due, or is the first one. `now` is monotonic."""
        ...

    def due_in(self, now: float) -> float | None:
        """Tell in how many seconds a batch may be taken; None when there is nothing to take."""
        ...

    @property
    def ready(self) -> int:
        """How many events can be taken now."""
        ...

    def take(self, limit: int) -> list[Entry]:
        """Take the oldest events out to send them, up to `limit`; none when others were faster."""
        ...

    def begin_send(self, entries: list[Entry]) -> Sending:
        """Note that events are about to be sent, and give those that may be."""
        ...

    def did_not_arrive(self, sending: Sending) -> None:
        """Note that the endpoint surely has none of them."""
        ...

    def settle(self, entries: Sequence[Entry]) -> bool:
        """Let events go that need not wait any longer; False when `end` was faster, and has accounted for them."""
        ...

    def reject(self, entries: Sequence[Entry], answer: str) -> None:
        """Settle and account for events that the endpoint refuses for themselves."""
        ...

    def refuse(self, event: bytes) -> None:
        """Account for an event that is too large to be sent."""
        ...

    def flush(self) -> None:
        """Have all that was added ready to be taken."""
        ...

    def end(self) -> None:
        """Let all events go that still wait, and account for them."""
        ...


class MemoryBacklog:
    """Events in memory, within Kong's parameters: beyond them the oldest are dropped. Nothing outlives the process."""

    keeps = False

    def __init__(self, settings: Queue, account: QueueAccount) -> None:
        self._account = account
        self._lock = threading.Lock()
        self._entries: deque[Entry] = deque()
        self._bytes = 0
        self._taken = 0
        self._warned = False
        self._dropping = False
        self._ended = False
        self.reconfigure(settings)

    def on_ready(self, callback: Callable[[], None]) -> None:
        """Do nothing: events come by `add` alone."""

    def reconfigure(self, settings: Queue) -> None:
        """Go by other parameters from now on."""
        self._settings = settings
        self._thresholds = policy.thresholds(settings)

    @property
    def largest(self) -> int:
        """The bytes of the largest event that can be taken in."""
        return self._thresholds.largest

    @property
    def waiting(self) -> int:
        """How many events wait, those that were taken included."""
        return len(self._entries) + self._taken

    @property
    def ready(self) -> int:
        """How many events can be taken now."""
        return len(self._entries)

    def add(self, event: bytes, now: float) -> bool:
        """Take an event in, and drop the oldest ones if it needs their place."""
        with self._lock:
            waiting = len(self._entries)
            if waiting >= self._thresholds.roomy:
                self._make_room(len(event))
            self._entries.append(Entry(event, now))
            self._bytes += len(event)
        return waiting == 0 or waiting + 1 >= self._thresholds.wakes_at

    def due_in(self, now: float) -> float | None:
        """Tell in how many seconds a batch may be taken; None when there is nothing to take."""
        with self._lock:
            if not self._entries:
                return None
            return policy.due_in(self._settings, len(self._entries), self._bytes, now - self._entries[0].queued_at)

    def take(self, limit: int) -> list[Entry]:
        """Take the oldest events out to send them."""
        with self._lock:
            size = min(limit, len(self._entries))
            self._taken += size  # first: `waiting` is read without the lock, and must never miss an event
            batch = [self._entries.popleft() for _ in range(size)]
            self._bytes -= sum(len(entry.event) for entry in batch)
            if self._warned and not policy.is_nearly_full(self._settings, len(self._entries), self._bytes):
                self._warned = False
            resumed, self._dropping = self._dropping, False
        if resumed:
            self._account.say("resumed", "resumed processing", logging.INFO)
        return batch

    def begin_send(self, entries: list[Entry]) -> Sending:
        """Give them all: nothing is known of what was sent before this process."""
        return Sending(entries)

    def did_not_arrive(self, sending: Sending) -> None:
        """Do nothing: nobody would ask."""

    def settle(self, entries: Sequence[Entry]) -> bool:
        """Let events go; False when `end` was faster."""
        with self._lock:
            if not self._ended:
                self._taken -= len(entries)
            return not self._ended

    def reject(self, entries: Sequence[Entry], answer: str) -> None:
        """Drop events that the endpoint refuses for themselves."""
        if self.settle(entries):
            self._account.drop(Dropped.REJECTED, len(entries), answer)

    def refuse(self, event: bytes) -> None:
        """Drop an event that is too large."""
        self._account.drop(Dropped.EVENT_TOO_LARGE, 1, f"an event of {len(event)} bytes is too large")

    def flush(self) -> None:
        """Do nothing: it is ready at once."""

    def end(self) -> None:
        """Drop what still waits."""
        with self._lock:
            left = self.waiting
            self._ended = True
            self._entries.clear()
            self._bytes = self._taken = 0
        if left:
            message = f"{left} events were not delivered before the process ended"
            self._account.drop(Dropped.PROCESS_ENDED, left, message)

    def _make_room(self, size: int) -> None:
        settings = self._settings
        if not self._warned and policy.is_nearly_full(settings, len(self._entries), self._bytes):
            self._warned = True
            self._account.say("capacity", f"at {policy.CAPACITY_WARNING:.0%} capacity", logging.WARNING)
        by_entries = by_bytes = 0
        while len(self._entries) >= settings.max_entries:
            self._forget_oldest()
            by_entries += 1
        while settings.max_bytes is not None and self._entries and self._bytes + size > settings.max_bytes:
            self._forget_oldest()
            by_bytes += 1
        if by_entries:
            message = "full, dropping the oldest events until delivery works again"
            self._account.drop(Dropped.QUEUE_FULL, by_entries, message)
        if by_bytes:
            message = "byte capacity exceeded, dropping the oldest events"
            self._account.drop(Dropped.QUEUE_BYTES_FULL, by_bytes, message)
        self._dropping = self._dropping or bool(by_entries or by_bytes)

    def _forget_oldest(self) -> None:
        self._bytes -= len(self._entries.popleft().event)
