"""Answers to POSTs over one connection, read within a time and a size, one after the other.

Contract: an `AnswerReader` lives as long as its connection and belongs to whoever has that. `http.client` parses; what
is added here: all answers of a connection come out of one buffer, so that no byte is lost between two of them; interim
answers (1xx, however many) are read over; an answer is read whole within its time, however little of it comes at a time
(the timeout of a socket alone counts from byte to byte), and 64 KB of its body at most, unpacked or not. Reading raises
OSError or HTTPException before the status line was read whole, and nothing afterwards, but for an answer that has
several lengths: the status is what counts, whatever becomes of the headers and the body. The body of a 2xx says
nothing: it is read for the sake of the connection, and waited for a second at most.
"""

from __future__ import annotations

import io
import math
import time
import zlib
from dataclasses import dataclass
from datetime import timezone
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from http.client import HTTPException, HTTPMessage, HTTPResponse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import socket
    from email.message import Message

_BUFFER_BYTES = 16 * 1024
_MAX_BODY_BYTES = 64 * 1024
_A_MOMENT = 0.01
# For the body of a 2xx: long enough for one that comes, so that the connection can be used again.
_ACCEPTED_SECONDS = 1.0
_SWITCHING_PROTOCOLS = 101
_OK, _MULTIPLE_CHOICES = 200, 300
# How gzip begins, and what zlib calls it.
_GZIP = b"\x1f\x8b"
_GZIP_WINDOW = 16 + zlib.MAX_WBITS
# What `http.client` calls those that it knows.
_VERSIONS = (10, 11)
_ERRORS = (OSError, ValueError, HTTPException)
# These end with their head, whatever it says of a body (RFC 9112, 6.3); `http.client` waits for one that is chunked.
_BODILESS = (HTTPStatus.NO_CONTENT, HTTPStatus.NOT_MODIFIED)


@dataclass(frozen=True)
class Answer:
    """A final answer; `body` is a bounded part of it, and `is_last`: the connection cannot be used again."""

    status: int
    headers: Message
    body: bytes
    is_last: bool


class AnswerReader:
    """Reads what comes over one connected socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._incoming = _Incoming(sock)
        self._kept = _Kept(self._incoming, _BUFFER_BYTES)

    @property
    def holds_more(self) -> bool:
        """True if bytes have been read that belong to no answer so far."""
        self._incoming.deadline = None
        return bool(self._kept.peek(1))

    def unasked(self) -> bytes:
        """Return the beginning of what is there to read and belongs to no answer so far; waits a moment at most."""
        self._incoming.deadline = time.monotonic() + _A_MOMENT
        try:
            return self._kept.peek(1)
        except (OSError, ValueError):
            return b""

    def makefile(self, mode: str) -> io.BufferedReader:  # noqa: ARG002 - as a socket does it
        """Return the buffer: an HTTPResponse takes this reader for its socket."""
        return self._kept

    def read(self, seconds: float) -> Answer:
        """Read the next final answer."""
        deadline = self._incoming.deadline = time.monotonic() + seconds
        while True:
            response = HTTPResponse(self, method="POST")  # type: ignore[arg-type]
            try:
                response.begin()
            except _ERRORS:
                if not _has_final_status(response):
                    raise
                return Answer(response.status, HTTPMessage(), b"", is_last=True)
            # Nobody asked for another protocol: what comes after a 101 is not HTTP, so it is final.
            if response.status >= _OK or response.status == _SWITCHING_PROTOCOLS:
                _check_length(response.headers)
                if _OK <= response.status < _MULTIPLE_CHOICES:
                    self._incoming.deadline = min(deadline, time.monotonic() + _ACCEPTED_SECONDS)
                return _answer(response)


def _has_final_status(response: HTTPResponse) -> bool:
    """Return whether the status line was read and settles the request, though the headers after it were not."""
    # The version is set from the status line too, after the status, and not for one that is not known.
    return response.version in _VERSIONS and response.status >= _OK


def _check_length(headers: Message) -> None:
    """Refuse an answer whose end nobody can tell: what comes after it could be taken for the next one."""
    if len({length.strip() for value in headers.get_all("Content-Length", ()) for length in value.split(",")}) > 1:
        raise HTTPException("the answer has several lengths")


def _answer(response: HTTPResponse) -> Answer:
    body = b""
    has_body = response.status not in _BODILESS
    try:
        while has_body and len(body) <= _MAX_BODY_BYTES and (more := response.read1(_BUFFER_BYTES)):
            body += more
    except _ERRORS:
        is_whole = False
    else:
        is_whole = len(body) <= _MAX_BODY_BYTES and (response.chunked or response.length == 0)
    is_last = response.will_close or not is_whole or response.status < _OK or not _has_clear_end(response)
    return Answer(response.status, response.headers, _unpacked(body), is_last)


def _unpacked(body: bytes) -> bytes:
    """Return a body as people can read it, though the endpoint compresses what nobody asked it to."""
    # By what it is: the header says so of bodies that are not compressed, too.
    if not body.startswith(_GZIP):
        return body
    try:
        unpacked = zlib.decompressobj(_GZIP_WINDOW).decompress(body, _MAX_BODY_BYTES)
    except zlib.error:
        unpacked = b""
    return unpacked or b"%d bytes of gzip" % len(body)


def _has_clear_end(response: HTTPResponse) -> bool:
    """Return whether all agree on where the answer ends: else the rest of it may be taken for the next one."""
    length, coding = response.headers.get("Content-Length"), response.headers.get("Transfer-Encoding")
    if response.status in _BODILESS:
        return coding is None and (length or "0").strip() == "0"
    return coding is None or (length is None and coding.strip().lower() == "chunked")


class _Incoming(io.RawIOBase):
    """What comes over a socket until the deadline; without a deadline, only what is there already counts."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.deadline: float | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if self.deadline is None:
            return None
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        self._sock.settimeout(left)
        return self._sock.recv_into(buffer)


class _Kept(io.BufferedReader):
    def close(self) -> None:
        """Stay open: an HTTPResponse closes what it reads from at its end, and the next one reads on."""


def parse_retry_after(value: str | None, now: float) -> float | None:
    """Return a Retry-After header, in seconds or as a date, as seconds from `now` (wall clock); nonsense is None."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            moment = parsedate_to_datetime(value)
        except (ValueError, TypeError, OverflowError):
            return None
        seconds = (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp() - now
    return max(0.0, seconds) if math.isfinite(seconds) else None
