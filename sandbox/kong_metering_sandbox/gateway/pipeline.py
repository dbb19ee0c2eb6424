"""The phases of a request: routing, access, forwarding, response, log."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING

from .context import LuaError, PluginExit, Reply, Saved
from .errorpages import error_message, error_page, refusal
from .forward import NameResolutionError, drop_connection_headers, forward, local_try, service_target
from .headers import Headers
from .outbound import UpstreamError, UpstreamResponse
from .record import build_record, response_table
from .wire import CLIENT_CLOSED, BodyError

if TYPE_CHECKING:
    from collections.abc import Coroutine, Mapping
    from typing import Any

    from .context import Exchange, Target
    from .downstream import ClientReader, Downstream
    from .errlog import ErrorLog
    from .external import ExternalPlugin
    from .iterator import PluginsIterator
    from .outbound import Upstreams
    from .plugins.base import BundledPlugin, Identities
    from .router import Router
    from .values import Table


@dataclass(frozen=True)
class Site:
    """The configuration that all workers share: routes and who may call."""

    router: Router
    identities: Identities


class Background:
    """Tasks that outlive the request that started them: the log phases."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Run something in the background."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def finish(self, within: float) -> None:
        """Wait until everything has ended, at most so many seconds."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=within)


class LogTimers:
    """One worker's log phases, each in a timer: no more than `limit` run at once, and what comes then is dropped."""

    def __init__(self, limit: int, background: Background, error_log: ErrorLog) -> None:
        self._limit = limit
        self._background = background
        self._error_log = error_log
        self._running = 0

    def start(self, external: ExternalPlugin, saved: Saved, config: Table) -> None:
        """Run a log phase in the background, if not too many run."""
        if self._running >= self._limit:
            self._error_log.write("alert", f"{self._limit} lua_max_running_timers are not enough")
            external.drop_log(saved)
            return
        self._running += 1
        self._background.start(self._run(external, saved, config))

    async def _run(self, external: ExternalPlugin, saved: Saved, config: Table) -> None:
        try:
            await external.log(saved, config)
        finally:
            self._running -= 1


@dataclass
class Worker:
    """One nginx worker: its own plugin instances, connections and timers, its own view of the plugins."""

    externals: Mapping[str, ExternalPlugin]
    timers: LogTimers
    iterator: PluginsIterator


@dataclass(frozen=True)
class Machinery:
    """What every request needs and no configuration changes."""

    bundled: Mapping[str, BundledPlugin]
    upstreams: Upstreams
    background: Background
    error_log: ErrorLog


class ClientGoneError(Exception):
    """The client closed the connection before there was a response."""


