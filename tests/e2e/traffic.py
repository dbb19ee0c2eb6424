"""Requests to the gateway byte by byte."""

from __future__ import annotations

import socket

Header = tuple[str | bytes, str | bytes]


def get(port: int, target: str | bytes, *headers: Header, method: str = "GET", host: str = "api.example") -> int:
    """Send one request with exactly these header bytes and give the status of the answer."""
    lines = [b"%s %s HTTP/1.1" % (_raw(method), _raw(target)), b"Host: " + _raw(host), b"Connection: close"]
    lines += [_raw(name) + b": " + _raw(value) for name, value in headers]
    return exchange(port, b"\r\n".join(lines) + b"\r\n\r\n")


def exchange(port: int, request: bytes) -> int:
    """Send bytes, read the answer to its end, and give its status; 0 when there is none."""
    answer = conversation(port, request)
    parts = answer.split(b" ", 2)
    return int(parts[1]) if len(parts) > 1 and answer.startswith(b"HTTP/") else 0


def conversation(port: int, request: bytes) -> bytes:
    """Send bytes and give all that comes back until the gateway closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=15) as connection:
        connection.sendall(request)
        answer = b""
        try:
            while data := connection.recv(65536):
                answer += data
        except ConnectionResetError:
            pass
        return answer


def _raw(text: str | bytes) -> bytes:
    return text if isinstance(text, bytes) else text.encode("latin-1")
