"""Declarative configuration: a kong.yaml (or decK's, with its environment substitution) becomes a `Store`."""

from __future__ import annotations

import re
import uuid
from typing import TYPE_CHECKING

import yaml

from .entities import KINDS, SCOPES, EntityError, Store, deterministic_id
from .schema import UNKNOWN, Errors

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .values import Table, Value

_SUBSTITUTION = re.compile(r"""\$\{\{\s*env\s+["']([^"']*)["']\s*\}\}""")
_DECK_PREFIX = "DECK_"
_FORMATS = ("1.1", "2.1", "3.0")
_META = ("_format_version", "_transform", "_comment", "_ignore")

# Which entities may be nested in which, and the field of the inner one that names the outer one.
_NESTED: dict[str, dict[str, str]] = {
    "services": {"routes": "service", "plugins": "service"},
    "routes": {"plugins": "route"},
    "consumers": {"keyauth_credentials": "consumer", "plugins": "consumer"},
}


class DeclarativeError(Exception):
    """The declarative configuration is invalid; `errors` tells what, by entity and entry."""

    def __init__(self, message: str, errors: Errors | None = None) -> None:
        super().__init__(message)
        self.errors = errors or {"error": message}


def substitute(text: str, environment: Mapping[str, str]) -> str:
    """Return the text with decK's `${{ env "DECK_X" }}` replaced.

    Raises:
        DeclarativeError: a variable is missing, or its name does not start with DECK_.

    """

    def value(match: re.Match[str]) -> str:
        name = match[1]
        if not name.startswith(_DECK_PREFIX):
            raise DeclarativeError(
                f"environment variables in the state file must be prefixed with 'DECK_', found: '{name}'"
            )
        if name not in environment:
            raise DeclarativeError(f"environment variable '{name}' present in state file but not set")
        return environment[name]

    return _SUBSTITUTION.sub(value, text)


def parse(text: str, environment: Mapping[str, str]) -> Table:
    """Return the content of a declarative file, in YAML or JSON.

    Raises:
        DeclarativeError: it cannot be parsed, or is no table.

    """
    try:
        content = yaml.safe_load(substitute(text, environment))
    except yaml.YAMLError as error:
        raise DeclarativeError(f"failed parsing declarative configuration: {error}") from error
    if not isinstance(content, dict):
        raise DeclarativeError("expected an object")
    table: Table = content
    return table


def load(content: Table, plugin_schemas: Mapping[str, Table]) -> Store:
    """Return the entities of a parsed declarative file, under the ids that Kong would give them.

    Raises:
        DeclarativeError: an entity is invalid; every invalid entity is named.

    """
    loader = _Loader(Store(plugin_schemas))
    loader.load(content)
    if loader.errors:
        raise DeclarativeError("declarative config is invalid", loader.errors)
    return loader.store


class _Loader:
    def __init__(self, store: Store) -> None:
        self.store = store
        self.errors: Errors = {}

    def load(self, content: Table) -> None:
        version = content.get("_format_version")
        if version is None:
            self.errors["_format_version"] = "required field missing"
        elif str(version) not in _FORMATS:
            self.errors["_format_version"] = f"expected one of: {', '.join(_FORMATS)}"
        for key in content:
            if key not in KINDS and key not in _META:
                self.errors[key] = UNKNOWN
        # References point upwards in this order, whatever the order in the file.
        deferred: list[tuple[str, int, Table]] = []
        for kind in KINDS:
            for i, item in enumerate(self._items(content, kind)):
                self._collect(kind, i, item, deferred)
        for kind in KINDS:
            for inner, i, item in deferred:
                if inner == kind:
                    self._insert(kind, i, item)

    def _items(self, owner: Table, kind: str) -> list[Table]:
        items = owner.get(kind)
        if items is None:
            return []
        if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
            self.errors[kind] = "expected an array"
            return []
        return items

    def _collect(self, kind: str, index: int, item: Table, into: list[tuple[str, int, Table]]) -> None:
        nested = _NESTED.get(kind, {})
        own = {name: value for name, value in item.items() if name not in nested}
        if own.get("id") is None:
            own["id"] = self._new_id(kind, own)
        into.append((kind, index, own))
        for inner, field in nested.items():
            for i, child in enumerate(self._items(item, inner)):
                self._collect(inner, i, {**child, field: {"id": own["id"]}}, into)

    @staticmethod
    def _new_id(kind: str, item: Table) -> str:
        if kind == "plugins":
            scopes = [_plain_reference(item.get(scope)) for scope in SCOPES]
            return deterministic_id(kind, ":".join(["plugins", "*", str(item.get("name")), *scopes]))
        key = item.get(KINDS[kind].label)
        if kind == "keyauth_credentials" or key is None:
            return str(uuid.uuid4())
        return deterministic_id(kind, str(key))

    def _insert(self, kind: str, index: int, item: Table) -> None:
        if self.store.get(kind, str(item["id"])) is not None:
            message = f"uniqueness violation: '{kind}' entity with primary key set to '{item['id']}' already declared"
            self.errors.setdefault(kind, {})[index + 1] = {"@entity": [message]}
            return
        try:
            self.store.insert(kind, {**item, **self._references(kind, item)})
        except EntityError as error:
            self.errors.setdefault(kind, {})[index + 1] = error.fields

    def _references(self, kind: str, item: Table) -> Table:
        """Return the foreign keys of an item; a name or an id may stand for each."""
        references: Table = {}
        for field, parent in KINDS[kind].foreign.items():
            reference = item.get(field)
            key = _plain_reference(reference)
            if key:
                found = self.store.get(parent, key)
                references[field] = {"id": found["id"] if found else key}
        return references


def _plain_reference(reference: Value) -> str:
    """Return the id or the name in a reference, which may be a string or a table with one of them."""
    if isinstance(reference, dict):
        reference = reference.get("id") or reference.get("name") or reference.get("username")
    return reference if isinstance(reference, str) else ""


def explain(errors: Errors) -> str:
    """Return errors as `kong start` prints them."""
    return "\n".join(_explain(errors, 0))


def _explain(errors: Errors, depth: int) -> list[str]:
    lines: list[str] = []
    indent = "  " * depth
    for name in sorted(errors, key=str):
        error = errors[name]
        if name == "@entity":
            lines += [f"{indent}{message}" for message in error]
        elif isinstance(error, dict) and error and all(isinstance(key, int) for key in error):
            lines.append(f"{indent}in '{name}':")
            for i in sorted(error):
                lines.append(f"{indent}  - in entry {i} of '{name}':")
                lines += _explain(error[i], depth + 2)
        elif isinstance(error, dict):
            lines += [f"{indent}in '{name}':", *_explain(error, depth + 1)]
        elif isinstance(error, list):
            entries: Errors = {i: message for i, message in enumerate(error, 1) if message is not None}
            lines += [f"{indent}in '{name}':", *_explain(entries, depth + 1)]
        else:
            lines.append(f"{indent}in '{name}': {error}")
    return lines
