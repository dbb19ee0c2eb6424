"""An ingest endpoint over real HTTP that keeps what it gets, and answers what it is told to."""

from __future__ import annotations

import sys
import threading
from collections import deque
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

from tests.support.posts import INGEST_PATH, Post, PostHandler, PostServer
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class IngestRequest(Post):
    """One POST, and what it was answered."""

    status: int


class _Handler(PostHandler):
    server: _HTTPServer

    def answer(self, post: Post) -> None:
        self.send_response(self.server.ingest.take(post))
        self.send_header("Content-Length", "0")
        self.end_headers()


class _HTTPServer(PostServer):
    def __init__(self, ingest: IngestServer) -> None:
        super().__init__(_Handler)
        self.ingest = ingest

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say what went wrong here, but not that a plugin server was killed."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class IngestServer:
    """Serves on a free port from `start` to `stop`; answers 202 unless told otherwise."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: list[IngestRequest] = []
        self._statuses: deque[int] = deque()
        self._http = _HTTPServer(self)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}{INGEST_PATH}"

    def answer_next(self, *statuses: int) -> None:
        """Answer the next requests with these statuses, one each."""
        with self._lock:
            self._statuses.extend(statuses)

    def take(self, post: Post) -> int:
        with self._lock:
            status = self._statuses.popleft() if self._statuses else 202
            self._requests.append(IngestRequest(post.path, post.headers, post.body, status))
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
        self._http.start()
        return self

    def stop(self) -> None:
        self._http.stop()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
