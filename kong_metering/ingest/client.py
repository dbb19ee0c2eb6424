"""One POST to the ingest endpoint, and what its answer means for the events in it.

Contract: an `IngestClient` belongs to one thread. `send` takes `timeout` at most to connect, to send (over TLS: each 16
KB) and to read the answer, never raises for anything that the network or the endpoint does, follows no redirect,
compresses nothing and adds nothing to the events: OpenMeter compares the content type exactly, does not decompress
bodies and refuses CloudEvents extensions (measured). Any 2xx to a whole request is success; one that does not look like
an acceptance comes with a note. No text of an outcome holds the token, whatever the endpoint echoes. A client that is
idle holds its connection until `close`; one that was idle for longer than `keepalive` is not used again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from kong_metering import __version__
from kong_metering.clock import LONGEST_SOCKET_WAIT
from kong_metering.ingest.answer import parse_retry_after
from kong_metering.ingest.transport import Connection, PostError, innermost
from kong_metering.log import printable
from kong_metering.trial.outcome import Delivered, Failed, Outcome, Rejected
from kong_metering.urls import text_without_credentials

if TYPE_CHECKING:
    from kong_metering.clock import Clock
    from kong_metering.config import PluginConfig
    from kong_metering.ingest.answer import Answer
    from kong_metering.ingest.transport import Posted

SINGLE = "application/cloudevents+json"
BATCH = "application/cloudevents-batch+json"

_OPENRESTY_DEFAULT_TIMEOUT_MS = 60_000
_REASON_CHARS = 200
_MAX_WORDS = 4096
_ACCEPTANCES = (HTTPStatus.OK, HTTPStatus.CREATED, HTTPStatus.ACCEPTED, HTTPStatus.NO_CONTENT)
_ACCEPTED_TYPES = re.compile(r"application/(?:[^/]+\+)?json|text/plain")
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


@dataclass(frozen=True)
class Endpoint:
    """Where and how events are posted; times in seconds, `keepalive` 0 means for ever, `timeout` is 24 days at most."""

    url: str
    token: str = field(repr=False)
    timeout: float
    keepalive: float
    verify: bool | str

    def __post_init__(self) -> None:
        """Keep to what a socket can wait for: Kong's schema takes any `config.timeout`."""
        object.__setattr__(self, "timeout", min(self.timeout, LONGEST_SOCKET_WAIT))

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


