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

from kong_metering_sandbox.collector import questions
from kong_metering_sandbox.collector.dialects import V1, V3
from kong_metering_sandbox.collector.questions import RefusalError
from kong_metering_sandbox.collector.store import Narrowed

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from kong_metering_sandbox.collector.dialects import Dialect
    from kong_metering_sandbox.collector.records import Customer, StoredEvent
    from kong_metering_sandbox.collector.store import EventStore

_MAX_PAGE: Final = 100
_DEFAULT_PAGE: Final = 20
_V3_EVENTS: Final = ("/api/v3/openmeter/events", "/v3/openmeter/events")
_V3_CUSTOMERS: Final = ("/api/v3/openmeter/customers", "/v3/openmeter/customers")
_EVENT_PAGE: Final = frozenset(("size", "after"))
_CUSTOMER_PAGE: Final = frozenset(("size", "number"))
_STRINGS: Final = ("eq", "oeq")


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
        questions.check_page(query, _EVENT_PAGE)
        size = questions.number(query.get("page[size]"), _DEFAULT_PAGE, _MAX_PAGE, "page[size]")
        asked = questions.v3_filters(query, questions.EVENT_FIELDS)
        strings = {field: _either(asked, field) for field in ("id", "subject", "type", "source")}
        since, before = (_seconds(asked.get(("time", operator))) for operator in ("gte", "lt"))
        questions.only(
            asked, ("time", "gte"), ("time", "lt"), *((field, operator) for field in strings for operator in _STRINGS)
        )
        narrowed = Narrowed(
            ids=strings["id"],
            subjects=strings["subject"],
            types=strings["type"],
            sources=strings["source"],
            since=since,
            before=before,
        )
        events = self._found(size, query.get("page[after]"), narrowed)
        page: dict[str, object] = {"size": size, "next": None, "previous": None}
        if events:
            page |= {"first": _cursor(events[0]), "last": _cursor(events[-1])}
        if len(events) == size:
            page["next"] = _cursor(events[-1])
        return {"data": [self._v3_event(event) for event in events], "meta": {"page": page}}

    def _v2_events(self, query: Mapping[str, str]) -> object:
        limit = questions.number(query.get("limit"), _MAX_PAGE, _MAX_PAGE, "limit")
        asked = dict(questions.v2_filters(query.get("filter")))
        narrowed = Narrowed(
            ids=asked.get("id"), subjects=asked.get("subject"), types=asked.get("type"), sources=asked.get("source")
        )
        events = self._found(limit, query.get("cursor"), narrowed)
        cursor = {"nextCursor": _cursor(events[-1])} if len(events) == limit else {}
        return {"items": [self._v2_event(event) for event in events], **cursor}

    def _v1_events(self, query: Mapping[str, str]) -> object:
        limit = questions.number(query.get("limit"), _MAX_PAGE, _MAX_PAGE, "limit")
        since = questions.v1_from(query.get("from"), datetime.now(timezone.utc))
        narrowed = Narrowed(id_pattern=_within(query.get("id")), since=int(since.timestamp()))
        return [self._v2_event(event) for event in self._found(limit, None, narrowed)]

    def _found(self, limit: int, cursor: str | None, narrowed: Narrowed) -> list[StoredEvent]:
        events = self._store.newest(limit, _before(cursor), time.time() - self._reading.delay, narrowed)
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
        questions.check_page(query, _CUSTOMER_PAGE)
        size = questions.number(query.get("page[size]"), _DEFAULT_PAGE, None, "page[size]")
        number = questions.number(query.get("page[number]"), 1, None, "page[number]")
        asked = questions.v3_filters(query, questions.CUSTOMER_FIELDS)
        fields = ("key", "usage_attribution_subject_key")
        keys, subjects = (_either(asked, field) for field in fields)
        questions.only(asked, *((field, operator) for field in fields for operator in _STRINGS))
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


def _either(asked: Mapping[tuple[str, str], list[str]], field: str) -> list[str] | None:
    """Return the values of a filter that names one or several; None when there is none."""
    return next((asked[field, operator] for operator in _STRINGS if (field, operator) in asked), None)


def _seconds(values: list[str] | None) -> int | None:
    return int(questions.moment(values[0], "invalid datetime").timestamp()) if values else None


def _within(part: str | None) -> str | None:
    return None if part is None else f"%{part}%"


def _cursor(event: StoredEvent) -> str:
    return base64.urlsafe_b64encode(str(event.seq).encode()).decode()


def _before(cursor: str | None) -> int:
    try:
        return int(base64.urlsafe_b64decode(cursor)) if cursor else 1 << 62
    except ValueError:
        raise RefusalError(HTTPStatus.BAD_REQUEST, "invalid cursor") from None


def _cloud_event(event: StoredEvent) -> dict[str, object]:
    made: dict[str, object] = {
        "specversion": "1.0",
        "id": event.id,
        "source": event.source,
        "type": event.type,
        "subject": event.subject,
        "time": event.time or _text(event.received_at),
    }
    if event.data is not None:
        made |= {"data": event.data, "datacontenttype": "application/json"}
    return made


def _times(event: StoredEvent, ingested: str, stored: str) -> dict[str, object]:
    at = _text(event.received_at)
    return {ingested: at, stored: at}


def _text(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat().replace("+00:00", "Z")


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
