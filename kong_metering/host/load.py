"""Whether a server is too busy for its node: its event loop's thread takes nearly a whole core, for long."""

from __future__ import annotations

import resource
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kong_metering.clock import Clock

_WINDOW_SECONDS = 30.0
_TOO_BUSY = 0.9
_SAID_AGAIN_SECONDS = 3600.0


def thread_seconds() -> float:
    """Tell how much time of a core this thread has taken."""
    usage = resource.getrusage(resource.RUSAGE_THREAD)
    return usage.ru_utime + usage.ru_stime


class Load:
    """Looks at the thread that calls it, which does so about once a second."""

    def __init__(self, clock: Clock, taken: Callable[[], float] = thread_seconds) -> None:
        self._now = clock.monotonic
        self._taken = taken
        self._began = clock.monotonic(), taken()
        self._said_at: float | None = None

    def trouble(self) -> str | None:
        """Say so when the thread took nearly a whole core for half a minute; once an hour at most."""
        now, taken = self._now(), self._taken()
        seconds = now - self._began[0]
        if seconds < _WINDOW_SECONDS:
            return None
        share = (taken - self._began[1]) / seconds
        self._began = now, taken
        if share < _TOO_BUSY or (self._said_at is not None and now - self._said_at < _SAID_AGAIN_SECONDS):
            return None
        self._said_at = now
        return f"took {share:.0%} of a core for {seconds:.0f} s"
