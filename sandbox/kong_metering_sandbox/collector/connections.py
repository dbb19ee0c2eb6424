"""TCP connections: names for them, and ways to end them badly."""

from __future__ import annotations

import os
import socket
import struct
from itertools import count
from typing import TYPE_CHECKING, Final
from weakref import WeakKeyDictionary

from kong_metering_sandbox.collector.dialects import reason

if TYPE_CHECKING:
    import asyncio

    from kong_metering_sandbox.collector.dialects import Answer

# On with a time of zero: close() sends RST and throws away what has not been sent.
_LINGER_ZERO: Final = struct.pack("ii", 1, 0)
_MISSING_BYTES: Final = 64


class ConnectionNames:
    """Gives each connection a name: the process id and a number, so that a restart repeats none."""

    def __init__(self) -> None:
        self._names: WeakKeyDictionary[asyncio.BaseTransport, str] = WeakKeyDictionary()
        self._numbers = count(1)

    def name(self, transport: asyncio.BaseTransport | None) -> str | None:
        """Return the connection's name, the same at every call; None for one that the client has left."""
        if transport is None:
            return None
        if transport not in self._names:
            self._names[transport] = f"{os.getpid()}-{next(self._numbers)}"
        return self._names[transport]


def reset(transport: asyncio.Transport | None) -> None:
    """End a connection with RST, as a crashed peer or an impatient load balancer does."""
    if transport is None or transport.is_closing():
        return
    transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_ZERO)
    transport.abort()


def send_head_only(transport: asyncio.Transport | None, answer: Answer) -> None:
    """Send the head of an answer, which promises a body that never comes."""
    if transport is None or transport.is_closing():
        return
    headers = {**answer.headers, "Content-Length": str(len(answer.body) or _MISSING_BYTES)}
    lines = [
        f"HTTP/1.1 {answer.status} {answer.reason}",
        *(f"{name}: {value}" for name, value in headers.items()),
    ]
    transport.write("\r\n".join([*lines, "", ""]).encode("latin-1"))


def send_interim(transport: asyncio.Transport | None, status: int) -> None:
    """Send an interim answer (1xx), after which the real one is still to come."""
    if transport is None or transport.is_closing():
        return
    transport.write(f"HTTP/1.1 {status} {reason(status)}\r\nLink: </style.css>; rel=preload\r\n\r\n".encode("latin-1"))
