"""Kong's schemas: defaults are filled in and values checked by a definition that is data.

The definitions come as Kong has them (`{"fields": [{name: {...}}], "entity_checks": [...]}`): those of an
external plugin out of its dump, those of the entities and bundled plugins out of `typedefs`. In a value,
an absent member is Lua's nil and None is Kong's null.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from .luapattern import lua_match
from .values import Table, Value, format_number
from .vault import is_reference

if TYPE_CHECKING:
    from collections.abc import Callable

Spec: TypeAlias = Table
Errors: TypeAlias = "dict[Value, Value]"

REQUIRED = "required field missing"
UNKNOWN = "unknown field"
_REQUIRED_FOR_CHECK = "field required for entity check"


# In Lua an empty list and an empty object are the same table, and Kong takes either for the other.
_EMPTY: dict[str, Callable[[], Value]] = {"record": dict, "array": list, "set": list}


class _Missing:
    """Stands for Lua's nil where None already stands for null."""


_MISSING = _Missing()


@dataclass(frozen=True)
class Schema:
    """A record's definition: fields by name, and rules over several of them."""

    fields: dict[str, Spec]
    entity_checks: tuple[dict[str, Value], ...] = ()

    @classmethod
    def of(cls, definition: Table) -> Schema:
        """Read a definition as Kong writes it."""
        fields = {name: spec for entry in definition.get("fields") or [] for name, spec in entry.items()}
        return cls(fields, tuple(definition.get("entity_checks") or ()))

    def fill(self, data: Table) -> Table:
        """Return a copy of `data` with every default in it; what is unset is None, as in Kong's API."""
        filled = copy.deepcopy(data)
        for name, spec in self.fields.items():
            value = _fill(spec, filled.get(name, _MISSING))
            if not isinstance(value, _Missing):
                filled[name] = value
        return filled

    def validate(self, data: Table) -> Errors:
        """Check filled data; the result is empty when all is well, else Kong's messages by field."""
        errors: Errors = {}
        for name, value in data.items():
            spec = self.fields.get(name)
            error = UNKNOWN if spec is None else validate_field(spec, value)
            if error is not None:
                errors[name] = error
        for name, spec in self.fields.items():
            if spec.get("required") is True and name not in data:
                errors[name] = REQUIRED
        for check in self.entity_checks:
            for name, rule in check.items():
                _run_check(self, name, rule, data, errors)
        return errors

    def find(self, path: str) -> Spec:
        """Return the definition of a field by its dotted path; empty when there is none."""
        head, dot, tail = path.partition(".")
        spec = self.fields.get(head, {})
        return Schema.of(spec).find(tail) if dot else spec


def _fill(spec: Spec, value: Value) -> Value:
    if value in ([], {}) and spec.get("type") in _EMPTY:
        value = _EMPTY[spec["type"]]()
    if spec.get("type") == "record":
        return _fill_record(spec, value)
    if isinstance(value, _Missing):
        return _default(spec)
    if isinstance(value, list):
        filled = [_fill(spec.get("elements", {}), member) for member in value]
        return list(dict.fromkeys(filled)) if spec.get("type") == "set" and _hashable(filled) else filled
    if isinstance(value, dict) and spec.get("type") == "map":
        return {key: _fill(spec.get("values", {}), member) for key, member in value.items()}
    return value


def _fill_record(spec: Spec, value: Value) -> Value:
    if isinstance(value, _Missing):
        value = _default(spec)
    return Schema.of(spec).fill(value) if isinstance(value, dict) else value


def _default(spec: Spec) -> Value:
    if spec.get("default") is not None:
        return copy.deepcopy(spec["default"])
    if spec.get("required") is not True:
        return None
    return {} if spec.get("type") == "record" else _MISSING


def _hashable(values: list[Value]) -> bool:
    return not any(isinstance(value, (dict, list)) for value in values)


def validate_field(spec: Spec, value: Value) -> Value:
    """Return what is wrong with a value: a message, messages by member, or None when nothing is."""
    if value is None:
        return _validate_null(spec)
    if "eq" in spec and spec["eq"] is None:
        return spec.get("err") or "value must be null"
    kind = spec.get("type", "any")
    error = _TYPES[kind](spec, value) if kind in _TYPES else f"invalid type: {kind}"
    if error is not None or (kind == "string" and spec.get("referenceable") and is_reference(value)):
        return error
    return _validate_rules(spec, value)


def _validate_null(spec: Spec) -> str | None:
    if "ne" in spec and spec["ne"] is None:
        return spec.get("err") or "value must not be null"
    if spec.get("eq") is not None:
        return f"value must be {lua_text(spec['eq'])}"
    return REQUIRED if spec.get("required") else None


