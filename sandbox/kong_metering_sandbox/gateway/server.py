"""The proxy's listener: client connections are dealt to the workers in turn, requests go to their pipelines."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .context import Exchange
from .downstream import ClientReader, Downstream
from .wire import BodyError, HeaderLimits, RequestHead, drain, read_body, read_head

if TYPE_CHECKING:
    from collections.abc import Callable

    from .pipeline import Pipeline

_STREAM_LIMIT = 65536
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_LINGERING = 5.0  # seconds that the rest of an unwanted body may take, as nginx's lingering_timeout


@dataclass(frozen=True)
class Lane:
    """What one connection is served by: a worker's pipeline, and whether the worker still accepts requests."""

    pipeline: Callable[[], Pipeline]
    is_retired: Callable[[], bool]
    workspace: str
    tells_request_id: bool


class ProxyServer:
    """Accepts clients on a socket; `next_lane` deals them to the workers."""

    def __init__(self, listener: socket.socket, limits: HeaderLimits, next_lane: Callable[[], Lane]) -> None:
        self._listener = listener
        self._limits = limits
        self._next_lane = next_lane
        self._server: asyncio.Server | None = None
        self._connections: set[_ClientConnection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_stopping = False

    async def start(self) -> None:
        """Start to accept connections."""
        loop = asyncio.get_running_loop()
        limit = max(_STREAM_LIMIT, self._limits.total)

        def protocol() -> asyncio.StreamReaderProtocol:
            reader = ClientReader(limit)
            return asyncio.StreamReaderProtocol(reader, self._connected)

        self._server = await loop.create_server(protocol, sock=self._listener)

    def close_idle(self, *, unused_too: bool = False) -> None:
        """Close the connections of retired workers that wait for a further request, or even for their first."""
        for connection in self._connections:
            connection.close_if_idle(unused_too=unused_too)

    async def stop(self, within: float) -> None:
        """Accept no more connections, and wait at most so many seconds for the requests that are under way."""
        self._is_stopping = True
        if self._server is not None:
            self._server.close()
        self.close_idle(unused_too=True)
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=within)
            for task in late:
                task.cancel()

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not isinstance(reader, ClientReader):
            return
        if self._is_stopping:
            # It was accepted a moment ago. Nobody would wait for its requests, nor for their log phases.
            writer.close()
            return
        # asyncio does this only for sockets that were made for TCP by name.
        writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = _ClientConnection(reader, writer, self._limits, self._next_lane())
        self._connections.add(connection)
        task = asyncio.ensure_future(self._serve(connection))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, connection: _ClientConnection) -> None:
        try:
            await connection.serve()
        finally:
            self._connections.discard(connection)


class _ClientConnection:
    """One client's connection, with one request after the other."""

    def __init__(self, reader: ClientReader, writer: asyncio.StreamWriter, limits: HeaderLimits, lane: Lane) -> None:
        self._reader = reader
        self._writer = writer
        self._limits = limits
        self._lane = lane
        self._served = 0
        self._waits = True

    def close_if_idle(self, *, unused_too: bool) -> None:
        """Close the connection if it waits for a request, of a worker that takes none any more.

        One that has not been used is left alone at a reload: its first request is most likely on its way.
        """
        if self._waits and self._lane.is_retired() and (self._served or unused_too):
            self._writer.close()

    async def serve(self) -> None:
        """Answer requests until the client or a response ends the connection."""
        try:
            while await self._serve_one():
                pass
        except ConnectionError:
            pass  # the client is gone; what there was to log has been logged
        finally:
            self._writer.close()
            with contextlib.suppress(OSError):
                await self._writer.wait_closed()

    async def _serve_one(self) -> bool:
        """Answer one request; False when the connection has ended."""
        self._waits = True
        head = await read_head(self._reader, self._limits)
        if head is None:
            return False
        self._waits = False
        self._served += 1
        exchange = self._exchange(head)
        keep_alive = not head.error and head.keep_alive and not self._lane.is_retired()
        downstream = Downstream(self._writer, exchange, keep_alive=keep_alive)
        await self._lane.pipeline().run(exchange, downstream, self._reader)
        return downstream.keep_alive and await self._is_ready_for_more(exchange)

    async def _is_ready_for_more(self, exchange: Exchange) -> bool:
        """Read what is left of the request's body."""
        if self._lane.is_retired():
            return False
        if exchange.receive_body is None:
            return True
        try:
            return await asyncio.wait_for(drain(self._reader, exchange.head), _LINGERING)
        except asyncio.TimeoutError:
            return False

    def _exchange(self, head: RequestHead) -> Exchange:
        peer = self._writer.get_extra_info("peername") or ("unknown", 0)
        own = self._writer.get_extra_info("sockname") or ("", 0)
        request_id = uuid.uuid4().hex
        exchange = Exchange(
            head=head,
            client_ip=str(peer[0]),
            client_port=int(peer[1]),
            server_port=int(own[1]),
            request_id=request_id,
            kong_request_id=request_id if self._lane.tells_request_id else None,
            nginx_request_id=uuid.uuid4().hex,
            workspace=self._lane.workspace,
        )

        async def receive_body() -> None:
            if (head.headers.get(b"expect") or b"").lower() == b"100-continue" and head.version == "1.1":
                self._writer.write(_CONTINUE)
                exchange.bytes_sent += len(_CONTINUE)
            try:
                exchange.body, size = await read_body(self._reader, head)
            except BodyError as error:
                exchange.request_size += error.received
                raise
            exchange.request_size += size

        exchange.receive_body = receive_body
        return exchange
