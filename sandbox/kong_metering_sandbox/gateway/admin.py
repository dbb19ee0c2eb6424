"""The Admin API: entities are listed, shown and, with a database, written; `/config` replaces them without one."""

from __future__ import annotations

import json
import socket as socket_module
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol
from urllib.parse import parse_qsl

from aiohttp import web

from . import adminschemas, declarative
from .adminlists import EMPTY_COLLECTIONS, Page
from .declarative import DeclarativeError
from .entities import KINDS, EntityError, is_uuid
from .schema import Schema
from .values import encode_json

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .entities import Store
    from .schema import Spec
    from .values import Table, Value

_VERSION = "3.9.1"
_COLLECTIONS = {
    "services": "services",
    "routes": "routes",
    "consumers": "consumers",
    "plugins": "plugins",
    "key-auths": "keyauth_credentials",
    "key-auth": "keyauth_credentials",
}
_CHILDREN = {
    ("services", "routes"): "service",
    ("services", "plugins"): "service",
    ("routes", "plugins"): "route",
    ("consumers", "plugins"): "consumer",
    ("consumers", "keyauth_credentials"): "consumer",
}
_OPERATIONS = {"POST": "create", "PATCH": "update", "PUT": "create or update", "DELETE": "remove"}
_NOT_FOUND = (404, {"message": "Not found"})
_UNSUPPORTED = 12
_BODY_LIMIT = 64 * 1024 * 1024


class Administered(Protocol):
    """What the Admin API administers."""

    @property
    def store(self) -> Store:
        """The entities."""

    @property
    def db_less(self) -> bool:
        """Whether entities come from a declarative configuration only."""

    @property
    def environment(self) -> Mapping[str, str]:
        """Where a declarative configuration's substitutions come from."""

    def plugins(self) -> dict[str, Table]:
        """Return version, priority and schema of each plugin that may be configured."""

    def changed(self) -> None:
        """Make the workers use the entities as they are now."""

    def load(self, content: Table) -> None:
        """Replace all entities by those of a declarative configuration.

        Raises:
            DeclarativeError: it is invalid.

        """


class _Refused(Exception):  # noqa: N818 - an answer, not an error
    def __init__(self, status: int, body: Table | None = None) -> None:
        super().__init__(status)
        self.answer = (status, body)


@dataclass(frozen=True)
class _Place:
    """What a path points to: a collection, maybe under a parent, and maybe one entity of it."""

    kind: str
    key: str | None = None
    field: str | None = None
    parent: Table | None = None


