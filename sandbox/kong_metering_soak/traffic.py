"""The soak's traffic: numbered requests at a steady rate, each of which maps to one event.

Contract: what request N is follows from N alone (`asked`). A number is used once: a request that fails is not repeated,
for nobody knows how far it got. Senders are threads with a connection each, which they open again when the gateway
closes it.
"""

from __future__ import annotations

import re
import socket
import threading
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from typing_extensions import Self

SUBJECT_HEADER = "x-tenant-id"
REFUSED_SUBJECT = "refused"
SUSPICIOUS_AGENT = "<script>alert(1)</script>"
ROUTES = ("orders", "invoices")

_SENDERS = 8
_TENANTS = 7
_TIMEOUT = 15.0
# One in so many requests, of the numbers with this remainder.
_NO_SUBJECT = (50, 3)
_REFUSED = (100, 7)
_SUSPICIOUS = (100, 14)
_INVOICES = (3, 0)
_TARGET = re.compile(r"/(?:orders|invoices)/(\d+)$")


@dataclass(frozen=True)
class Asked:
    """What one request asks for: its route, and who pays; None for a request that must give no event.

    `is_suspicious` tells that a firewall before the endpoint may take offence at it.
    """

    route: str
    subject: str | None
    is_suspicious: bool = False

    @property
    def is_refused(self) -> bool:
        """Whether the endpoint refuses the event of this request for itself."""
        return self.subject == REFUSED_SUBJECT

    @property
    def is_planted(self) -> bool:
        """Whether its event may become a dead letter."""
        return self.is_refused or self.is_suspicious


def asked(number: int) -> Asked:
    """Tell what the request with this number is."""
    route = ROUTES[1] if _is_one_of(number, _INVOICES) else ROUTES[0]
    if _is_one_of(number, _NO_SUBJECT):
        return Asked(route, None)
    if _is_one_of(number, _REFUSED):
        return Asked(route, REFUSED_SUBJECT)
    return Asked(route, f"tenant-{number % _TENANTS}", is_suspicious=_is_one_of(number, _SUSPICIOUS))


def target_of(number: int) -> str:
    """Give the target of a request, which is in its event as well."""
    return f"/{asked(number).route}/{number}"


def number_of(target: object) -> int | None:
    """Give the number of the request with a target; None when it is none of ours."""
    found = _TARGET.fullmatch(target) if isinstance(target, str) else None
    return int(found[1]) if found else None


def _is_one_of(number: int, share: tuple[int, int]) -> bool:
    return number % share[0] == share[1]


class Traffic:
    """Sends requests to a port of this machine while its context lasts."""

    def __init__(self, port: int, rate: float) -> None:
        self._port = port
        self._rate = rate
        self._lock = threading.Lock()
        self._issued = 0
        self._results: Counter[str] = Counter()
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._send_all, name=f"sender {n}") for n in range(_SENDERS)]
        self._started = time.monotonic()

    def __enter__(self) -> Self:
        self._started = time.monotonic()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    @property
    def issued(self) -> int:
        """How many requests were sent, or tried to: their numbers are those below it."""
        return self._issued

    @property
    def results(self) -> dict[str, int]:
        """Requests by what came of them: a status, or `no answer`."""
        return dict(sorted(self._results.items()))

    def _send_all(self) -> None:
        with _Connection(self._port) as connection:
            while not self._stopping.is_set():
                with self._lock:
                    number, self._issued = self._issued, self._issued + 1
                self._stopping.wait(max(0.0, self._started + number / self._rate - time.monotonic()))
                result = connection.send(number)
                with self._lock:
                    self._results[result] += 1


class _Connection:
    """A sender's connection to the gateway."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._socket: socket.socket | None = None
        self._reader: BinaryIO | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def send(self, number: int) -> str:
        """Send a request and read the answer; give its status, or `no answer`."""
        try:
            if self._socket is None or self._reader is None:
                self._socket = socket.create_connection(("127.0.0.1", self._port), timeout=_TIMEOUT)
                self._reader = self._socket.makefile("rb")
            self._socket.sendall(_request(number))
            status, keeps = _read_answer(self._reader)
        except (OSError, ValueError):
            self._close()
            return "no answer"
        if not keeps:
            self._close()
        return status

    def _close(self) -> None:
        if self._reader is not None:
            self._reader.close()
        if self._socket is not None:
            self._socket.close()
        self._socket = self._reader = None


def _request(number: int) -> bytes:
    lines = [f"GET {target_of(number)} HTTP/1.1", "Host: api.example"]
    wanted = asked(number)
    if wanted.subject is not None:
        lines.append(f"{SUBJECT_HEADER}: {wanted.subject}")
    if wanted.is_suspicious:
        lines.append(f"User-Agent: {SUSPICIOUS_AGENT}")
    return "\r\n".join([*lines, "", ""]).encode("ascii")


def _read_answer(reader: BinaryIO) -> tuple[str, bool]:
    """Read an answer to its end; give its status, and whether the connection stays. Raises `ValueError`."""
    status = reader.readline().split()
    if len(status) < 2:  # noqa: PLR2004 - version and status
        raise ValueError("the gateway closed the connection")
    length, chunked, keeps = 0, False, True
    while (line := reader.readline()) not in (b"\r\n", b""):
        name, _, value = line.lower().partition(b":")
        length = int(value) if name == b"content-length" else length
        chunked = chunked or (name == b"transfer-encoding" and b"chunked" in value)
        keeps = keeps and not (name == b"connection" and b"close" in value)
    if chunked:
        _read_chunks(reader)
    elif len(reader.read(length)) < length:
        raise ValueError("the answer is cut short")
    return status[1].decode("ascii", "replace"), keeps


def _read_chunks(reader: BinaryIO) -> None:
    while (size := int(reader.readline(), 16)) > 0:
        reader.read(size + 2)
    reader.readline()
