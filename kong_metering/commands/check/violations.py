"""What Kong refuses in a value, by the schema that Kong has of the plugin (`kong_metering/schema.py`). Pure.

Only what that schema uses of Kong's schema language is understood.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kong_metering.commands.check.findings import Path

Spec = Mapping[str, Any]

_REFERENCE = re.compile(r"\{vault://[^{}]+\}")
_CLASSES = {"s": r"\s", "c": r"\x00-\x1f\x7f", "d": "0-9", "a": "A-Za-z", "w": "A-Za-z0-9"}


class Unreadable:
    """Stands for a value that is elsewhere, such as in a Kubernetes Secret."""


UNREADABLE = Unreadable()


class Kind(Enum):
    """Which rule is broken."""

    UNKNOWN = "unknown-field"
    MISSING = "missing"
    NULL = "nothing-below"
    TYPE = "wrong-type"
    VALUE = "wrong-value"


@dataclass(frozen=True)
class Violation:
    """One value that is refused; `said`: why, if the schema has words for it. `among`: the fields that there are."""

    kind: Kind
    path: Path
    spec: Spec
    value: Any = None
    said: str = ""
    among: tuple[str, ...] = ()


def is_reference(value: object) -> bool:
    """Return whether a value is a vault reference."""
    return isinstance(value, str) and _REFERENCE.fullmatch(value) is not None


def fields_of(spec: Spec) -> dict[str, Spec]:
    """Return the fields of a record by their names."""
    return {name: field for entry in spec.get("fields", ()) for name, field in entry.items()}


def violations(spec: Spec, value: Any, path: Path = ()) -> Iterator[Violation]:
    """Find what is refused in a value, and in what it holds."""
    if isinstance(value, Unreadable):
        return
    if value is None:
        if spec.get("required"):
            yield Violation(Kind.NULL if _is_made(spec) else Kind.MISSING, path, spec)
    elif not _is_of_type(spec, value):
        yield Violation(Kind.TYPE, path, spec, value)
    elif spec["type"] == "record":
        yield from _in_record(spec, {} if value == [] else value, path)
    elif spec["type"] in ("array", "set"):
        for index, item in enumerate(value or ()):
            yield from violations({**spec["elements"], "required": True}, item, (*path, index))
    else:
        yield from _of_value(spec, value, path)


def _in_record(spec: Spec, value: Mapping[Any, Any], path: Path) -> Iterator[Violation]:
    fields = fields_of(spec)
    for name in value:
        if name not in fields:
            yield Violation(Kind.UNKNOWN, (*path, str(name)), spec, value[name], among=tuple(fields))
    for name, field in fields.items():
        if name in value or not _is_made(field):
            yield from violations(field, value.get(name), (*path, name))
    for check in spec.get("entity_checks", ()):
        yield from _of_check(fields, check["conditional"], value, path)


def _is_made(spec: Spec) -> bool:
    """Return whether Kong makes a value where there is none; in the place of null it makes none."""
    return "default" in spec or spec["type"] == "record"


def _of_check(
    fields: Mapping[str, Spec], rule: Mapping[str, Any], value: Mapping[Any, Any], path: Path
) -> Iterator[Violation]:
    """Find what is refused because of what another field says."""
    given = value.get(rule["if_field"], fields[rule["if_field"]].get("default"))
    if not _is_met(rule["if_match"], given):
        return
    then, match = rule["then_field"], rule["then_match"]
    target, spec = value.get(then), {**fields[then], **match}
    said = f"with {rule['if_field']}: {'null' if given is None else given}"
    if target is None:
        if match.get("required"):
            yield Violation(Kind.MISSING, (*path, then), spec, said=said)
    elif _is_of_type(spec, target):
        for found in _of_value(match, target, (*path, then)):
            yield Violation(found.kind, found.path, spec, target, found.said)


def _is_met(condition: Spec, given: Any) -> bool:
    """Return whether a value is what a check is about; Kong looks at null by `eq` alone."""
    return "eq" not in condition if given is None else next(_of_value(condition, given, ()), None) is None


def _of_value(spec: Spec, value: Any, path: Path) -> Iterator[Violation]:
    """Find the first rule that a single value breaks, as Kong does."""
    if isinstance(value, Unreadable) or (spec.get("referenceable") and is_reference(value)):
        return
    broken = next((said for said in _broken(spec, value) if said is not None), None)
    if broken is not None:
        yield Violation(Kind.VALUE, path, spec, value, broken)


def _broken(spec: Spec, value: Any) -> Iterator[str | None]:
    """Tell of each rule whether it is broken; an empty text where the schema has no words for it."""
    if "eq" in spec and value != spec["eq"]:
        yield ""
    if "one_of" in spec and value not in spec["one_of"]:
        yield ""
    if "between" in spec and not spec["between"][0] <= value <= spec["between"][1]:
        yield ""
    if isinstance(value, str) and len(value) < spec.get("len_min", 1 if spec.get("type") == "string" else 0):
        yield "is empty"
    for rule in spec.get("match_none", ()):
        if matches(rule["pattern"], value):
            yield str(rule["err"])
    if "match" in spec and not matches(spec["match"], value):
        yield str(spec.get("err", ""))


def _is_of_type(spec: Spec, value: Any) -> bool:
    kind = spec.get("type")
    if kind == "record":
        return isinstance(value, Mapping) or value == []
    if kind in ("array", "set"):
        return isinstance(value, list) or value == {}
    if kind == "boolean":
        return isinstance(value, bool)
    if kind in ("integer", "number"):
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return is_number and (kind == "number" or float(value).is_integer())
    return isinstance(value, str)


def matches(pattern: str, text: str) -> bool:
    """Match as Lua does, for the patterns that our schema has: classes of characters, sets, anchors, `*`, `+`, `?`."""
    return re.search(_as_regular_expression(pattern), text) is not None


def _as_regular_expression(pattern: str) -> str:
    made, in_set, rest = "", False, iter(pattern)
    for char in rest:
        if char == "%":
            escaped = next(rest)
            inner = _CLASSES.get(escaped)
            made += re.escape(escaped) if inner is None else inner if in_set or escaped == "s" else f"[{inner}]"
        else:
            in_set = (in_set or char == "[") and char != "]"
            made += r"\Z" if char == "$" and not in_set else char
    return made
