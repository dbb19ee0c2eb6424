"""OpenMeter's API for what is stored, as it belongs to an ingest URL: which questions can be asked, and how. Pure.

What it takes and answers was measured: v3 takes a filter of 1,024 bytes and 50 items, v2 a list of 100 ids, v1 one id,
which it looks for anywhere in the stored ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any
from urllib.parse import quote, urlencode, urlsplit, urlunsplit

PAGE = 100
_MAX_FILTER_BYTES = 1024
_MAX_ITEMS = 50
_V1_PATH, _V2_PATH = "/api/v1/events", "/api/v2/events"
_V3_PATH, _V3_CUSTOMERS = "/openmeter/events", "/openmeter/customers"
_NO_CUSTOMER = "no customer found for event subject"


class Version(Enum):
    """Which of its APIs lists events."""

    V1 = 1
    V2 = 2
    V3 = 3


@dataclass(frozen=True)
class Stored:
    """An event as it is stored; `faults` are OpenMeter's own words why no meter will count it.

    `is_unassigned`: its subject is no customer's.
    """

    id: str
    subject: str
    is_unassigned: bool = False
    faults: tuple[str, ...] = ()


@dataclass(frozen=True)
class Page:
    """A page of a list; `cursor` asks for the next one, None at the end."""

    events: tuple[Stored, ...]
    cursor: str | None = None


@dataclass(frozen=True)
class EventsApi:
    """The API that lists events of one endpoint."""

    url: str
    version: Version

    @classmethod
    def of(cls, ingest_url: str) -> EventsApi | None:
        """Return the API that belongs to an ingest URL; None when the URL is none of OpenMeter's."""
        parts = urlsplit(ingest_url)
        path = parts.path.rstrip("/")
        if path.endswith(_V3_PATH):
            return cls(urlunsplit((parts.scheme, parts.netloc, path, "", "")), Version.V3)
        if path.endswith(_V1_PATH):
            path = path.removesuffix(_V1_PATH) + _V2_PATH
            return cls(urlunsplit((parts.scheme, parts.netloc, path, "", "")), Version.V2)
        return None

    @property
    def older(self) -> EventsApi | None:
        """The API to ask where there is none of this version; None where nothing is left."""
        if self.version is not Version.V2:
            return None
        return EventsApi(self.url.removesuffix(_V2_PATH) + _V1_PATH, Version.V1)

    def questions(self, ids: Sequence[str]) -> Iterator[list[str]]:
        """Cut ids up into questions that can be asked at once; an id that can never be asked for is in none."""
        if self.version is Version.V3:
            yield from _filters(ids)
            return
        most = 1 if self.version is Version.V1 else PAGE
        for start in range(0, len(ids), most):
            yield list(ids[start : start + most])

    def page_url(self, ids: Sequence[str], cursor: str | None = None) -> str:
        """Return the URL of a page of the answer to one question."""
        if self.version is Version.V3:
            query = {"filter[id][oeq]": ",".join(ids), "page[size]": str(PAGE)}
            return _url(self.url, query | ({"page[after]": cursor} if cursor else {}))
        if self.version is Version.V2:
            query = {"limit": str(PAGE), "filter": json.dumps({"id": {"$in": list(ids)}}, separators=(",", ":"))}
            return _url(self.url, query | ({"cursor": cursor} if cursor else {}))
        return _url(self.url, {"id": ids[0], "limit": str(PAGE)})

    def page(self, document: Any) -> Page:
        """Read a page. Raises `ValueError` for what is none."""
        try:
            if self.version is Version.V3:
                return Page(tuple(map(_stored_v3, document["data"])), document["meta"]["page"].get("next"))
            items = document["items"] if self.version is Version.V2 else document
            cursor = document.get("nextCursor") if self.version is Version.V2 else None
            return Page(tuple(map(_stored_v2, items)), cursor)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError("the answer is no list of events") from error


