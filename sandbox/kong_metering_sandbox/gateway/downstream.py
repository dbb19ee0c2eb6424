"""The way back to the client: response heads as nginx writes them, with every byte counted."""

from __future__ import annotations

import asyncio
from email.utils import formatdate
from http import HTTPStatus
from typing import TYPE_CHECKING

from .headers import Headers

if TYPE_CHECKING:
    from .context import Exchange, Reply
    from .outbound import UpstreamResponse

_SERVER = b"kong/3.9.1"
_VIA = b"1.1 " + _SERVER
_HOP_BY_HOP = frozenset((b"connection", b"keep-alive", b"transfer-encoding", b"content-length"))
_WITHOUT_BODY = (HTTPStatus.NO_CONTENT, HTTPStatus.NOT_MODIFIED)


class ClientReader(asyncio.StreamReader):
    """A stream that tells at once when the client has closed its side, even while nobody reads."""

    def __init__(self, limit: int) -> None:
        super().__init__(limit=limit)
        self.gone = asyncio.Event()

    def feed_eof(self) -> None:
        """Note the end of the client's side."""
        super().feed_eof()
        self.gone.set()

    def set_exception(self, exc: Exception) -> None:
        """Note that the connection broke."""
        super().set_exception(exc)
        self.gone.set()


class Downstream:
    """Writes one response to the client, and notes in the exchange what was sent."""

    def __init__(self, writer: asyncio.StreamWriter, exchange: Exchange, *, keep_alive: bool) -> None:
        self._writer = writer
        self._exchange = exchange
        self._chunked = False
        self.keep_alive = keep_alive

    async def reply(self, reply: Reply) -> None:
        """Send a response of the gateway's own."""
        exchange = self._exchange
        headers = Headers(reply.headers)
        if headers.get(b"content-length") is None:
            headers.add(b"Content-Length", b"%d" % len(reply.body))
        self._add_kong_headers(headers, is_upstream=False)
        exchange.status = reply.status
        await self._head(_reason(reply.status), headers, with_date=True)
        if exchange.head.method != b"HEAD" and reply.status not in _WITHOUT_BODY:
            await self._write(reply.body)

    async def proxy_head(self, response: UpstreamResponse) -> None:
        """Send the head of a service's response; its body follows piece by piece."""
        exchange = self._exchange
        exchange.status = response.status
        headers = Headers((name, value) for name, value in response.headers if name.lower() not in _HOP_BY_HOP)
        length = response.headers.get(b"content-length")
        if response.status not in _WITHOUT_BODY:
            self._frame(headers, length)
        self._add_kong_headers(headers, is_upstream=True)
        await self._head(response.reason, headers, with_date=headers.get(b"date") is None)

    def _frame(self, headers: Headers, length: bytes | None) -> None:
        if length is not None:
            headers.add(b"Content-Length", length)
        elif self._exchange.head.version != "1.1":
            self.keep_alive = False
        else:
            headers.add(b"Transfer-Encoding", b"chunked")
            self._chunked = self._exchange.head.method != b"HEAD"

    async def piece(self, data: bytes) -> None:
        """Send a piece of the body."""
        await self._write(b"%x\r\n%s\r\n" % (len(data), data) if self._chunked else data)

    async def end(self) -> None:
        """End the body."""
        if self._chunked:
            await self._write(b"0\r\n\r\n")

    def _add_kong_headers(self, headers: Headers, *, is_upstream: bool) -> None:
        exchange = self._exchange
        for name, value in exchange.extra_headers:
            headers.set(name, value)
        if exchange.proxied:
            via = headers.variable(b"via")
            headers.set(b"X-Kong-Upstream-Latency", b"%d" % exchange.latencies.proxy)
            headers.set(b"X-Kong-Proxy-Latency", b"%d" % exchange.latencies.kong)
            headers.set(b"Via", via + b", " + _VIA if via else _VIA)
        else:
            headers.set(b"X-Kong-Response-Latency", b"%d" % exchange.latencies.kong)
        if not is_upstream or headers.get(b"server") is None:
            headers.set(b"Server", _SERVER)
        if exchange.kong_request_id is not None:
            headers.set(b"X-Kong-Request-Id", exchange.kong_request_id.encode())

    async def _head(self, reason: bytes, headers: Headers, *, with_date: bool) -> None:
        self._exchange.response_headers = headers
        if self._exchange.head.version == "0.9":
            return  # a body is all that HTTP/0.9 knows
        status_line = b"HTTP/1.1 %d %s\r\n" % (self._exchange.status, reason)
        wire = headers.copy()
        if with_date:
            wire.add(b"Date", formatdate(usegmt=True).encode())
        wire.add(b"Connection", b"keep-alive" if self.keep_alive else b"close")
        await self._write(status_line + wire.encode() + b"\r\n")

    async def _write(self, data: bytes) -> None:
        self._exchange.bytes_sent += len(data)
        self._writer.write(data)
        await self._writer.drain()


# Where nginx's words are not the ones of the standard.
_REASONS = {
    302: b"Moved Temporarily",
    405: b"Not Allowed",
    408: b"Request Time-out",
    413: b"Request Entity Too Large",
    414: b"Request-URI Too Large",
    416: b"Requested Range Not Satisfiable",
    503: b"Service Temporarily Unavailable",
    504: b"Gateway Time-out",
}


def _reason(status: int) -> bytes:
    try:
        return _REASONS.get(status) or HTTPStatus(status).phrase.encode()
    except ValueError:
        return b""
