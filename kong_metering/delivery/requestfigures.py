"""What came of the requests of one queue, for those who watch it; any thread may note and read."""

from __future__ import annotations

import threading
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

from kong_metering.trial.outcome import Delivered, kind_of

if TYPE_CHECKING:
    from kong_metering.clock import Clock
    from kong_metering.measures import Histogram
    from kong_metering.trial.outcome import Outcome


class LastRequest(NamedTuple):
    """What came of a queue's last request: its number, 0 before the first, why it failed, if it did, and its time."""

    number: int = 0
    problem: str = ""
    seconds: float = 0.0


class RequestFigures:
    """Counts requests by what came of them, and remembers the last good and the last bad one (wall clock)."""

    def __init__(self, clock: Clock, times: Histogram) -> None:
        """Take where the time of each request is counted."""
        self._clock = clock
        self._times = times
        self._lock = threading.Lock()
        self._by_kind: Counter[str] = Counter()
        self._delivered_at: float | None = None
        self._last_failure: dict[str, Any] | None = None
        self._last = LastRequest()

    def note(self, outcome: Outcome, seconds: float) -> None:
        """Count a request that took so long."""
        self._times.observe(seconds)
        now = self._clock.wall()
        with self._lock:
            self._by_kind[kind_of(outcome)] += 1
            problem = "" if isinstance(outcome, Delivered) else outcome.reason
            self._last = LastRequest(self._last.number + 1, problem, seconds)
            if isinstance(outcome, Delivered):
                self._delivered_at = now
            else:
                self._last_failure = {"at": now, "reason": outcome.reason}

    @property
    def last(self) -> LastRequest:
        """What came of the last one."""
        return self._last

    def told(self) -> dict[str, Any]:
        """Return the figures."""
        with self._lock:
            return {
                "requests": dict(self._by_kind),
                "delivered_at": self._delivered_at,
                "last_failure": self._last_failure,
            }
