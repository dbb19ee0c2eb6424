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

    def since_boot(self) -> float:
        """Seconds since the machine started, those included in which it slept; the same for all processes."""
        ...


class SystemClock:
    """The machine's clocks."""

    monotonic = staticmethod(time.monotonic)
    wall = staticmethod(time.time)

    def since_boot(self) -> float:
        """Return the seconds since the machine started."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)


class EpochClock:
    """A clock that tells the time since 1970 in milliseconds too, as it is written to disk."""

    def __init__(self, clock: Clock) -> None:
        """Take the moment for the one that the wall clock shows now."""
        self.monotonic = clock.monotonic
        self._wall = clock.wall
        self._epoch = clock.wall() - clock.monotonic()

    def now_ms(self) -> int:
        """Tell it by the clock that nobody sets: right for two events of one process, whatever the wall's shows."""
        return int((self._epoch + self.monotonic()) * 1000)

    def wall_ms(self) -> int:
        """Tell it as the machine knows it."""
        return int(self._wall() * 1000)
