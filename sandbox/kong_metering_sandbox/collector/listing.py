"""What OpenMeter answers to those who read back: lists of events (v1, v2, v3), and customers (v3).

Limits, pages and failures are those that were measured with a real one. Events are sorted by when they came, the newest
first. Which event types have a meter, how long an event takes until it can be read, and whether reading works at all
are settings for tests (`Reading`); by default each type has a meter, and events can be read at once.
"""

from __future__ import annotations

import base64
import time
from datetime import datetime, timezone
from http import HTTPStatus
from typing import TYPE_CHECKING, Annotated, Final

import orjson
from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from kong_metering_sandbox.collector.dialects import V1, V3

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from kong_metering_sandbox.collector.dialects import Dialect
    from kong_metering_sandbox.collector.records import Customer, StoredEvent
    from kong_metering_sandbox.collector.store import EventStore

_MAX_FILTER_BYTES: Final = 1024
_MAX_FILTER_ITEMS: Final = 50
_MAX_PAGE: Final = 100
_DEFAULT_PAGE: Final = 20
_MAX_CUSTOMERS: Final = 1000
_V3_EVENTS: Final = ("/api/v3/openmeter/events", "/v3/openmeter/events")
_V3_CUSTOMERS: Final = ("/api/v3/openmeter/customers", "/v3/openmeter/customers")


class Reading(BaseModel):
    """How reading back behaves.

    ``delay``: seconds until an event can be read. ``is_down``: every list is a 500, as while Postgres is down.
    ``meters``: the event types that have one; None: all. ``versions``: those of the API that are there.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    delay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0
    is_down: bool = False
    meters: list[str] | None = None
    versions: list[str] = ["v1", "v2", "v3"]


class Attribution(BaseModel):
    """The subjects of a customer."""

    model_config = ConfigDict(extra="forbid")

    subject_keys: list[Annotated[str, Field(min_length=1)]]


class NewCustomer(BaseModel):
    """A customer to be made."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(min_length=1, max_length=256)]
    key: Annotated[str, Field(min_length=1, max_length=256)]
    usage_attribution: Attribution = Attribution(subject_keys=[])
    # What is taken, and not told again.
    description: Annotated[str, Field(max_length=1024)] = ""
    labels: dict[str, str] = {}
    primary_email: str = ""
    currency: str = ""
    billing_address: dict[str, str] = {}


_NEW_CUSTOMER: Final = TypeAdapter(NewCustomer)
_READING: Final = TypeAdapter(Reading)


