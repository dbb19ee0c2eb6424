"""What Kong or the plugin refuses in the configuration of a plugin entity, with what is expected and what to do. Pure.

All of it follows from the declaration of the settings (`kong_metering/config.py`), and from the schema made of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from kong_metering import PLUGIN_NAME
from kong_metering.commands.check.entities import ENTITY_KEYS, Origin, nearest
from kong_metering.commands.check.findings import Finding, Level, told
from kong_metering.commands.check.violations import (
    UNREADABLE,
    Kind,
    Spec,
    Unreadable,
    Violation,
    fields_of,
    is_reference,
    violations,
)
from kong_metering.config import PluginConfig
from kong_metering.log import printable
from kong_metering.schema import plugin_schema

if TYPE_CHECKING:
    from kong_metering.commands.check.entities import Plugin
    from kong_metering.commands.check.findings import Path

ENTITY = fields_of(plugin_schema())
CONFIG = ENTITY["config"]
_NAMES = {"string": "a text", "integer": "a whole number", "number": "a number", "boolean": "true or false"}
_LONGEST_NAME = 80


def entity_findings(plugin: Plugin) -> Iterator[Finding]:
    """Find what is wrong in the entity around `config`."""
    if plugin.origin is not Origin.KUBERNETES:
        for key in plugin.body:
            if key not in ENTITY_KEYS:
                yield plugin.find(Level.ERROR, "unknown-field", (*plugin.path, str(key)), *_misplaced(str(key)))
    protocols = plugin.body.get("protocols")
    # The ingress controller leaves out what is null.
    if protocols is not None or ("protocols" in plugin.body and plugin.origin is not Origin.KUBERNETES):
        for found in violations(ENTITY["protocols"], protocols, (*plugin.path, "protocols")):
            yield _finding(plugin, found, found.path)


def settings_findings(plugin: Plugin) -> Iterator[Finding]:
    """Find what is wrong in `config`."""
    if isinstance(plugin.config, Unreadable):
        return
    refused = _refused(plugin)
    for found in refused:
        if found.kind is Kind.MISSING and plugin.is_partial:
            continue
        yield _finding(plugin, found, plugin.path_of(found.path))
    yield from _by_the_plugin(plugin, [found.path for found in refused])


def _refused(plugin: Plugin) -> list[Violation]:
    return list(violations(CONFIG, {} if plugin.config is None else plugin.config))


def without_refused(plugin: Plugin) -> Plugin:
    """Return the plugin with `UNREADABLE` in the place of what Kong refuses: what it would mean is no matter."""
    config = plugin.config
    for found in _refused(plugin):
        if found.kind in (Kind.TYPE, Kind.VALUE, Kind.NULL):
            config = replaced(config, found.path)
    return replace(plugin, config=config)


def replaced(value: Any, path: Path) -> Any:
    """Return a value with `UNREADABLE` where a path leads to."""
    if not path:
        return UNREADABLE
    copied: Any = list(value) if isinstance(value, list) else dict(value)
    copied[path[0]] = replaced(value[path[0]], path[1:])
    return copied


def _by_the_plugin(plugin: Plugin, known: list[Path]) -> Iterator[Finding]:
    """Find what Kong takes and the plugin refuses."""
    if not isinstance(plugin.config, Mapping):
        return
    try:
        PluginConfig.model_validate(plugin.config)
    except ValidationError as error:
        for item in error.errors(include_input=False, include_url=False):
            path = item["loc"]
            if (
                item["type"] == "missing"
                or _is_elsewhere(plugin.config, path)
                or any(_overlap(path, one) for one in known)
            ):
                continue
            problem = item["msg"].removeprefix("Value error, ")
            spec = _spec(path)
            yield plugin.find(Level.ERROR, "refused", plugin.path_of(path), problem, _set_it(spec, path))


def _is_elsewhere(config: Mapping[Any, Any], path: Path) -> bool:
    """Return whether a value is not known here: in a vault, or in a Secret."""
    value: Any = config
    for part in path:
        try:
            value = value[part]
        except (KeyError, IndexError, TypeError):
            return False
        if isinstance(value, Unreadable):
            return True
    return is_reference(value) and bool(_spec(path).get("referenceable"))


def _overlap(one: Path, other: Path) -> bool:
    shorter = min(len(one), len(other))
    return one[:shorter] == other[:shorter]


def _spec(path: Path) -> Spec:
    spec: Spec = CONFIG
    for part in path:
        spec = spec["elements"] if isinstance(part, int) else fields_of(spec).get(part, {"type": "any"})
    return spec


# ---------------------------------------------------------------------------------------------------------------- words


def _finding(plugin: Plugin, found: Violation, path: Path) -> Finding:
    problem, remedy = _WORDS[found.kind](found)
    return plugin.find(Level.ERROR, found.kind.value, path, problem, remedy)


def _unknown(found: Violation) -> tuple[str, str]:
    return _misplaced(str(found.path[-1]), found)


def _misplaced(name: str, found: Violation | None = None) -> tuple[str, str]:
    """Tell where a name that is not known here belongs."""
    here, path = ((), ()) if found is None else (found.among, found.path[:-1])
    what = f"{told(('config', *path))} has no such setting" if found else "a plugin entity has no such member"
    if name in here:
        return what, "remove it"
    if (near := nearest(name, here)) is not None:
        return what, f"is it {near}?"
    plain = name.removeprefix("config.")
    places = [place for place in _all_places() if nearest(plain.rpartition(".")[2], [place[-1]]) == place[-1]]
    exact = [place for place in places if place[-1] == plain or ".".join(place) == plain] or places
    if exact:
        return what, f"is it {told(('config', *exact[0]))}? There: {_nested(exact[0])}"
    known = here or tuple(key for key in ENTITY_KEYS if not key.startswith("_"))
    return what, f"there are: {', '.join(known)}"


def _nested(place: tuple[str, ...]) -> str:
    return "".join(f"{name}: " for name in ("config", *place)) + "..."


def _all_places(spec: Spec = CONFIG, around: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """List the names of all settings, the outermost ones first; those in lists are not meant by anybody."""
    fields = fields_of(spec)
    yield from ((*around, name) for name in fields)
    for name, field in fields.items():
        yield from _all_places(field, (*around, name))


def _missing(found: Violation) -> tuple[str, str]:
    why = f" {found.said}" if found.said else ""
    return f"is required{why}, and not set", _set_it(found.spec, found.path)


def _null(found: Violation) -> tuple[str, str]:
    """Tell of what is null, as YAML has it when all lines below its name are commented out."""
    name = next((str(part) for part in reversed(found.path) if isinstance(part, str)), "config")
    where = name if found.path[-1:] == (name,) else f"this member of {name}"
    problem = f"nothing stands below {where}, so it is null, and Kong refuses that: required field missing"
    return (
        problem,
        f"remove the line, or put something below it: {', '.join(fields_of(found.spec)) or expected(found.spec)}",
    )


def _type(found: Violation) -> tuple[str, str]:
    problem = f"expected {expected(found.spec)}, found {_found(found.value)}"
    if isinstance(found.value, str) and found.spec.get("type") in ("integer", "number", "boolean"):
        return problem, "write it without quotation marks" if _is_quoted_one(found) else _set_it(found.spec, found.path)
    if found.spec.get("type") == "string" and isinstance(found.value, (int, float)):
        return problem, f"put {_quoted(found.spec, str(found.value))}"
    if found.spec.get("type") == "array" and isinstance(found.value, (str, int, Mapping)):
        return problem, "write a list: each member in a line of its own behind `- `, or in brackets, `[...]`"
    return problem, _set_it(found.spec, found.path)


def _quoted(spec: Spec, text: str) -> str:
    """Tell what to put into quotation marks: a number as it is, or as a range, where only that is taken."""
    refused = next(violations(spec, text), None)
    if refused is None or not refused.said:
        return "it into quotation marks"
    if next(violations(spec, f"{text}-{text}"), None) is None:
        return f'a range into quotation marks: "{text}-{text}"'
    return f"it into quotation marks: {refused.said}"


def _is_quoted_one(found: Violation) -> bool:
    text = str(found.value).strip().lower()
    if found.spec.get("type") == "boolean":
        return text in ("true", "false")
    return text.lstrip("-").replace(".", "", 1).isdigit()


def _value(found: Violation) -> tuple[str, str]:
    spec = found.spec
    if "one_of" in spec:
        near = nearest(str(found.value), [str(one) for one in spec["one_of"]])
        return f"expected {expected(spec)}", f"is it {near}?" if near else _set_it(spec, found.path)
    if "between" in spec:
        return f"expected {expected(spec)}, found {found.value:,}", _set_it(spec, found.path)
    return found.said or f"expected {expected(spec)}", _set_it(spec, found.path)


_WORDS = {Kind.UNKNOWN: _unknown, Kind.MISSING: _missing, Kind.NULL: _null, Kind.TYPE: _type, Kind.VALUE: _value}


def expected(spec: Spec) -> str:
    """Tell what a setting takes."""
    if "one_of" in spec:
        return f"one of {', '.join(str(one) for one in spec['one_of'])}"
    kind = spec.get("type")
    if kind in ("array", "set"):
        return "a list"
    if kind == "record":
        return f"settings of its own: {', '.join(fields_of(spec))}"
    what = _NAMES.get(str(kind), "a value")
    if "between" in spec:
        first, last = spec["between"]
        return f"{what} from {first:,} to {last:,}"
    return what


def _found(value: Any) -> str:
    """Tell what there is; of texts only that, for one may be a secret in the wrong place."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return "a number"
    if isinstance(value, Mapping):
        return "names with values"
    return "a list" if isinstance(value, list) else "a text" if isinstance(value, str) else "something else"


