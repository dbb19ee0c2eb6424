"""From a finished request to its CloudEvents, as bytes ready to send. Pure: no PDK, no queue, no thread.

Fields and types follow the vendor's catalogue of event fields; what a request does not have is left out. The same
request always gives the same ids, so that an event that is sent twice counts once.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import orjson

from kong_metering.ai import ai_usages
from kong_metering.reasons import Skipped
from kong_metering.record import Record, Request, integer, legible, mapping, milliseconds, readable, text
from kong_metering.subject import ResolvedSubject, place_of, resolve_subject

if TYPE_CHECKING:
    from kong_metering.clock import Clock
    from kong_metering.config import PluginConfig
    from kong_metering.request import FinishedRequest

API_REQUEST = "kong.api_request"
LLM_REQUEST = "kong.llm_request"
_PORTAL_FIELDS = (
    "api_id",
    "api_package_id",
    "api_product_version_id",
    "application_id",
    "control_plane_id",
    "portal_id",
)
EVENT_FIELDS = {
    API_REQUEST: frozenset(
        {
            *_PORTAL_FIELDS,
            "client_ip",
            "request_host",
            "request_method",
            "request_size_bytes",
            "request_uri",
            "request_user_agent",
            "response_http_status",
            "response_size_bytes",
            "route_id",
            "route_name",
            "service_id",
            "service_name",
            "service_port",
            "service_protocol",
            "subject_type",
            "upstream_status",
        }
    ),
    LLM_REQUEST: frozenset(
        {
            *_PORTAL_FIELDS,
            "ai_plugin_id",
            "ai_plugin_name",
            "api_request_id",
            "cache_status",
            "http_status",
            "model",
            "provider",
            "route_id",
            "service_id",
            "subject_type",
            "tokens",
            "type",
        }
    ),
}
_ONE_TRY = {str(status): status for status in range(100, 600)}
_DEFAULT_SOURCE = "kong-gateway"
_MAX_TIMESTAMP_MS = 253_402_300_799_999  # the last millisecond of the year 9999


class Meter:
    """Turns finished requests into events, by one plugin configuration.

    `meters_api_requests`: whether each request that gives events gives one for itself, the first of them;
    `meters_anything`: whether any request can give an event.
    """

    def __init__(self, config: PluginConfig, clock: Clock) -> None:
        self.meters_api_requests = config.meter_api_requests
        self.meters_anything = config.meter_api_requests or config.meter_ai_token_usage
        self._config = config
        self._clock = clock
        self._ranges = [_range(item) for item in config.allow_status_codes or ()]
        self._attributes = config.attributes or []

    @property
    def header_names(self) -> tuple[str, ...]:
        """The request headers that events need; the access phase reads them before another plugin can change them."""
        names = [item.look_up_value_in for item in self._attributes if item.source == "header"]
        subject = self._config.subject
        if subject.look_up_value_in == "header" and subject.field:
            names.insert(0, subject.field)
        return tuple(dict.fromkeys(names)) if self.meters_anything else ()

    @property
    def reserved_attributes(self) -> dict[str, list[str]]:
        """The configured attributes that can have no place in some type of event, and in which."""
        names = {item.event_property_name for item in self._attributes}
        reserved = {name: [kind for kind, own in EVENT_FIELDS.items() if name in own] for name in sorted(names)}
        return {name: kinds for name, kinds in reserved.items() if kinds}

    @property
    def subject_place(self) -> str:
        """What a request without a subject does not have, in words."""
        return place_of(self._config.subject)

    def events(self, request: FinishedRequest) -> list[bytes] | Skipped:
        """Build the events of a request, or tell why there are none."""
        if not self._status_allowed(request.record):
            return Skipped.STATUS_NOT_ALLOWED
        request_id = request.record.request.id or str(uuid.uuid4())
        due = self._due(request.record, request_id)
        if not due:
            return []
        subject = resolve_subject(self._config.subject, request)
        if subject is None:
            return Skipped.NO_SUBJECT
        envelope = _Envelope(request_id, request.record, subject, self._clock)
        attributes = self._attribute_values(request) if self._attributes else {}
        return [envelope.around(event_type, kind, attributes, data) for event_type, kind, data in due]

    def _due(self, record: Record, request_id: str) -> list[tuple[str, str, dict[str, Any]]]:
        """List type, kind and data of each event that the request is to give."""
        due = []
        if self._config.meter_api_requests:
            due.append((API_REQUEST, "api_request", api_request_data(record)))
        if self._config.meter_ai_token_usage and record.ai is not None:
            usage = llm_request_data(record, request_id)
            due += [(LLM_REQUEST, f"llm_request:{name}", data) for name, data in usage]
        return due

    def _status_allowed(self, record: Record) -> bool:
        if not self._ranges:
            return True
        status = record.response.status
        return status is not None and any(first <= status <= last for first, last in self._ranges)

    def _attribute_values(self, request: FinishedRequest) -> dict[str, str]:
        values = {}
        for attribute in self._attributes:
            read = request.header if attribute.source == "header" else request.argument
            value = read(attribute.look_up_value_in)
            if value is not None:
                values[attribute.event_property_name] = legible(value)
        return values


def api_request_data(record: Record) -> dict[str, Any]:
    """Collect the data fields of a `kong.api_request` event, those that the record has."""
    request, response, route, service = record.request, record.response, record.route, record.service
    fields = {
        "client_ip": record.client_ip,
        "request_host": request_host(request),
        "request_method": request.method,
        "request_size_bytes": request.size,
        "request_uri": _path(request.uri),
        "request_user_agent": _first_text(request.headers.get("user-agent")),
        "response_http_status": response.status,
        "response_size_bytes": response.size,
        "route_id": route.id,
        "route_name": route.name,
        "service_id": service.id,
        "service_name": service.name,
        "service_port": service.port,
        "service_protocol": service.protocol,
        "upstream_status": last_upstream_status(record.upstream_status),
    }
    return {name: value for name, value in fields.items() if value is not None} if None in fields.values() else fields


def llm_request_data(record: Record, request_id: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the data of the `kong.llm_request` events of a request, each with a name that tells them apart.

    Each AI plugin that counted tokens gives one for the prompt and one for the completion.
    """
    usages = ai_usages(record)
    if not usages:
        return
    common = {
        "api_request_id": request_id,
        "http_status": record.response.status,
        "route_id": record.route.id,
        "service_id": record.service.id,
    }
    for usage in usages:
        plugin = {
            "ai_plugin_id": usage.plugin_id,
            "ai_plugin_name": usage.plugin_name,
            "cache_status": usage.cache_status,
            "provider": usage.provider,
        }
        for kind, tokens, model in (
            ("request", usage.prompt_tokens, usage.request_model),
            ("response", usage.completion_tokens, usage.response_model),
        ):
            if tokens is not None:
                fields = {**common, **plugin, "type": kind, "tokens": tokens, "model": model}
                yield f"{usage.plugin_name}:{kind}", {key: item for key, item in fields.items() if item is not None}


