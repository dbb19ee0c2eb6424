"""Asks OpenMeter over HTTP: JSON in, JSON out, gently.

Contract: a `Web` belongs to one thread. A request that fails for the moment (no connection, 429, 502, 503, 504) is made
again, a few times, with growing pauses, or after as long as `Retry-After` asks for; `wait` is what waits, and may raise
to end it all. No proxies, .netrc or authorities from the environment, no redirects. No error holds the token.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import requests

from kong_metering import __version__
from kong_metering.errors import KongMeteringError
from kong_metering.ingest.answer import parse_retry_after
from kong_metering.ingest.transport import innermost
from kong_metering.log import printable
from kong_metering.urls import text_without_credentials

if TYPE_CHECKING:
    from kong_metering.clock import Clock
    from kong_metering.ingest.client import Endpoint

TRIES = 4
_PASSING = (
    HTTPStatus.TOO_MANY_REQUESTS,
    HTTPStatus.BAD_GATEWAY,
    HTTPStatus.SERVICE_UNAVAILABLE,
    HTTPStatus.GATEWAY_TIMEOUT,
)
_FIRST_PAUSE_SECONDS = 0.5
_LONGEST_PAUSE_SECONDS = 60.0
_MAX_BODY_BYTES = 64 * 1024 * 1024
_CHUNK_BYTES = 256 * 1024
_WORDS = 300


class CannotAsk(KongMeteringError):  # noqa: N818 - what it is
    """The endpoint does not answer such questions, or not with this token; the text says what it answered."""


class Unanswered(KongMeteringError):  # noqa: N818 - what it is
    """One question got no answer; the text says why. `status` is None where there was none at all."""

    def __init__(self, reason: str, status: int | None = None) -> None:
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True)
class Pace:
    """How gently it asks: seconds between two requests, and what waits."""

    wait: Callable[[float], None]
    between: float = 0.0


class Web:
    """One endpoint's host, asked with its token."""

    def __init__(self, endpoint: Endpoint, clock: Clock, pace: Pace) -> None:
        self._endpoint = endpoint
        self._clock = clock
        self._pace = pace
        self._session = requests.Session()
        self._session.trust_env = False
        self._session.verify = endpoint.verify
        self._session.headers.update(
            {
                "Accept": "application/json, application/problem+json",
                "User-Agent": f"kong-metering/{__version__}",
                "Authorization": f"Bearer {endpoint.token}",
            }
        )

    def close(self) -> None:
        """End the connections."""
        self._session.close()

    def get(self, url: str) -> Any:
        """Return the document at a URL. Raises `Unanswered`, and `CannotAsk`."""
        return self._asked("GET", url, None)

    def post(self, url: str, document: Any) -> Any:
        """Send a document, and return the answer. Raises `Unanswered`, and `CannotAsk`."""
        return self._asked("POST", url, document)

    def _asked(self, method: str, url: str, document: Any) -> Any:
        pause = _FIRST_PAUSE_SECONDS
        for tries_left in reversed(range(TRIES)):
            if self._pace.between:
                self._pace.wait(self._pace.between)
            try:
                return self._asked_once(method, url, document)
            except _Passing as passing:
                if tries_left == 0:
                    raise Unanswered(str(passing), passing.status) from passing
                self._pace.wait(min(passing.retry_after or pause, _LONGEST_PAUSE_SECONDS))
                pause *= 2
        raise AssertionError("the last try returns or raises")

    def _asked_once(self, method: str, url: str, document: Any) -> Any:
        where = self._clean(url.partition("?")[0])
        try:
            with self._session.request(
                method, url, json=document, timeout=self._endpoint.timeout, allow_redirects=False, stream=True
            ) as answer:
                body = _body(answer)
        except (requests.RequestException, OSError, ValueError) as error:
            # What requests says of it names the whole question, which hides what happened.
            cause = innermost(error)
            raise _Passing(f"{where}: {type(cause).__name__}: {self._clean(str(cause))}") from None
        words = (
            f"{where} answered {answer.status_code}: {self._clean(body[:_WORDS].decode('utf-8', 'replace').strip())}"
        )
        if answer.status_code in _PASSING:
            retry_after = parse_retry_after(answer.headers.get("Retry-After"), self._clock.wall())
            raise _Passing(words, answer.status_code, retry_after)
        if answer.status_code in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
            raise CannotAsk(f"{words} (may this token read events? One that may only ingest cannot)")
        if answer.status_code in (HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED):
            raise NotThere(f"{words} (is it OpenMeter, and of a version that lists events?)")
        if not answer.ok or answer.is_redirect:
            raise Unanswered(words, answer.status_code)
        try:
            return json.loads(body)
        except ValueError:
            raise Unanswered(f"{where} answered no JSON", answer.status_code) from None

    def _clean(self, text: str) -> str:
        text = text.replace(self._endpoint.token, "***") if self._endpoint.token else text
        return printable(text_without_credentials(text), _WORDS)


class NotThere(CannotAsk):
    """There is no such API."""


class _Passing(Exception):  # noqa: N818 - what it is
    def __init__(self, reason: str, status: int | None = None, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.status = status
        self.retry_after = retry_after


def _body(answer: requests.Response) -> bytes:
    """Read a bounded answer. Raises `ValueError` for one that is larger."""
    body = b""
    for chunk in answer.iter_content(_CHUNK_BYTES):
        body += chunk
        if len(body) > _MAX_BODY_BYTES:
            raise ValueError("the answer is too large")
    return body
