"""Says that Kong has not come: whoever keeps it from connecting keeps it from saying so, too.

Contract: used from the event loop's thread only; looks once, a minute after the start, and says at most one line. A
Kong that has nothing to meter does not come either.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from kong_metering.host.kongs import who_cannot_connect
from kong_metering.log import LOGGER, not_through_kong

if TYPE_CHECKING:
    from kong_metering.clock import Clock

ABSENCE_SECONDS = 60.0


class Absence:
    """From the start of a server until Kong has come, or was missed."""

    def __init__(self, path: Path, clock: Clock, seconds: float = ABSENCE_SECONDS) -> None:
        self._path = path
        self._clock = clock
        self._said_at: float | None = clock.monotonic() + seconds

    def look(self, has_come: Callable[[], bool]) -> None:
        """Say so if it is time and Kong has not come; to be called each second."""
        if self._said_at is None or self._clock.monotonic() < self._said_at:
            return
        self._said_at = None
        if has_come():
            return
        hindered = who_cannot_connect(self._path, is_missed=True)
        if hindered is not None:
            LOGGER.error("Kong has not come, and cannot: %s", hindered, extra=not_through_kong())
            return
        LOGGER.warning(
            "Kong has not come yet, which is right as long as it has nothing to meter. Else see that the plugin is "
            "enabled, that pluginserver_*_socket in kong.conf names %s, and that Kong's workers may connect there: "
            "they run as the user that this server runs as, or are in the group that --socket-group names",
            self._path,
            extra=not_through_kong(),
        )
