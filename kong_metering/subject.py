"""Who pays: from a request and the configuration to the subject of its events. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from kong_metering.log import printable
from kong_metering.record import legible, mapping, subject_text

if TYPE_CHECKING:
    from kong_metering.config import Subject
    from kong_metering.request import FinishedRequest


class ResolvedSubject(NamedTuple):
    """The subject of a request's events; `type` tells what kind of identifier it is, such as consumer_id."""

    value: str
    type: str


def resolve_subject(settings: Subject, request: FinishedRequest) -> ResolvedSubject | None:
    """Find the subject of a request; None when it has none, or a blank one."""
    look_up, field = settings.look_up_value_in, settings.field
    if look_up == "header":
        return _resolved(request.header(field or ""), "header")
    if look_up == "query":
        return _resolved(request.argument(field or ""), "query")
    entity = mapping(request.record.consumer if look_up == "consumer" else request.record.application)
    if field is not None:
        return _resolved(_scalar(entity.get(field)), f"{look_up}_{field}")
    identifier = _scalar(entity.get("id"))
    prefix = "consumer" if look_up == "consumer" else "app"
    return _resolved(f"{prefix}:{identifier}" if identifier else None, f"{look_up}_id")


def place_of(settings: Subject) -> str:
    """Tell in words where the subject is looked for."""
    look_up, field = settings.look_up_value_in, printable(settings.field or "")
    if look_up == "header":
        return f"no header {field} that is not blank"
    if look_up == "query":
        return f"no query argument {field} that is not blank"
    what = f"authenticated {look_up}" if look_up == "consumer" else f"{look_up} in Kong's log record"
    return f"no {what} with a field {field}" if field else f"no {what}"


def _resolved(value: str | None, kind: str) -> ResolvedSubject | None:
    subject = subject_text(value) if value else None
    return ResolvedSubject(legible(subject), kind) if subject else None


def _scalar(value: object) -> str | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return value if isinstance(value, str) else None
