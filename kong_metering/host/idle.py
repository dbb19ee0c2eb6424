"""Connections that Kong keeps and does not use: some are closed when descriptors are short, so that others are served.

Each of Kong's workers keeps up to 256 of them (`lua_socket_pool_size`) for a minute, and uses the one again that it
used last. Who waits for a connection of his own gets none of these, and a 500 after that minute (seen on Kong 3.9.3).

Contract: used from the event loop's thread only. A connection that is closed at the very moment at which Kong takes it
costs that request its answer, and in a burst such a moment is long: of 3,000 requests at once 42 met it when 50 ms
without use were enough. So only one goes that has carried something, and nothing within `_IDLE_SECONDS`, and that holds
no bytes which were not read yet.
"""

from __future__ import annotations

import contextlib
import select
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kong_metering.host.connection import Connection

# Much longer than a worker's loop takes to come round, much shorter than anybody waits.
_IDLE_SECONDS = 1.0


class IdleConnections:
    """Which of a server's connections are idle."""

    def __init__(self, connections: Collection[Connection], now: Callable[[], float]) -> None:
        """Look at these, which may change, by this clock (monotonic)."""
        self._connections = connections
        self._now = now
        # How much had come over those that were quiet at the last look.
        self._seen: dict[Connection, int] = {}
        self._looked_at = now()

    def close_some(self, kept: Collection[Connection]) -> int:
        """Close idle ones, but for those that are `kept`; tell how many."""
        if self._now() - self._looked_at < _IDLE_SECONDS:
            return 0
        self._looked_at = self._now()
        seen = {one: one.received for one in self._connections if one.received and one.is_quiet and one not in kept}
        idle = [one for one, received in seen.items() if self._seen.get(one) == received]
        self._seen = seen
        closed = [one for one in idle if not _has_unread(one)]
        for one in closed:
            one.close()
        return len(closed)


def _has_unread(connection: Connection) -> bool:
    poll = select.poll()
    with contextlib.suppress(OSError):
        poll.register(connection.descriptor(), select.POLLIN)
        return bool(poll.poll(0))
    return True
