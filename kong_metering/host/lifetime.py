"""What ends a server: a signal, or that nobody is left whom it serves for.

Contract: used from the event loop's thread only, signals included. A server whose supervisor is gone goes on for
`_ORPHAN_SECONDS`, so that no request is lost until the next plugin server is there, and for as long as one that has
asked for the socket gets ready; when it has handed over it ends at once, for nobody is left to tell it to. One that a
Kong has started goes on for longer while that lives, and ends when it is gone.
"""

from __future__ import annotations

import asyncio
import os
import signal
import stat
from collections.abc import Callable

from kong_metering.host.workers import is_living
from kong_metering.log import LOGGER

# What the system sends to a server when its supervisor is gone.
ORPHANED = signal.SIGUSR1
# What is kept back in a new server until it can act on it.
SIGNALS = (signal.SIGTERM, signal.SIGINT, ORPHANED)

# Kong starts the next plugin server within a second, which may take some to come up.
_ORPHAN_SECONDS = 5.0
# A Kong that lives starts it for sure; on a machine that is short of time it was seen to take more than five seconds.
_ORPHAN_OF_KONG_SECONDS = 20.0
# `kong stop` comes back when Kong is gone, and who called it does not expect us to stay on.
_KONG_LOOK_SECONDS = 0.1
_STANDARD_OUTPUTS = (1, 2)


class Lifetime:
    """From a server's first moment until it is to end."""

    def __init__(
        self, supervisor: int, kong: int | None, has_parted: Callable[[], bool], is_awaited: Callable[[], bool]
    ) -> None:
        """Begin; `has_parted` tells whether nothing is left to serve, `is_awaited` whether somebody will take over.

        `kong` is the master process of the gateway that has started the supervisor, if any has.
        """
        self._loop = asyncio.get_running_loop()
        self._supervisor = supervisor
        self._kong = kong
        self._has_parted = has_parted
        self._is_awaited = is_awaited
        self._ended: asyncio.Future[str] = self._loop.create_future()
        self._ends_at: float | None = None

    @property
    def is_orphaned(self) -> bool:
        """Whether the supervisor is gone."""
        return self._ends_at is not None

    def heed_signals(self) -> None:
        """Take the signals that were kept back until now, and those to come."""
        for number in SIGNALS:
            signal.signal(number, self._told)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    async def wait(self) -> str:
        """Wait for the end, and give the reason."""
        return await self._ended

    def look(self) -> None:
        """See whether the supervisor lives, and whether it is time to end without it; about once a second."""
        if self._ends_at is None:
            if os.getppid() != self._supervisor:
                self._begin_to_end()
        elif self._has_parted():
            self._end("all is handed over, and the supervisor is gone")
        elif self._kong is not None and not is_living(self._kong):
            self._end("the supervisor is gone, and Kong is")
        elif self._is_awaited():
            self._ends_at = self._loop.time() + self._orphan_seconds
        elif self._loop.time() >= self._ends_at:
            self._end("the supervisor is gone")

    def _told(self, number: int, _frame: object) -> None:
        if number == ORPHANED:
            self._loop.call_soon_threadsafe(self.look)
        else:
            self._loop.call_soon_threadsafe(self._end, signal.Signals(number).name)

    def _begin_to_end(self) -> None:
        if self._ended.done():
            return
        self._ends_at = self._loop.time() + self._orphan_seconds
        LOGGER.warning(
            "the supervisor, process %d, is gone; this server goes on until it is replaced", self._supervisor
        )
        _let_go_of_pipes()
        self._look_often()

    @property
    def _orphan_seconds(self) -> float:
        return _ORPHAN_SECONDS if self._kong is None else _ORPHAN_OF_KONG_SECONDS

    def _look_often(self) -> None:
        self.look()
        if self._kong is not None and not self._ended.done():
            self._loop.call_later(_KONG_LOOK_SECONDS, self._look_often)

    def _end(self, why: str) -> None:
        if not self._ended.done():
            self._ended.set_result(why)


def ignore_signals() -> None:
    """Let nothing disturb an end that is under way."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _let_go_of_pipes() -> None:
    """Close the pipe to Kong, which starts the next plugin server only when nobody can write to it any more."""
    nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    for descriptor in _STANDARD_OUTPUTS:
        if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
            os.dup2(nowhere, descriptor)
    os.close(nowhere)
