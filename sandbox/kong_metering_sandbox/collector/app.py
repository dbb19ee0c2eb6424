"""The collector's HTTP side: ingest paths, questions about what arrived, and the switches for tests."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final, TypeVar

import orjson
from aiohttp import web
from pydantic import TypeAdapter, ValidationError

from kong_metering_sandbox.collector.connections import ConnectionNames, reset, send_head_only, send_interim
from kong_metering_sandbox.collector.faults import FaultRule, FaultTable
from kong_metering_sandbox.collector.ingest import Body, endpoints
from kong_metering_sandbox.collector.listing import Listing
from kong_metering_sandbox.collector.records import IngestRequest
from kong_metering_sandbox.collector.tokens import Tokens, fingerprint

if TYPE_CHECKING:
    from kong_metering_sandbox.collector.dialects import Answer
    from kong_metering_sandbox.collector.ingest import Endpoint
    from kong_metering_sandbox.collector.store import EventStore

T = TypeVar("T")

_MAX_PAGE: Final = 10_000
_RULES: Final = TypeAdapter(list[FaultRule])
_TOKENS: Final = TypeAdapter(list[str])


class Ingest:
    """Answers ingest requests, well or as badly as the fault rules ask."""

    def __init__(self, store: EventStore, faults: FaultTable) -> None:
        self._store = store
        self._faults = faults
        self._endpoints = endpoints()
        self._connections = ConnectionNames()
        self._stopping = asyncio.Event()

    def routes(self) -> list[web.RouteDef]:
        """Return the ingest paths."""
        return [web.post(path, self.handle) for path in self._endpoints]

    async def stop(self, _app: web.Application) -> None:
        """End all delays, so that nothing holds up the server's end."""
        self._stopping.set()

    async def handle(self, request: web.Request) -> web.Response:
        """Answer one request. What it stores is committed before the client hears anything."""
        received_at = time.time()
        rule = self._faults.take_unread()
        if rule is not None:
            self._store.record(self._entry(request, received_at, None, None), (), None)
            return await self._finish(request, rule, None)
        body = Body.parse(await request.read())
        return await self._decide(request, received_at, body, self._endpoints[request.path])

    async def _decide(self, request: web.Request, received_at: float, body: Body, endpoint: Endpoint) -> web.Response:
        authorization = request.headers.get("Authorization")
        authorized = self._store.tokens.accept(authorization)
        verdict = endpoint.judge(request.headers.get("Content-Type"), body, authorized=authorized)
        rule = self._faults.take(body, verdict.answer)
        answer = None if rule.silent else rule.answer(body, verdict.answer, endpoint.dialect)
        events = rule.spared(verdict.events) if rule.stores(answer or verdict.answer) else ()
        number = None if body.error is not None else len(body.items)
        status = None if answer is None else answer.status
        entry = self._entry(request, received_at, number, status)
        self._store.record(entry, events, fingerprint(authorization))
        return await self._finish(request, rule, answer)

    async def _finish(self, request: web.Request, rule: FaultRule, answer: Answer | None) -> web.Response:
        await self._hold(rule.delay + (rule.hang or 0))
        for status in rule.interim:
            await self._hold(rule.interim_pause)
            send_interim(request.transport, status)
        await self._hold(rule.interim_pause if rule.interim else 0)
        if answer is not None and rule.reset is None:
            return web.Response(status=answer.status, headers=answer.headers, body=answer.body or None)
        if answer is not None:
            send_head_only(request.transport, answer)
        reset(request.transport)
        return web.Response()  # aiohttp wants one; there is no connection left to send it on

    async def _hold(self, seconds: float) -> None:
        if seconds > 0:
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), seconds)

    def _entry(self, request: web.Request, received_at: float, events: int | None, status: int | None) -> IngestRequest:
        return IngestRequest(
            received_at=received_at,
            path=request.path,
            content_type=request.headers.get("Content-Type"),
            events=events,
            status=status,
            connection=self._connections.name(request.transport),
        )


