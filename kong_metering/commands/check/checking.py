"""A whole file: what it is, and all that is found in it. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kong_metering.commands.check import documents, kubernetes
from kong_metering.commands.check.entities import (
    Declared,
    Origin,
    is_body,
    is_declarative,
    of_body,
    of_config,
    of_declarative,
)
from kong_metering.commands.check.findings import Finding, Level
from kong_metering.commands.check.meaning import meaning_findings
from kong_metering.commands.check.placeholders import without_unfilled
from kong_metering.commands.check.scopes import scope_findings
from kong_metering.commands.check.settings import (
    CONFIG,
    entity_findings,
    is_nearly_ours,
    name_findings,
    settings_findings,
    without_refused,
)
from kong_metering.commands.check.violations import fields_of
from kong_metering.log import printable

if TYPE_CHECKING:
    from kong_metering.commands.check.documents import Document, Text
    from kong_metering.commands.check.entities import Plugin

_LONGEST_NAME = 80
_VERSIONS = ("1.1", "2.1", "3.0")
# Members of a kong.yaml that only decK knows.
_DECKS_OWN = ("_info", "_konnect", "_workspace", "_plugin_configs")


@dataclass(frozen=True)
class Checked:
    """What came of a file: what was found, how many metering plugins there are, and whose file it is, if that shows."""

    findings: tuple[Finding, ...]
    plugins: int = 0
    tool: str | None = None


def check_text(text: str, environment: Mapping[str, str], ours: str) -> Checked:
    """Check a kong.yaml, a body for the Admin API, or manifests of Kubernetes; `ours` is what the plugin is called."""
    read = documents.read(text, environment)
    if any(one.level is Level.ERROR and one.rule == "syntax" for one in read.findings):
        return Checked(read.findings)
    found = list(read.findings)
    objects = [document for document in read.documents if kubernetes.is_manifest(document.value)]
    others = [document for document in read.documents if document not in objects]
    plugins = []
    for document in others:
        declared = _declared(document, ours)
        found += _document_findings(document, declared)
        plugins += declared.plugins if declared else []
    if objects:
        declared = Declared(ours, kubernetes.plugins_of(kubernetes.manifests(objects), ours))
        found += _manifest_findings(kubernetes.manifests(objects), declared)
        plugins += declared.plugins
    count = sum(plugin.is_ours for plugin in _once(plugins))
    if not count and not any(one.level is Level.ERROR for one in found):
        found += _nothing(read, others, _once(plugins), ours)
    return Checked(tuple(found), count, _tool(read, objects))


def plugins_in(text: str, environment: Mapping[str, str], ours: str) -> list[Plugin]:
    """Return the metering plugins of a file and those that look like one, without what is not filled in."""
    read = documents.read(text, environment)
    objects = [document for document in read.documents if kubernetes.is_manifest(document.value)]
    others = [_declared(document, ours) for document in read.documents if document not in objects]
    found = [plugin for declared in others if declared for plugin in declared.plugins]
    found += kubernetes.plugins_of(kubernetes.manifests(objects), ours)
    return [without_unfilled(plugin)[1] for plugin in _once(found) if plugin.is_ours or plugin.is_alike]


def _tool(read: Text, objects: Sequence[Document]) -> str | None:
    if objects:
        return "the Kubernetes ingress controller"
    is_decks = any(
        isinstance(one.value, Mapping) and not one.value.keys().isdisjoint(_DECKS_OWN) for one in read.documents
    )
    return "decK" if read.deck_variables or is_decks else None


def _declared(document: Document, ours: str) -> Declared | None:
    value = document.value
    if is_declarative(value):
        return of_declarative(document, ours)
    if is_body(value):
        return of_body(document, ours)
    if isinstance(value, Mapping) and not set(fields_of(CONFIG)).isdisjoint(value):
        return of_config(document, ours)
    return None


def _nothing(read: Text, others: Sequence[Document], plugins: Sequence[Plugin], ours: str) -> Iterator[Finding]:
    alike = {plugin.name: plugin for plugin in reversed(plugins) if plugin.is_alike}
    if not read.documents:
        yield Finding(Level.ERROR, "empty", (), "there is nothing in it", "is it the right file?")
        return
    for name, plugin in alike.items():
        shown = printable(name, _LONGEST_NAME)
        problem = f"no plugin {ours} is in it, and {shown} is configured like one: it was not looked at"
        remedy = f"if the plugin server has --plugin-name {shown}, check with that; else write {ours}"
        yield plugin.find(Level.WARNING, "no-metering-plugin", (*plugin.path, plugin.key), problem, remedy)
    if not alike and (plugins or not any(_declared(document, ours) is None for document in others)):
        problem = f"no plugin {ours} is in it, so nothing is metered by it"
        yield Finding(Level.WARNING, "no-metering-plugin", (), problem, "is it the right file?")


def _document_findings(document: Document, declared: Declared | None) -> Iterator[Finding]:
    if declared is None:
        yield Finding(
            Level.ERROR,
            "unknown-document",
            (),
            "it is neither a kong.yaml (with `_format_version` and `plugins`), nor a body for POST /plugins (with "
            "`name` and `config`), nor a manifest of Kubernetes (with `kind`)",
            "is it the right file? kong.conf is checked with --kong-conf, Terraform by `terraform plan`",
            line=document.line(()),
        )
        return
    for path, what in declared.malformed:
        line = document.line(path)
        yield Finding(Level.ERROR, "wrong-type", path, f"expected {what}", "look at the indentation", line=line)
    if is_declarative(document.value):
        yield from _version_findings(document)
    for plugin in declared.plugins:
        yield from _plugin_findings(plugin)
    yield from scope_findings(declared)


def _version_findings(document: Document) -> Iterator[Finding]:
    version: Any = document.value.get("_format_version")
    if version in _VERSIONS:
        return
    level = Level.WARNING if version is None else Level.ERROR
    problem = (
        "is not set; a Kong without database does not start with it"
        if version is None
        else (f"expected one of the texts {', '.join(_VERSIONS)}")
    )
    path = ("_format_version",)
    remedy = 'write `_format_version: "3.0"`, with quotation marks: without them it is a number'
    yield Finding(level, "format-version", path, problem, remedy, line=document.line(path))


def _manifest_findings(objects: Sequence[kubernetes.Manifest], declared: Declared) -> Iterator[Finding]:
    attached = {name for manifest in objects for name in manifest.attached}
    for manifest in objects:
        if manifest.kind in kubernetes.KINDS and _is_about_us(manifest, declared.ours):
            yield from kubernetes.manifest_findings(manifest, manifest.name in attached)
    for plugin in _once(declared.plugins):
        yield from _plugin_findings(plugin)
    yield from scope_findings(declared)


def _is_about_us(manifest: kubernetes.Manifest, ours: str) -> bool:
    name = manifest.body.get("plugin")
    return not isinstance(name, str) or is_nearly_ours(name, ours)


def _once(plugins: Sequence[Plugin]) -> list[Plugin]:
    """Leave out what is there again for another scope."""
    seen: dict[int, Plugin] = {}
    for plugin in plugins:
        seen.setdefault(id(plugin.body), plugin)
    return list(seen.values())


def _plugin_findings(plugin: Plugin) -> Iterator[Finding]:
    yield from name_findings(plugin)
    if not plugin.is_ours:
        return
    unfilled, plugin = without_unfilled(plugin)
    yield from unfilled
    yield from entity_findings(plugin)
    yield from settings_findings(plugin)
    yield from meaning_findings(without_refused(plugin))
    if not plugin.is_enabled:
        key = "disabled" if plugin.origin is Origin.KUBERNETES else "enabled"
        problem = "the plugin is switched off, and meters nothing"
        yield plugin.find(Level.NOTE, "switched-off", (*plugin.path, key), problem, f"remove {key}")
