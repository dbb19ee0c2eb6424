"""The way to the services: raw HTTP/1.1 requests, responses that are read piece by piece, idle connections kept."""

from __future__ import annotations

import asyncio
import re
import ssl
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING

from .headers import Headers

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from .context import Target

_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) (\d{3})(?: (.*))?")
_READ_SIZE = 65536
_LINE_LIMIT = 1024 * 1024
_INFORMATIONAL = range(100, 200)
_WITHOUT_BODY = (HTTPStatus.NO_CONTENT, HTTPStatus.NOT_MODIFIED)
_IDLE_PER_PEER = 60


class UpstreamError(Exception):
    """The service gave no usable response; `status` is the gateway's answer, `sent` whether it had the request."""

    def __init__(self, status: int, text: str, *, sent: bool) -> None:
        super().__init__(text)
        self.status = status
        self.sent = sent


@dataclass(frozen=True)
class UpstreamResponse:
    """A response of a service; `body` yields it as it comes."""

    status: int
    reason: bytes
    headers: Headers
    body: AsyncIterator[bytes]


@dataclass(frozen=True)
class UpstreamRequest:
    """What is sent to a service."""

    method: bytes
    uri: bytes
    headers: Headers
    body: bytes

    def encode(self) -> bytes:
        """Return the bytes to send."""
        line = self.method + b" " + self.uri + b" HTTP/1.1\r\n"
        return line + self.headers.encode() + b"\r\n" + self.body


@dataclass(frozen=True)
class _Peer:
    host: str
    port: int
    tls: bool


@dataclass
class _Connection:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    @property
    def usable(self) -> bool:
        return not (self.reader.at_eof() or self.writer.is_closing())


class Upstreams:
    """Connections to all services, shared by everything that sends requests."""

    def __init__(self) -> None:
        self._idle: dict[_Peer, list[_Connection]] = {}

    async def send(self, target: Target, request: UpstreamRequest) -> UpstreamResponse:
        """Send a request and return its response as soon as the response's head is there.

        Raises:
            UpstreamError: see there.

        """
        peer = _Peer(target.host, target.port, target.scheme == "https")
        idle = self._take_idle(peer)
        if idle is not None:
            try:
                return await self._exchange(peer, idle, target, request)
            except UpstreamError as error:
                # The service closed the connection while it lay idle: that says nothing about the service.
                if error.status != HTTPStatus.BAD_GATEWAY:
                    raise
        return await self._exchange(peer, await _connect(peer, target), target, request)

    def close(self) -> None:
        """Close the idle connections."""
        for connections in self._idle.values():
            for connection in connections:
                connection.writer.close()
        self._idle.clear()

    def _take_idle(self, peer: _Peer) -> _Connection | None:
        connections = self._idle.get(peer, [])
        while connections:
            connection = connections.pop()
            if connection.usable:
                return connection
            connection.writer.close()
        return None

    async def _exchange(
        self, peer: _Peer, connection: _Connection, target: Target, request: UpstreamRequest
    ) -> UpstreamResponse:
        try:
            connection.writer.write(request.encode())
            await connection.writer.drain()
            head = await asyncio.wait_for(_read_response_head(connection.reader), target.read_timeout)
        except asyncio.TimeoutError as error:
            connection.writer.close()
            raise UpstreamError(HTTPStatus.GATEWAY_TIMEOUT, "timed out", sent=True) from error
        except (OSError, ValueError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
            connection.writer.close()
            raise UpstreamError(HTTPStatus.BAD_GATEWAY, str(error), sent=True) from error
        except BaseException:
            connection.writer.close()
            raise
        body = self._body(peer, connection, head, has_body=request.method != b"HEAD", timeout=target.read_timeout)
        return UpstreamResponse(head.status, head.reason, head.headers, body)

    async def _body(
        self, peer: _Peer, connection: _Connection, head: _ResponseHead, *, has_body: bool, timeout: float
    ) -> AsyncIterator[bytes]:
        reusable = False
        try:
            if has_body and head.status not in _WITHOUT_BODY:
                async for chunk in _pieces(connection.reader, head.headers, timeout):
                    yield chunk
            reusable = head.keep_alive
        except (OSError, ValueError, asyncio.IncompleteReadError, asyncio.TimeoutError) as error:
            raise UpstreamError(HTTPStatus.BAD_GATEWAY, str(error), sent=True) from error
        finally:
            idle = self._idle.setdefault(peer, [])
            if reusable and connection.usable and len(idle) < _IDLE_PER_PEER:
                idle.append(connection)
            else:
                connection.writer.close()


@dataclass(frozen=True)
class _ResponseHead:
    minor_version: int
    status: int
    reason: bytes
    headers: Headers

    @property
    def keep_alive(self) -> bool:
        connection = (self.headers.get(b"connection") or b"").lower()
        framed = self.headers.get(b"content-length") or self.headers.get(b"transfer-encoding")
        ends = framed is not None or self.status in _WITHOUT_BODY
        return ends and self.minor_version == 1 and b"close" not in connection


async def _connect(peer: _Peer, target: Target) -> _Connection:
    context = ssl.create_default_context() if peer.tls else None
    opening = asyncio.open_connection(peer.host, peer.port, limit=_LINE_LIMIT, ssl=context)
    try:
        return _Connection(*await asyncio.wait_for(opening, target.connect_timeout))
    except asyncio.TimeoutError as error:
        raise UpstreamError(HTTPStatus.GATEWAY_TIMEOUT, "timed out", sent=False) from error
    except OSError as error:
        raise UpstreamError(HTTPStatus.BAD_GATEWAY, str(error), sent=False) from error


async def _read_response_head(reader: asyncio.StreamReader) -> _ResponseHead:
    while True:
        line = (await reader.readuntil(b"\n")).rstrip(b"\r\n")
        found = _STATUS_LINE.fullmatch(line)
        if found is None:
            raise ValueError("upstream sent no valid HTTP/1.0 header")
        headers = Headers()
        while field := (await reader.readuntil(b"\n")).rstrip(b"\r\n"):
            name, colon, value = field.partition(b":")
            if not colon:
                raise ValueError("upstream sent invalid header")
            headers.add(name, value.strip())
        if int(found[2]) not in _INFORMATIONAL:
            return _ResponseHead(int(found[1]), int(found[2]), found[3] or b"", headers)


async def _pieces(reader: asyncio.StreamReader, headers: Headers, timeout: float) -> AsyncIterator[bytes]:
    if b"chunked" in (headers.get(b"transfer-encoding") or b"").lower():
        async for chunk in _chunks(reader, timeout):
            yield chunk
        return
    length = headers.get(b"content-length")
    left = int(length) if length is not None else None
    while left is None or left > 0:
        size = _READ_SIZE if left is None else min(left, _READ_SIZE)
        data = await asyncio.wait_for(reader.read(size), timeout)
        if not data:
            if left:
                raise ValueError("upstream prematurely closed connection")
            return
        left = left if left is None else left - len(data)
        yield data


async def _chunks(reader: asyncio.StreamReader, timeout: float) -> AsyncIterator[bytes]:
    while True:
        line = await asyncio.wait_for(reader.readuntil(b"\n"), timeout)
        size = int(line.partition(b";")[0].strip(), 16)
        if not size:
            while (await reader.readuntil(b"\n")).strip():
                pass
            return
        while size:
            data = await asyncio.wait_for(reader.read(min(size, _READ_SIZE)), timeout)
            if not data:
                raise ValueError("upstream prematurely closed connection")
            size -= len(data)
            yield data
        await reader.readexactly(len(b"\r\n"))