class RefusalError(Exception):
    """A question that is not answered."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status


class Listing:
    """Answers those who read."""

    def __init__(self, store: EventStore) -> None:
        self._store = store
        self._reading = Reading()

    def routes(self) -> list[web.RouteDef]:
        """Return the paths of OpenMeter's that read, those of its customers, and the switch for tests."""
        return [
            web.get("/api/v1/events", self._answering(V1(), "v1", self._v1_events)),
            web.get("/api/v2/events", self._answering(V1(), "v2", self._v2_events)),
            *(web.get(path, self._answering(V3(), "v3", self._v3_events)) for path in _V3_EVENTS),
            *(web.get(path, self._answering(V3(), "v3", self._customers)) for path in _V3_CUSTOMERS),
            *(web.post(path, self.create_customer) for path in _V3_CUSTOMERS),
            web.put("/reading", self.replace_reading),
        ]

    async def replace_reading(self, request: web.Request) -> web.Response:
        """Change how reading back behaves."""
        self._reading = _READING.validate_json(await request.read())
        return web.Response(status=204)

    async def create_customer(self, request: web.Request) -> web.Response:
        """Make a customer; 409 when its key, or one of its subjects, is another one's."""
        dialect = V3()
        try:
            self._check(request, "v3")
            new = _NEW_CUSTOMER.validate_json(await request.read())
            _check_names([new.key, *new.usage_attribution.subject_keys])
            made = self._store.add_customer(new.name, new.key, new.usage_attribution.subject_keys)
        except ValidationError as error:
            return _refused(dialect, HTTPStatus.BAD_REQUEST, str(error.errors()[0]["msg"]))
        except RefusalError as refusal:
            return _refused(dialect, refusal.status, str(refusal))
        if made is None:
            return _refused(dialect, HTTPStatus.CONFLICT, "customer with this key or subject exists")
        return web.json_response(_customer(made), status=HTTPStatus.CREATED)

    def _answering(
        self, dialect: Dialect, version: str, answer: Callable[[Mapping[str, str]], object]
    ) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def handle(request: web.Request) -> web.StreamResponse:
            try:
                self._check(request, version)
                return web.Response(body=orjson.dumps(answer(request.query)), content_type="application/json")
            except RefusalError as refusal:
                return _refused(dialect, refusal.status, str(refusal))

        return handle

    def _check(self, request: web.Request, version: str) -> None:
        if version not in self._reading.versions:
            raise RefusalError(HTTPStatus.NOT_FOUND, "not found")
        if not self._store.tokens.accept(request.headers.get("Authorization")):
            raise RefusalError(HTTPStatus.UNAUTHORIZED, "Invalid credentials")
        if self._reading.is_down:
            raise RefusalError(HTTPStatus.INTERNAL_SERVER_ERROR, "Internal Server Error")

    # -- events -------------------------------------------------------------------------------------------------------

    def _v3_events(self, query: Mapping[str, str]) -> object:
        size = _number(query.get("page[size]"), _DEFAULT_PAGE, _MAX_PAGE, "page[size]")
        events = self._found(
            size,
            query.get("page[after]"),
            ids=_values(query, "id"),
            subjects=_values(query, "subject"),
            types=_values(query, "type"),
        )
        cursor = _cursor(events[-1]) if len(events) == size else None
        return {
            "data": [self._v3_event(event) for event in events],
            "meta": {"page": {"size": size, "next": cursor, "previous": None}},
        }

    def _v2_events(self, query: Mapping[str, str]) -> object:
        limit = _number(query.get("limit"), _MAX_PAGE, _MAX_PAGE, "limit")
        try:
            wanted = orjson.loads(query.get("filter", "{}")).get("id", {})
            ids = [str(each) for each in wanted["$in"]] if "$in" in wanted else None
        except (ValueError, AttributeError, TypeError, KeyError):
            raise RefusalError(HTTPStatus.BAD_REQUEST, "invalid filter") from None
        events = self._found(limit, query.get("cursor"), ids=ids)
        cursor = {"nextCursor": _cursor(events[-1])} if len(events) == limit else {}
        return {"items": [self._v2_event(event) for event in events], **cursor}

    def _v1_events(self, query: Mapping[str, str]) -> object:
        limit = _number(query.get("limit"), _MAX_PAGE, _MAX_PAGE, "limit")
        return [self._v2_event(event) for event in self._found(limit, None, id_part=query.get("id"))]

    def _found(  # noqa: PLR0913 - the filters of a list
        self,
        limit: int,
        cursor: str | None,
        *,
        ids: list[str] | None = None,
        id_part: str | None = None,
        subjects: list[str] | None = None,
        types: list[str] | None = None,
    ) -> list[StoredEvent]:
        until = time.time() - self._reading.delay
        events = self._store.newest(
            limit, _before(cursor), until, ids=ids, id_part=id_part, subjects=subjects, types=types
        )
        if any("\0" in event.subject for event in events):
            # Looking for its customer fails in Postgres, which takes no such text.
            raise RefusalError(HTTPStatus.INTERNAL_SERVER_ERROR, "Internal Server Error")
        return events

    def _v3_event(self, event: StoredEvent) -> dict[str, object]:
        customer = self._store.customer_of(event.subject)
        errors = self._errors(event, customer)
        item: dict[str, object] = {"event": _cloud_event(event), **_times(event, "ingested_at", "stored_at")}
        if customer is not None:
            item["customer"] = {"id": customer.id}
        if errors:
            item["validation_errors"] = [{"code": "validation_error", "message": error} for error in errors]
        return item

    def _v2_event(self, event: StoredEvent) -> dict[str, object]:
        customer = self._store.customer_of(event.subject)
        errors = self._errors(event, customer)
        item: dict[str, object] = {"event": _cloud_event(event), **_times(event, "ingestedAt", "storedAt")}
        if customer is not None:
            item["customerId"] = customer.id
        if errors:
            item["validationError"] = "\n".join(errors)
        return item

    def _errors(self, event: StoredEvent, customer: Customer | None) -> list[str]:
        meters = self._reading.meters
        no_meter = meters is not None and event.type not in meters
        errors = [f"no meter found for event type: {event.type}"] if no_meter else []
        return errors + ([] if customer else [f"no customer found for event subject: {event.subject}"])

    # -- customers ----------------------------------------------------------------------------------------------------

    def _customers(self, query: Mapping[str, str]) -> object:
        size = _number(query.get("page[size]"), _DEFAULT_PAGE, _MAX_CUSTOMERS, "page[size]")
        number = _number(query.get("page[number]"), 1, 1 << 31, "page[number]")
        keys, subjects = _values(query, "key"), _values(query, "usage_attribution_subject_key")
        found = [
            customer
            for customer in self._store.customers()
            if (keys is None or customer.key in keys)
            and (subjects is None or not set(subjects).isdisjoint(customer.subjects))
        ]
        page = found[(number - 1) * size : number * size]
        meta = {"page": {"number": number, "size": size, "total": len(found)}}
        return {"data": [_customer(each) for each in page], "meta": meta}