def portal_data(record: Record) -> dict[str, Any]:
    """Collect the Dev Portal's fields: from the record itself or from `application` in it.

    No Kong that we know of puts them there by itself (`docs/events.md` tells where we looked); an operator can, with
    `kong.log.set_serialize_value("application.id", ...)`.
    """
    own = [getattr(record, name) for name in _PORTAL_FIELDS]
    if record.application is None and not any(own):
        return {}
    application = mapping(record.application)
    values = {name: text(value) or text(application.get(name)) for name, value in zip(_PORTAL_FIELDS, own, strict=True)}
    values["application_id"] = values["application_id"] or text(application.get("id"))
    return {name: value for name, value in values.items() if value is not None}


def request_host(request: Request) -> str | None:
    """Give the host that was asked for, without its port.

    Kong builds `request.url` from nginx's own idea of the host, which also knows the absolute form of a request target
    and requests without a Host header; an IPv6 address keeps its brackets.
    """
    url = request.url
    if url is not None and "://" in url:
        authority = url.partition("://")[2].partition("/")[0].partition("?")[0]
    else:
        authority = _first_text(request.headers.get("host")) or ""
    host, colon, port = authority.rpartition(":")
    return (host if colon and port.isdigit() else authority) or None


def last_upstream_status(value: object) -> int | None:
    """Give the status of the last try: nginx lists every try, as in `502, 502 : 200`."""
    if isinstance(value, str):
        if value in _ONE_TRY:
            return _ONE_TRY[value]
        value = value.replace(":", ",").rpartition(",")[2].strip()
    return integer(value)