def _validate_rules(spec: Spec, value: Value) -> str | None:
    for name, rule in _RULES.items():
        argument = spec.get(name)
        if name == "len_min" and argument is None and spec.get("type") == "string":
            argument = 1
        if argument is None:
            continue
        error = rule(value, argument)
        if error is not None:
            return str(spec.get("err") or error)
    return None


def lua_text(value: Value) -> str:
    """Return a value as Lua's `tostring` shows it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return format_number(value) if isinstance(value, (int, float)) else str(value)


def _is_number(value: Value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_array(spec: Spec, value: Value) -> Value:
    if not isinstance(value, list):
        return "expected a set" if spec["type"] == "set" else "expected an array"
    elements = {**spec.get("elements", {"type": "any"}), "required": True}
    errors = [validate_field(elements, member) for member in value]
    while errors and errors[-1] is None:
        errors.pop()
    return errors or None


def _check_map(spec: Spec, value: Value) -> Value:
    if not isinstance(value, dict):
        return "expected a map"
    for key, member in value.items():
        error = validate_field({**spec.get("keys", {"type": "any"}), "required": True}, key)
        error = error or validate_field({**spec.get("values", {"type": "any"}), "required": True}, member)
        if error:
            return error
    return None


def _check_record(spec: Spec, value: Value) -> Value:
    if not isinstance(value, dict):
        return "expected a record"
    schema = Schema.of(spec)
    return schema.validate(schema.fill(value)) or None


def _check_foreign(_spec: Spec, value: Value) -> Value:
    return None if isinstance(value, dict) else "expected a record"


def _plain_check(message: str, test: Callable[[Value], bool]) -> Callable[[Spec, Value], Value]:
    return lambda _spec, value: None if test(value) else message


_TYPES: dict[str, Callable[[Spec, Value], Value]] = {
    "array": _check_array,
    "set": _check_array,
    "map": _check_map,
    "record": _check_record,
    "foreign": _check_foreign,
    "string": _plain_check("expected a string", lambda value: isinstance(value, str)),
    "number": _plain_check("expected a number", _is_number),
    "boolean": _plain_check("expected a boolean", lambda value: isinstance(value, bool)),
    "integer": _plain_check("expected an integer", lambda value: _is_number(value) and float(value).is_integer()),
    "any": lambda _spec, _value: None,
}


def _rule_one_of(value: Value, options: list[Value]) -> str | None:
    return None if value in options else f"expected one of: {', '.join(map(lua_text, options))}"


def _rule_not_one_of(value: Value, options: list[Value]) -> str | None:
    return f"must not be one of: {', '.join(map(lua_text, options))}" if value in options else None


def _rule_between(value: float, limits: list[float]) -> str | None:
    low, high = limits
    return None if low <= value <= high else f"value should be between {int(low)} and {int(high)}"


def _rule_match(value: str, pattern: str) -> str | None:
    return None if lua_match(value, pattern) is not None else f"invalid value: {value}"


def _rule_match_all(value: str, rules: list[Table]) -> str | None:
    return next((rule["err"] for rule in rules if lua_match(value, rule["pattern"]) is None), None)


def _rule_match_none(value: str, rules: list[Table]) -> str | None:
    return next((rule["err"] for rule in rules if lua_match(value, rule["pattern"]) is not None), None)


def _rule_match_any(value: str, rule: Table) -> str | None:
    return None if any(lua_match(value, one) is not None for one in rule["patterns"]) else rule["err"]


def _size(value: Value) -> int:
    return len(value.encode()) if isinstance(value, str) else len(value)


# In Kong's order: the first rule that a value breaks gives the message.
_RULES: dict[str, Callable[..., str | None]] = {
    "eq": lambda value, wanted: None if value == wanted else f"value must be {lua_text(wanted)}",
    "ne": lambda value, other: f"value must not be {lua_text(value)}" if value == other else None,
    "not_one_of": _rule_not_one_of,
    "one_of": _rule_one_of,
    "gt": lambda value, limit: None if value > limit else f"value must be greater than {lua_text(limit)}",
    "between": _rule_between,
    "len_eq": lambda value, size: None if _size(value) == size else f"length must be {size}",
    "len_min": lambda value, size: None if _size(value) >= size else f"length must be at least {size}",
    "len_max": lambda value, size: None if _size(value) <= size else f"length must be at most {size}",
    "starts_with": lambda value, head: None if value.startswith(head) else f"should start with: {head}",
    "not_match": lambda value, rule: f"invalid value: {value}" if lua_match(value, rule) is not None else None,
    "match_none": _rule_match_none,
    "match": _rule_match,
    "match_all": _rule_match_all,
    "match_any": _rule_match_any,
    "contains": lambda value, wanted: None if wanted in value else f"expected to contain: {wanted}",
    "custom_validator": lambda value, test: test(value),
}


def get_path(data: Value, path: str) -> Value:
    """Return a member by its dotted path; None when any part of the path is absent."""
    for name in path.split("."):
        data = data.get(name) if isinstance(data, dict) else None
    return data


def _set_path(data: Errors, path: str, value: Value) -> None:
    head, dot, tail = path.partition(".")
    if not dot:
        data[head] = value
        return
    inner = data.setdefault(head, {})
    if isinstance(inner, dict):
        _set_path(inner, tail, value)


def _is_filled(value: Value) -> bool:
    return value is not None and value not in ("", [], {})


def _quoted(names: list[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)


def _run_check(schema: Schema, name: str, rule: Value, data: Table, errors: Errors) -> None:
    check = _CHECKS.get(name)
    if check is None:
        return
    involved = rule if isinstance(rule, list) else [rule["if_field"], rule.get("then_field", rule["if_field"])]
    if any(_is_resolved_later(schema.find(path), get_path(data, path)) for path in involved):
        return
    error = check(schema, rule, data, errors)
    if error is not None:
        errors.setdefault("@entity", []).append(error)


def _is_resolved_later(spec: Spec, value: Value) -> bool:
    return bool(spec.get("referenceable")) and is_reference(value)


def _conditional(schema: Schema, rule: Table, data: Table, errors: Errors) -> str | None:
    if_field, then_field = rule["if_field"], rule["then_field"]
    if not _exists(data, if_field):
        _set_path(errors, if_field, _REQUIRED_FOR_CHECK)
        return None
    if validate_field({**schema.find(if_field), **rule["if_match"]}, get_path(data, if_field)) is not None:
        return None
    error = validate_field({**schema.find(then_field), **rule["then_match"]}, get_path(data, then_field))
    if error is None:
        return None
    _set_path(errors, then_field, error)
    message = f"failed conditional validation given value of field '{if_field}'"
    return str(rule.get("then_err") or message).replace("%s", if_field)


def _exists(data: Value, path: str) -> bool:
    head, dot, tail = path.partition(".")
    if not isinstance(data, dict) or head not in data:
        return False
    return _exists(data[head], tail) if dot else True


def _filled_names(data: Table, names: list[str]) -> list[str]:
    return [name for name in names if _is_filled(get_path(data, name))]


def _at_least_one_of(_schema: Schema, names: list[str], data: Table, _errors: Errors) -> str | None:
    message = f"at least one of these fields must be non-empty: {_quoted(names)}"
    return None if _filled_names(data, names) else message


def _only_one_of(_schema: Schema, names: list[str], data: Table, _errors: Errors) -> str | None:
    message = f"exactly one of these fields must be non-empty: {_quoted(names)}"
    return None if len(_filled_names(data, names)) == 1 else message


def _mutually_required(_schema: Schema, names: list[str], data: Table, _errors: Errors) -> str | None:
    message = f"all or none of these fields must be set: {_quoted(names)}"
    return None if len(_filled_names(data, names)) in (0, len(names)) else message


def _mutually_exclusive(_schema: Schema, names: list[str], data: Table, _errors: Errors) -> str | None:
    message = f"only one or none of these fields must be set: {_quoted(names)}"
    return None if len(_filled_names(data, names)) <= 1 else message


_CHECKS: dict[str, Callable[[Schema, Value, Table, Errors], str | None]] = {
    "conditional": _conditional,
    "at_least_one_of": _at_least_one_of,
    "only_one_of": _only_one_of,
    "mutually_required": _mutually_required,
    "mutually_exclusive": _mutually_exclusive,
}


def violation_message(errors: Errors) -> str:
    """Return the one-line text that Kong makes of the errors, for the `message` of its answer."""
    parts = [str(message) for message in errors.get("@entity", [])]
    for name in sorted(key for key in errors if key != "@entity"):
        error = errors[name]
        if isinstance(error, dict):
            parts += [f"{name}.{sub}: {_pretty(error[sub])}" for sub in sorted(error, key=str)]
        elif isinstance(error, list):
            parts += [f"{name}.{i}: {_pretty(sub)}" for i, sub in enumerate(error, 1) if sub is not None]
        else:
            parts.append(f"{name}: {error}")
    if len(parts) == 1:
        return f"schema violation ({parts[0]})"
    return f"{len(parts)} schema violations ({'; '.join(parts)})"


def _pretty(error: Value, depth: int = 0) -> str:
    """Return nested errors the way that Penlight's pretty printer shows a Lua table."""
    if not isinstance(error, (dict, list)):
        return f'"{error}"' if depth else str(error)
    indent = "  " * (depth + 1)
    if isinstance(error, list):
        members = [_pretty(member, depth + 1) for member in error if member is not None]
    else:
        members = [f"{name} = {_pretty(member, depth + 1)}" for name, member in error.items()]
    return "{\n" + ",\n".join(indent + member for member in members) + "\n" + "  " * depth + "}"
