"""One connection from Kong: its bytes in, its answers out.

Contract: used from the event loop's thread only. Bytes that are not the protocol, and answers that nobody reads, cost
the sender its connection and nobody else anything. While the server hands its sockets over to the next process, bytes
that would begin something new are kept for that one.
"""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Protocol, cast

from kong_metering.host import handover
from kong_metering.host.codec import FrameReader, ProtocolError
from kong_metering.log import printable

if TYPE_CHECKING:
    from kong_metering.log import TroubleLog

_MAX_UNREAD_BYTES = 1024 * 1024
_GO_ON = b"plugin.Step"
_METHOD_WITHIN = 64


class ConnectionServer(Protocol):
    """What a connection needs of the server that it belongs to."""

    troubles: TroubleLog
    connections: set[Connection]

    @property
    def is_handing_over(self) -> bool:
        """Whether nothing new may begin."""
        ...

    def share(self, asked: Connection) -> None:
        """Give the socket that listens to the next process, at the other end of `asked`."""
        ...

    def answer(self, request_id: int, method: str, argument: object) -> bytes:
        """Give the bytes that answer one RPC."""
        ...


class Connection(asyncio.Protocol):
    """One connection from Kong: bytes in, answers out."""

    def __init__(self, server: ConnectionServer) -> None:
        self._server = server
        self._reader = FrameReader()
        self._transport: asyncio.Transport | None = None
        # What came while new events had to wait.
        self._held = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin: the event loop's call."""
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=_MAX_UNREAD_BYTES)
        self._server.connections.add(self)

    def data_received(self, data: bytes) -> None:
        """Answer the requests that these bytes complete: the event loop's call."""
        transport = self._transport
        if transport is None:
            return
        if self._server.is_handing_over and self._begins_something(data):
            self._held += data
            return
        try:
            for request_id, method, argument in self._reader.feed(data):
                if method == handover.METHOD:
                    self._server.share(self)
                    continue
                transport.write(self._server.answer(request_id, method, argument))
        except ProtocolError as error:
            self._server.troubles.report(
                "protocol", f"a connection was closed, it did not speak the protocol: {printable(str(error))}"
            )
            self.abort()

    def _begins_something(self, data: bytes) -> bool:
        """Whether this is no step of an event that is under way; Kong has one RPC at a time on a connection."""
        return bool(self._held) or not (self._reader.is_amid_frame or _GO_ON in data[:_METHOD_WITHIN])

    @property
    def is_quiet(self) -> bool:
        """Whether all answers are written, and no frame has begun."""
        transport = self._transport
        return transport is None or not (self._reader.is_amid_frame or transport.get_write_buffer_size())

    def detach(self) -> tuple[int, bytes] | None:
        """Read no more, and give a descriptor of the socket, with the bytes that have to be looked at yet.

        None when somebody else could not go on where this one is.
        """
        if self._transport is None or not self.is_quiet:
            return None
        self._transport.pause_reading()
        return self.descriptor(), self._held

    def descriptor(self) -> int:
        """Give another descriptor of the socket. Raises `OSError`."""
        if self._transport is None:
            raise ConnectionError("the connection has ended")
        return os.dup(self._transport.get_extra_info("socket").fileno())

    def go_on(self) -> None:
        """Read again, and look at what had to wait."""
        if self._transport is not None:
            self._transport.resume_reading()
            held, self._held = self._held, b""
            if held:
                self.data_received(held)

    def pause_writing(self) -> None:
        """End the connection: whoever sends so many requests and reads no answers is not Kong."""
        self._server.troubles.report("unread", "a connection was closed, it did not read its answers")
        self.abort()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the protocol's signature
        """End: the event loop's call."""
        self._transport = None
        self._server.connections.discard(self)

    def abort(self) -> None:
        """Close the connection without waiting for anything."""
        if self._transport is not None:
            self._transport.abort()
            self._transport = None

    def close(self) -> None:
        """Close the connection once its answers are written."""
        if self._transport is not None:
            self._transport.close()
