"""What one queue counts, and what it says in the log."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from typing import TYPE_CHECKING, Any

from kong_metering.log import LOGGER, cause_of, trouble
from kong_metering.outages import in_words
from kong_metering.plurals import counted

if TYPE_CHECKING:
    from kong_metering.reasons import Buried, Dropped
    from kong_metering.stats import Stats


class QueueAccount:
    """A queue's name and the account of its events, within that of its process; any thread may use it.

    What is counted was said before: who sees a count finds its reason in the log.
    """

    def __init__(self, name: str, stats: Stats) -> None:
        self.name = name
        self.waiting = 0
        self._stats = stats
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._dead_letters: Counter[str] = Counter()
        self._dropped: Counter[str] = Counter()
        self._verified: Counter[str] = Counter()

    @property
    def delivered(self) -> int:
        """How many events the endpoint took."""
        return self._counts["delivered"]

    def accept(self) -> None:
        """Count an event that came in."""
        self._count(1, "accepted")
        self._stats.accept()

    def adopt(self, events: int) -> None:
        """Count events that another process had accepted."""
        self._count(events, "adopted")
        self._stats.adopt(events)

    def deliver(self, events: int) -> None:
        """Count events that the endpoint took."""
        self._stats.deliver(events)
        self._count(-events, "delivered")

    def verify(self, result: str, events: int) -> None:
        """Count events that were read back from the endpoint, by what was found."""
        self._stats.verify(result, events)
        with self._lock:
            self._verified[result] += events

    def move(self, events: int, other: QueueAccount) -> None:
        """Count events that wait in another queue from now on."""
        other._count(events, "moved_in")
        self._count(-events, "moved_out")

    def leave(self, events: int) -> None:
        """Count events that stay on disk for another process."""
        self._stats.leave(events)
        self._count(-events, "left")

    def drop(self, reason: Dropped, events: int, message: str) -> None:
        """Say that events are given up, and count them."""
        self.say(f"dropped:{reason.value}", message)
        self._stats.drop(reason, events)
        self._lose(events, self._dropped, reason)

    def bury(self, reason: Buried, events: int, message: str) -> None:
        """Say that events became dead letters, and count them."""
        self.say(f"dead letters:{reason.value}", message)
        self._stats.bury(reason, events)
        self._lose(events, self._dead_letters, reason)

    def say(self, kind: str, message: str, level: int = logging.ERROR) -> None:
        """Log a trouble, or its end; the same kind is summarised when it repeats."""
        LOGGER.log(level, "queue %s: %s", self.name, message, extra=trouble(f"{kind}:{self.name}"))

    def say_position_is_lost(self, error: Exception) -> None:
        """Log that it cannot be written down what is delivered.

        The price is paid by those who come after a crash: events are sent once more, with the same ids.
        """
        self.say("position", f"what is delivered cannot be written down: {cause_of(error)}")

    def say_recovery(self, seconds: float) -> None:
        """Say that the endpoint takes events again, after it took none for so long, and how many wait."""
        waited = counted(self.waiting, "event")
        message = f"the endpoint works again after {in_words(seconds)}; {waited} waited"
        self.say("works again", message, logging.WARNING)

    def told(self) -> dict[str, Any]:
        """Return all counts: of events; dead letters and dropped ones by reason, those read back by what was found."""
        with self._lock:
            counts = {"accepted": 0, "adopted": 0, "delivered": 0, **self._counts, "waiting": self.waiting}
            return {
                **counts,
                "dead_letters": dict(self._dead_letters),
                "dropped": dict(self._dropped),
                "verified": dict(self._verified),
            }

    def _count(self, events: int, what: str) -> None:
        with self._lock:
            self.waiting += events
            self._counts[what] += abs(events)

    def _lose(self, events: int, counts: Counter[str], reason: Buried | Dropped) -> None:
        with self._lock:
            self.waiting -= events
            counts[reason.value] += events
