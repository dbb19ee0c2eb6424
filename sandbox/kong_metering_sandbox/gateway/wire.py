"""HTTP/1 as nginx reads it: raw bytes in, and the same tolerance and the same refusals.

`HeadParser` has no I/O; `read_head` and `read_body` feed it and the bodies from a stream.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass, field
from http import HTTPStatus

from .headers import Headers

_METHOD = re.compile(rb"[A-Z_-]+")
_TARGET = re.compile(rb"[^\x00-\x20\x7f]+")
_ABSOLUTE = re.compile(rb"[A-Za-z][A-Za-z0-9+.-]*://([^/?#]*)(.*)", re.DOTALL)
_ABSOLUTE_HOST = re.compile(rb"(\[[0-9A-Za-z:._~!$&'()*+,;=-]+\]|[A-Za-z0-9.-]+)(:[0-9]*)?")
_FORBIDDEN_IN_NAME = re.compile(rb"[\x00-\x20\x7f]")
_INVALID_IN_NAME = re.compile(rb"[^A-Za-z0-9_-]")
_HOST = re.compile(rb"(\[[^\x00-\x20\x7f/\]]*\]?|[^\x00-\x20\x7f/:]*)[^\x00-\x20\x7f/]*")
_PERCENT = re.compile(rb"%([0-9A-Fa-f]{2})")
_CHUNK_SIZE = re.compile(rb"[0-9A-Fa-f]{1,15}")
_MAX_LENGTH = 2**63 - 1
_UNIQUE = frozenset(
    b"host content-length transfer-encoding authorization expect if-modified-since if-unmodified-since"
    b" if-match if-none-match if-range content-range".split()
)
_VERSION = re.compile(rb"HTTP/([1-9][0-9]{0,2})\.([0-9]{1,3})")
_REFUSED_METHODS = (b"CONNECT", b"TRACE")
_CHUNK_LINE_LIMIT = 1024
_MAX_HEADER_LINES = 1000  # Kong's `max_headers` since 3.9.3, Host included
_READ_SIZE = 65536

# nginx's own numbers: inside of it only, no client sees them.
HEADER_TOO_LARGE = 494
CLIENT_CLOSED = 499


@dataclass(frozen=True)
class HeaderLimits:
    """nginx's `large_client_header_buffers`: how many buffers there are and how many bytes a line may have."""

    count: int = 4
    size: int = 8192

    @property
    def total(self) -> int:
        """How many bytes all lines together may have; nginx has a first buffer of 1 KiB besides."""
        return 1024 + self.count * self.size


class BodyError(Exception):
    """The request's body cannot be read; `status` is what nginx logs, `received` how many bytes of it came."""

    def __init__(self, status: int, received: int = 0) -> None:
        super().__init__(f"broken request body ({status})")
        self.status = status
        self.received = received


@dataclass
class RequestHead:
    """Request line and header fields; when `error` is set, what had been read before it."""

    line: bytes = b""
    method: bytes = b""
    target: bytes = b""
    version: str = "1.0"
    host: bytes = b""
    headers: Headers = field(default_factory=Headers)
    size: int = 0
    """Bytes of the lines that were accepted; a line that is refused does not count, as in nginx."""
    received: int = 0
    error: int = 0

    @property
    def path(self) -> bytes:
        """The target without its query."""
        return self.target.partition(b"?")[0]

    @property
    def query(self) -> bytes:
        """The query as the client sent it, without the question mark."""
        return self.target.partition(b"?")[2]

    @property
    def keep_alive(self) -> bool:
        """Whether the client wants to use the connection again."""
        connection = (self.headers.get(b"connection") or b"").lower()
        if self.version == "1.1":
            return b"close" not in connection
        return self.version == "1.0" and b"keep-alive" in connection