class AdminApi:
    """Answers the Admin API's requests."""

    def __init__(self, gateway: Administered) -> None:
        self._gateway = gateway

    def application(self) -> web.Application:
        """Return the web application to serve."""
        application = web.Application(client_max_size=_BODY_LIMIT)
        application.router.add_route("*", "/{path:.*}", self._handle)
        return application

    async def _handle(self, request: web.Request) -> web.Response:
        try:
            status, body = await self._answer(request)
        except EntityError as error:
            status, body = error.status, error.body
        except _Refused as refused:
            status, body = refused.answer
        return web.Response(
            status=status,
            body=b"" if body is None else encode_json(body),
            headers={
                "Content-Type": "application/json; charset=utf-8",
                "Access-Control-Allow-Origin": "*",
                "Server": f"kong/{_VERSION}",
            },
        )

    async def _answer(self, request: web.Request) -> tuple[int, Table | None]:
        segments = [segment for segment in request.match_info["path"].split("/") if segment]
        data = await _read(request)
        method = "GET" if request.method == "HEAD" else request.method
        special = self._special(method, segments, data)
        if special is not None:
            return special
        place = self._place(segments)
        if method == "GET" and place.key is None:
            return 200, Page.asked_for(request.query).of(request.path, self._listed(place), request.query)
        return self._entities(method, place, data)

    def _special(self, method: str, segments: list[str], data: Table) -> tuple[int, Table | None] | None:
        """Answer a request that is about no entity; None when it is about one."""
        if method == "POST" and segments == ["config"]:
            return self._load_config(data)
        told = adminschemas.answer(method, segments, self._gateway.store, self._gateway.plugins(), data)
        if told is not None:
            return told
        if method == "GET" and len(segments) == 1 and segments[0] in EMPTY_COLLECTIONS:
            return 200, {"data": [], "next": None}
        information = self._information(segments) if method == "GET" else None
        return None if information is None else (200, information)

    def _information(self, segments: list[str]) -> Table | None:
        plugins = self._gateway.plugins()
        if not segments:
            return self._root(plugins)
        if segments == ["status"]:
            return {"database": {"reachable": True}, "memory": {"workers_lua_vms": []}, "server": {}}
        if segments == ["plugins", "enabled"]:
            return {"enabled_plugins": sorted(plugins)}
        return None

    def _root(self, plugins: dict[str, Table]) -> Table:
        available = {name: {k: plugin[k] for k in ("version", "priority")} for name, plugin in plugins.items()}
        return {
            "tagline": "Welcome to kong",
            "version": _VERSION,
            "edition": "community",
            "hostname": socket_module.gethostname(),
            "plugins": {
                "available_on_server": available,
                "enabled_in_cluster": sorted({plugin["name"] for plugin in self._gateway.store.all("plugins")}),
            },
            "configuration": {"database": "off" if self._gateway.db_less else "memory"},
        }

    def _load_config(self, data: Table) -> tuple[int, Table | None]:
        if not self._gateway.db_less:
            message = "this endpoint is only available when Kong is configured to not use a database"
            return 400, {"message": message}
        try:
            content = data
            if "_format_version" not in data:
                content = declarative.parse(str(data.get("config", "")), self._gateway.environment)
            self._gateway.load(content)
        except DeclarativeError as error:
            message = f"declarative config is invalid: {declarative.explain(error.errors)}"
            fields = {str(name): value for name, value in error.errors.items()}
            name = "invalid declarative configuration"
            return 400, {"code": 14, "name": name, "message": message, "fields": fields}
        return 201, {kind: {one["id"]: one for one in self._gateway.store.all(kind)} for kind in KINDS}

    def _place(self, segments: list[str]) -> _Place:
        kind = _COLLECTIONS.get(segments[0]) if segments else None
        if kind is None:
            raise _Refused(*_NOT_FOUND)
        if len(segments) <= len(("kind", "key")):
            return _Place(kind, segments[1] if len(segments) > 1 else None)
        return self._nested_place(kind, segments)

    def _nested_place(self, kind: str, segments: list[str]) -> _Place:
        inner = _COLLECTIONS.get(segments[2])
        field = _CHILDREN.get((kind, inner or ""))
        parent = self._gateway.store.get(kind, segments[1])
        if inner is None or field is None or parent is None or len(segments) > len(("kind", "id", "kind", "id")):
            raise _Refused(*_NOT_FOUND)
        return _Place(inner, segments[3] if len(segments) > len(("kind", "id", "kind")) else None, field, parent)

    def _entities(self, method: str, place: _Place, data: Table) -> tuple[int, Table | None]:
        if place.field is not None and place.parent is not None and method in ("POST", "PUT"):
            data = {**data, place.field: {"id": place.parent["id"]}}
        data = _typed(self._specs(place, data), data) if "\0form" in data else data
        if place.key is None:
            return self._collection(method, place, data)
        return self._entity(method, place, place.key, data)

    def _specs(self, place: _Place, data: Table) -> dict[str, Spec]:
        """Return the fields that a form may set; a plugin's depend on which plugin it is."""
        if place.kind == "plugins" and "name" not in data and place.key is not None:
            known = self._gateway.store.get("plugins", place.key)
            data = {"name": (known or {}).get("name")}
        return self._gateway.store.schema(place.kind, data).fields

    def _listed(self, place: _Place) -> list[Table]:
        if place.field is not None and place.parent is not None:
            return self._gateway.store.children(place.kind, place.field, place.parent["id"])
        return list(self._gateway.store.all(place.kind))

    def _collection(self, method: str, place: _Place, data: Table) -> tuple[int, Table | None]:
        store = self._gateway.store
        if method != "POST":
            raise _Refused(405, {"message": "Method not allowed"})
        if self._gateway.db_less:
            store.check(place.kind, data)
            raise self._unsupported(method, place.kind)
        entity = store.insert(place.kind, data)
        self._gateway.changed()
        return 201, entity

    def _entity(self, method: str, place: _Place, key: str, data: Table) -> tuple[int, Table | None]:
        store = self._gateway.store
        entity = store.get(place.kind, key)
        if entity is not None and place.field is not None and place.parent is not None:
            entity = entity if (entity[place.field] or {}).get("id") == place.parent["id"] else None
        if method == "DELETE" and entity is None:
            return (204, None) if is_uuid(key) else _NOT_FOUND
        if method in _OPERATIONS and self._gateway.db_less:
            raise self._unsupported(method, place.kind)
        if entity is None and method != "PUT":
            return _NOT_FOUND
        return self._change(method, place.kind, (key, entity), data)

    def _change(self, method: str, kind: str, which: tuple[str, Table | None], data: Table) -> tuple[int, Table | None]:
        store = self._gateway.store
        key, entity = which
        result: Table | None
        if method == "GET":
            return 200, entity
        if method == "PUT":
            result = store.replace(kind, key, data)
        elif method == "PATCH" and entity is not None:
            result = store.update(kind, entity, data)
        elif method == "DELETE" and entity is not None:
            store.delete(kind, entity)
            result = None
        else:
            raise _Refused(405, {"message": "Method not allowed"})
        self._gateway.changed()
        return (204, None) if result is None else (200, result)

    @staticmethod
    def _unsupported(method: str, kind: str) -> _Refused:
        message = f"cannot {_OPERATIONS[method]} '{kind}' entities when not using a database"
        return _Refused(405, {"code": _UNSUPPORTED, "name": "operation unsupported", "message": message})


