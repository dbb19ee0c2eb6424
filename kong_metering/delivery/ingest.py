"""One POST to the ingest endpoint, and what its answer means for the events in it.

Contract: an `IngestClient` belongs to one thread. `send` takes `timeout` at most to connect, to send (over TLS: each
16 KB) and to read the answer, never raises for anything that the network or the endpoint does, follows no redirect,
compresses nothing and adds nothing to the events: OpenMeter compares the content type exactly, does not decompress
bodies and refuses CloudEvents extensions (`../shared/reference/delivery.md`). Any 2xx is success. No reason holds the
token, whatever the endpoint echoes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from http.client import HTTPException
from typing import TYPE_CHECKING, Any

import requests
import urllib3

from kong_metering import __version__
from kong_metering.delivery.policy import parse_retry_after
from kong_metering.delivery.transport import PlainSession
from kong_metering.log import printable
from kong_metering.urls import text_without_credentials

if TYPE_CHECKING:
    from kong_metering.clock import Clock
    from kong_metering.config import PluginConfig

SINGLE = "application/cloudevents+json"
BATCH = "application/cloudevents-batch+json"

_OPENRESTY_DEFAULT_TIMEOUT_MS = 60_000
_MAX_ANSWER_BYTES = 64 * 1024
_ABOUT_THE_EVENTS = (HTTPStatus.BAD_REQUEST, HTTPStatus.REQUEST_ENTITY_TOO_LARGE, HTTPStatus.UNPROCESSABLE_ENTITY)
_PASSING = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS)
_HINTS = {
    401: "is api_token right, and not expired?",
    403: "may this api_token ingest events?",
    404: "is ingest_endpoint the URL for events, with its path?",
}
# The detail quotes the event's values too, as JSON; so what a client wrote never follows upon these very words.
_V1_INDEX = re.compile(r'Error at "/(\d{1,7})(?:/|")')
_V3_INDEX = re.compile(r"^\[?(\d{1,7})\]?(?:\.|$)")
# urllib3 and http.client let a few through that requests does not wrap in its own, which are OSErrors.
_NO_CONNECTION = (urllib3.exceptions.NewConnectionError, urllib3.exceptions.ConnectTimeoutError)
_NETWORK_ERRORS = (OSError, ValueError, urllib3.exceptions.HTTPError, HTTPException)


@dataclass(frozen=True)
class Endpoint:
    """Where and how events are posted; times in seconds, `keepalive` 0 means for ever."""

    url: str
    token: str = field(repr=False)
    timeout: float
    keepalive: float
    verify: bool | str

    @classmethod
    def of(cls, config: PluginConfig, ca_bundle: str | None) -> Endpoint:
        """Read it from a plugin configuration; `ca_bundle` is a PEM file to verify the endpoint with."""
        timeout = config.timeout if config.timeout > 0 else _OPENRESTY_DEFAULT_TIMEOUT_MS
        return cls(
            url=config.ingest_endpoint,
            token=config.api_token,
            timeout=timeout / 1000,
            keepalive=max(0.0, config.keepalive) / 1000,
            verify=(ca_bundle or True) if config.ssl_verify else False,
        )


@dataclass(frozen=True)
class Delivered:
    """The endpoint took all events of the request."""


@dataclass(frozen=True)
class Failed:
    """The endpoint did not take the request, for now.

    `reason` is for people; `kind`, the status or the type of error, is the same for the same trouble. `retry_after` is
    the pause that the endpoint asked for, in seconds. `is_misconfigured`: trying again will not help, until somebody
    changes the configuration here or there. `may_have_arrived`: the endpoint may hold the events all the same, some of
    them at least (OpenMeter hands them to Kafka one by one before it answers 500).
    """

    reason: str
    kind: str
    retry_after: float | None = None
    is_server_error: bool = False
    is_misconfigured: bool = False
    may_have_arrived: bool = True


@dataclass(frozen=True)
class Rejected:
    """The endpoint refused the request because of an event in it; `indexes` are the ones it named."""

    reason: str
    indexes: tuple[int, ...] = ()


Outcome = Delivered | Failed | Rejected


class IngestClient:
    """Posts events to one endpoint over a connection that is kept."""

    def __init__(self, endpoint: Endpoint, clock: Clock) -> None:
        self._endpoint = endpoint
        self._clock = clock
        self._session = PlainSession()
        self._template: requests.PreparedRequest | None = None
        self._used_at = clock.monotonic()

    def send(self, events: Sequence[bytes]) -> Outcome:
        """Post the events in one request and tell what came of it."""
        self._end_stale_connection()
        try:
            with self._session.send(
                self._request(events),
                stream=True,
                timeout=self._endpoint.timeout,
                verify=self._endpoint.verify,
                allow_redirects=False,
            ) as response:
                return self._outcome(response)
        except _NETWORK_ERRORS as error:
            return self._failure(error)
        finally:
            self._used_at = self._clock.monotonic()

    def close(self) -> None:
        """End the connection."""
        self._session.close()

    def _end_stale_connection(self) -> None:
        idle = self._clock.monotonic() - self._used_at
        if self._endpoint.keepalive and idle > self._endpoint.keepalive:
            self._session.close()

    def _request(self, events: Sequence[bytes]) -> requests.PreparedRequest:
        if self._template is None:
            self._template = self._prepared()
        request = self._template.copy()
        single = len(events) == 1
        body = events[0] if single else b"[" + b",".join(events) + b"]"
        request.body = body
        request.headers["Content-Type"] = SINGLE if single else BATCH
        request.headers["Content-Length"] = str(len(body))
        return request

    def _prepared(self) -> requests.PreparedRequest:
        """Prepare what all requests have in common once: it is most of what a request costs."""
        headers = {"Accept": "application/json, application/problem+json", "User-Agent": f"kong-metering/{__version__}"}
        prepared = self._session.prepare_request(requests.Request("POST", self._endpoint.url, headers=headers))
        # Afterwards: requests would put credentials that stand in the URL in its place.
        prepared.headers["Authorization"] = f"Bearer {self._endpoint.token}"
        return prepared

    def _outcome(self, response: requests.Response) -> Outcome:
        status = response.status_code
        answer = _answer(response)
        if 200 <= status < 300:  # noqa: PLR2004 - the class of statuses
            return Delivered()
        words = self._clean(answer.decode("utf-8", "replace").strip()) or "no explanation"
        reason = f"{self._clean(self._endpoint.url)} answered {status}: {words}"
        if status in _ABOUT_THE_EVENTS:
            return Rejected(reason, _named_events(answer))
        if status in _HINTS:
            reason += f" ({_HINTS[status]})"
        elif 300 <= status < 400:  # noqa: PLR2004
            location = self._clean(response.headers.get("Location", ""))
            reason += f" (redirects are not followed; should ingest_endpoint be {location or 'another URL'}?)"
        return Failed(
            reason,
            str(status),
            parse_retry_after(response.headers.get("Retry-After"), self._clock.wall()),
            is_server_error=status >= HTTPStatus.INTERNAL_SERVER_ERROR,
            is_misconfigured=status < HTTPStatus.INTERNAL_SERVER_ERROR and status not in _PASSING,
            may_have_arrived=status >= HTTPStatus.INTERNAL_SERVER_ERROR or status == HTTPStatus.REQUEST_TIMEOUT,
        )

    def _failure(self, error: Exception) -> Failed:
        """Tell why there was no answer: a URL, a certificate or a bundle that will not do, or a trouble that passes."""
        cause = _innermost(error)
        kind = type(cause).__name__
        return Failed(
            f"{self._clean(self._endpoint.url)}: {kind}: {self._clean(str(cause))}",
            kind,
            is_misconfigured=_is_misconfigured(error, cause),
            may_have_arrived=not (_is_misconfigured(error, cause) or _never_connected(error)),
        )

    def _clean(self, text: str) -> str:
        """Make words fit for the log, without secrets."""
        return printable(text_without_credentials(text.replace(self._endpoint.token, "***")))


def _answer(response: requests.Response) -> bytes:
    """Read the body, a bounded part of it; a connection with more to say is not used again."""
    answer = b""
    try:
        for chunk in response.iter_content(4096):
            answer += chunk
            if len(answer) > _MAX_ANSWER_BYTES:
                break
    except _NETWORK_ERRORS:
        # The status is known, and it is what counts.
        response.close()
    return answer


def _innermost(error: BaseException) -> BaseException:
    """Find what requests and urllib3 have wrapped."""
    return next((cause for cause in _causes(error) if isinstance(cause, HTTPException)), [*_causes(error)][-1])


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Go from an error to what it was raised from."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)


def _is_misconfigured(error: BaseException, cause: BaseException) -> bool:
    """Whether it is the configuration.

    Bad URLs and refused certificates are ValueErrors; a bundle that is not there is a plain OSError.
    """
    return isinstance(error, ValueError) or isinstance(cause, ValueError) or type(error) is OSError


def _never_connected(error: BaseException) -> bool:
    return any(isinstance(cause, _NO_CONNECTION) for cause in _causes(error))


def _named_events(answer: bytes) -> tuple[int, ...]:
    """Find which events of a batch the endpoint's answer is about.

    OpenMeter v1 says `Error at "/3/subject"` in `detail`, v3 lists `invalid_parameters[].field` such as `3.subject`.
    """
    try:
        problem: Any = json.loads(answer)
    except (ValueError, RecursionError):
        return ()
    if not isinstance(problem, dict):
        return ()
    found: set[int] = set()
    parameters = problem.get("invalid_parameters")
    for item in parameters if isinstance(parameters, list) else []:
        match = _V3_INDEX.match(str(item.get("field", ""))) if isinstance(item, dict) else None
        if match:
            found.add(int(match[1]))
    if not found:
        found.update(int(index) for index in _V1_INDEX.findall(str(problem.get("detail", ""))))
    return tuple(sorted(found))