class HeadParser:
    """Builds a `RequestHead` from lines; each method returns a status: 0, or why the request is refused."""

    def __init__(self) -> None:
        self.head = RequestHead()
        self._lines = 0
        self.was_read = True
        """Whether the latest line has the form of one: such a line counts, even if it is refused for what it says."""

    def request_line(self, line: bytes) -> int:
        """Read the request line, without its line end."""
        self.head.line = line
        self.was_read = False
        method, space, rest = line.partition(b" ")
        words = [word for word in rest.split(b" ") if word]
        if not space or not _METHOD.fullmatch(method) or len(words) not in (1, 2) or not _TARGET.fullmatch(words[0]):
            return HTTPStatus.BAD_REQUEST
        self.head.method = method
        error = self._target(words[0]) or self._version(words[1] if words[1:] else None)
        if error:
            self.head.target = b""  # nginx has none until the whole line is good
        return error

    def _version(self, word: bytes | None) -> int:
        if word is None:  # HTTP/0.9 has no version, no headers, and only one method
            self.head.version = "0.9"
            return 0 if self.head.method == b"GET" else HTTPStatus.BAD_REQUEST
        found = _VERSION.fullmatch(word)
        if found is None:
            return HTTPStatus.BAD_REQUEST
        self.head.version = "1.0" if int(found[2]) == 0 else "1.1"
        return 0 if int(found[1]) == 1 else HTTPStatus.HTTP_VERSION_NOT_SUPPORTED

    def _target(self, target: bytes) -> int:
        absolute = _ABSOLUTE.fullmatch(target)
        if absolute:
            host = _ABSOLUTE_HOST.fullmatch(absolute[1])
            if not host or not _host_name(host[1]) or absolute[2].startswith(b"#"):
                return HTTPStatus.BAD_REQUEST
            self.head.host = _host_name(host[1])
            target = absolute[2] or b"/"
        elif not target.startswith(b"/"):
            return HTTPStatus.BAD_REQUEST
        self.head.target = target
        return HTTPStatus.BAD_REQUEST if _is_unusable(re.split(rb"[?#]", target, maxsplit=1)[0]) else 0

    def header_line(self, line: bytes) -> int:
        """Read one header line, without its line end; a name with odd characters is left out, as nginx does."""
        name, _, value = line.partition(b":")
        self.was_read = False
        if not name or _FORBIDDEN_IN_NAME.search(name) or b"\0" in value or b"\r" in value:
            return HTTPStatus.BAD_REQUEST
        self.was_read = True
        if _INVALID_IN_NAME.search(name):
            return 0
        self._lines += 1
        if self._lines > _MAX_HEADER_LINES:
            return HTTPStatus.BAD_REQUEST
        if name.lower() in _UNIQUE and self.head.headers.count(name):
            return HTTPStatus.BAD_REQUEST
        self.head.headers.add(name, value.strip(b" "))
        return self._host(value.strip(b" ")) if name.lower() == b"host" else 0

    def _host(self, value: bytes) -> int:
        host = _host_name(value)
        if not host:
            return HTTPStatus.BAD_REQUEST
        self.head.host = self.head.host or host
        return 0

    def finish(self) -> int:
        """Check the fields together, once the empty line has come."""
        headers = self.head.headers
        length, encoding = headers.get(b"content-length"), headers.get(b"transfer-encoding")
        if headers.get(b"host") is None and self.head.version == "1.1":
            return HTTPStatus.BAD_REQUEST
        if length is not None and (not length.isdigit() or int(length) > _MAX_LENGTH or encoding is not None):
            return HTTPStatus.BAD_REQUEST
        if encoding is not None and self.head.version == "1.0":
            return HTTPStatus.BAD_REQUEST
        if encoding is not None and encoding.lower() != b"chunked":
            return HTTPStatus.NOT_IMPLEMENTED
        return HTTPStatus.METHOD_NOT_ALLOWED if self.head.method in _REFUSED_METHODS else 0


def _host_name(value: bytes) -> bytes:
    """Return nginx's idea of a host: in lower case, without its port and one dot at its end; empty when refused."""
    found = _HOST.fullmatch(value)
    name = found[1] if found else b""
    return b"" if b".." in name else name.removesuffix(b".").lower()


def _is_unusable(path: bytes) -> bool:
    """Whether nginx refuses a path: a broken escape or a zero byte in it, or more `..` than there are segments."""
    if b"%" in _PERCENT.sub(b"", path):
        return True
    segments = _PERCENT.sub(lambda match: bytes([int(match[1], 16)]), path).split(b"/")[1:]
    depth = 0
    for segment in segments:
        depth += {b"..": -1, b".": 0, b"": 0}.get(segment, 1)
        if depth < 0 or b"\0" in segment:
            return True
    return False


