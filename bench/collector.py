"""The ingest end of the benchmarks: takes events as fast as it can, and only counts them.

A POST to a path that ends in `/gate` is answered 429 while the gate is closed, and 204 once it is open; while the gate
is held, it waits for its answer. Any other POST is answered 204; one to a path that ends in `/records` has records of
Kong's http-log instead of events. GET `/open`, `/close` and `/hold` move the gate and, as any other path does, tell the
counts as JSON; GET `/subjects` tells the subjects that have an event that was posted to a path that ends so. Prints its
port when it is ready.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from typing import cast

import uvloop

_EVENT_MARK = b'"specversion":'
_RECORD_MARK = b'"started_at":'
_SUBJECT = re.compile(rb'"subject":"([^"]*)"')

_NO_CONTENT = b"HTTP/1.1 204 No Content\r\n\r\n"
_TOO_MANY = b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 0\r\n\r\n"


class _Ingest:
    """The counts and the gate."""

    def __init__(self) -> None:
        self._events = self._refused = 0
        self._gate = "close"
        self._held: list[tuple[_Connection, bytes]] = []
        self._subjects: set[bytes] = set()

    def take(self, connection: _Connection, head: bytes, body: bytes) -> None:
        method, path, _ = head.split(b" ", 2)
        if method == b"GET":
            connection.write(self._told(path))
        elif path.endswith(b"/gate"):
            self._at_gate(connection, body)
        elif path.endswith(b"/subjects"):
            self._subjects.update(_SUBJECT.findall(body))
            self._accept(connection, body)
        else:
            self._accept(connection, body, _RECORD_MARK if path.endswith(b"/records") else _EVENT_MARK)

    def _accept(self, connection: _Connection, body: bytes, mark: bytes = _EVENT_MARK) -> None:
        self._events += body.count(mark)
        connection.write(_NO_CONTENT)

    def _at_gate(self, connection: _Connection, body: bytes) -> None:
        if self._gate == "open":
            self._accept(connection, body)
        elif self._gate == "close":
            self._refused += 1
            connection.write(_TOO_MANY)
        else:
            self._held.append((connection, body))

    def _told(self, path: bytes) -> bytes:
        wanted = path.decode()[1:]
        if wanted in ("open", "close", "hold"):
            self._gate = wanted
            held, self._held = self._held, []
            for connection, body in held:
                self._at_gate(connection, body)
        if wanted == "subjects":
            told = json.dumps(sorted(subject.decode() for subject in self._subjects)).encode()
        else:
            told = json.dumps({"events": self._events, "refused": self._refused}).encode()
        return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(told), told)


class _Connection(asyncio.Protocol):
    def __init__(self, ingest: _Ingest) -> None:
        self._ingest = ingest
        self._data = bytearray()
        self._wanted = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.WriteTransport", transport)

    def data_received(self, data: bytes) -> None:
        self._data += data
        while len(self._data) >= self._wanted and (end := self._data.find(b"\r\n\r\n")) >= 0:
            head = bytes(self._data[:end])
            self._wanted = end + 4 + _content_length(head)
            if len(self._data) < self._wanted:
                return
            body = bytes(self._data[end + 4 : self._wanted])
            del self._data[: self._wanted]
            self._wanted = 0
            self._ingest.take(self, head, body)

    def write(self, answer: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(answer)


def _content_length(head: bytes) -> int:
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return int(value)
    return 0


async def _serve() -> None:
    ingest = _Ingest()
    server = await asyncio.get_running_loop().create_server(lambda: _Connection(ingest), "127.0.0.1", 0)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(_serve())
