"""The entities of a gateway and the rules between them: unique names, foreign keys, one plugin per scope.

A `Store` is what the Admin API writes and what a declarative file is loaded into. Entities are held the way
that the Admin API shows them: complete, with null for what is unset.
"""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from . import typedefs
from .schema import Errors, Schema, violation_message

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from .values import Table, Value

_NAMESPACE = uuid.UUID("fd02801f-0957-4a15-a55a-c8d9606f30b5")  # Kong's own, so that ids are Kong's ids
_SCHEMA_VIOLATION, _FOREIGN_KEY_VIOLATION, _UNIQUE_VIOLATION = 2, 4, 5
SCOPES = ("route", "service", "consumer")


class EntityError(Exception):
    """An entity was refused: the HTTP status and the body that Kong answers with."""

    def __init__(self, status: int, body: Table) -> None:
        super().__init__(body["message"])
        self.status = status
        self.body = body

    @property
    def fields(self) -> Errors:
        """What is wrong, by field."""
        if self.body["code"] != _SCHEMA_VIOLATION:
            return {"@entity": [self.body["message"]]}
        fields: Errors = self.body["fields"]
        return fields


@dataclass(frozen=True)
class Kind:
    """One kind of entity: its collection's name, its definition, what names it and what it refers to."""

    name: str
    definition: Table
    label: str
    """The unique field that may stand in a URL in the id's place."""
    foreign: Mapping[str, str] = field(default_factory=dict)
    unique: tuple[str, ...] = ()


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("services", typedefs.SERVICES, "name", unique=("name",)),
        Kind("routes", typedefs.ROUTES, "name", {"service": "services"}, ("name",)),
        Kind("consumers", typedefs.CONSUMERS, "username", unique=("username", "custom_id")),
        Kind("keyauth_credentials", typedefs.CREDENTIALS, "key", {"consumer": "consumers"}, ("key",)),
        Kind("plugins", typedefs.PLUGINS, "instance_name", {s: f"{s}s" for s in SCOPES}, ("instance_name",)),
    )
}


def is_uuid(text: str) -> bool:
    """Tell whether a text is a UUID in its usual form."""
    try:
        return str(uuid.UUID(text)) == text.lower()
    except ValueError:
        return False


def deterministic_id(kind: str, key: str) -> str:
    """Return the id that Kong gives an entity of a declarative file."""
    return str(uuid.uuid5(uuid.uuid5(_NAMESPACE, kind), key))


def violation(errors: Errors) -> EntityError:
    """Return the refusal of an entity that breaks its schema."""
    body = {
        "code": _SCHEMA_VIOLATION,
        "name": "schema violation",
        "message": violation_message(errors),
        "fields": errors,
    }
    return EntityError(400, body)


def _lua_table(fields: Mapping[str, Value]) -> str:
    parts = (f"{name}={_lua_literal(fields[name])}" for name in sorted(fields))
    return "{" + ",".join(parts) + "}"


def _lua_literal(value: Value) -> str:
    if isinstance(value, dict):
        return _lua_table(value)
    return "null" if value is None else f'"{value}"'