async def read_head(reader: asyncio.StreamReader, limits: HeaderLimits) -> RequestHead | None:
    """Read a request's head; None when the client closed the connection without having sent any of it.

    A head that is refused comes with its `error`, and with what had been read before.
    """
    parser = HeadParser()
    head = parser.head
    has_begun = False
    while True:
        raw = await _read_line(reader, limits, head)
        if raw is None:
            return head if has_begun or head.received else None
        has_begun = True
        line = raw[:-2] if raw.endswith(b"\r\n") else raw[:-1]
        if not head.line and not line:
            head.received = 0  # nginx skips empty lines between requests
            continue
        if not head.line:
            head.error = parser.request_line(line)
        elif line:
            head.error = parser.header_line(line)
        else:
            head.error = parser.finish()
        if not head.error or not line or parser.was_read:
            head.size += len(raw)
        if head.error or not line or head.version == "0.9":
            return head


async def _read_line(reader: asyncio.StreamReader, limits: HeaderLimits, head: RequestHead) -> bytes | None:
    """Return the next line with its end; None, and the head's error, when there is none that can be used."""
    try:
        raw = await reader.readuntil(b"\n")
    except asyncio.IncompleteReadError as error:
        head.received += len(error.partial)
        head.line = head.line or error.partial
        head.error = HTTPStatus.BAD_REQUEST
        return None
    except asyncio.LimitOverrunError:
        raw = b" " * (limits.total + 1)
    head.received += len(raw)
    if len(raw) > limits.size or head.received > limits.total:
        head.error = HEADER_TOO_LARGE if head.line else HTTPStatus.REQUEST_URI_TOO_LONG
        return None
    return raw


async def read_body(reader: asyncio.StreamReader, head: RequestHead) -> tuple[bytes, int]:
    """Read a request's body: its content, and how many bytes it had on the wire.

    Raises:
        BodyError: it is malformed, or the client went away in the middle of it.

    """
    try:
        if head.headers.get(b"transfer-encoding") is not None:
            return await read_chunked(reader)
        length = int(head.headers.get(b"content-length") or 0)
        return await reader.readexactly(length) if length else b"", length
    except asyncio.IncompleteReadError as error:
        raise BodyError(HTTPStatus.BAD_REQUEST, len(error.partial)) from error
    except (ConnectionError, ValueError) as error:
        raise BodyError(HTTPStatus.BAD_REQUEST) from error


async def read_chunked(reader: asyncio.StreamReader) -> tuple[bytes, int]:
    """Read a chunked body to its end: the content, and its size on the wire.

    Raises:
        ValueError: it is malformed.
        asyncio.IncompleteReadError: the peer closed the connection before the end.

    """
    parts: list[bytes] = []
    wire_size = 0
    while True:
        line = await _bounded_line(reader)
        wire_size += len(line)
        digits = line.partition(b";")[0].strip()
        if not _CHUNK_SIZE.fullmatch(digits):
            raise ValueError("a chunk has no size")
        size = int(digits, 16)
        if not size:
            return b"".join(parts), wire_size + await _skip_trailer(reader)
        chunk = await reader.readexactly(size + 2)
        if not chunk.endswith(b"\r\n"):
            raise ValueError("a chunk does not end where it should")
        parts.append(chunk[:-2])
        wire_size += len(chunk)


async def _skip_trailer(reader: asyncio.StreamReader) -> int:
    size = 0
    while True:
        line = await _bounded_line(reader)
        size += len(line)
        if not line.strip():
            return size


async def _bounded_line(reader: asyncio.StreamReader) -> bytes:
    line = await reader.readuntil(b"\n")
    if len(line) > _CHUNK_LINE_LIMIT:
        raise ValueError("line too long")
    return line


async def drain(reader: asyncio.StreamReader, head: RequestHead) -> bool:
    """Read a body that nobody wants; False when the connection cannot be used again."""
    try:
        if head.headers.get(b"transfer-encoding") is not None:
            await read_chunked(reader)
            return True
        left = int(head.headers.get(b"content-length") or 0)
        while left:
            chunk = await reader.read(min(left, _READ_SIZE))
            if not chunk:
                return False
            left -= len(chunk)
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError, ConnectionError):
        return False
    return True
