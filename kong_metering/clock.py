"""The two clocks, handed in wherever time matters, so that tests can turn them."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Durations come from `monotonic`, timestamps from `wall`; the two are never mixed."""

    def monotonic(self) -> float:
        """Seconds since some moment; never goes back, not even when the system's time is set."""
        ...

    def wall(self) -> float:
        """Seconds since 1970-01-01 UTC, as far as this machine knows."""
        ...


class SystemClock:
    """The machine's clocks."""

    monotonic = staticmethod(time.monotonic)
    wall = staticmethod(time.time)
