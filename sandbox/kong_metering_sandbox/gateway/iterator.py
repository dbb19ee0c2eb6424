"""Which plugins run for a request, and with which configuration: of each plugin the most specific entity."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from .values import without_nulls
from .vault import resolve_config

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from .values import Table

_HTTP = frozenset(("http", "https", "grpc", "grpcs"))

Scope: TypeAlias = "tuple[str | None, str | None, str | None]"


def plugin_config(entity: Table, schema: Table, workspace: str, environment: Mapping[str, str]) -> Table:
    """Return the configuration that a plugin gets: what is unset is absent, references are resolved.

    Kong's own keys are beside the user's; `__seq__` is added by each worker.
    """
    config = resolve_config(_config_definition(schema), without_nulls(entity["config"]), environment)
    scope = _scope(entity)
    for name, value in zip(("route_id", "service_id", "consumer_id"), scope, strict=True):
        if value is not None:
            config[name] = value
    if entity["instance_name"]:
        config["plugin_instance_name"] = entity["instance_name"]
    config["__plugin_id"] = entity["id"]
    config["__ws_id"] = workspace
    parts = [part or "" for part in scope]
    config["__key__"] = ":".join(["plugins", entity["name"], *parts, "", workspace])
    return config


def _config_definition(schema: Table) -> Table:
    for entry in schema.get("fields") or []:
        if "config" in entry:
            found: Table = entry["config"]
            return found
    return {}


def _scope(entity: Table) -> Scope:
    route, service, consumer = ((entity[name] or {}).get("id") for name in ("route", "service", "consumer"))
    return route, service, consumer


class PluginsIterator:
    """One worker's view of the plugin entities; a new one is built whenever a plugin changes."""

    def __init__(
        self,
        entities: Iterable[Table],
        configure: Callable[[Table], Table],
        priorities: Mapping[str, int],
        next_sequence: Callable[[], int],
    ) -> None:
        self._by_scope: dict[str, dict[Scope, Table]] = {}
        self._refreshed: dict[str, Callable[[], Table]] = {}
        for entity in entities:
            if entity["enabled"] and _HTTP & set(entity["protocols"]):
                config = {**configure(entity), "__seq__": next_sequence()}
                self._by_scope.setdefault(entity["name"], {})[_scope(entity)] = config
                if "$refs" in config:
                    self._refreshed[entity["id"]] = partial(configure, entity)
        self._names = sorted(self._by_scope, key=lambda name: (-priorities[name], name))

    @property
    def names(self) -> list[str]:
        """The plugins that are configured anywhere, in the order in which they run."""
        return list(self._names)

    def find(self, name: str, route: str | None, service: str | None, consumer: str | None) -> Table | None:
        """Return the configuration of a plugin for a request; None when it does not run for it."""
        by_scope = self._by_scope[name]
        for scope in _candidates(route, service, consumer):
            config = by_scope.get(scope)
            if config is not None:
                return self._with_present_secrets(config)
        return None

    def global_only(self) -> Iterator[tuple[str, Table]]:
        """Yield the plugins that run for everything, in order: all that a request without a route gets."""
        for name in self._names:
            config = self._by_scope[name].get((None, None, None))
            if config is not None:
                yield name, self._with_present_secrets(config)

    def _with_present_secrets(self, config: Table) -> Table:
        """Put what the vaults say now into a configuration, in its place: no number changes, and nobody is told."""
        if (refreshed := self._refreshed.get(config.get("__plugin_id", ""))) is not None:
            config.update(refreshed())
        return config


def _candidates(route: str | None, service: str | None, consumer: str | None) -> Iterator[Scope]:
    """Yield the scopes of a request from the most to the least specific, in Kong's order of precedence."""
    if route and service and consumer:
        yield route, service, consumer
    if route and consumer:
        yield route, None, consumer
    if service and consumer:
        yield None, service, consumer
    if route and service:
        yield route, service, None
    if consumer:
        yield None, None, consumer
    if route:
        yield route, None, None
    if service:
        yield None, service, None
    yield None, None, None