def _set_it(spec: Spec, path: Path) -> str:
    name = next((part for part in reversed(path) if isinstance(part, str)), "config")
    if path and isinstance(path[-1], int):
        return f"correct this member of {name}"
    description = printable(str(spec.get("description", "")), 400)
    if spec.get("type") == "record":
        return f"write {name} with {expected(spec)}"
    return f"set {name} to {expected(spec)}" + (f": {_uncapitalised(description)}" if description else "")


def _uncapitalised(text: str) -> str:
    return text if text[1:2].isupper() else text[:1].lower() + text[1:]


def name_findings(plugin: Plugin) -> Iterator[Finding]:
    """Find a plugin whose name is nearly ours."""
    path = (*plugin.path, plugin.key)
    if plugin.name and not plugin.is_ours and is_nearly_ours(plugin.name, plugin.ours):
        name = printable(plugin.name, _LONGEST_NAME)
        unless = f", or, if the plugin server has --plugin-name {name}, check with that" if plugin.is_alike else ""
        problem, remedy = f"Kong knows no plugin {name}", f"write {plugin.ours}{unless}"
        yield plugin.find(Level.ERROR, "plugin-name", path, problem, remedy)
    if not plugin.name:
        yield plugin.find(
            Level.ERROR,
            "plugin-name",
            path,
            "it does not say which plugin it is",
            f"write {plugin.key}: {plugin.ours}",
        )


def is_nearly_ours(name: str, ours: str) -> bool:
    """Return whether somebody surely meant this plugin; a Kong with one of its own of our usual name has both."""
    return name == ours or (name != PLUGIN_NAME and nearest(name, [ours]) is not None)
