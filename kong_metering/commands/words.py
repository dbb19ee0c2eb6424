"""Numbers, times and foreign text in words, for people and for JSON. Pure.

Contract: what stands in an event, an endpoint's answer or a file name is shown with every control, invisible or
undecodable character escaped, so that nobody who sends events can write to the terminal of the one who looks at them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

import orjson

from kong_metering.log import printable
from kong_metering.plurals import counted
from kong_metering.urls import without_credentials

if TYPE_CHECKING:
    from kong_metering.spool.identity import QueueIdentity

_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
_LAST_MS = 253_402_300_799_999
_AGES = ((86_400, "d"), (3600, "h"), (60, "min"))
_AT_LEAST_OF_A_UNIT = 2
_NO_LIMIT = 1 << 40


@dataclass(frozen=True)
class EventSummary:
    """What tells an event from others; an attribute that is not there, or is no text, is empty."""

    id: str = ""
    subject: str = ""
    type: str = ""


def summary_of(event: bytes) -> EventSummary:
    """Read what an event says of itself, whatever its bytes are."""
    try:
        members = orjson.loads(event)
    except ValueError:
        return EventSummary()
    if not isinstance(members, dict):
        return EventSummary()
    return EventSummary(*(text if isinstance(text := members.get(name), str) else "" for name in _SUMMARY))


_SUMMARY = ("id", "subject", "type")


def pretty(event: bytes) -> str:
    """Lay an event out in lines for people; as it is, if it is no JSON."""
    try:
        text = json.dumps(json.loads(event), indent=2, ensure_ascii=False)
    except (ValueError, RecursionError):
        return shown(event.decode("utf-8", "backslashreplace"))
    return "\n".join(shown(line) for line in text.split("\n"))


def one_line(event: bytes) -> str:
    """Make an event fit for a terminal: the same JSON, with what must not get there escaped as JSON does it."""
    text = event.decode("utf-8", "backslashreplace")
    return "".join(char if char.isprintable() else json.dumps(char)[1:-1].replace("\x7f", "\\u007f") for char in text)


def shown(text: str, limit: int = _NO_LIMIT) -> str:
    """Make foreign text fit for a terminal."""
    return printable(text, limit)


def events(count: int) -> str:
    """Tell a number of events."""
    return counted(count, "event")


def waiting(count: int) -> str:
    """Tell a number of events that wait."""
    return counted(count, "waiting event")


def letters(count: int) -> str:
    """Tell a number of dead letters."""
    return counted(count, "dead letter")


def files(count: int) -> str:
    """Tell a number of damaged files."""
    return counted(count, "damaged file")


def process(pid: int) -> str:
    """Name a process that holds a log; 0 is one that does not tell its id."""
    return f"process {pid}" if pid else "a process that does not tell its id"


def of_them_were(count: int) -> str:
    """Tell how many of them were something."""
    return counted(count, "of them was", "of them were")


def plugin(identity: QueueIdentity) -> str:
    """Name the plugin entity of a queue, its id included: mostly its name has that in it."""
    return shown(
        identity.name if identity.entity_id in identity.name else f"{identity.name} {identity.entity_id}".strip()
    )


def queue(identity: QueueIdentity) -> str:
    """Name a queue in full."""
    return f"{plugin(identity)} at {shown(without_credentials(identity.endpoint))}"


def size(count: int) -> str:
    """Tell a number of bytes, such as `9.1 MB`."""
    amount = float(count)
    for unit in ("B", "KB", "MB", "GB"):
        if amount < 1000:  # noqa: PLR2004 - where the next unit starts
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} TB"


def age(seconds: float) -> str:
    """Tell a length of time in its largest unit, such as `3 h`; what is ahead of the clock has no age."""
    for unit, name in _AGES:
        if seconds >= _AT_LEAST_OF_A_UNIT * unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{max(0.0, seconds):.0f} s"


def moment(time_ms: int) -> str:
    """Tell a time for people, in UTC; 0 is a time that nobody knows."""
    return f"{_datetime(time_ms):%Y-%m-%d %H:%M:%SZ}" if time_ms else "unknown"


def timestamp(time_ms: int | None) -> str | None:
    """Tell a time for programs, as RFC 3339 in UTC."""
    return _datetime(time_ms).isoformat(timespec="milliseconds").replace("+00:00", "Z") if time_ms else None


def _datetime(time_ms: int) -> datetime:
    return _EPOCH + timedelta(milliseconds=max(0, min(time_ms, _LAST_MS)))


def queue_members(identity: QueueIdentity | None) -> dict[str, str | None]:
    """Name a queue for programs; None is one of which nobody knows whose it is."""
    return {
        "plugin_id": identity.entity_id if identity else None,
        "plugin_name": identity.name if identity else None,
        "endpoint": without_credentials(identity.endpoint) if identity else None,
    }


def json_line(members: dict[str, Any]) -> str:
    """Make one line of JSON, all of it in printable ASCII."""
    return json.dumps(members).replace("\x7f", "\\u007f")


def json_document(members: dict[str, Any]) -> str:
    """Make a JSON document that people can read as well."""
    return json.dumps(members, indent=2).replace("\x7f", "\\u007f")
