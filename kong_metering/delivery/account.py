"""What one queue counts, and what it says in the log."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

from kong_metering.log import LOGGER, cause_of, trouble

if TYPE_CHECKING:
    from kong_metering.reasons import Buried, Dropped
    from kong_metering.stats import Stats


class QueueAccount:
    """A queue's name and how many of its events wait, over the account of its process; any thread may use it.

    What is counted was said before: who sees a count finds its reason in the log.
    """

    def __init__(self, name: str, stats: Stats) -> None:
        self.name = name
        self.waiting = 0
        self._stats = stats
        self._lock = threading.Lock()

    def accept(self) -> None:
        """Count an event that came in."""
        self._count(1)
        self._stats.accept()

    def adopt(self, events: int) -> None:
        """Count events that another process had accepted."""
        self._count(events)
        self._stats.adopt(events)

    def deliver(self, events: int) -> None:
        """Count events that the endpoint took."""
        self._stats.deliver(events)
        self._count(-events)

    def move(self, events: int, other: QueueAccount) -> None:
        """Count events that wait in another queue from now on."""
        other._count(events)
        self._count(-events)

    def leave(self, events: int) -> None:
        """Count events that stay on disk for another process."""
        self._stats.leave(events)
        self._count(-events)

    def drop(self, reason: Dropped, events: int, message: str) -> None:
        """Say that events are given up, and count them."""
        self.say(f"dropped:{reason.value}", message)
        self._stats.drop(reason, events)
        self._count(-events)

    def bury(self, reason: Buried, events: int, message: str) -> None:
        """Say that events became dead letters, and count them."""
        self.say(f"dead letters:{reason.value}", message)
        self._stats.bury(reason, events)
        self._count(-events)

    def say(self, kind: str, message: str, level: int = logging.ERROR) -> None:
        """Log a trouble, or its end; the same kind is summarised when it repeats."""
        LOGGER.log(level, "queue %s: %s", self.name, message, extra=trouble(f"{kind}:{self.name}"))

    def say_position_is_lost(self, error: Exception) -> None:
        """Log that it cannot be written down what is delivered.

        The price is paid by those who come after a crash: events are sent once more, with the same ids.
        """
        self.say("position", f"what is delivered cannot be written down: {cause_of(error)}")

    def _count(self, events: int) -> None:
        with self._lock:
            self.waiting += events
