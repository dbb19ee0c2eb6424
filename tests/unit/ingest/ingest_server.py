"""An ingest endpoint over real HTTP that can misbehave below HTTP too: reset, hang, drip, talk nonsense, never end."""

from __future__ import annotations

import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tests.support.posts import INGEST_PATH, Post, PostHandler, PostServer

_DRIP_SECONDS = 0.02


@dataclass(frozen=True)
class Received(Post):
    """One request, as it came; `connection` numbers the connections from 1."""

    connection: int


class Exchange(PostHandler):
    """One connection, seen by a reaction."""

    server: IngestServer

    def handle(self) -> None:
        self.number = self.server.count_connection()
        if self.server.on_connect is not None:
            self.server.on_connect(self)
        else:
            super().handle()

    def answer(self, post: Post) -> None:
        self.server.requests.append(Received(post.path, post.headers, post.body, self.number))
        self.server.on_request(self)

    def reply(self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if status not in (204, 304):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if status not in (204, 304):
            self.wfile.write(body)

    def raw(self, data: bytes) -> None:
        self.wfile.write(data)
        self.wfile.flush()

    def hang(self) -> None:
        """Say nothing until the server stops."""
        self.server.stopping.wait()

    def drip(self, data: bytes = b"x") -> None:
        """Say the same again and again, a little at a time."""
        while not self.server.stopping.wait(_DRIP_SECONDS):
            self.raw(data)

    def reset(self) -> None:
        """Make the connection end with a reset."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True


Reaction = Callable[[Exchange], None]


def answer(status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> Reaction:
    return lambda exchange: exchange.reply(status, body, headers)


def broken_off(data: bytes) -> Reaction:
    """Answer with exactly these bytes, and end the connection."""

    def talk(exchange: Exchange) -> None:
        exchange.raw(data)
        exchange.close_connection = True

    return talk


class IngestServer(PostServer):
    """Reacts to each request as told; `on_connect`, where set, takes the connection before anything is read."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        super().__init__(Exchange)
        self.on_request: Reaction = answer(204)
        self.on_connect: Reaction | None = None
        self.requests: list[Received] = []
        self.connections = 0
        self.stopping = threading.Event()
        self._tls = tls

    @property
    def url(self) -> str:
        scheme = "https" if self._tls else "http"
        return f"{scheme}://127.0.0.1:{self.server_address[1]}{INGEST_PATH}"

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        if self._tls is not None:
            # The handshake happens at the first read, in the connection's own thread.
            connection = self._tls.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        return connection, address

    def count_connection(self) -> int:
        self.connections += 1
        return self.connections

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: clients that give up, or refuse a certificate, are what the tests are about."""


@contextmanager
def running(server: IngestServer) -> Iterator[IngestServer]:
    server.start()
    try:
        yield server
    finally:
        server.stopping.set()
        server.stop()
