"""What the ingest endpoints of the tests share: POSTs over real HTTP, and connections that the server can end."""

from __future__ import annotations

import json
import socket
import threading
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

INGEST_PATH = "/api/v3/openmeter/events"


@dataclass(frozen=True)
class Post:
    """One POST, as it came."""

    path: str
    headers: dict[str, str]
    body: bytes

    @cached_property
    def events(self) -> list[dict[str, Any]]:
        """The events in it; read once, however often somebody looks."""
        parsed = json.loads(self.body)
        return parsed if isinstance(parsed, list) else [parsed]


class PostHandler(BaseHTTPRequestHandler, ABC):
    """One connection, which is kept alive."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(Post(self.path, dict(self.headers.items()), body))

    @abstractmethod
    def answer(self, post: Post) -> None: ...

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - as in http.server
        pass


class PostServer(ThreadingHTTPServer):
    """Serves on a free port from `start` to `stop`."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, handler: type[PostHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self._connections: set[socket.socket] = set()
        self._thread = threading.Thread(
            target=self.serve_forever, kwargs={"poll_interval": 0.01}, name="ingest server", daemon=True
        )

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()
        self.end_connections()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def end_connections(self) -> None:
        """End all connections, as a server does that is tired of idle ones."""
        for connection in list(self._connections):
            # Its own thread closes it, once it reads the end.
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue
