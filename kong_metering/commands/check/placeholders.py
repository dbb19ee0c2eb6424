"""Texts that stand where somebody or something was to put a value: variables of the shell, of decK, templates. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kong_metering.commands.check.documents import left_unfilled
from kong_metering.commands.check.entities import Origin
from kong_metering.commands.check.findings import Level
from kong_metering.commands.check.settings import CONFIG, replaced
from kong_metering.commands.check.violations import Spec, fields_of, is_reference
from kong_metering.log import printable

if TYPE_CHECKING:
    from kong_metering.commands.check.entities import Plugin
    from kong_metering.commands.check.findings import Finding, Path

Words = tuple[Level, str, str]

_SHELL = re.compile(r"""['"]?\$[({]?([A-Za-z_]\w*)[)}]?['"]?""")
_SHELL_INSIDE = re.compile(r"\$\{?([A-Z_][A-Z0-9_]*)\}?")
_DECK = re.compile(r"DECK_[A-Z0-9_]+")
_TERRAFORM = re.compile(r"(?:\$\{)?(?:var|local|data)\.\w+(?:\.\w+)*\}?")
_TEMPLATE = re.compile(r"\{\{.*\}\}|<[^<>]+>|\[\[.*\]\]|%\w+%")
_BRACES = re.compile(r"[{<][^{}<>]*[}>]")
_NO_TOKEN = re.compile(
    r"(?i)(?:your|my)[-_ ]?(?:api[-_ ]?)?(?:token|key)|change[-_ ]?me|x{3,}|todo|\.{3,}|token|secret"
)
_VAULT_LIKE = re.compile(r"[{<$]*vault(?::/|\b).*", re.IGNORECASE)
# Deeper, no setting is.
_DEEPEST = 8
_FILLED_IN_BY = {
    Origin.DECLARATIVE: 'with decK write ${{{{ env "DECK_{0}" }}}}; without it the value, or for a token '
    "{{vault://env/...}}",
    Origin.ADMIN_API: "the shell fills in ${0} only outside of single quotation marks: in curl's --data '...' write "
    '"\'"${0}"\'"; or write the value',
    Origin.KUBERNETES: "Kubernetes fills in nothing: hand the manifest to `kubectl apply -f -` by way of the shell "
    '(`echo "..."`), or put the value into a Secret and use configPatches',
}


def without_unfilled(plugin: Plugin) -> tuple[list[Finding], Plugin]:
    """Find such texts in a plugin's configuration; give the plugin with `UNREADABLE` in their places."""
    found: list[Finding] = []
    config = plugin.config
    for path, text in list(_texts(config, (), set())):
        words = _of_text(plugin.origin, path, text)
        if words is not None:
            level, problem, remedy = words
            found.append(plugin.find(level, "not-filled-in", plugin.path_of(path), problem, remedy))
            config = replaced(config, path)
    return found, replace(plugin, config=config)


def _texts(value: Any, path: Path, seen: set[int]) -> Iterator[tuple[Path, str]]:
    """Find all texts; what an alias of YAML has put in several places, in the first one."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, (Mapping, list)) and len(path) < _DEEPEST and id(value) not in seen:
        seen.add(id(value))
        for part, inner in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _texts(inner, (*path, part), seen)


def _of_text(origin: Origin, path: Path, text: str) -> Words | None:
    return _of_variable(origin, path, text) or _of_reference(path, text) or _of_template(path, text)


def _of_variable(origin: Origin, path: Path, text: str) -> Words | None:
    name = left_unfilled(text)
    if name is not None:
        return _of_deck(origin, printable(name, 80))
    if _DECK.fullmatch(text):
        problem = f"the name of the variable {printable(text, 80)} stands there, and not its value"
        return Level.ERROR, problem, f'with decK write ${{{{ env "{printable(text, 80)}" }}}}, else the value'
    match = _SHELL.fullmatch(text) or (_SHELL_INSIDE.search(text) if path == ("ingest_endpoint",) else None)
    if match is None:
        return None
    name = printable(match[1], 80)
    return Level.ERROR, f"${name} stands there as it is: Kong fills in no variables", _FILLED_IN_BY[origin].format(name)


def _of_deck(origin: Origin, name: str) -> Words:
    if origin is not Origin.DECLARATIVE:
        return Level.ERROR, f"decK's {name} stands there as it is: only decK fills it in", "write the value"
    problem = f"decK's variable {name} is not set here; Kong itself takes it for the value as it is written"
    remedy = (
        f"set {name} in the environment and check again; for a Kong without database let `deck file render FILE "
        "--populate-env-vars` fill it in first, or write the value"
    )
    return Level.WARNING, problem, remedy


def _of_reference(path: Path, text: str) -> Words | None:
    is_one = is_reference(text)
    if is_one and not _takes_references(path):
        problem = "Kong resolves no vault reference in this setting, and takes it for the value"
        return Level.ERROR, problem, "write the value"
    if not is_one and _VAULT_LIKE.fullmatch(text):
        problem = "it is nearly a vault reference, and Kong takes it for the value"
        return Level.ERROR, problem, "write it as {vault://env/om-token}: in braces, with two slashes and a name"
    return None


def _takes_references(path: Path) -> bool:
    spec: Spec = CONFIG
    for part in path:
        spec = spec.get("elements", {}) if isinstance(part, int) else fields_of(spec).get(part, {})
    return bool(spec.get("referenceable"))


def _of_template(path: Path, text: str) -> Words | None:
    if is_reference(text):
        return None
    if _TERRAFORM.fullmatch(text):
        remedy = "leave the quotation marks out in Terraform; elsewhere write the value"
        return Level.ERROR, "an expression of Terraform stands there as a text", remedy
    is_token, is_url = path == ("api_token",), path == ("ingest_endpoint",)
    if _TEMPLATE.fullmatch(text) or (is_token and _NO_TOKEN.fullmatch(text)):
        return Level.ERROR, "a placeholder stands there, and not the value", "write the value"
    if is_url and _BRACES.search(text):
        return (
            Level.ERROR,
            "a placeholder is left in it",
            "write the value in its place: for a region of Konnect, us or eu",
        )
    return None
