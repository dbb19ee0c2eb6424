"""Decides what an ingest request deserves. Pure: header values and bytes in, a verdict out."""

from __future__ import annotations

import json
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Final

import orjson

from kong_metering_sandbox.collector.dialects import BATCH, SINGLE, V1, V3, Answer
from kong_metering_sandbox.collector.validation import EventValidator

if TYPE_CHECKING:
    from kong_metering_sandbox.collector.dialects import Dialect

_LARGEST_MESSAGE_BYTES: Final = 1_000_000
# A JSON string has up to six times the bytes of what it holds.
_SURELY_SMALL_BYTES: Final = _LARGEST_MESSAGE_BYTES // 6
_LAST_LOST_YEAR: Final = "1970"
_JSON_BLANKS: Final = " \t\r\n"


@dataclass(frozen=True)
class Body:
    """A request's body, read once for all who look at it: ``error`` says why it is not JSON, None when it is."""

    document: object
    size: int
    error: str | None = None

    @classmethod
    def parse(cls, raw: bytes) -> Body:
        """Read JSON as Go does; whatever is not JSON, compressed bodies among it, becomes a body with an error.

        Bytes that are not UTF-8 and lone surrogates become U+FFFD; what follows the first document is not looked at.
        """
        try:
            return cls(orjson.loads(raw), len(raw))
        except orjson.JSONDecodeError:
            pass
        try:
            return cls(_first_document(raw), len(raw))
        except ValueError as error:
            return cls(None, len(raw), str(error))

    @property
    def items(self) -> list[object]:
        """The events of the body, valid or not: its elements, or its one document."""
        if self.error is not None:
            return []
        return self.document if isinstance(self.document, list) else [self.document]

    @property
    def is_batch(self) -> bool:
        """Whether the body is an array."""
        return isinstance(self.document, list)


@dataclass(frozen=True)
class Verdict:
    """What a request gets when no fault interferes. ``events`` are to be stored; none when it is refused."""

    answer: Answer
    events: tuple[dict[str, object], ...] = ()


class Endpoint:
    """One version of the ingest API: a dialect and the schema of its events."""

    def __init__(self, dialect: Dialect, validator: EventValidator) -> None:
        self.dialect = dialect
        self._validator = validator

    def judge(self, content_type: str | None, body: Body, *, authorized: bool) -> Verdict:
        """Check authorization, content type, JSON and events, in OpenMeter's order; the first failure decides."""
        if not authorized:
            return self._refuse(HTTPStatus.UNAUTHORIZED, "Invalid credentials")
        media_type = self.dialect.media_type(content_type)
        if media_type is None:
            return self._refuse_body(f'header Content-Type has unexpected value "{content_type or ""}"')
        if body.error is not None:
            return self._refuse_body(f"failed to decode request body: {body.error}")
        if (media_type == SINGLE and body.is_batch) or (media_type == BATCH and not body.is_batch):
            return self._refuse_body(f"doesn't match schema: value must be an {_shape(media_type)}")
        problems = self._validator.body_problems(body.document)
        return Verdict(self.dialect.invalid(problems)) if problems else self._take(body)

    def _take(self, body: Body) -> Verdict:
        """Decide about valid events."""
        events = tuple(item for item in body.items if isinstance(item, dict))
        if body.size > _SURELY_SMALL_BYTES and any(map(_is_too_large, events)):
            return self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR, "Broker: Message size too large")
        return Verdict(Answer(self.dialect.accepted_status), tuple(event for event in events if not _is_lost(event)))

    def _refuse(self, status: int, detail: str) -> Verdict:
        return Verdict(self.dialect.refusal(status, detail))

    def _refuse_body(self, detail: str) -> Verdict:
        return self._refuse(HTTPStatus.BAD_REQUEST, f"request body has an error: {detail}")


def endpoints() -> dict[str, Endpoint]:
    """Make the endpoints of every ingest path: OpenMeter's v1 and v3, and v3 where Konnect has it."""
    v1 = Endpoint(V1(), EventValidator("openmeter-ingest-v1.openapi.yaml", "Event"))
    v3 = Endpoint(V3(), EventValidator("openmeter-ingest-v3.openapi.yaml", "MeteringEvent"))
    return {"/api/v1/events": v1, "/api/v3/openmeter/events": v3, "/v3/openmeter/events": v3}


def _first_document(raw: bytes) -> object:
    """Read the first JSON document; raises `ValueError` when there is none."""
    text = raw.decode("utf-8", "replace").lstrip(_JSON_BLANKS)
    document, _ = json.JSONDecoder(parse_constant=_refuse_constant).raw_decode(text)
    plain = json.dumps(document, ensure_ascii=False).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return json.loads(plain)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _is_too_large(event: dict[str, object]) -> bool:
    """Whether Kafka refuses an event's message, in which OpenMeter has put its data as a JSON string."""
    data = orjson.dumps(event.get("data")).decode()
    return len(orjson.dumps({**event, "data": data})) > _LARGEST_MESSAGE_BYTES


def _is_lost(event: dict[str, object]) -> bool:
    """Whether OpenMeter drops an event in silence after its 2xx: one of 1970 or before."""
    time = event.get("time")
    return isinstance(time, str) and time[:4] <= _LAST_LOST_YEAR


def _shape(media_type: str) -> str:
    return "object" if media_type == SINGLE else "array"
