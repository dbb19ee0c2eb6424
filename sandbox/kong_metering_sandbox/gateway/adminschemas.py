"""What the Admin API tells of schemas: `/schemas/...`, as Kong answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from .entities import KINDS, Store

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .values import Table, Value

_Answer: TypeAlias = "tuple[int, Table]"
_ENTITY_SEGMENTS = 2  # schemas, KIND


def answer(method: str, segments: list[str], store: Store, plugins: Mapping[str, Table], data: Table) -> _Answer | None:
    """Answer a request for a schema, or to check an entity by one; None when it is neither.

    Raises:
        EntityError: the entity breaks its schema.

    """
    if segments[:2] == ["plugins", "schema"] and method == "GET" and len(segments) > _ENTITY_SEGMENTS:
        plugin = plugins.get(segments[2])
        return (200, _configuration(plugin["schema"])) if plugin else _none("plugin", segments[2])
    if segments[:1] != ["schemas"] or len(segments) < _ENTITY_SEGMENTS:
        return None
    kind = segments[1]
    if method == "POST" and segments[2:] == ["validate"]:
        return _validated(kind, store, data)
    if method != "GET":
        return None
    if kind == "plugins" and len(segments) > _ENTITY_SEGMENTS:
        plugin = plugins.get(segments[2])
        return (200, published(plugin["schema"])) if plugin else _none("plugin", segments[2])
    return (200, published(KINDS[kind].definition)) if kind in KINDS else _none("entity", kind)


def published(definition: Table) -> Table:
    """Return a definition as the Admin API shows it: what is code is left out."""
    return {name: _published(definition.get(name) or []) for name in ("entity_checks", "fields")}


def _published(value: Value) -> Value:
    if isinstance(value, dict):
        return {name: _published(item) for name, item in value.items() if not callable(item)}
    return [_published(item) for item in value] if isinstance(value, list) else value


def _configuration(definition: Table) -> Table:
    fields = {name: spec for entry in definition["fields"] for name, spec in entry.items()}
    return published(fields["config"])


def _validated(kind: str, store: Store, data: Table) -> _Answer:
    if kind not in KINDS:
        return _none("entity", kind)
    store.check(kind, data)
    return 200, {"message": "schema validation successful"}


def _none(what: str, name: str) -> _Answer:
    return 404, {"message": f"No {what} named '{name}'"}
