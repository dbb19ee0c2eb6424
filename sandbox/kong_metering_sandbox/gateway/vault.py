"""Vault references: `{vault://env/om-token}` stands for the environment variable OM_TOKEN of the gateway."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .values import Table, Value

_REFERENCE = re.compile(r"\{vault://([a-z][a-z0-9-]*)/([^/?}]+)(?:/([^/?}]+))?/?(?:\?[^}]*)?\}")


def is_reference(value: Value) -> bool:
    """Tell whether a value is a vault reference."""
    return isinstance(value, str) and value.startswith("{vault://") and value.endswith("}")


def resolve(reference: str, environment: Mapping[str, str]) -> str | None:
    """Return the secret that a reference stands for; None when there is none. Only the env vault is known."""
    found = _REFERENCE.fullmatch(reference)
    if not found or found[1] != "env":
        return None
    secret = environment.get(found[2].upper().replace("-", "_"))
    if secret is None or found[3] is None:
        return secret
    return _member(secret, found[3])


def _member(secret: str, name: str) -> str | None:
    try:
        value = json.loads(secret)
    except ValueError:
        return None
    member = value.get(name) if isinstance(value, dict) else None
    return member if isinstance(member, str) else None


def resolve_config(spec: Table, config: Table, environment: Mapping[str, str]) -> Table:
    """Return a configuration with its references resolved, and each record's `$refs` beside its fields.

    A reference that cannot be resolved becomes an empty string, as in Kong.
    """
    resolved = dict(config)
    references: Table = {}
    for entry in spec.get("fields") or []:
        for name, field in entry.items():
            value = resolved.get(name)
            if field.get("type") == "record" and isinstance(value, dict):
                resolved[name] = resolve_config(field, value, environment)
            elif field.get("referenceable") and is_reference(value):
                references[name] = value
                resolved[name] = resolve(str(value), environment) or ""
            elif isinstance(value, list):
                resolved[name] = _resolve_list(field, value, environment)
    return {**resolved, "$refs": references} if references else resolved


def _resolve_list(field: Table, values: list[Value], environment: Mapping[str, str]) -> list[Value]:
    elements = field.get("elements") or {}
    if elements.get("type") == "record":
        return [resolve_config(elements, value, environment) for value in values]
    if not elements.get("referenceable"):
        return values
    return [(resolve(value, environment) or "") if is_reference(value) else value for value in values]
