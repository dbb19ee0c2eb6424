"""What a process counts and times for those who watch it, beside the account (`stats.py`).

Contract: any thread may count and read. Counting holds a lock for well under a microsecond. What becomes of requests is
kept for `MOST_PLUGINS` plugin entities; of more than that the ones seen first are forgotten.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kong_metering.clock import Clock
    from kong_metering.config import Entity
    from kong_metering.reasons import Skipped

# Upper bounds of the times told apart, in seconds; what takes longer than the last is counted behind it.
BOUNDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
MOST_PLUGINS = 10_000
METERED = "metered"


class Histogram:
    """How often something took how long."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = [0] * (len(BOUNDS) + 1)
        self._sum = 0.0

    def observe(self, seconds: float) -> None:
        """Count something that took so long."""
        index = bisect_left(BOUNDS, seconds)
        with self._lock:
            self._counts[index] += 1
            self._sum += seconds

    def told(self) -> dict[str, Any]:
        """Return the counts by upper bound, which do not include each other, and the sum of all times in seconds."""
        with self._lock:
            bounds = [*map(str, BOUNDS), "+Inf"]
            return {"counts": dict(zip(bounds, self._counts, strict=True)), "sum": self._sum}


@dataclass(frozen=True)
class Timings:
    """How long things take, in seconds.

    `access` and `log`: a phase, from Kong's call until the last of its answers was dealt with. `post`: one request to
    an endpoint. `write`: one write of events to a log. `sync`: one wait until the disk confirms what was written.
    """

    access: Histogram = field(default_factory=Histogram)
    log: Histogram = field(default_factory=Histogram)
    post: Histogram = field(default_factory=Histogram)
    write: Histogram = field(default_factory=Histogram)
    sync: Histogram = field(default_factory=Histogram)

    def told(self) -> dict[str, Any]:
        """Return all of them by name."""
        return {name: histogram.told() for name, histogram in vars(self).items()}


class PluginRequests:
    """What became of the requests of one plugin entity, and when the last of them was (wall clock)."""

    def __init__(self, name: str, clock: Clock) -> None:
        self.name = name
        self._clock = clock
        self._last_at: float | None = None
        self._lock = threading.Lock()
        self._outcomes: Counter[str] = Counter()
        self._events: Counter[str] = Counter()

    def meter(self, api_events: int, llm_events: int) -> None:
        """Count a request that gave events, by their type, or that had none to give."""
        with self._lock:
            self._outcomes[METERED] += 1
            self._last_at = self._clock.wall()
            self._events["kong.api_request"] += api_events
            if llm_events:
                self._events["kong.llm_request"] += llm_events

    def skip(self, reason: Skipped) -> None:
        """Count a request that gave no event."""
        with self._lock:
            self._outcomes[reason.value] += 1
            self._last_at = self._clock.wall()

    def told(self) -> dict[str, Any]:
        """Return the requests by outcome, when the last one was, and the events by type."""
        with self._lock:
            return {
                "name": self.name,
                "requests": dict(self._outcomes),
                "last_request_at": self._last_at,
                "events": {name: count for name, count in self._events.items() if count},
            }


class Requests:
    """What became of the requests of each plugin entity."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._plugins: dict[str, PluginRequests] = {}

    def of(self, entity: Entity) -> PluginRequests:
        """Return where those of a plugin entity are counted."""
        with self._lock:
            found = self._plugins.get(entity.id)
            if found is None:
                if len(self._plugins) >= MOST_PLUGINS:
                    del self._plugins[next(iter(self._plugins))]
                found = self._plugins[entity.id] = PluginRequests(entity.name, self._clock)
            return found

    def told(self) -> dict[str, Any]:
        """Return the figures of each, by the id of the plugin entity."""
        with self._lock:
            plugins = dict(self._plugins)
        return {entity: plugin.told() for entity, plugin in plugins.items()}
