"""Writes a declarative configuration to a gateway by its Admin API, entity by entity, as a person or decK would."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import requests

# What is written first, and removed last. For each kind, what may be nested in it and how it refers to its parent.
_KINDS: dict[str, dict[str, str]] = {
    "services": {"routes": "service", "plugins": "service"},
    "routes": {"plugins": "route"},
    "consumers": {"plugins": "consumer", "keyauth_credentials": "consumer"},
    "keyauth_credentials": {},
    "plugins": {},
}
_PATHS = {"keyauth_credentials": "key-auths"}
_REFERENCES = {"service": "services", "route": "routes", "consumer": "consumers"}
_NAMES = ("name", "username", "key")
_PAGE = 1000
_SECONDS = 60


@dataclass(frozen=True)
class Entity:
    """An entity as it is written: which kind, its id, its fields without those nested in it."""

    kind: str
    id: str
    fields: Mapping[str, Any]


class AdminApi:
    """The Admin API at a URL, which has a database behind it."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._session = requests.Session()
        self._session.trust_env = False

    def apply(self, content: Mapping[str, Any]) -> None:
        """Make the entities those of a declarative configuration; one that stays is changed in place.

        One without an id gets the same each time, by its name and its place.
        """
        wanted = sorted(_entities(content), key=lambda entity: [*_KINDS].index(entity.kind))
        for kind in reversed(_KINDS):
            kept = {entity.id for entity in wanted if entity.kind == kind}
            for one in self._call("GET", f"{_path(kind)}?size={_PAGE}")["data"]:
                if one["id"] not in kept:
                    self.delete(kind, one["id"])
        for entity in wanted:
            self.put(entity.kind, entity.id, entity.fields)

    def put(self, kind: str, key: str, fields: Mapping[str, Any]) -> str:
        """Create or replace an entity, and give its id."""
        return str(self._call("PUT", f"{_path(kind)}/{key}", fields)["id"])

    def create(self, kind: str, fields: Mapping[str, Any]) -> str:
        """Create an entity, and give its id."""
        return str(self._call("POST", _path(kind), fields)["id"])

    def change(self, kind: str, entity_id: str, fields: Mapping[str, Any]) -> None:
        """Change some fields of an entity."""
        self._call("PATCH", f"{_path(kind)}/{entity_id}", fields)

    def delete(self, kind: str, entity_id: str) -> None:
        """Remove an entity."""
        self._call("DELETE", f"{_path(kind)}/{entity_id}")

    def _call(self, method: str, path: str, fields: Mapping[str, Any] | None = None) -> Any:
        answer = self._session.request(method, f"{self._url}/{path}", json=fields, timeout=_SECONDS)
        assert answer.ok, f"{method} /{path}: {answer.status_code} {answer.text}"
        return answer.json() if answer.content else None


def _path(kind: str) -> str:
    return _PATHS.get(kind, kind)


def _entities(content: Mapping[str, Any]) -> Iterator[Entity]:
    for kind in _KINDS:
        yield from _listed(kind, content.get(kind) or (), {}, "")


def _listed(kind: str, listed: Any, parent: Mapping[str, Any], place: str) -> Iterator[Entity]:
    for number, one in enumerate(listed):
        fields = {name: value for name, value in one.items() if name not in _KINDS[kind]}
        fields |= {
            name: {"id": _id(_REFERENCES[name], value)}
            for name, value in fields.items()
            if name in _REFERENCES and isinstance(value, str)
        }
        name = next((str(one[name]) for name in _NAMES if name in one), str(number))
        # Names of plugins are not their own; the others may be referred to by theirs, wherever they stand.
        unique = f"{place}/{name}" if kind == "plugins" else name
        entity_id = one.get("id") or _id(kind, unique)
        yield Entity(kind, entity_id, {**fields, **parent, "id": entity_id})
        for inner, reference in _KINDS[kind].items():
            yield from _listed(inner, one.get(inner) or (), {reference: {"id": entity_id}}, f"{kind}/{name}")


def _id(kind: str, name: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"{kind}/{name}"))