def source_of(record: Record) -> str:
    """Name the event's source: the service's name, else its id, else the gateway."""
    return _uri_reference(record.service.name or record.service.id or _DEFAULT_SOURCE)


@lru_cache(maxsize=1024)
def _uri_reference(name: str) -> str:
    """Make a name a valid CloudEvents `source`; of what Kong allows in names, only non-ASCII letters change."""
    return quote(readable(name), safe="-._~!$&'()*+,;=@/")


class _Envelope:
    """What all events of one request have in common."""

    def __init__(self, request_id: str, record: Record, subject: ResolvedSubject, clock: Clock) -> None:
        self._request_id = request_id
        self._source = source_of(record)
        self._subject = subject
        self._time = _rfc3339(record.started_at, clock)
        self._portal = portal_data(record)

    def around(self, event_type: str, kind: str, attributes: Mapping[str, str], data: dict[str, Any]) -> bytes:
        """Build one event; `kind` tells the events of a request apart in their ids.

        An attribute never takes the name of a field of ours, present or not: its value is the client's to choose, and
        bills are made of these fields.
        """
        data["subject_type"] = self._subject.type
        if self._portal:
            data = {**self._portal, **data}
        if attributes:
            own = EVENT_FIELDS[event_type]
            data = {**{name: value for name, value in attributes.items() if name not in own}, **data}
        event = {
            "specversion": "1.0",
            "id": f"{self._request_id}:{kind}",
            "source": self._source,
            "type": event_type,
            "subject": self._subject.value,
            "time": self._time,
            "data": data,
        }
        try:
            written = orjson.dumps(event)
        except TypeError:  # somewhere a string has bytes that are not UTF-8
            written = orjson.dumps(_readable_throughout(event))
        # What orjson gives holds 8 KB of memory, however short it is; the event may wait for long.
        return bytes(memoryview(written))


def _readable_throughout(value: Any) -> Any:
    if isinstance(value, str):
        return readable(value)
    if isinstance(value, Mapping):
        return {readable(key): _readable_throughout(item) for key, item in value.items()}
    return value


def _rfc3339(started_at_ms: object, clock: Clock) -> str:
    started_at = milliseconds(started_at_ms)
    if started_at is None or started_at > _MAX_TIMESTAMP_MS:
        started_at = int(clock.wall() * 1000)
    seconds, rest = divmod(started_at, 1000)
    return f"{_second(seconds)}.{rest:03d}Z"


@lru_cache(maxsize=64)
def _second(seconds: int) -> str:
    """Write a whole second since 1970; many requests come in one, and writing it is a tenth of building an event."""
    return f"{datetime.fromtimestamp(seconds, timezone.utc):%Y-%m-%dT%H:%M:%S}"


def _range(item: str) -> tuple[int, int]:
    first, last = item.split("-")
    return int(first), int(last)


def _path(uri: str | None) -> str | None:
    return None if uri is None else uri.partition("#")[0].partition("?")[0] or None


def _first_text(value: object) -> str | None:
    if isinstance(value, list):
        return next((item for item in value if text(item)), None)
    return text(value)
