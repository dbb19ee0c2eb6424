"""An ingest endpoint over real HTTP that can misbehave below HTTP too: reset, hang, drip, talk nonsense, never end."""

from __future__ import annotations

import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PATH = "/api/v3/openmeter/events"
_DRIP_SECONDS = 0.02


@dataclass(frozen=True)
class Received:
    """One request, as it came; `connection` numbers the connections from 1."""

    path: str
    headers: dict[str, str]
    body: bytes
    connection: int


class Exchange(BaseHTTPRequestHandler):
    """One connection, seen by a reaction."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    server: IngestServer

    def handle(self) -> None:
        self.number = self.server.count_connection(self.connection)
        if self.server.on_connect is not None:
            self.server.on_connect(self)
        else:
            super().handle()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append(Received(self.path, dict(self.headers.items()), body, self.number))
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

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - as in http.server
        pass


Reaction = Callable[[Exchange], None]


def answer(status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> Reaction:
    return lambda exchange: exchange.reply(status, body, headers)


class IngestServer(ThreadingHTTPServer):
    """Reacts to each request as told; `on_connect`, where set, takes the connection before anything is read."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Exchange)
        self.on_request: Reaction = answer(204)
        self.on_connect: Reaction | None = None
        self.requests: list[Received] = []
        self.connections = 0
        self.stopping = threading.Event()
        self._tls = tls
        self._sockets: set[socket.socket] = set()

    @property
    def url(self) -> str:
        scheme = "https" if self._tls else "http"
        return f"{scheme}://127.0.0.1:{self.server_address[1]}{PATH}"

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        if self._tls is not None:
            # The handshake happens at the first read, in the connection's own thread.
            connection = self._tls.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        return connection, address

    def count_connection(self, connection: socket.socket) -> int:
        self._sockets.add(connection)
        self.connections += 1
        return self.connections

    def end_connections(self) -> None:
        """End all connections, as a server does that is tired of idle ones."""
        for connection in list(self._sockets):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue

    def shutdown_request(self, request: Any) -> None:
        self._sockets.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: clients that give up, or refuse a certificate, are what the tests are about."""


@contextmanager
def running(server: IngestServer) -> Iterator[IngestServer]:
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.01}, name="ingest server", daemon=True
    )
    thread.start()
    try:
        yield server
    finally:
        server.stopping.set()
        server.shutdown()
        thread.join()
        server.server_close()
        server.end_connections()
