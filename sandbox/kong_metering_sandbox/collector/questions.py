"""What those who list ask for: filters, pages and times, read and refused as OpenMeter does.

What OpenMeter knows and the stand-in does not is refused with 501, so that nothing is passed over in silence.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta, timezone
from http import HTTPStatus
from typing import Any, Final

import orjson

_MAX_FILTER_BYTES: Final = 1024
_MAX_FILTER_ITEMS: Final = 50
_OLDEST_V1: Final = timedelta(days=32)
_FILTER: Final = re.compile(r"filter\[([^\]]+)\](?:\[(.*)\])?")
_PAGE: Final = re.compile(r"page\[([^\]]*)\]")
_OPERATORS: Final = frozenset(
    ("eq", "neq", "gt", "gte", "lt", "lte", "contains", "oeq", "ocontains", "exists", "nexists")
)
_TIMES: Final = frozenset(("time", "ingested_at", "stored_at"))
EVENT_FIELDS: Final = frozenset(("id", "source", "subject", "type", "customer_id", *_TIMES))
CUSTOMER_FIELDS: Final = frozenset(
    ("key", "name", "primary_email", "usage_attribution_subject_key", "plan_key", "billing_profile_id")
)


class RefusalError(Exception):
    """A question that is not answered."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status


def v3_filters(query: Mapping[str, str], fields: frozenset[str]) -> dict[tuple[str, str], list[str]]:
    """Return the values of each filter by field and operator; raises `RefusalError` for what OpenMeter refuses."""
    found: dict[tuple[str, str], list[str]] = {}
    asked = {name: match for name in query if (match := _FILTER.fullmatch(name))}
    unknown = sorted({match[1] for match in asked.values()} - fields)
    if unknown:
        raise _bad(f"unknown filter field(s): {', '.join(unknown)}")
    for name, match in asked.items():
        field, operator, value = match[1], match[2] or "eq", query[name]
        if operator not in _OPERATORS:
            raise _bad(f"filter[{field}][{operator}]: unsupported operator")
        if len(value.encode()) > _MAX_FILTER_BYTES:
            raise _bad(f'filter parameter "{name}": value too long (max {_MAX_FILTER_BYTES} bytes)')
        items = [item.strip() for item in value.split(",") if item.strip()] if operator == "oeq" else [value]
        if len(items) > _MAX_FILTER_ITEMS:
            raise _bad(f"filter[{field}][{operator}]: too many comma-separated items (max {_MAX_FILTER_ITEMS})")
        if field in _TIMES:
            moment(value, f"filter[{field}][{operator}]: invalid datetime")
        if items:
            found[field, operator] = items
    return found


def check_page(query: Mapping[str, str], allowed: frozenset[str]) -> None:
    """Raise `RefusalError` for a way to turn pages that the list does not have."""
    for name in (match[1] for match in map(_PAGE.fullmatch, query) if match):
        if name == "before" and "after" in allowed:
            raise _bad("page[before]: backward pagination is not supported")
        if name not in allowed:
            raise _bad(f"page.{name} [format]: field [{name}] is not present in destination object")


def v2_filters(text: str | None) -> Iterator[tuple[str, list[str]]]:
    """Give field and values of each filter; OpenMeter passes over fields that it does not know."""
    try:
        document: Any = orjson.loads(text or "{}")
        asked = {name: dict(document[name]) for name in ("id", "source", "subject", "type") if name in document}
    except (ValueError, TypeError):
        raise _bad("invalid filter") from None
    if {"time", "ingestedAt", "customerId"} & set(document):
        raise _not_known(f"filter {text}")
    for name, operators in asked.items():
        if set(operators) - {"$in", "$eq"}:
            raise _not_known(f"filter {text}")
        yield name, [str(each) for each in operators.get("$in", [operators.get("$eq")])]


def v1_from(text: str | None, now: datetime) -> datetime:
    """Return from when on v1 lists: 32 days ago at most. Raises `RefusalError` for longer ago."""
    oldest = now - _OLDEST_V1
    if text is None:
        return oldest
    start = moment(text, "from: invalid datetime")
    if start < oldest:
        raise _bad(f"validation error: validate input: from date is too old: {text}, must be after {oldest:%FT%TZ}")
    return start


def moment(text: str, refusal: str) -> datetime:
    """Read a time; raises `RefusalError` with these words for what is none."""
    try:
        read = datetime.fromisoformat(re.sub(r"[zZ]$", "+00:00", text))
    except ValueError:
        raise _bad(refusal) from None
    return read if read.tzinfo else read.replace(tzinfo=timezone.utc)


def number(text: str | None, default: int, most: int | None, name: str) -> int:
    """Read a number of a page, or of its items. Raises `RefusalError` for one that is out of bounds."""
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and int(text) >= 1 and (most is None or int(text) <= most)):
        raise _bad(f"{name}: must be between 1 and {most}" if most else f"{name}: must be greater than 0")
    return int(text)


def only(filters: Mapping[tuple[str, str], list[str]], *known: tuple[str, str]) -> None:
    """Raise `RefusalError` for a filter that the stand-in does not have."""
    for field, operator in set(filters) - set(known):
        raise _not_known(f"filter[{field}][{operator}]")


def _bad(detail: str) -> RefusalError:
    return RefusalError(HTTPStatus.BAD_REQUEST, detail)


def _not_known(what: str) -> RefusalError:
    return RefusalError(HTTPStatus.NOT_IMPLEMENTED, f"the stand-in for OpenMeter does not know {what}")
