"""Where the pieces meet: the gateway's life from start over reloads to stop."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import socket
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from aiohttp import web

from . import READY_FILE, declarative, typedefs
from .admin import AdminApi
from .connections import ConnectionPool
from .declarative import DeclarativeError
from .entities import Store
from .external import ExternalPlugin, PluginInfo, query_plugin
from .iterator import PluginsIterator, plugin_config
from .logphases import LogPhaseFile, NoLogPhases
from .outbound import Upstreams
from .pipeline import Background, LogTimers, Machinery, Pipeline, Site, Worker
from .plugins.ai_proxy import AiProxy
from .plugins.base import BundledPlugin, Identities
from .plugins.key_auth import KeyAuth
from .plugins.rate_limiting import RateLimiting
from .plugins.request_termination import RequestTermination
from .plugins.request_transformer import RequestTransformer
from .process import PluginServerProcess
from .router import Router
from .server import Lane, ProxyServer
from .settings import Address, Settings, SettingsError
from .values import without_nulls

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from .errlog import ErrorLog
    from .logphases import LogPhases
    from .values import Table

_DB_LESS_WORKSPACE = "0dc6f45b-8f8d-40d2-a504-473544ee190b"
_IN_FLIGHT_TIME = 5.0  # seconds that requests under way have when the gateway stops
_LOG_TIME = 5.0  # seconds that their log phases have after that
_BACKLOG = 16384


@dataclass
class Generation:
    """The workers between two reloads, with the plugin servers that were started with them."""

    settings: Settings
    infos: Mapping[str, PluginInfo]
    store: Store
    workers: list[Worker] = field(default_factory=list)
    processes: list[PluginServerProcess] = field(default_factory=list)
    site: Site = field(default_factory=lambda: Site(Router([], {}), Identities()))
    retired: bool = False

    @property
    def plugin_schemas(self) -> dict[str, Table]:
        """The definitions of the plugins that may be configured."""
        return _plugin_schemas(self.settings, self.infos)


def _plugin_schemas(settings: Settings, infos: Mapping[str, PluginInfo]) -> dict[str, Table]:
    schemas = {**typedefs.BUNDLED, **{name: info.schema for name, info in infos.items()}}
    return {name: schemas[name] for name in settings.plugins if name in schemas}


class Gateway:
    """The whole gateway; `load_settings` reads kong.conf again at each reload."""

    def __init__(self, load_settings: Callable[[], Settings], environment: Mapping[str, str], log: ErrorLog) -> None:
        self._load_settings = load_settings
        self._environment = environment
        self._log = log
        self._sequence = itertools.count(1)
        self._turn = itertools.count()
        bundled: dict[str, BundledPlugin] = {
            "key-auth": KeyAuth(),
            "rate-limiting": RateLimiting(),
            "request-transformer": RequestTransformer(),
            "request-termination": RequestTermination(),
            "ai-proxy": AiProxy(),
        }
        self._machinery = Machinery(bundled, Upstreams(), Background(), log)
        self._generation = Generation(load_settings(), {}, Store({}))
        path = self._generation.settings.log_phases
        self._log_phases: LogPhases = LogPhaseFile(path) if path else NoLogPhases()
        self._workspace = _DB_LESS_WORKSPACE if self.db_less else str(uuid.uuid4())
        self._listeners: list[socket.socket] = []
        self._proxy: ProxyServer | None = None
        self._admin: web.AppRunner | None = None
        self._lingering: set[asyncio.Task[None]] = set()

    @property
    def store(self) -> Store:
        """The entities."""
        return self._generation.store

    @property
    def db_less(self) -> bool:
        """Whether entities come from a declarative configuration only."""
        return self._generation.settings.db_less

    @property
    def environment(self) -> Mapping[str, str]:
        """Where vault references and the substitutions of declarative files come from."""
        return self._environment

    def plugins(self) -> dict[str, Table]:
        """Return version, priority and schema of each plugin that may be configured."""
        infos = self._generation.infos
        return {
            name: {
                "version": infos[name].version if name in infos else "3.9.1",
                "priority": self._priorities()[name],
                "schema": schema,
            }
            for name, schema in self._generation.plugin_schemas.items()
        }

    async def start(self) -> None:
        """Load everything, listen, start the plugin servers and write the ready file.

        Raises:
            SettingsError: a setting, a plugin server's dump or the declarative configuration is unusable.
            OSError: an address cannot be listened on.

        """
        generation = await self._new_generation(self._generation.settings)
        settings = generation.settings
        self._write_pid(settings)
        proxy = self._listen(settings.proxy_listen)
        admin = self._listen(settings.admin_listen)
        self._begin(generation)
        if proxy is not None:
            self._proxy = ProxyServer(proxy, settings.header_limits, self._next_lane)
            await self._proxy.start()
        if admin is not None:
            self._admin = web.AppRunner(AdminApi(self).application(), access_log=None)
            await self._admin.setup()
            await web.SockSite(self._admin, admin).start()
        _write_ready_file(settings, proxy, admin)

    async def reload(self) -> None:
        """Start over with new workers and plugin servers; the old ones linger. A bad configuration changes nothing."""
        old = self._generation
        try:
            generation = await self._new_generation(self._load_settings())
        except SettingsError as error:
            self._log.write("emerg", str(error))
            return
        self._begin(generation)
        old.retired = True
        if self._proxy is not None:
            self._proxy.close_idle()
        task = asyncio.create_task(self._end_later(old, generation.settings.reload_linger))
        self._lingering.add(task)
        task.add_done_callback(self._lingering.discard)

    async def stop(self) -> None:
        """Stop: no more connections, then the requests under way, their log phases, and the plugin servers."""
        generation = self._generation
        generation.retired = True
        if self._proxy is not None:
            await self._proxy.stop(_IN_FLIGHT_TIME)
        if self._admin is not None:
            await self._admin.cleanup()
        await self._machinery.background.finish(_LOG_TIME)
        for task in list(self._lingering):
            task.cancel()
        await asyncio.gather(*self._lingering, return_exceptions=True)
        await _end(generation)
        self._machinery.upstreams.close()
        for listener in self._listeners:
            listener.close()
        for name in (READY_FILE, "pids/nginx.pid"):
            with contextlib.suppress(FileNotFoundError):
                (generation.settings.prefix / name).unlink()

    def changed(self) -> None:
        """Make all workers use the entities as they are now; every plugin configuration gets a new sequence."""
        generation = self._generation
        store, schemas = generation.store, generation.plugin_schemas
        generation.site = self._site(store)

        def configure(entity: Table) -> Table:
            schema = schemas[entity["name"]]
            return plugin_config(entity, schema, self._workspace, self._environment)

        for worker in generation.workers:
            worker.iterator = PluginsIterator(store.all("plugins"), configure, self._priorities(), self._next_sequence)

    def load(self, content: Table) -> None:
        """Replace all entities by those of a declarative configuration.

        Raises:
            DeclarativeError: it is invalid.

        """
        self._generation.store = declarative.load(content, self._generation.plugin_schemas)
        self.changed()

    def _next_sequence(self) -> int:
        return next(self._sequence)

    def _priorities(self) -> dict[str, int]:
        bundled = {name: plugin.priority for name, plugin in self._machinery.bundled.items()}
        return {**bundled, **{name: info.priority for name, info in self._generation.infos.items()}}

    def _site(self, store: Store) -> Site:
        def entities(kind: str) -> list[Table]:
            return [without_nulls(entity) for entity in store.all(kind)]

        services = {one["id"]: {**one, "ws_id": self._workspace} for one in entities("services")}
        routes = [{**route, "ws_id": self._workspace} for route in entities("routes")]
        consumers = {consumer["id"]: consumer for consumer in entities("consumers")}
        credentials = {credential["key"]: credential for credential in entities("keyauth_credentials")}
        return Site(Router(routes, services), Identities(consumers, credentials))

    async def _new_generation(self, settings: Settings) -> Generation:
        infos = {info.name: info for info in [await query_plugin(one) for one in settings.pluginservers]}
        schemas = _plugin_schemas(settings, infos)
        for name in settings.plugins:
            if name not in schemas:
                raise SettingsError(f"{name} plugin is enabled but not installed")
        store = self._initial_store(settings, schemas)
        return Generation(settings, infos, store)

    def _initial_store(self, settings: Settings, schemas: Mapping[str, Table]) -> Store:
        """Return the entities to start with; what is in the database outlives a reload."""
        if not settings.db_less and self._generation.workers:
            return self._generation.store
        path = settings.declarative_config
        if path is None:
            return Store(schemas)
        try:
            content = declarative.parse(path.read_text(encoding="utf-8"), self._environment)
            return declarative.load(content, schemas)
        except OSError as error:
            raise SettingsError(f"error parsing declarative config file {path}:\n{error.strerror}") from error
        except DeclarativeError as error:
            text = declarative.explain(error.errors)
            raise SettingsError(f"error parsing declarative config file {path}:\n{text}") from error

    def _begin(self, generation: Generation) -> None:
        """Let the generation's workers take over, and start its plugin servers."""
        self._generation = generation
        generation.store.use_plugin_schemas(generation.plugin_schemas)
        empty = PluginsIterator([], dict, {}, self._next_sequence)
        for _ in range(generation.settings.workers):
            externals = {name: self._external(generation, info) for name, info in generation.infos.items()}
            timers = LogTimers(generation.settings.max_running_timers, self._machinery.background, self._log)
            generation.workers.append(Worker(externals, timers, empty))
        self.changed()
        inherited = [listener.fileno() for listener in self._listeners]
        for server in generation.settings.pluginservers:
            if server.start_cmd is not None:
                process = PluginServerProcess(server.name, server.start_cmd, self._log, inherited)
                process.start()
                generation.processes.append(process)

    def _external(self, generation: Generation, info: PluginInfo) -> ExternalPlugin:
        pool = ConnectionPool(info.server.socket, generation.settings.socket_pool_size)
        return ExternalPlugin(info, pool, self._log, self._log_phases, lambda name: _forget(generation, name))

    async def _end_later(self, generation: Generation, seconds: float) -> None:
        """Stop a generation's plugin servers after it has lingered, or at once when the gateway stops."""
        try:
            await asyncio.sleep(seconds)
        finally:
            await _end(generation)

    def _next_lane(self) -> Lane:
        generation = self._generation
        worker = generation.workers[next(self._turn) % len(generation.workers)]
        return Lane(
            pipeline=lambda: Pipeline(generation.site, worker, self._machinery),
            is_retired=lambda: generation.retired,
            workspace=self._workspace,
            tells_request_id=generation.settings.tells_request_id,
        )

    def _listen(self, address: Address | None) -> socket.socket | None:
        if address is None:
            return None
        family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        listener = socket.create_server((address.host, address.port), family=family, backlog=_BACKLOG)
        self._listeners.append(listener)
        return listener

    @staticmethod
    def _write_pid(settings: Settings) -> None:
        folder = settings.prefix / "pids"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "nginx.pid").write_text(f"{os.getpid()}\n", encoding="ascii")


def _forget(generation: Generation, plugin: str) -> None:
    """Make all workers forget a plugin's instances.

    Kong tells the workers by an event, the one with the trouble included. Where that event comes late (in 7 of 200
    times, with a server that answers in 0.1 ms), a real worker forgets the new instance, too, and starts a third one.
    """
    for worker in generation.workers:
        worker.externals[plugin].forget_instances()


async def _end(generation: Generation) -> None:
    await asyncio.gather(*(process.stop() for process in generation.processes))
    for worker in generation.workers:
        for external in worker.externals.values():
            external.close()


def _url(listener: socket.socket | None) -> str | None:
    if listener is None:
        return None
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, host)
    return f"http://{host}:{port}"


def _write_ready_file(settings: Settings, proxy: socket.socket | None, admin: socket.socket | None) -> None:
    """Write the ready file in one step, so that nobody reads half of it."""
    content = {"proxy_url": _url(proxy), "admin_url": _url(admin), "pid": os.getpid()}
    path = settings.prefix / READY_FILE
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(content), encoding="utf-8")
    draft.replace(path)
