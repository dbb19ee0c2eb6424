"""What is valid in the queue of a plugin, and in what it meters for whom, and surely not meant. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from kong_metering.commands.check.entities import nearest
from kong_metering.commands.check.findings import Level
from kong_metering.events import EVENT_FIELDS

if TYPE_CHECKING:
    from kong_metering.commands.check.findings import Finding
    from kong_metering.commands.check.view import Settings

_CONSUMER_FIELDS = ("id", "username", "custom_id")
_SECRET_HEADERS = ("authorization", "proxy-authorization", "cookie", "apikey", "x-api-key", "api-key")
# Kong has nginx keep underscores; what else is in a name makes it an invalid one, which nginx ignores by default.
_KEPT_HEADER = re.compile(r"[A-Za-z0-9_-]+")
_DROPPED = "nginx, and so Kong, drops headers of such names, unless ignore_invalid_headers is off"
_RENAME = "choose a name of letters, digits, - and _ alone"
_RANGE = re.compile(r"([0-9]{3})-[0-9]{3}")
_STATUSES = range(100, 600)
_LARGE_BATCH = 10_000
_FEW_BYTES = 10_000


def queue(settings: Settings) -> Iterator[Finding]:
    """Look at the queue."""
    size, entries = settings.number("queue", "max_batch_size"), settings.number("queue", "max_entries")
    yield from _batches(settings, size)
    if size is not None and entries is not None and entries < size:
        problem, remedy = "no batch can be full: fewer events may wait in memory", "make it max_batch_size at least"
        yield settings.find(Level.WARNING, "small-queue", ("queue", "max_entries"), problem, remedy)
    limit = settings.number("queue", "max_bytes")
    if limit is not None and limit < _FEW_BYTES:
        problem = f"{limit:,.0f} bytes hold a few events only"
        yield settings.find(Level.WARNING, "small-queue", ("queue", "max_bytes"), problem, "leave it out: no limit")
    first, longest = settings.number("queue", "initial_retry_delay"), settings.number("queue", "max_retry_delay")
    if first is not None and longest is not None and first > longest:
        problem = "the first pause between two tries is longer than the longest, max_retry_delay"
        remedy = "make it the smaller one of the two"
        yield settings.find(Level.WARNING, "retry-delays", ("queue", "initial_retry_delay"), problem, remedy)


def _batches(settings: Settings, size: float | None) -> Iterator[Finding]:
    if settings.number("queue", "concurrency_limit") == -1:
        yield settings.find(
            Level.WARNING,
            "no-batches",
            ("queue", "concurrency_limit"),
            "each event leaves alone, in a request of its own: under heavy traffic that is too many for most endpoints",
            "leave it at 1, and set max_batch_size to 100 or more",
        )
    elif size == 1:
        yield settings.find(
            Level.NOTE,
            "no-batches",
            ("queue", "max_batch_size"),
            "events leave alone, and up to --adaptive-batch (100) together while more come",
            "for more than about 1,000 requests/s set it to 100 to 1,000, unless the endpoint takes no arrays",
        )
    elif size is not None and size > _LARGE_BATCH:
        yield settings.find(
            Level.WARNING,
            "large-batches",
            ("queue", "max_batch_size"),
            f"a request with {size:,.0f} events has several megabytes: what stands before an endpoint often takes 1 MB",
            "1,000 are enough for any traffic",
        )


def what(settings: Settings) -> Iterator[Finding]:
    """Look at what is metered."""
    if settings.value("meter_api_requests") is False and settings.value("meter_ai_token_usage") is False:
        yield settings.find(
            Level.WARNING,
            "meters-nothing",
            ("meter_api_requests",),
            "with meter_api_requests and meter_ai_token_usage both off it meters nothing",
            "set one of them to true, or remove the plugin",
        )
    codes = settings.value("allow_status_codes")
    for index, item in enumerate(codes if isinstance(codes, list) else ()):
        match = _RANGE.fullmatch(item) if isinstance(item, str) else None
        if match and int(match[1]) not in _STATUSES:
            problem, remedy = "no answer has such a status", "statuses are from 100 to 599"
            yield settings.find(Level.WARNING, "no-such-status", ("allow_status_codes", index), problem, remedy)


def subject(settings: Settings) -> Iterator[Finding]:
    """Look at who is billed."""
    place, field = settings.value("subject", "look_up_value_in"), settings.text("subject", "field")
    if place == "consumer" and field is not None and field not in _CONSUMER_FIELDS:
        near = nearest(field, _CONSUMER_FIELDS)
        default = (
            "" if settings.has("subject", "look_up_value_in") else "without look_up_value_in it is the consumer's, and "
        )
        yield settings.find(
            Level.ERROR,
            "consumer-field",
            ("subject", "field"),
            f"{default}a consumer has no such field, so no request has a subject, and nothing is billed; "
            f"there are {', '.join(_CONSUMER_FIELDS)}",
            f"is it {near}?" if near else "for a header or a query argument set look_up_value_in: header, or query",
        )
    if place == "application":
        yield settings.find(
            Level.NOTE,
            "application",
            ("subject", "look_up_value_in"),
            "Kong by itself has no application in its log record, and then nothing is billed",
            "docs/events.md says how to put one there; to bill by API key, look up the consumer",
        )
    if place == "header" and field is not None and not _KEPT_HEADER.fullmatch(field):
        problem = f"{_DROPPED}: no request has a subject, and nothing is billed"
        yield settings.find(Level.WARNING, "dropped-header", ("subject", "field"), problem, _RENAME)
    if place == "header" and (level := _level_of_secret(field)) is not None:
        yield settings.find(
            level,
            "secret-as-subject",
            ("subject", "field"),
            "this header holds the client's own secret, which would be the subject on each event and invoice",
            "use an authentication plugin, and look_up_value_in: consumer",
        )


def _level_of_secret(header: str | None) -> Level | None:
    """Tell how bad it is to put a header into events; None if it holds no secret, as far as its name tells."""
    name = (header or "").strip().lower()
    if name not in _SECRET_HEADERS:
        return None
    return Level.ERROR if "authorization" in name else Level.WARNING


def attributes(settings: Settings) -> Iterator[Finding]:
    """Look at the attributes."""
    given = settings.value("attributes")
    seen: dict[str, int] = {}
    for index, attribute in enumerate(given if isinstance(given, list) else ()):
        yield from _source(settings, index)
        name = attribute.get("event_property_name") if isinstance(attribute, Mapping) else None
        if not isinstance(name, str):
            continue
        path = ("attributes", index, "event_property_name")
        if name in seen:
            problem = f"attributes[{seen[name]}] has the same name, and the later one wins"
            yield settings.find(Level.WARNING, "doubled-attribute", path, problem, "choose another name")
        seen[name] = index
        kinds = [kind for kind, own in EVENT_FIELDS.items() if name in own]
        if kinds:
            problem = f"it is a field of {' and '.join(kinds)} itself, and the attribute is left out there"
            yield settings.find(Level.WARNING, "reserved-attribute", path, problem, "choose another name")


def _source(settings: Settings, index: int) -> Iterator[Finding]:
    """Look at where an attribute comes from."""
    path = ("attributes", index, "look_up_value_in")
    header = settings.text(*path) if settings.value("attributes", index, "source") == "header" else None
    if header is not None and not _KEPT_HEADER.fullmatch(header):
        problem = f"{_DROPPED}: the attribute is never there"
        yield settings.find(Level.WARNING, "dropped-header", path, problem, _RENAME)
    if (level := _level_of_secret(header)) is not None:
        yield settings.find(
            level,
            "secret-as-attribute",
            path,
            "this header holds the client's own secret, which would be in each event, on disk and in OpenMeter",
            "take the attribute out; who the client is, an authentication plugin finds, for look_up_value_in: consumer",
        )
