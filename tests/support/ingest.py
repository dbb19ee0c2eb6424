"""An ingest endpoint over real HTTP that keeps what it gets, and answers what it is told to."""

from __future__ import annotations

import json
import socket
import sys
import threading
from collections import deque
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import TYPE_CHECKING, Any

from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from typing_extensions import Self

PATH = "/api/v3/openmeter/events"


@dataclass(frozen=True)
class IngestRequest:
    """One POST, as it came."""

    path: str
    headers: dict[str, str]
    body: bytes
    status: int

    @property
    def events(self) -> list[dict[str, Any]]:
        parsed = json.loads(self.body)
        return parsed if isinstance(parsed, list) else [parsed]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    server: _HTTPServer

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        status = self.server.ingest.take(self.path, dict(self.headers.items()), body)
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - as in http.server
        pass


class _HTTPServer(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, ingest: IngestServer) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.ingest = ingest
        self._connections: set[socket.socket] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say what went wrong here, but not that a plugin server was killed."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    def end_connections(self) -> None:
        for connection in list(self._connections):
            # Its own thread closes it, once it reads the end.
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue


class IngestServer:
    """Serves on a free port from `start` to `stop`; answers 202 unless told otherwise."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: list[IngestRequest] = []
        self._statuses: deque[int] = deque()
        self._http = _HTTPServer(self)
        self._thread = threading.Thread(
            target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, name="ingest server", daemon=True
        )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}{PATH}"

    def answer_next(self, *statuses: int) -> None:
        """Answer the next requests with these statuses, one each."""
        with self._lock:
            self._statuses.extend(statuses)

    def take(self, path: str, headers: dict[str, str], body: bytes) -> int:
        with self._lock:
            status = self._statuses.popleft() if self._statuses else 202
            self._requests.append(IngestRequest(path, headers, body, status))
            return status

    def requests(self) -> list[IngestRequest]:
        with self._lock:
            return list(self._requests)

    def events(self) -> list[dict[str, Any]]:
        """List the events of the requests that were accepted, in the order of their arrival."""
        return [event for request in self.requests() if request.status < 300 for event in request.events]

    def wait_for_events(self, count: int) -> list[dict[str, Any]]:
        wait_until(lambda: len(self.events()) >= count, f"{count} events at the ingest endpoint")
        return self.events()

    def clear(self) -> None:
        with self._lock:
            self._requests.clear()
            self._statuses.clear()

    def start(self) -> Self:
        self._thread.start()
        return self

    def stop(self) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()
        self._http.end_connections()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