async def _read(request: web.Request) -> Table:
    """Return a request's body as a table; a form's keeps the marker that its values are all text."""
    body = await request.read()
    if not body:
        return {}
    if request.content_type == "application/x-www-form-urlencoded":
        return {**_nested(parse_qsl(body.decode("utf-8", "replace"), keep_blank_values=True)), "\0form": True}
    if request.content_type in ("application/yaml", "text/yaml"):
        return {"config": body.decode("utf-8", "replace")}
    if request.content_type != "application/json":
        raise _Refused(415)
    try:
        data = json.loads(body)
    except ValueError:
        data = None
    if not isinstance(data, dict):
        raise _Refused(400, {"message": "Cannot parse JSON body"})
    return dict(data)


def _nested(pairs: list[tuple[str, str]]) -> Table:
    """Return form fields as a table: dots lead into records, brackets and repetition make lists."""
    table: Table = {}
    for name, value in pairs:
        *path, last = name.split(".")
        node = table
        for part in path:
            node = node.setdefault(part, {})
        if last.endswith("[]") or last in node:
            last = last.removesuffix("[]")
            known = node.get(last, [])
            node[last] = [*(known if isinstance(known, list) else [known]), value]
        else:
            node[last] = value
    return table


def _typed(specs: dict[str, Spec], data: Table) -> Table:
    """Return a form's table with its texts turned into what the fields want."""
    return {name: _typed_value(specs.get(name, {}), value) for name, value in data.items() if name != "\0form"}


def _typed_value(spec: Spec, value: Value) -> Value:
    kind = spec.get("type")
    if kind == "record" and isinstance(value, dict):
        return _typed(Schema.of(spec).fields, value)
    if kind in ("array", "set"):
        members = value if isinstance(value, list) else [value]
        return [_typed_value(spec.get("elements", {}), member) for member in members if member != ""]
    return _scalar(str(kind), value)


def _scalar(kind: str, value: Value) -> Value:
    if kind == "boolean" and value in ("true", "false"):
        return value == "true"
    if kind in ("integer", "number"):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value or None
