"""Vault references: `{vault://env/om-token}` stands for the environment variable OM_TOKEN of the gateway.

`{vault://file/om-token}` stands for what is in the file `om-token` of the directory that the environment variable
STANDIN_VAULT names, at that moment: what a custom vault of Kong's does whose values change while Kong runs.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .values import Table, Value

_REFERENCE = re.compile(r"\{vault://([a-z][a-z0-9-]*)/([^/?}]+)(?:/([^/?}]+))?/?(?:\?[^}]*)?\}")


def is_reference(value: Value) -> bool:
    """Tell whether a value is a vault reference."""
    return isinstance(value, str) and value.startswith("{vault://") and value.endswith("}")


def resolve(reference: str, environment: Mapping[str, str]) -> str | None:
    """Return the secret that a reference stands for; None when there is none. Other vaults are not known."""
    found = _REFERENCE.fullmatch(reference)
    if not found:
        return None
    secret = _VAULTS.get(found[1], lambda _name, _environment: None)(found[2], environment)
    if secret is None or found[3] is None:
        return secret
    return _member(secret, found[3])


def _from_environment(name: str, environment: Mapping[str, str]) -> str | None:
    return environment.get(name.upper().replace("-", "_"))


def _from_file(name: str, environment: Mapping[str, str]) -> str | None:
    try:
        return (Path(environment.get("STANDIN_VAULT", "")) / name).read_text(encoding="utf-8")
    except OSError:
        return None


_VAULTS = {"env": _from_environment, "file": _from_file}


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
