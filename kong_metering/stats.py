"""What became of everything: counters that add up.

Contract: any thread may count and read. For every process, at any moment,
`accepted + adopted = delivered + dead letters (by reason) + dropped (by reason) + left + waiting`, where waiting is
known to the queues; a request that gave no event is counted under the reason why. Counting holds a lock for well under
a microsecond.
"""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kong_metering.reasons import Buried, Dropped, Skipped


@dataclass(frozen=True)
class Snapshot:
    """The account at one moment: events, and requests that gave none, by reason.

    `adopted` are events that a process before this one had accepted; `left`, those that stay on disk for the next one.
    `dead_letters` are those that became some; `dead_letters_dropped`: how many, of any process, were dropped since
    there were too many. `verified` are delivered ones that were read back, by what was found.
    """

    accepted: int = 0
    adopted: int = 0
    delivered: int = 0
    left: int = 0
    dead_letters: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    dead_letters_dropped: int = 0
    verified: dict[str, int] = field(default_factory=dict)

    @property
    def waiting(self) -> int:
        """Events of which nothing else has become yet."""
        gone = self.delivered + self.left + sum(self.dead_letters.values()) + sum(self.dropped.values())
        return self.accepted + self.adopted - gone


class Stats:
    """The counters of one process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._accepted = 0
        self._adopted = 0
        self._delivered = 0
        self._left = 0
        self._dead_letters: Counter[str] = Counter()
        self._dropped: Counter[str] = Counter()
        self._skipped: Counter[str] = Counter()
        self._dead_letters_dropped = 0
        self._verified: Counter[str] = Counter()

    def accept(self) -> None:
        """Count one event that a queue took."""
        with self._lock:
            self._accepted += 1

    def adopt(self, events: int) -> None:
        """Count events that were taken over from another process's spool."""
        with self._lock:
            self._adopted += events

    def deliver(self, events: int) -> None:
        """Count events that the endpoint answered with a 2xx."""
        with self._lock:
            self._delivered += events

    def leave(self, events: int) -> None:
        """Count events that are left on disk for another process."""
        with self._lock:
            self._left += events

    def bury(self, reason: Buried, events: int) -> None:
        """Count events that became dead letters."""
        with self._lock:
            self._dead_letters[reason.value] += events

    def drop_letters(self, letters: int) -> None:
        """Count dead letters that were dropped, the oldest, to make room for new ones."""
        with self._lock:
            self._dead_letters_dropped += letters

    def drop(self, reason: Dropped, events: int = 1) -> None:
        """Count accepted events that are given up."""
        with self._lock:
            self._dropped[reason.value] += events

    def skip(self, reason: Skipped) -> None:
        """Count a request that gives no event."""
        with self._lock:
            self._skipped[reason.value] += 1

    def verify(self, result: str, events: int) -> None:
        """Count delivered events that were read back, by what was found."""
        with self._lock:
            self._verified[result] += events

    def snapshot(self) -> Snapshot:
        """Take all counters at one moment."""
        with self._lock:
            return Snapshot(
                self._accepted,
                self._adopted,
                self._delivered,
                self._left,
                dict(self._dead_letters),
                dict(self._dropped),
                dict(self._skipped),
                self._dead_letters_dropped,
                dict(self._verified),
            )
