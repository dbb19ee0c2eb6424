"""Decides what an ingest request deserves. Pure: header values and bytes in, a verdict out."""

from __future__ import annotations

from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING

import orjson

from kong_metering_sandbox.collector.dialects import BATCH, SINGLE, V1, V3, Answer
from kong_metering_sandbox.collector.validation import EventValidator

if TYPE_CHECKING:
    from kong_metering_sandbox.collector.dialects import Dialect


@dataclass(frozen=True)
class Body:
    """A request's body, read once for all who look at it: ``error`` says why it is not JSON, None when it is."""

    document: object
    size: int
    error: str | None = None

    @classmethod
    def parse(cls, raw: bytes) -> Body:
        """Read JSON; whatever is not JSON, compressed bodies among it, becomes a body with an error."""
        try:
            return cls(orjson.loads(raw), len(raw))
        except orjson.JSONDecodeError as error:
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
        if problems:
            return Verdict(self.dialect.invalid(problems))
        events = tuple(item for item in body.items if isinstance(item, dict))
        return Verdict(Answer(self.dialect.accepted_status), events)

    def _refuse(self, status: int, detail: str) -> Verdict:
        return Verdict(self.dialect.refusal(status, detail))

    def _refuse_body(self, detail: str) -> Verdict:
        return self._refuse(HTTPStatus.BAD_REQUEST, f"request body has an error: {detail}")


def endpoints() -> dict[str, Endpoint]:
    """Make the endpoints of every ingest path: OpenMeter's v1 and v3, and v3 where Konnect has it."""
    v1 = Endpoint(V1(), EventValidator("openmeter-ingest-v1.openapi.yaml", "Event"))
    v3 = Endpoint(V3(), EventValidator("openmeter-ingest-v3.openapi.yaml", "MeteringEvent"))
    return {"/api/v1/events": v1, "/api/v3/openmeter/events": v3, "/v3/openmeter/events": v3}


def _shape(media_type: str) -> str:
    return "object" if media_type == SINGLE else "array"
