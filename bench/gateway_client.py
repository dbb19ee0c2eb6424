"""A client that knows each of its requests: when it was sent, when and how it was answered.

Slower than wrk, and meant for faults rather than speed. Each request has a subject of its own, so that its event can be
told from all others. All of it runs on one event loop, which also runs what befalls the gateway meanwhile: so what
happened first is known.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import uvloop
from gateway_kong import HEADERS, ROUTE, SUBJECT_HEADER

_HEAD_END = b"\r\n\r\n"
_LENGTH = b"content-length:"
_STATUS = slice(9, 12)
NO_ANSWER = 0


@dataclass(frozen=True)
class Exchange:
    """One request and its answer; times from `time.perf_counter`. `status` is 0 if the connection ended instead."""

    subject: str
    sent: float
    ended: float
    status: int


class _Connection(asyncio.Protocol):
    """One connection, with one request at a time; opened again when it ends."""

    def __init__(self, traffic: _Traffic) -> None:
        self._traffic = traffic
        self._answer = bytearray()
        self._subject = ""
        self._sent = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._send()

    def data_received(self, data: bytes) -> None:
        self._answer += data
        end = self._answer.find(_HEAD_END)
        if end < 0:
            return
        if len(self._answer) >= end + len(_HEAD_END) + _content_length(bytes(self._answer[:end])):
            self._ended(int(self._answer[_STATUS]))
            self._answer.clear()
            self._send()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        if self._subject:
            self._ended(NO_ANSWER)
        self._traffic.closed()

    def _send(self) -> None:
        if self._traffic.is_over:
            self._transport.close()
            return
        self._subject = self._traffic.next_subject()
        self._sent = time.perf_counter()
        headers = {**HEADERS, SUBJECT_HEADER: self._subject, "host": "bench"}
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self._transport.write(f"GET {ROUTE} HTTP/1.1\r\n{lines}\r\n".encode())

    def _ended(self, status: int) -> None:
        self._traffic.exchanges.append(Exchange(self._subject, self._sent, time.perf_counter(), status))
        self._subject = ""


class _Traffic:
    """What all connections share."""

    def __init__(self, port: int, seconds: float) -> None:
        self.exchanges: list[Exchange] = []
        self._port = port
        self._seconds = seconds
        self._sent = 0
        self._over_at = 0.0
        self._open = 0
        self._all_closed = asyncio.Event()

    @property
    def is_over(self) -> bool:
        return time.perf_counter() >= self._over_at

    def next_subject(self) -> str:
        self._sent += 1
        return f"request-{self._sent}"

    def closed(self) -> None:
        self._open -= 1
        if not self.is_over:
            asyncio.get_running_loop().create_task(self._connect())
        elif self._open == 0:
            self._all_closed.set()

    async def run(self, connections: int, each_second: Callable[[], None]) -> None:
        self._over_at = time.perf_counter() + self._seconds
        for _ in range(connections):
            await self._connect()
        while not self.is_over:
            await asyncio.sleep(1)
            if not self.is_over:
                each_second()
        await self._all_closed.wait()

    async def _connect(self) -> None:
        self._open += 1
        await asyncio.get_running_loop().create_connection(lambda: _Connection(self), "127.0.0.1", self._port)


def send_traffic(port: int, *, connections: int, seconds: float, each_second: Callable[[], None]) -> list[Exchange]:
    """Send requests over some connections for some seconds, and call `each_second` meanwhile; gives all exchanges."""

    async def run() -> list[Exchange]:
        traffic = _Traffic(port, seconds)
        await traffic.run(connections, each_second)
        return traffic.exchanges

    return uvloop.run(run())


def _content_length(head: bytes) -> int:
    for line in head.lower().split(b"\r\n"):
        if line.startswith(_LENGTH):
            return int(line[len(_LENGTH) :])
    return 0