class Control:
    """Answers questions about what arrived, and takes the settings that tests change."""

    def __init__(self, store: EventStore, faults: FaultTable) -> None:
        self._store = store
        self._faults = faults

    def routes(self) -> list[web.RouteDef]:
        """Return the paths that are not OpenMeter's. They ask for no token."""
        return [
            web.get("/events", self.events),
            web.delete("/events", self.reset),
            web.get("/usage", self.usage),
            web.get("/stats", self.stats),
            web.get("/requests", self.requests),
            web.get("/faults", self.rules),
            web.post("/faults", self.replace_rules),
            web.delete("/faults", self.remove_rules),
            web.put("/tokens", self.replace_tokens),
        ]

    async def events(self, request: web.Request) -> web.Response:
        """``?subject= &type= &source= &limit= &after=``: events in order of arrival, after a sequence number."""
        query = request.query
        found = self._store.events(
            subject=query.get("subject"),
            type=query.get("type"),
            source=query.get("source"),
            after=_number(request, "after", 0),
            limit=min(_number(request, "limit", 100), _MAX_PAGE),
        )
        return _json({"events": found})

    async def reset(self, _request: web.Request) -> web.Response:
        """Forget events, requests and totals; faults and tokens stay."""
        self._store.reset()
        return web.Response(status=204)

    async def usage(self, request: web.Request) -> web.Response:
        """``?type=``: events and tokens of each subject."""
        return _json({"usage": self._store.usage(request.query.get("type"))})

    async def stats(self, _request: web.Request) -> web.Response:
        """Totals."""
        return _json(self._store.stats())

    async def requests(self, request: web.Request) -> web.Response:
        """``?limit=``: the newest ingest requests, in order of arrival."""
        limit = min(_number(request, "limit", 1_000), _MAX_PAGE)
        return _json({"requests": self._store.requests(limit)})

    async def rules(self, _request: web.Request) -> web.Response:
        """Show the fault rules in force, with the number of times that each has left."""
        return _json({"faults": [rule.model_dump(exclude_unset=True) for rule in self._faults.rules]})

    async def replace_rules(self, request: web.Request) -> web.Response:
        """Replace the fault rules by a JSON list."""
        rules = _parse(_RULES, await request.read())
        self._faults.replace(rules)
        return web.Response(status=204)

    async def remove_rules(self, _request: web.Request) -> web.Response:
        """Remove all fault rules."""
        self._faults.replace(())
        return web.Response(status=204)

    async def replace_tokens(self, request: web.Request) -> web.Response:
        """Replace the accepted tokens by a JSON list of texts; an empty one lets everyone in."""
        tokens = _parse(_TOKENS, await request.read())
        self._store.tokens = Tokens.of(tokens)
        return web.Response(status=204)


def make_app(store: EventStore) -> web.Application:
    """Put the collector's parts together over an open store, which the caller closes."""
    faults = FaultTable()
    ingest = Ingest(store, faults)
    # OpenMeter sets no limit to a body; a limit is a fault rule here.
    app = web.Application(client_max_size=0)
    app.add_routes([*ingest.routes(), *Listing(store).routes(), *Control(store, faults).routes()])
    app.on_shutdown.append(ingest.stop)
    return app


def _json(value: object) -> web.Response:
    return web.Response(body=orjson.dumps(value), content_type="application/json")


def _number(request: web.Request, name: str, default: int) -> int:
    text = request.query.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit()):
        raise web.HTTPBadRequest(text=f"{name} is {text!r}: give a number that is not negative")
    return int(text)


def _parse(adapter: TypeAdapter[T], raw: bytes) -> T:
    try:
        return adapter.validate_json(raw)
    except ValidationError as error:
        # Without the input, which may be a token.
        objections = [(".".join(map(str, found["loc"])), found["msg"]) for found in error.errors()]
        text = "; ".join(f"{place}: {message}" for place, message in objections)
        raise web.HTTPBadRequest(text=text) from error
