"""The two clocks, handed in wherever time matters, so that tests can turn them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Protocol

# 24 days: a socket waits by `poll`, for milliseconds in a C int; a longer time is taken for another one.
LONGEST_SOCKET_WAIT = 2_147_483.0

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


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

    def boot_id(self) -> str:
        """Name that start of the machine; empty where the system has no name for it."""
        ...


class SystemClock:
    """The machine's clocks."""

    monotonic = staticmethod(time.monotonic)
    wall = staticmethod(time.time)

    def since_boot(self) -> float:
        """Return the seconds since the machine started."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    def boot_id(self) -> str:
        """Return the name of this start of the machine."""
        try:
            return _BOOT_ID.read_text("ascii").strip()
        except OSError:
            return ""


class EpochClock:
    """A clock that tells the time since 1970 in milliseconds too, as it is written to disk."""

    def __init__(self, clock: Clock) -> None:
        """Take the machine's."""
        self.monotonic = clock.monotonic
        self._wall = clock.wall

    def wall_ms(self) -> int:
        """Tell it as the machine knows it."""
        return int(self._wall() * 1000)
