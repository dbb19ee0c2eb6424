"""One connection from Kong: its bytes in, its answers out.

Contract: used from the event loop's thread only. Bytes that are not the protocol, and answers that nobody reads, cost
the sender its connection and nobody else anything. While the server hands its sockets over to the next process, bytes
that would begin something new are kept for that one.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Protocol, cast

from kong_metering.host import handover
from kong_metering.host.conversation import FIRST_BYTES
from kong_metering.host.errors import ConnectionEnd, ProtocolError
from kong_metering.log import LOGGER, cause_of, printable, trouble

if TYPE_CHECKING:
    from kong_metering.host.conversation import Conversation, Conversations

_MAX_UNREAD_BYTES = 1024 * 1024


class ConnectionServer(Protocol):
    """What a connection needs of the server that it belongs to."""

    conversations: Conversations
    connections: set[Connection]

    @property
    def is_handing_over(self) -> bool:
        """Whether nothing new may begin."""
        ...

    def share(self, asked: Connection) -> None:
        """Give the socket that listens to the next process, at the other end of `asked`."""
        ...


class Connection(asyncio.Protocol):
    """One connection from Kong: bytes in, answers out."""

    def __init__(self, server: ConnectionServer) -> None:
        self._server = server
        self._conversation: Conversation | None = None
        self._transport: asyncio.Transport | None = None
        # What came while new events had to wait, or while it was too little to tell the protocol.
        self._held = b""
        # How often something came.
        self.received = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin: the event loop's call."""
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=_MAX_UNREAD_BYTES)
        self._server.connections.add(self)

    def data_received(self, data: bytes) -> None:
        """Answer what these bytes complete: the event loop's call."""
        self.received += 1
        transport, conversation = self._transport, self._conversation
        if transport is None:
            return
        if self._server.is_handing_over and self._begins_something(data):
            self._held += data
            return
        if conversation is None:
            data, self._held = self._held + data, b""
            if len(data) < FIRST_BYTES:
                self._held = data
                return
            own = {handover.METHOD: lambda: self._server.share(self)}
            conversation = self._conversation = self._server.conversations.begin(data[:FIRST_BYTES], own)
        try:
            written = conversation.receive(data)
        except ConnectionEnd:
            self.close()
        except ProtocolError as error:
            LOGGER.error(
                "a connection was closed, it did not speak the protocol: %s",
                printable(str(error)),
                extra=trouble("protocol"),
            )
            self.abort()
        except Exception as error:  # noqa: BLE001 - the next bytes would be taken for others than they are
            LOGGER.error(
                "a connection was closed, it caused an error: %s",
                cause_of(error),
                extra=trouble(f"connection:{type(error).__name__}"),
            )
            self.abort()
        else:
            if written:
                transport.write(written)

    def _begins_something(self, data: bytes) -> bool:
        return bool(self._held) or self._conversation is None or self._conversation.begins_something(data)

    @property
    def is_quiet(self) -> bool:
        """Whether all answers are written, and nothing is under way."""
        transport, conversation = self._transport, self._conversation
        return transport is None or not (
            transport.get_write_buffer_size() or (conversation is not None and not conversation.is_quiet)
        )

    def detach(self) -> tuple[int, bytes] | None:
        """Read no more, and give the socket's descriptor, with the bytes that have to be looked at yet.

        The descriptor stays this one's. None when somebody else could not go on where this one is.
        """
        if self._transport is None or not self.is_quiet:
            return None
        self._transport.pause_reading()
        return self.descriptor(), self._held

    def descriptor(self) -> int:
        """Give the socket's descriptor, which stays this one's. Raises `OSError`."""
        if self._transport is None:
            raise ConnectionError("the connection has ended")
        descriptor: int = self._transport.get_extra_info("socket").fileno()
        return descriptor

    def go_on(self) -> None:
        """Read again, and look at what had to wait."""
        if self._transport is not None:
            self._transport.resume_reading()
            held, self._held = self._held, b""
            if held:
                self.data_received(held)

    def pause_writing(self) -> None:
        """End the connection: whoever sends so many requests and reads no answers is not Kong."""
        LOGGER.error("a connection was closed, it did not read its answers", extra=trouble("unread"))
        self.abort()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the protocol's signature
        """End: the event loop's call."""
        self._transport = None
        self._server.connections.discard(self)
        self._lose()

    def abort(self) -> None:
        """Close the connection without waiting for anything."""
        if self._transport is not None:
            self._transport.abort()
            self._transport = None
            self._lose()

    def close(self) -> None:
        """Close the connection once its answers are written."""
        if self._transport is not None:
            self._transport.close()

    def _lose(self) -> None:
        conversation, self._conversation = self._conversation, None
        if conversation is not None:
            conversation.lose()
