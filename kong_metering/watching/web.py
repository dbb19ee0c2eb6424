"""The HTTP server for those who watch: `/metrics`, `/healthz`, `/readyz`, and the status page at `/`.

Contract: `Web.serve` answers on threads of its own, `_MOST_AT_ONCE` at a time; a client that dawdles is cut off after
`_PATIENCE_SECONDS`, or when it has been there for longest and another one comes. It only reads. Nothing that is asked
for reaches the log, nor anything of a client's the answers.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from kong_metering.quantities import Listen

_PATIENCE_SECONDS = 5.0
_MOST_AT_ONCE = 16
_TEXT = "text/plain; charset=utf-8"


@dataclass(frozen=True)
class Answer:
    """What a path gives."""

    body: bytes
    content_type: str = _TEXT
    status: HTTPStatus = HTTPStatus.OK

    @classmethod
    def judged(cls, complaint: str) -> Answer:
        """Return `ok`, or 503 with what is wrong."""
        if not complaint:
            return cls(b"ok\n")
        return cls(complaint.encode() + b"\n", status=HTTPStatus.SERVICE_UNAVAILABLE)


class Web:
    """The server; `pages` gives the answer for each path, from an `Accept` header."""

    def __init__(self, listen: Listen, pages: dict[str, Callable[[str | None], Answer]]) -> None:
        """Listen; raises `OSError` when that cannot be."""
        self._listen = listen
        self._server = _Server(listen, pages)

    @property
    def address(self) -> str:
        """Where it listens, as a browser takes it where that can be."""
        listen = self._listen
        if listen.path is not None:
            return str(listen)
        return f"http://{replace(listen, port=self._server.server_port)}/"

    def serve(self) -> None:
        """Answer until `end` is called."""
        self._server.serve_forever(poll_interval=0.2)

    def end(self) -> None:
        """Answer no more; to be called on another thread than `serve`."""
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, listen: Listen, pages: dict[str, Callable[[str | None], Answer]]) -> None:
        self.pages = pages
        self._lock = threading.Lock()
        # Whom each thread answers, the one that came first in front.
        self._served: dict[socket.socket, None] = {}
        if listen.path is not None:
            self.address_family = socket.AF_UNIX
            _make_way(listen.path)
            super().__init__(str(listen.path), _Handler)  # type: ignore[arg-type] # of a Unix socket it is a path
        else:
            self.address_family = socket.AF_INET6 if ":" in listen.host else socket.AF_INET
            super().__init__((listen.host, listen.port), _Handler)

    def server_bind(self) -> None:
        if self.address_family == socket.AF_UNIX:
            self.socket.bind(self.server_address)
            self.server_name, self.server_port = "localhost", 0
        else:
            super().server_bind()

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            if len(self._served) >= _MOST_AT_ONCE:
                # Who asks is answered in some milliseconds, so that this one mostly asks nothing; its thread ends now.
                self._cut_off(next(iter(self._served)))
            self._served[request] = None
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._lock:
                self._served.pop(request, None)

    def _cut_off(self, client: socket.socket) -> None:
        del self._served[client]
        with contextlib.suppress(OSError):
            client.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a client that goes away is no trouble of ours."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = _PATIENCE_SECONDS
    server_version = "kong-metering"
    sys_version = ""

    def do_GET(self) -> None:
        self._answer(has_body=True)

    def do_HEAD(self) -> None:
        self._answer(has_body=False)

    def _answer(self, *, has_body: bool) -> None:
        page = self.server.pages.get(self.path.partition("?")[0])
        answer = page(self.headers.get("Accept")) if page else Answer(_index(self.server), status=HTTPStatus.NOT_FOUND)
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.content_type)
        self.send_header("Content-Length", str(len(answer.body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        if has_body:
            self.wfile.write(answer.body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the standard library's signature
        """Log nothing: a scrape each few seconds is no news."""


def _index(server: _Server) -> bytes:
    return f"nothing is here; there is {', '.join(server.pages)}\n".encode()


def _make_way(path: Path) -> None:
    """Remove a socket that nobody listens at. Raises `OSError` when somebody does, or it is no socket."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise FileExistsError(errno.EEXIST, "is there, and no socket", str(path))
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                path.unlink()
            else:
                raise OSError(errno.EADDRINUSE, "somebody else listens there", str(path))
