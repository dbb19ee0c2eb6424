"""One kept connection: a POST goes out, its answer comes back.

Contract: a `Connection` belongs to one thread at a time. `requests` prepares the URL and the headers and picks the
certificates, once; urllib3 connects; the bytes of a POST are then written in one piece, for which `requests` itself
takes several times the CPU (bench/post.py). No proxies, .netrc or authorities from the environment, no cookies, no
redirects, no compression. A POST takes `timeout` at most to connect, to send (over TLS: each 16 KB) and to read the
answer. It raises nothing but `PostError`, which says how far it came; a connection on which anything went wrong is
closed. One that the endpoint has ended while it was idle, or on which it said what nobody asked for, is replaced. Had
that been a success, and come a little later, it would have been taken for the answer to the next request:
`said_unasked` tells that this endpoint's connections are not to be kept.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

import requests
import urllib3
from requests.adapters import HTTPAdapter
from urllib3.util import wait_for_read

from kong_metering.ingest.answer import Answer, AnswerReader

if TYPE_CHECKING:
    from urllib3.connection import HTTPConnection

_ONE_PIECE_BYTES = 128 * 1024
_DEFAULT_PORTS = {"http": ":80", "https": ":443"}
_SUCCESS = b"HTTP/1.1 2"
_UNFIT_FOR_A_HEADER = re.compile(r"[^\t\x20-\x7e\x80-\xff]")
# urllib3's and http.client's are not all OSErrors; URLs that will not do and refused certificates are ValueErrors.
_ERRORS = (OSError, ValueError, urllib3.exceptions.HTTPError, HTTPException)


class PostError(Exception):
    """There was no answer; `__cause__` says why.

    `is_misconfigured`: it is the URL, a header, a certificate or a bundle, not a trouble that passes.
    `may_have_arrived`: the request was written whole. `is_begun`: some of it was.
    """

    def __init__(
        self, *, is_misconfigured: bool = False, may_have_arrived: bool = False, is_begun: bool = False
    ) -> None:
        super().__init__()
        self.is_misconfigured = is_misconfigured
        self.may_have_arrived = may_have_arrived
        self.is_begun = is_begun


@dataclass(frozen=True)
class Posted:
    """What came of a request; `is_sent_whole` is False if the answer came, and then the end, while it was written."""

    answer: Answer
    is_sent_whole: bool


class Connection:
    """Posts to one URL over a connection that is kept."""

    def __init__(self, url: str, headers: Mapping[str, str], *, timeout: float, verify: bool | str) -> None:
        """Prepare what all requests have in common; `headers` come with each.

        Raises `PostError` if it cannot be used. `timeout` is in seconds, `verify` as in requests.
        """
        try:
            request = requests.Request("POST", url).prepare()
            self._head = _head(request, headers)
            self._connection = _Adapter().new_connection(request, verify=verify)
        except _ERRORS as error:
            raise PostError(is_misconfigured=True) from error
        self._timeout = self._connection.timeout = timeout
        self._reader: AnswerReader | None = None
        self.said_unasked = False

    @property
    def is_open(self) -> bool:
        """True if there is a connection."""
        return self._reader is not None

    @property
    def has_ended(self) -> bool:
        """True if the open connection, which is idle, cannot be used again; reads nothing and waits for nothing.

        Whatever there is to read on it is the end of it, or was not asked for.
        """
        sock = self._connection.sock
        if self._reader is None or sock is None:
            return False
        return (
            self._reader.holds_more
            or wait_for_read(sock, 0.0)
            or (isinstance(sock, ssl.SSLSocket) and sock.pending() > 0)
        )

    def post(self, content_type: str, body: bytes) -> Posted:
        """Send a request, and read its answer."""
        if self.has_ended:
            self.close()
        try:
            posted = self._exchange(content_type, body)
        except BaseException:
            self.close()
            raise
        if posted.answer.is_last or not posted.is_sent_whole:
            self.close()
        return posted

    def close(self) -> None:
        """End the connection; the next POST makes another one."""
        if self._reader is not None and self.has_ended and self._reader.unasked().startswith(_SUCCESS):
            self.said_unasked = True
        self._reader = None
        self._connection.close()

    def _exchange(self, content_type: str, body: bytes) -> Posted:
        reader = self._reader = self._reader or self._connect()
        try:
            self._write(content_type, body)
        except _ERRORS as error:
            return Posted(self._early_answer(reader, error), is_sent_whole=False)
        try:
            return Posted(reader.read(self._timeout), is_sent_whole=True)
        except _ERRORS as error:
            raise PostError(may_have_arrived=True, is_begun=True) from error

    def _connect(self) -> AnswerReader:
        try:
            self._connection.connect()
        except _ERRORS as error:
            raise PostError(is_misconfigured=isinstance(error, ValueError)) from error
        return AnswerReader(self._connection.sock)

    def _write(self, content_type: str, body: bytes) -> None:
        self._connection.sock.settimeout(self._timeout)
        head = self._head + b"Content-Type: %b\r\nContent-Length: %d\r\n\r\n" % (content_type.encode(), len(body))
        if len(body) <= _ONE_PIECE_BYTES:
            self._connection.send(head + body)
        else:
            self._connection.send(head)
            self._connection.send(body)

    def _early_answer(self, reader: AnswerReader, error: Exception) -> Answer:
        """Read why the endpoint did not want to read on, if it said so."""
        try:
            if wait_for_read(self._connection.sock, 0.0):
                return reader.read(self._timeout)
        except _ERRORS:
            pass
        raise PostError(is_begun=True) from error


def _head(request: requests.PreparedRequest, headers: Mapping[str, str]) -> bytes:
    """Write what all requests begin with."""
    for name, value in headers.items():
        if _UNFIT_FOR_A_HEADER.search(value):
            # Without the value: it may be a secret.
            raise ValueError(f"{name} holds characters that cannot stand in a header")
    parts = urlsplit(str(request.url))
    host = parts.netloc.rpartition("@")[2].removesuffix(_DEFAULT_PORTS.get(parts.scheme, ""))
    lines = [f"POST {request.path_url} HTTP/1.1", f"Host: {host}", *(f"{name}: {headers[name]}" for name in headers)]
    return "".join(f"{line}\r\n" for line in lines).encode("latin-1")


class _Pool(urllib3.HTTPConnectionPool):
    def new_connection(self) -> HTTPConnection:
        return cast("HTTPConnection", self._new_conn())


class _TLSPool(urllib3.HTTPSConnectionPool):
    def new_connection(self) -> HTTPConnection:
        return cast("HTTPConnection", self._new_conn())


class _Adapter(HTTPAdapter):
    """Makes connections by the rules of `requests`: which certificates are verified, and with which authorities."""

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = {"http": _Pool, "https": _TLSPool}

    def new_connection(self, request: requests.PreparedRequest, *, verify: bool | str) -> HTTPConnection:
        pool = cast("_Pool | _TLSPool", self.get_connection_with_tls_context(request, verify))
        self.cert_verify(pool, request.url, verify, None)  # type: ignore[no-untyped-call]
        return pool.new_connection()


def innermost(error: BaseException) -> BaseException:
    """Find what requests and urllib3 have wrapped."""
    return next((cause for cause in _causes(error) if isinstance(cause, HTTPException)), [*_causes(error)][-1])


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Go from an error to what it was raised from."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
