"""An ingest endpoint of real sockets that fails in many ways, and keeps who sent what when.

Contract: a thread for each connection. All that arrives whole is noted before it is answered, or not. Which fault a
request meets is up to the weather, which changes each second, and to chance; `clear_up` ends all faults but the refusal
of bad events, which never ends: 400, for every other request with the position of the bad ones.
"""

from __future__ import annotations

import random
import socket
import struct
import threading
import time
from collections.abc import Callable
from enum import Enum
from typing import TYPE_CHECKING, Any, BinaryIO

import orjson

from kong_metering_torture.events import Name, digest
from kong_metering_torture.verdict import Arrival, Fate

if TYPE_CHECKING:
    from typing_extensions import Self

_WEATHER_SECONDS = 1.0
# Longer than a client waits.
_HANG_SECONDS = 2.5
_LOOK_SECONDS = 0.01
_RESET = struct.pack("ii", 1, 0)
_UNAVAILABLE = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n"
_NO_CONTENT = b"HTTP/1.1 204 No Content\r\n\r\n"


class Fault(Enum):
    """What a request meets instead of an answer that is right."""

    NONE = "none"
    UNAVAILABLE = "503"
    RESET = "reset"
    RESET_AFTER_STORING = "reset after storing"
    HANG = "hang"


# Which share of the requests meets a fault: mostly fair, storms, an outage.
_WEATHERS = (0.0, 0.0, 0.02, 0.02, 0.02, 0.3, 1.0)


class TortureEndpoint:
    """The endpoint; it listens while its context lasts."""

    def __init__(self, seed: int) -> None:
        self.arrivals: list[Arrival] = []
        # Requests that arrived whole, and were no events as they were put.
        self.unreadable = 0
        self.faults = dict.fromkeys(Fault, 0)
        self._chance = random.Random(seed)  # noqa: S311
        self._fault_share = 0.0
        self._stopping = threading.Event()
        self._names_bad = False
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/events"
        self._is_clear = False
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._accept, self._change_weather)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def clear_up(self) -> None:
        """End all faults."""
        self._is_clear = True

    def _change_weather(self) -> None:
        while not self._stopping.wait(_WEATHER_SECONDS):
            self._fault_share = self._chance.choice(_WEATHERS)

    def _accept(self) -> None:
        while not self._stopping.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as reader:
            try:
                while request := _read_request(reader):
                    if not self._answer(connection, *request):
                        return
            except (OSError, ValueError):
                return  # the client is gone, in the middle of something

    def _answer(self, connection: socket.socket, process: str, body: bytes) -> bool:
        """Answer a request, or do not; tell whether the connection goes on."""
        start = time.monotonic()
        events = self._events_in(body)
        if not events:
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
            return True
        bad = [place for place, (name, _) in enumerate(events) if name.is_bad]
        with self._lock:
            fault = self._fault()
            self._names_bad = not self._names_bad
            words = _problem(bad, is_named=self._names_bad)
        answer, fate = {
            Fault.NONE: (words, Fate.REFUSED) if bad else (_NO_CONTENT, Fate.TAKEN),
            Fault.UNAVAILABLE: (_UNAVAILABLE, Fate.FAILED),
        }.get(fault, (b"", Fate.UNANSWERED))
        if fault is Fault.HANG:
            _hang(connection)
        # Noted before it is answered: whoever sends again because of the answer begins later.
        end = time.monotonic()
        with self._lock:
            self.arrivals += [
                Arrival(name, content, process, start, end, place, fate) for place, (name, content) in enumerate(events)
            ]
        if not answer:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            return False
        connection.sendall(answer)
        return True

    def _fault(self) -> Fault:
        is_met = not self._is_clear and self._chance.random() < self._fault_share
        fault = self._chance.choice([fault for fault in Fault if fault is not Fault.NONE]) if is_met else Fault.NONE
        self.faults[fault] += 1
        return fault

    def _events_in(self, body: bytes) -> list[tuple[Name, bytes]]:
        try:
            found: Any = orjson.loads(body)
            events = found if isinstance(found, list) else [found]
            # Written again as it was written first, if it is what was put.
            return [(Name.of(event["id"]), digest(orjson.dumps(event))) for event in events]
        except (ValueError, KeyError, TypeError):
            self.unreadable += 1
            return []


def _problem(bad: list[int], *, is_named: bool) -> bytes:
    detail = ", ".join(f'Error at "/{place}/data"' for place in bad) if is_named else "no"
    body = orjson.dumps({"detail": detail})
    head = b"HTTP/1.1 400 Bad Request\r\nContent-Type: application/problem+json\r\nContent-Length: %d\r\n\r\n"
    return head % len(body) + body


def _hang(connection: socket.socket) -> None:
    """Wait until the client gives up or is dead; for a while at most."""
    _wait_for(lambda: _has_ended(connection), _HANG_SECONDS)


def _wait_for(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(_LOOK_SECONDS)


def _has_ended(connection: socket.socket) -> bool:
    try:
        return not connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True


def _read_request(reader: BinaryIO) -> tuple[str, bytes] | None:
    """Read a request: who sends it, and its body; None when none came whole."""
    if not reader.readline():
        return None
    process, length = "", 0
    while (line := reader.readline()).strip():
        name, _, value = line.decode("latin-1").partition(":")
        if name.lower() == "authorization":
            process = value.strip().removeprefix("Bearer ")
        elif name.lower() == "content-length":
            length = int(value)
    body = reader.read(length)
    return (process, body) if len(body) == length else None
