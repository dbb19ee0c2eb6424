"""The plugin entity as JSON Schema, for editors and checks of files, translated from Kong's schema language.

Kong has the last word: a JSON Schema cannot say that a vault reference may stand where a pattern is asked for, so each
such field takes one; and what Kong adds to an entity (`service`, `tags` and so on) is not looked at.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

_TYPES = {"record": "object", "set": "array"}
_SAME = {"default": "default", "description": "description", "one_of": "enum", "len_min": "minLength"}
_VAULT_REFERENCE = r"^\{vault://.+\}$"

Schema = dict[str, Any]


def json_schema(plugin_schema: Mapping[str, Any]) -> Schema:
    """Translate the schema of a plugin entity."""
    name = plugin_schema["name"]
    entity = _record(plugin_schema["fields"])
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"{name} plugin of Kong Gateway",
        **entity,
        "properties": {"name": {"const": name}, **entity["properties"]},
        "required": ["name", "config"],
        "additionalProperties": True,
    }


def _record(fields: Iterable[Mapping[str, Mapping[str, Any]]], checks: Iterable[Mapping[str, Any]] = ()) -> Schema:
    named = {name: field for entry in fields for name, field in entry.items()}
    schema: Schema = {
        "type": "object",
        "properties": {name: _field(field) for name, field in named.items()},
        "additionalProperties": False,
    }
    if needed := [name for name, field in named.items() if _is_asked_for(field)]:
        schema["required"] = needed
    if rules := [_rule(check["conditional"], named) for check in checks]:
        schema["allOf"] = rules
    return schema


def _is_asked_for(field: Mapping[str, Any]) -> bool:
    """Return whether a field has to be given: Kong makes a record out of its members' defaults."""
    if not field.get("required") or "default" in field:
        return False
    members = [member for entry in field.get("fields", ()) for member in entry.values()]
    return field["type"] != "record" or any(map(_is_asked_for, members))


def _field(field: Mapping[str, Any]) -> Schema:
    kind = field["type"]
    schema: Schema = _record(field["fields"], field.get("entity_checks", ())) if kind == "record" else {}
    schema = {"type": _TYPES.get(kind, kind), **schema, **_restrictions(field)}
    if "elements" in field:
        schema["items"] = _field(field["elements"])
    if kind == "set":
        schema["uniqueItems"] = True
    return schema


def _restrictions(field: Mapping[str, Any]) -> Schema:
    schema: Schema = {theirs: field[ours] for ours, theirs in _SAME.items() if ours in field}
    if "between" in field:
        schema["minimum"], schema["maximum"] = field["between"]
    refused = [{"not": {"pattern": _pattern(one["pattern"])}} for one in field.get("match_none", ())]
    if refused:
        schema["allOf"] = refused
    if "match" in field:
        pattern = _pattern(field["match"])
        schema["pattern"] = f"{_VAULT_REFERENCE}|{pattern}" if field.get("referenceable") else pattern
    return schema


def _rule(conditional: Mapping[str, Any], named: Mapping[str, Mapping[str, Any]]) -> Schema:
    """Translate a `conditional`; the field that it looks at may be left out, and then has its default."""
    looked_at, wanted = conditional["if_field"], dict(conditional["if_match"])
    values = wanted.get("one_of", [wanted.get("eq")])
    condition: Schema = {"properties": {looked_at: {"enum": values}}}
    if named[looked_at].get("default") not in values:
        condition["required"] = [looked_at]
    target, then = conditional["then_field"], conditional["then_match"]
    consequence: Schema = {"properties": {target: _restrictions(then)}}
    if then.get("required"):
        consequence["required"] = [target]
    return {"if": condition, "then": consequence}


def _pattern(lua: str) -> str:
    """Translate a Lua pattern of those that the schema has: classes `%s` and `%c`, escapes, sets and anchors."""
    translated, in_set = "", False
    for part in re.findall(r"%.|.", lua):
        if part[0] == "%":
            translated += _class(part[1], in_set=in_set)
            continue
        in_set = part == "[" or (in_set and part != "]")
        translated += part
    return translated


def _class(letter: str, *, in_set: bool) -> str:
    members = {"s": r"\s", "c": r"\x00-\x1f\x7f"}.get(letter, re.escape(letter))
    return members if in_set or letter != "c" else f"[{members}]"