class Pipeline:
    """Runs requests for one worker, under one configuration."""

    def __init__(self, site: Site, worker: Worker, machinery: Machinery) -> None:
        self._site = site
        self._worker = worker
        self._machinery = machinery

    async def run(self, exchange: Exchange, downstream: Downstream, reader: ClientReader) -> None:
        """Answer a request and start its log phases; the connection may break on the way."""
        try:
            reply = await self._respond(exchange, downstream, reader)
            if reply is not None:
                if not exchange.proxied:
                    exchange.latencies.kong = exchange.elapsed_ms()
                await downstream.reply(reply)
        except ClientGoneError:
            exchange.status = CLIENT_CLOSED
            downstream.keep_alive = False
        except (ConnectionError, UpstreamError):
            downstream.keep_alive = False
        self._start_log_phases(exchange)

    async def _respond(self, exchange: Exchange, downstream: Downstream, reader: ClientReader) -> Reply | None:
        """Return the gateway's own answer, or None when the service's has been passed on."""
        try:
            reply = await self._own_reply(exchange)
            if reply is not None or exchange.target is None:
                return reply
            drop_connection_headers(exchange.headers)
            await exchange.ensure_body()
        except BodyError as error:
            downstream.keep_alive = False
            return self._fail(exchange, error.status)
        return await self._proxy(exchange, exchange.target, downstream, reader)

    def _fail(self, exchange: Exchange, status: int) -> Reply:
        exchange.unexpected = True
        return error_page(exchange, status)

    async def _own_reply(self, exchange: Exchange) -> Reply | None:
        """Run routing and access; return the answer when the request goes no further."""
        if exchange.head.error:
            exchange.ran = list(self._worker.iterator.global_only())
            return self._fail(exchange, exchange.head.error)
        head = exchange.head
        match = self._site.router.match(exchange.method, head.host, exchange.server_port, head.path)
        if match is None:
            exchange.exited = True
            exchange.ran = list(self._worker.iterator.global_only())
            return refusal(exchange, HTTPStatus.NOT_FOUND, "no Route matched with those values")
        exchange.match = match
        if "http" not in match.route["protocols"]:
            return self._needs_https(exchange, match.route)
        exchange.target = service_target(match, head.headers.get(b"host") or head.host)
        exchange.upstream_uri = match.upstream_path
        exchange.tries = []
        reply = await self._access(exchange)
        if reply is None and exchange.target is None:
            exchange.exited = True
            return refusal(exchange, HTTPStatus.SERVICE_UNAVAILABLE, "no Service found with those values")
        return reply

    def _needs_https(self, exchange: Exchange, route: Table) -> Reply:
        exchange.exited = True
        exchange.ran = list(self._worker.iterator.global_only())
        status = route["https_redirect_status_code"]
        if status == HTTPStatus.UPGRADE_REQUIRED:
            headers = {"Connection": "Upgrade", "Upgrade": "TLS/1.2, HTTP/1.1"}
            return refusal(exchange, status, "Please use HTTPS protocol", headers)
        location = b"https://" + exchange.head.host + exchange.head.target
        return Reply(status, b"", ((b"Location", location),))

    async def _access(self, exchange: Exchange) -> Reply | None:
        """Run the access phases in order of priority, until a plugin answers; collect who will log."""
        reply: Reply | None = None
        iterator = self._worker.iterator
        for name in iterator.names:
            scope = (exchange.route_id, exchange.service_id, exchange.consumer_id)
            config = iterator.find(name, *scope)
            if config is None:
                continue
            exchange.ran.append((name, config))
            if reply is None:
                reply = await self._run_access(name, config, exchange)
        return reply

    async def _run_access(self, name: str, config: Table, exchange: Exchange) -> Reply | None:
        external = self._worker.externals.get(name)
        try:
            if external is None:
                await self._machinery.bundled[name].access(exchange, config, self._site.identities)
            elif "access" in external.info.phases:
                await external.access(exchange, config)
        except PluginExit as answer:
            exchange.exited = True
            return answer.reply
        except LuaError as error:
            self._machinery.error_log.error(f"init.lua: {error}")
            exchange.unexpected = True
            status = HTTPStatus.INTERNAL_SERVER_ERROR
            return refusal(exchange, status, error_message(status))
        return None

    async def _proxy(
        self, exchange: Exchange, target: Target, downstream: Downstream, reader: ClientReader
    ) -> Reply | None:
        own_body = exchange.observer.respond() if exchange.observer else None
        try:
            if own_body is None:
                response = await _unless_gone(forward(exchange, target, self._machinery.upstreams), reader)
            else:
                local_try(exchange, target)
                response = UpstreamResponse(HTTPStatus.OK, b"OK", Headers(own_body.headers), own_body.pieces)
        except NameResolutionError:
            exchange.exited = True
            return refusal(exchange, HTTPStatus.SERVICE_UNAVAILABLE, "name resolution failed")
        except UpstreamError as error:
            exchange.proxied = True
            return self._fail(exchange, error.status)
        exchange.proxied = True
        await self._pass_on(exchange, response, downstream)
        return None

    async def _pass_on(self, exchange: Exchange, response: UpstreamResponse, downstream: Downstream) -> None:
        observer = exchange.observer
        started = exchange.elapsed_ms()
        await downstream.proxy_head(response)
        if observer is not None:
            observer.see_head(exchange)
        async for piece in response.body:
            if observer is not None:
                observer.see_piece(piece)
            await downstream.piece(piece)
        await downstream.end()
        exchange.latencies.receive = exchange.elapsed_ms() - started
        if observer is not None:
            observer.finish(exchange)

    def _start_log_phases(self, exchange: Exchange) -> None:
        """Save what the log phases need and run them in the background, each on its own."""
        externals = self._worker.externals
        loggers = [(externals[name], config) for name, config in exchange.ran if name in externals]
        loggers = [(external, config) for external, config in loggers if "log" in external.info.phases]
        # Kong asks its present iterator first: once the last plugin is gone, nothing logs what began before (3.9.3).
        if not loggers or not self._worker.iterator.names:
            return
        try:
            record = build_record(exchange)
        except LuaError as error:
            self._machinery.error_log.error(f"log.lua: {error}")
            return
        saved = Saved(
            exchange,
            record,
            exchange.headers.table(),
            response_table(exchange.response_headers),
            exchange.status,
        )
        for external, config in loggers:
            self._worker.timers.start(external, saved, config)


async def _unless_gone(work: Coroutine[Any, Any, UpstreamResponse], reader: ClientReader) -> UpstreamResponse:
    """Wait for the service's response, but no longer than the client does."""
    response = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(reader.gone.wait())
    try:
        await asyncio.wait((response, gone), return_when=asyncio.FIRST_COMPLETED)
        if response.done():
            return response.result()
        raise ClientGoneError
    finally:
        for task in (response, gone):
            task.cancel()
