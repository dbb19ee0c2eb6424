"""What differs between the two versions of the ingest API: content types, statuses, and the words of refusals."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING, Final, Protocol

import orjson

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kong_metering_sandbox.collector.validation import Problem

SINGLE: Final = "application/cloudevents+json"
BATCH: Final = "application/cloudevents-batch+json"
EITHER: Final = "application/json"
MEDIA_TYPES: Final = frozenset({SINGLE, BATCH, EITHER})
_PHRASES: Final = {int(status): status.phrase for status in HTTPStatus}


@dataclass(frozen=True)
class Answer:
    """An HTTP answer that has not been sent."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""

    @property
    def reason(self) -> str:
        """The reason phrase of the status line."""
        return reason(self.status)

    @property
    def accepted(self) -> bool:
        """Whether the sender may forget its events."""
        return HTTPStatus.OK <= self.status < HTTPStatus.MULTIPLE_CHOICES


class Dialect(Protocol):
    """One version of the API."""

    @property
    def accepted_status(self) -> int:
        """The status of an accepted batch."""

    def media_type(self, header: str | None) -> str | None:
        """Return the media type that a Content-Type header names, None when the API does not take it."""

    def refusal(self, status: int, detail: str) -> Answer:
        """Make an error answer that points at nothing in the body."""

    def invalid(self, problems: Sequence[Problem]) -> Answer:
        """Make the 400 that points at what is wrong in the body. There is at least one problem."""


@dataclass(frozen=True)
class V1:
    """OpenMeter's ``/api/v1/events``."""

    accepted_status: int = HTTPStatus.NO_CONTENT

    def media_type(self, header: str | None) -> str | None:
        """Compare the whole header, parameters included, as OpenMeter does."""
        return header if header in MEDIA_TYPES else None

    def refusal(self, status: int, detail: str) -> Answer:
        """Make a problem document as RFC 7807 describes it."""
        document = {
            "type": "about:blank",
            "title": reason(status),
            "status": status,
            "detail": detail,
            "instance": f"urn:request:local/{uuid.uuid4()}",
        }
        return _problem_answer(status, document)

    def invalid(self, problems: Sequence[Problem]) -> Answer:
        """Name the first problem only: OpenMeter's validator stops there."""
        first = problems[0]
        pointer = "".join(f"/{step}" for step in first.location())
        detail = f'request body has an error: doesn\'t match schema: Error at "{pointer}": {first.reason}'
        return self.refusal(HTTPStatus.BAD_REQUEST, detail)


@dataclass(frozen=True)
class V3:
    """OpenMeter's and Konnect's ``/v3/openmeter/events``."""

    accepted_status: int = HTTPStatus.ACCEPTED

    def media_type(self, header: str | None) -> str | None:
        """Compare the media type without its parameters."""
        name = (header or "").partition(";")[0].strip().lower()
        return name if name in MEDIA_TYPES else None

    def refusal(self, status: int, detail: str) -> Answer:
        """Make Konnect's error document. A 400's list may not be empty, so it then blames the body as a whole."""
        document = self._document(status, detail)
        if status == HTTPStatus.BAD_REQUEST:
            document["invalid_parameters"] = [{"field": "body", "rule": "invalid", "reason": detail, "source": "body"}]
        return _problem_answer(status, document)

    def invalid(self, problems: Sequence[Problem]) -> Answer:
        """List every problem."""
        document = self._document(HTTPStatus.BAD_REQUEST, "The request body is invalid")
        document["invalid_parameters"] = [_invalid_parameter(problem) for problem in problems]
        return _problem_answer(HTTPStatus.BAD_REQUEST, document)

    def _document(self, status: int, detail: str) -> dict[str, object]:
        return {
            "status": status,
            "title": reason(status),
            "instance": f"kong:trace:{uuid.uuid4().int >> 64}",
            "detail": detail,
        }


def _invalid_parameter(problem: Problem) -> dict[str, object]:
    parameter: dict[str, object] = {
        "field": ".".join(problem.location()) or "body",
        "rule": problem.rule,
        "reason": problem.reason,
        "source": "body",
    }
    if problem.minimum is not None:
        parameter["minimum"] = problem.minimum
    if problem.choices:
        parameter["choices"] = list(problem.choices)
    return parameter


def reason(status: int) -> str:
    """Return the reason phrase of a status, also of one that no standard names."""
    return _PHRASES.get(status, "Error")


def _problem_answer(status: int, document: Mapping[str, object]) -> Answer:
    return Answer(status, {"Content-Type": "application/problem+json"}, orjson.dumps(document))