@dataclass(frozen=True)
class CustomersApi:
    """The v3 API of customers beside an ingest URL."""

    url: str

    @classmethod
    def of(cls, ingest_url: str) -> CustomersApi | None:
        """Return the API that belongs to an ingest URL; None when the URL is none of OpenMeter's."""
        parts = urlsplit(ingest_url)
        path = parts.path.rstrip("/")
        if path.endswith(_V3_PATH):
            path = path.removesuffix(_V3_PATH) + _V3_CUSTOMERS
        elif path.endswith(_V1_PATH):
            path = f"{path.removesuffix(_V1_PATH)}/api/v3{_V3_CUSTOMERS}"
        else:
            return None
        return cls(urlunsplit((parts.scheme, parts.netloc, path, "", "")))

    def questions(self, subjects: Sequence[str]) -> Iterator[list[str]]:
        """Cut subjects up into questions that can be asked at once; one that can never be asked for is in none."""
        yield from _filters(subjects)
        yield from ([subject] for subject in subjects if not _is_listable(subject) and _fits(subject))

    def page_url(self, subjects: Sequence[str], number: int, *, by_key: bool) -> str:
        """Return the URL of a page of the customers whose key, or one of whose subjects, is one of these."""
        name = "key" if by_key else "usage_attribution_subject_key"
        operator = "oeq" if len(subjects) > 1 else "eq"
        value = ",".join(subjects)
        query = {f"filter[{name}][{operator}]": value, "page[size]": str(PAGE), "page[number]": str(number)}
        return _url(self.url, query)

    def subjects(self, document: Any) -> list[list[str]]:
        """Read a page: for each customer what is attributed to it. Raises `ValueError` for what is no page."""
        try:
            return [
                [customer["key"], *(customer.get("usage_attribution") or {}).get("subject_keys", ())]
                for customer in document["data"]
            ]
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError("the answer is no list of customers") from error


def customer_of(subject: str) -> dict[str, Any]:
    """Return the customer to be made for a subject."""
    # A key is unique, and has 256 characters at most; a subject is attributed whatever its length.
    key = subject if len(subject) <= _MAX_KEY else f"{subject[: _MAX_KEY - 33]}-{_digest(subject)}"
    return {"name": subject[:_MAX_KEY], "key": key, "usage_attribution": {"subject_keys": [subject]}}


_MAX_KEY = 256


def _digest(text: str) -> str:
    import hashlib  # noqa: PLC0415 - seldom needed

    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _fits(value: str) -> bool:
    return 0 < len(value.encode("utf-8", "surrogatepass")) <= _MAX_FILTER_BYTES and "\0" not in value


def _is_listable(value: str) -> bool:
    """Return whether it can stand in a list divided by commas, around which blanks do not count."""
    return "," not in value and value == value.strip()


def _filters(values: Sequence[str]) -> Iterator[list[str]]:
    """Line values up for filters that take many, divided by commas."""
    one: list[str] = []
    size = 0
    for value in values:
        if not (_is_listable(value) and _fits(value)):
            continue
        length = len(value.encode("utf-8", "surrogatepass"))
        if one and (size + 1 + length > _MAX_FILTER_BYTES or len(one) == _MAX_ITEMS):
            yield one
            one, size = [], 0
        one.append(value)
        size += length + (1 if size else 0)
    if one:
        yield one


def _url(url: str, query: Mapping[str, str]) -> str:
    return f"{url}?{urlencode(query, quote_via=quote, errors='surrogatepass')}"


def _stored_v3(item: Mapping[str, Any]) -> Stored:
    event = item["event"]
    errors = [str(error["message"]) for error in item.get("validation_errors") or ()]
    faults = tuple(error for error in errors if not error.startswith(_NO_CUSTOMER))
    return Stored(event["id"], event["subject"], len(faults) < len(errors), faults)


def _stored_v2(item: Mapping[str, Any]) -> Stored:
    event = item["event"]
    text = item.get("validationError") or ""
    # All errors are one text, a line each. Subjects and values, which they name, may have lines of their own.
    last = f"{_NO_CUSTOMER}: {event['subject']}"
    is_unassigned = not item.get("customerId") and text.endswith(last)
    if is_unassigned:
        text = text.removesuffix(last)
    return Stored(event["id"], event["subject"], is_unassigned, tuple(filter(None, text.split("\n"))))
