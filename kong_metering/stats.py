"""What became of everything: counters that add up.

Contract: any thread may count and read. For every process, at any moment,
`accepted = delivered + dropped (by reason) + waiting`, where waiting is known to the queues; a request that
gave no event is counted under the reason why. Counting holds a lock for well under a microsecond.
"""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field
from enum import Enum


class Skipped(str, Enum):
    """Why a request gave no event."""

    NO_SUBJECT = "no_subject"
    STATUS_NOT_ALLOWED = "status_not_allowed"
    ERROR = "error"


class Dropped(str, Enum):
    """Why an accepted event will never be delivered."""

    QUEUE_FULL = "queue_full"
    QUEUE_BYTES_FULL = "queue_bytes_full"
    EVENT_TOO_LARGE = "event_too_large"
    RETRY_TIME_EXCEEDED = "retry_time_exceeded"
    BREAKER_OPEN = "breaker_open"
    REJECTED = "rejected"
    PROCESS_ENDED = "process_ended"


@dataclass(frozen=True)
class Snapshot:
    """The account at one moment: events, and requests that gave none, by reason."""

    accepted: int = 0
    delivered: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)

    @property
    def waiting(self) -> int:
        """Events that are neither delivered nor dropped yet."""
        return self.accepted - self.delivered - sum(self.dropped.values())


class Stats:
    """The counters of one process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._accepted = 0
        self._delivered = 0
        self._dropped: Counter[str] = Counter()
        self._skipped: Counter[str] = Counter()

    def accept(self) -> None:
        """Count one event that a queue took."""
        with self._lock:
            self._accepted += 1

    def deliver(self, events: int) -> None:
        """Count events that the endpoint answered with a 2xx."""
        with self._lock:
            self._delivered += events

    def drop(self, reason: Dropped, events: int = 1) -> None:
        """Count accepted events that are given up."""
        with self._lock:
            self._dropped[reason.value] += events

    def skip(self, reason: Skipped) -> None:
        """Count a request that gives no event."""
        with self._lock:
            self._skipped[reason.value] += 1

    def snapshot(self) -> Snapshot:
        """Take all counters at one moment."""
        with self._lock:
            return Snapshot(self._accepted, self._delivered, dict(self._dropped), dict(self._skipped))