class Store:
    """All entities, and the plugins that may be configured; plugin definitions come by name."""

    def __init__(self, plugin_schemas: Mapping[str, Table]) -> None:
        self._tables: dict[str, dict[str, Table]] = {name: {} for name in KINDS}
        self._plugin_schemas = plugin_schemas

    def use_plugin_schemas(self, plugin_schemas: Mapping[str, Table]) -> None:
        """Let other plugins be configured from now on; the entities that there are stay."""
        self._plugin_schemas = plugin_schemas

    def all(self, kind: str) -> Iterator[Table]:
        """Yield the entities of a kind in the order in which they came."""
        yield from self._tables[kind].values()

    def get(self, kind: str, key: str) -> Table | None:
        """Return an entity by its id or by its name."""
        found = self._tables[kind].get(key)
        if found is not None or is_uuid(key):
            return found
        label = KINDS[kind].label
        return next((entity for entity in self.all(kind) if entity[label] == key), None)

    def children(self, kind: str, field_name: str, parent_id: str) -> list[Table]:
        """Return the entities of a kind that refer to a parent."""
        return [entity for entity in self.all(kind) if (entity[field_name] or {}).get("id") == parent_id]

    def schema(self, kind: str, data: Table) -> Schema:
        """Return the schema for an entity.

        Raises:
            EntityError: it is a plugin that is not enabled.

        """
        if kind != "plugins":
            return Schema.of(KINDS[kind].definition)
        name = data.get("name")
        own = self._plugin_schemas.get(name) if isinstance(name, str) else None
        if name is None or own is None:
            missing = f"plugin '{name}' not enabled; add it to the 'plugins' configuration property"
            raise violation({"name": "required field missing" if name is None else missing})
        return Schema.of(typedefs.plugin_definition(own))

    def insert(self, kind: str, data: Table) -> Table:
        """Add an entity and return it complete.

        Raises:
            EntityError: it breaks its schema, a foreign key or a unique constraint.

        """
        now = int(time.time())
        stamps = {"created_at": now, "updated_at": now}
        return self._put(kind, {**_stamped(kind, stamps), "id": str(uuid.uuid4()), **_shorthands(kind, data)})

    def update(self, kind: str, entity: Table, changes: Table) -> Table:
        """Change some fields of an entity and return it complete; a nested record is changed, not replaced.

        Raises:
            EntityError: as with `insert`.

        """
        stamps = _stamped(kind, {"updated_at": int(time.time())})
        merged = {**_merge(entity, _shorthands(kind, changes)), "id": entity["id"], **stamps}
        return self._put(kind, merged)

    def replace(self, kind: str, key: str, data: Table) -> Table:
        """Put an entity in the place of the one with this id or name, or add it under it.

        Raises:
            EntityError: as with `insert`.

        """
        existing = self.get(kind, key)
        if existing is not None:
            return self.insert(kind, {**data, "id": existing["id"], "created_at": existing["created_at"]})
        return self.insert(kind, {**data, ("id" if is_uuid(key) else KINDS[kind].label): key})

    def delete(self, kind: str, entity: Table) -> None:
        """Remove an entity, with its plugins and credentials.

        Raises:
            EntityError: it is a service that routes refer to.

        """
        if kind == "services" and self.children("routes", "service", entity["id"]):
            message = "an existing 'routes' entity references this 'services' entity"
            fields = {"@referenced_by": "routes"}
            raise EntityError(400, _error_body(_FOREIGN_KEY_VIOLATION, "foreign key violation", message, fields))
        del self._tables[kind][entity["id"]]
        for child_kind in ("plugins", "keyauth_credentials"):
            for field_name, parent in KINDS[child_kind].foreign.items():
                if parent == kind:
                    for child in self.children(child_kind, field_name, entity["id"]):
                        self._tables[child_kind].pop(child["id"], None)

    def check(self, kind: str, data: Table) -> None:
        """Check an entity that is not going to be added; whether what it refers to is there is not looked at.

        Raises:
            EntityError: it breaks its schema.

        """
        schema = self.schema(kind, data)
        errors = schema.validate(schema.fill({"id": str(uuid.uuid4()), **_shorthands(kind, data)}))
        for name in KINDS[kind].foreign:
            if isinstance(data.get(name), dict) and "id" not in data[name]:
                errors[name] = {"id": "missing primary key"}
        if errors:
            raise violation(errors)

    def _put(self, kind: str, data: Table) -> Table:
        entity = self._checked(kind, data)
        self._check_unique(kind, entity)
        self._tables[kind][entity["id"]] = entity
        return entity

    def _checked(self, kind: str, data: Table) -> Table:
        schema = self.schema(kind, data)
        entity = schema.fill(data)
        errors = schema.validate(entity)
        if errors:
            raise violation(errors)
        self._check_foreign(kind, entity)
        return entity

    def _check_foreign(self, kind: str, entity: Table) -> None:
        for name, parent in KINDS[kind].foreign.items():
            reference = entity[name]
            if reference is None:
                continue
            found = self.get(parent, str(reference.get("id") or reference.get("name") or ""))
            if found is None:
                message = f"the foreign key '{_lua_table(reference)}' does not reference an existing '{parent}' entity."
                fields = {name: reference}
                body = _error_body(_FOREIGN_KEY_VIOLATION, "foreign key violation", message, fields)
                raise EntityError(400, body)
            entity[name] = {"id": found["id"]}

    def _check_unique(self, kind: str, entity: Table) -> None:
        keys: list[dict[str, Any]] = [{name: entity[name]} for name in KINDS[kind].unique if entity[name]]
        if kind == "plugins":
            keys.append({name: entity[name] for name in ("name", *SCOPES)})
        for key in keys:
            for other in self.all(kind):
                if other["id"] != entity["id"] and all(other[name] == value for name, value in key.items()):
                    message = f"UNIQUE violation detected on '{_lua_table(key)}'"
                    body = _error_body(_UNIQUE_VIOLATION, "unique constraint violation", message, key)
                    raise EntityError(409, body)


def _error_body(code: int, name: str, message: str, fields: Table) -> Table:
    return {"code": code, "name": name, "message": message, "fields": fields}


def _stamped(kind: str, stamps: Table) -> Table:
    known = Schema.of(KINDS[kind].definition).fields
    return {name: stamp for name, stamp in stamps.items() if name in known}


def _shorthands(kind: str, data: Table) -> Table:
    if kind == "services" and isinstance(data.get("url"), str):
        rest = {name: value for name, value in data.items() if name != "url"}
        return {**typedefs.service_address(data["url"]), **rest}
    if kind == "keyauth_credentials" and not data.get("key"):
        return {**data, "key": uuid.uuid4().hex}
    return data


def _merge(base: Table, changes: Table) -> Table:
    merged = dict(base)
    for name, value in changes.items():
        known = base.get(name)
        both_records = isinstance(known, dict) and isinstance(value, dict) and "id" not in value
        merged[name] = _merge(known, value) if both_records and known else value
    return merged