class IngestClient:
    """Posts events to one endpoint over a connection that is kept."""

    def __init__(self, endpoint: Endpoint, clock: Clock) -> None:
        self._endpoint = endpoint
        self._clock = clock
        self._connection: Connection | None = None
        self._used_at = clock.monotonic()

    @property
    def endpoint(self) -> Endpoint:
        """Where it posts to."""
        return self._endpoint

    @property
    def is_connected(self) -> bool:
        """True if it holds a connection, and so a descriptor."""
        return self._connection is not None and self._connection.is_open

    @property
    def has_ended(self) -> bool:
        """True if the endpoint has ended the connection, which is idle; reads nothing and waits for nothing."""
        return self._connection is not None and self._connection.has_ended

    @property
    def said_unasked(self) -> bool:
        """True if the endpoint has answered 2xx on a connection, by now closed, when nothing had been asked."""
        return self._connection is not None and self._connection.said_unasked

    def send(self, events: Sequence[bytes]) -> Outcome:
        """Post the events in one request and tell what came of it."""
        self._end_stale_connection()
        single = len(events) == 1
        body = events[0] if single else b"[" + b",".join(events) + b"]"
        try:
            self._connection = self._connection or self._prepared()
            return self._outcome(self._connection.post(SINGLE if single else BATCH, body))
        except PostError as error:
            return self._failure(error)
        finally:
            self._used_at = self._clock.monotonic()

    def close(self) -> None:
        """End the connection."""
        if self._connection is not None:
            self._connection.close()

    def _end_stale_connection(self) -> None:
        idle = self._clock.monotonic() - self._used_at
        if self._endpoint.keepalive and idle > self._endpoint.keepalive:
            self.close()

    def _prepared(self) -> Connection:
        headers = {
            "Accept": "application/json, application/problem+json",
            "Accept-Encoding": "identity",
            "User-Agent": f"kong-metering/{__version__}",
            "Authorization": f"Bearer {self._endpoint.token}",
        }
        return Connection(self._endpoint.url, headers, timeout=self._endpoint.timeout, verify=self._endpoint.verify)

    def _outcome(self, posted: Posted) -> Outcome:
        answer = posted.answer
        status = answer.status
        if 200 <= status < 300:  # noqa: PLR2004 - the class of statuses
            return self._delivered(answer) if posted.is_sent_whole else self._unread(answer)
        reason, words = (self._explained(answer, limit) for limit in (_REASON_CHARS, _MAX_WORDS))
        if status in _ABOUT_THE_EVENTS:
            return Rejected(reason, _named_events(answer.body), words)
        return Failed(
            reason,
            str(status),
            parse_retry_after(answer.headers.get("Retry-After"), self._clock.wall()),
            is_misconfigured=status < HTTPStatus.INTERNAL_SERVER_ERROR and status not in _PASSING,
            may_have_arrived=posted.is_sent_whole and not _refuses_before_it_reads(status),
            words=words,
        )

    def _delivered(self, answer: Answer) -> Delivered:
        # Cleaned first: in lower case, an echoed token would not be known again.
        content_type = self._clean(answer.headers.get("Content-Type", "")).partition(";")[0].strip().lower()
        if answer.status in _ACCEPTANCES and (not content_type or _ACCEPTED_TYPES.fullmatch(content_type)):
            return Delivered()
        what = f"{answer.status} with {content_type}" if content_type else str(answer.status)
        return Delivered(
            f"{self._clean(self._endpoint.url)} answers {what}, which is unusual for an acceptance, and counts as one "
            "(is ingest_endpoint the URL for events, with its path?)"
        )

    def _unread(self, answer: Answer) -> Failed:
        """Tell of an acceptance of something that the endpoint cannot have read."""
        reason = f"{self._clean(self._endpoint.url)} answered {answer.status} without reading the whole request"
        return Failed(reason, str(answer.status), may_have_arrived=False)

    def _explained(self, answer: Answer, limit: int) -> str:
        """Give what the endpoint answered, its words cut to `limit` characters, and a hint."""
        words = self._clean(answer.body.decode("utf-8", "replace").strip(), limit) or "no explanation"
        reason = f"{self._clean(self._endpoint.url)} answered {answer.status}: {words}"
        if answer.status in _HINTS:
            return f"{reason} ({_HINTS[answer.status]})"
        if 300 <= answer.status < 400:  # noqa: PLR2004 - the class of statuses
            location = self._clean(answer.headers.get("Location", ""))
            return f"{reason} (redirects are not followed; should ingest_endpoint be {location or 'another URL'}?)"
        return reason

    def _failure(self, error: PostError) -> Failed:
        """Tell why there was no answer: something that is configured and will not do, or a trouble that passes."""
        cause = innermost(error)
        kind = type(cause).__name__
        return Failed(
            f"{self._clean(self._endpoint.url)}: {kind}: {self._clean(str(cause))}",
            kind,
            is_misconfigured=error.is_misconfigured,
            may_have_arrived=error.may_have_arrived,
            is_begun=error.is_begun,
        )

    def _clean(self, text: str, limit: int = _REASON_CHARS) -> str:
        """Make words fit for the log, without secrets."""
        return printable(text_without_credentials(text.replace(self._endpoint.token, "***")), limit)


def _refuses_before_it_reads(status: int) -> bool:
    """Tell an answer to who comes, where to and when from one that may come after a part of the events was taken."""
    return HTTPStatus.OK <= status < HTTPStatus.INTERNAL_SERVER_ERROR and status != HTTPStatus.REQUEST_TIMEOUT


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
