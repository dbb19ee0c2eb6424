"""Where a server accepts connections: it serves those of its own workers, and passes the others on to theirs.

Contract: used from the event loop's thread only. No connection goes to another server than its worker's, as long as
that one lives or is going to be replaced: what does not fit into its channel waits here, and goes to the next servers
when these take over.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, cast

from kong_metering.host.channels import Kind, duplicate
from kong_metering.host.handover import process_of
from kong_metering.host.workers import is_living
from kong_metering.log import LOGGER

if TYPE_CHECKING:
    from kong_metering.host.board import State
    from kong_metering.host.connection import Connection
    from kong_metering.host.station import Station

_RETRY_SECONDS = 0.002


class Front:
    """What a server serves at.

    `connect` makes the protocol of a connection that is to be served here, `adopt` serves one that is accepted already.
    """

    def __init__(
        self, station: Station, connect: Callable[[], Connection], adopt: Callable[[socket.socket], None]
    ) -> None:
        self.station = station
        # The connections to those that are going to take over.
        self.shared_with: set[Connection] = set()
        self._connect = connect
        self._adopt = adopt
        self._server: asyncio.AbstractServer | None = None
        self._unsent: list[tuple[int, int]] = []

    async def start_accepting(self) -> None:
        """Accept connections from now on."""
        is_alone = len(self.station.slots) == 1
        # A descriptor of the loop's own: it closes it.
        listener = duplicate(self.station.sockets.listener.fileno())
        self._server = await asyncio.get_running_loop().create_unix_server(
            self._connect if is_alone else lambda: _Arrival(self), sock=listener, backlog=self.station.backlog
        )

    def stop_accepting(self) -> None:
        """Accept none."""
        if self._server is not None:
            self._server.close()
            self._server = None

    def leave(self, state: State) -> None:
        """Accept none, and take none from others, for good."""
        asyncio.get_running_loop().remove_reader(self.station.channel.outlet.fileno())
        self.stop_accepting()
        self.station.sockets.listener.close()
        self.station.slot.tell(state)

    def take_unsent(self) -> list[int]:
        """Give the descriptors of the connections that could not be passed on yet; the caller closes them."""
        unsent, self._unsent = self._unsent, []
        return [descriptor for _, descriptor in unsent]

    def serve_unsent(self, descriptors: Iterable[int]) -> None:
        """Look once more whose these connections are."""
        for descriptor in descriptors:
            with socket.socket(fileno=descriptor) as accepted:
                if not self._is_passed_on(accepted):
                    self._adopt(duplicate(descriptor))

    def receive(self, transport: asyncio.Transport) -> None:
        """Serve a connection that was just accepted, or pass it on before anything is read from it."""
        with duplicate(transport.get_extra_info("socket").fileno()) as accepted:
            if self._is_passed_on(accepted):
                transport.abort()
                return
        connection = self._connect()
        transport.set_protocol(connection)
        connection.connection_made(transport)

    def _is_passed_on(self, accepted: socket.socket) -> bool:
        """Pass a connection on, now or soon, if it is not of a worker of this server."""
        process = process_of(accepted)
        if process == 0 and self.station.workers.meets_unknown():
            LOGGER.warning(
                "Kong runs in another PID namespace, so its workers cannot be told apart: all connections go to the "
                "first of %d servers",
                len(self.station.slots),
            )
        index = self.station.workers.server_of(process)
        if index == self.station.index or self._is_lost(index):
            return False
        return self._send(index, accepted.fileno())

    def _is_lost(self, index: int) -> bool:
        """Whether a server is gone, and nobody is left to replace it."""
        return self.station.is_orphaned and not is_living(self.station.slots[index].pid)

    def _send(self, index: int, descriptor: int) -> bool:
        try:
            self.station.sockets.servers[index].send(Kind.CONNECTION, descriptor)
        except BlockingIOError:
            if not self._unsent:
                asyncio.get_running_loop().call_later(_RETRY_SECONDS, self._send_unsent)
            self._unsent.append((index, os.dup(descriptor)))
        except OSError:
            return False
        return True

    def _send_unsent(self) -> None:
        unsent, self._unsent = self._unsent, []
        for index, descriptor in unsent:
            with socket.socket(fileno=descriptor) as accepted:
                if self._is_lost(index) or not self._send(index, descriptor):
                    self._adopt(duplicate(accepted.fileno()))


class _Arrival(asyncio.Protocol):
    """A connection of which it is not known yet who serves it."""

    def __init__(self, front: Front) -> None:
        self._front = front

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Find out: the event loop's call."""
        self._front.receive(cast("asyncio.Transport", transport))