def _check_names(names: list[str]) -> None:
    if any("\0" in name for name in names):
        raise RefusalError(HTTPStatus.INTERNAL_SERVER_ERROR, "failed to create customer")


def _values(query: Mapping[str, str], field: str) -> list[str] | None:
    """Read a filter; None when there is none. Raises `RefusalError` for one that is too long."""
    for operator in ("[eq]", "[oeq]", ""):
        value = query.get(f"filter[{field}]{operator}")
        if value is None:
            continue
        items = value.split(",") if operator == "[oeq]" else [value]
        if len(value.encode()) > _MAX_FILTER_BYTES:
            raise RefusalError(HTTPStatus.BAD_REQUEST, f"filter[{field}]{operator}: value too long (max 1024)")
        if len(items) > _MAX_FILTER_ITEMS:
            raise RefusalError(
                HTTPStatus.BAD_REQUEST, f"filter[{field}]{operator}: too many comma-separated items (max 50)"
            )
        return [item.strip() for item in items] if operator == "[oeq]" else items
    return None


def _number(text: str | None, default: int, most: int, name: str) -> int:
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= most):
        raise RefusalError(HTTPStatus.BAD_REQUEST, f"{name} must be between 1 and {most}")
    return int(text)


def _cursor(event: StoredEvent) -> str:
    return base64.urlsafe_b64encode(str(event.seq).encode()).decode()


def _before(cursor: str | None) -> int:
    try:
        return int(base64.urlsafe_b64decode(cursor)) if cursor else 1 << 62
    except ValueError:
        raise RefusalError(HTTPStatus.BAD_REQUEST, "invalid cursor") from None


def _cloud_event(event: StoredEvent) -> dict[str, object]:
    return {
        "specversion": "1.0",
        "id": event.id,
        "source": event.source,
        "type": event.type,
        "subject": event.subject,
        "time": event.time,
        "data": event.data,
    }


def _times(event: StoredEvent, ingested: str, stored: str) -> dict[str, object]:
    at = datetime.fromtimestamp(event.received_at, timezone.utc).isoformat().replace("+00:00", "Z")
    return {ingested: at, stored: at}


def _customer(customer: Customer) -> dict[str, object]:
    return {
        "id": customer.id,
        "key": customer.key,
        "name": customer.name,
        "usage_attribution": {"subject_keys": customer.subjects},
    }


def _refused(dialect: Dialect, status: int, detail: str) -> web.Response:
    answer = dialect.refusal(status, detail)
    return web.Response(status=answer.status, headers=answer.headers, body=answer.body)
