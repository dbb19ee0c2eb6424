"""Requests to the gateway byte by byte, one at a time or as a load."""

from __future__ import annotations

import itertools
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kong_metering_sandbox.gateways import wait_for

if TYPE_CHECKING:
    from typing_extensions import Self

Header = tuple[str | bytes, str | bytes]
ACME: Header = ("X-Tenant-Id", "acme")


def request(  # noqa: PLR0913 - a request has this many parts
    target: str | bytes = "/echo",
    *headers: Header,
    method: str = "GET",
    host: str | bytes | None = "api.example",
    version: str = "HTTP/1.1",
    body: bytes = b"",
    keep_alive: bool = False,
) -> bytes:
    """Give the bytes of a request with exactly these header bytes; by default the last one of its connection."""
    lines = [_raw(method) + b" " + _raw(target) + b" " + _raw(version)]
    lines += [b"Host: " + _raw(host)] if host is not None else []
    lines += [] if keep_alive else [b"Connection: close"]
    lines += [_raw(name) + b": " + _raw(value) for name, value in headers]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def _raw(text: str | bytes) -> bytes:
    return text if isinstance(text, bytes) else text.encode("utf-8")


def get(port: int, target: str | bytes, *headers: Header, method: str = "GET", host: str = "api.example") -> int:
    """Send one request with exactly these header bytes and give the status of the answer."""
    return exchange(port, request(target, *headers, method=method, host=host))


def exchange(port: int, data: bytes) -> int:
    """Send bytes, read the answer to its end, and give its status; 0 when there is none."""
    answer = conversation(port, data)
    parts = answer.split(b" ", 2)
    return int(parts[1]) if len(parts) > 1 and answer.startswith(b"HTTP/") else 0


def conversation(port: int, data: bytes) -> bytes:
    """Send bytes and give all that comes back until the gateway closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=15) as connection:
        connection.sendall(data)
        answer = b""
        try:
            while received := connection.recv(65536):
                answer += received
        except ConnectionResetError:
            pass
        return answer


@dataclass(frozen=True)
class Answered:
    """A request that was answered to its end: its number, when it was sent, when the answer was there (wall clock)."""

    number: int
    status: int
    sent_at: float
    answered_at: float


class Load:
    """Numbered requests from several clients at once, each on a connection of its own, while the context lasts.

    Request N goes to `PATH/N`, to one path after the other; they are numbered from `first` on. A number is used once,
    whatever comes of it.
    """

    def __init__(
        self, port: int, *paths: str, first: int = 0, clients: int = 4, headers: Sequence[Header] = (ACME,)
    ) -> None:
        self._port = port
        self._paths = paths or ("/echo",)
        self._headers = headers
        self._lock = threading.Lock()
        self._numbers = itertools.count(first)
        self._answered: list[Answered] = []
        self._over = threading.Event()
        self._clients = [threading.Thread(target=self._ask, name=f"client {number}") for number in range(clients)]

    def __enter__(self) -> Self:
        for client in self._clients:
            client.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for client in self._clients:
            client.join()

    def answered(self, path: str | None = None) -> Mapping[int, Answered]:
        """Give the requests that were answered so far, those to one path if it is given, by their numbers."""
        with self._lock:
            return {one.number: one for one in self._answered if path in (None, self._path(one.number))}

    def forgive(self, is_forgiven: Callable[[Answered], bool]) -> None:
        """Count some of those that were answered so far as if they were not."""
        with self._lock:
            self._answered = [one for one in self._answered if not is_forgiven(one)]

    def wait_for(self, more: int) -> None:
        """Wait until so many more requests were answered."""
        wanted = len(self._answered) + more
        wait_for(lambda: len(self._answered) >= wanted, f"{more} more requests are answered")

    def _path(self, number: int) -> str:
        return self._paths[number % len(self._paths)]

    def _ask(self) -> None:
        while not self._over.wait(_PAUSE_SECONDS):
            with self._lock:
                number = next(self._numbers)
            data = request(f"{self._path(number)}/{number}", *self._headers)
            sent_at = time.time()
            try:
                answer = conversation(self._port, data)
            except OSError:
                continue  # nobody listens, or nobody answers
            answered_at = time.time()
            if status := _status_of_whole(answer):
                with self._lock:
                    self._answered.append(Answered(number, status, sent_at, answered_at))


_PAUSE_SECONDS = 0.005
_STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) ")
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)


def _status_of_whole(answer: bytes) -> int:
    """Give the status of an answer that is all there, else 0."""
    head, end, body = answer.partition(b"\r\n\r\n")
    status, length = _STATUS.match(head), _LENGTH.search(head + b"\r\n")
    is_whole = len(body) == int(length[1]) if length else body.endswith(b"\r\n0\r\n\r\n")
    return int(status[1]) if end and status and is_whole else 0
