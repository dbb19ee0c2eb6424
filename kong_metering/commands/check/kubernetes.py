"""Which plugin entities Kubernetes manifests declare, and to what they are attached. Pure.

Values in Secrets are not read: `configFrom` and `configPatches` are looked at, and what they give is not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from kong_metering.commands.check.entities import Origin, Plugin, Scope, nearest
from kong_metering.commands.check.findings import Finding, Level, Path
from kong_metering.commands.check.violations import UNREADABLE
from kong_metering.log import printable

if TYPE_CHECKING:
    from kong_metering.commands.check.documents import Document

KINDS = ("KongPlugin", "KongClusterPlugin")
API_VERSION = "configuration.konghq.com/v1"
_KEYS = (
    "apiVersion",
    "kind",
    "metadata",
    "plugin",
    "config",
    "configFrom",
    "configPatches",
    "disabled",
    "instance_name",
    "protocols",
    "ordering",
    "run_on",
    "consumerRef",
    "status",
)
_ATTACHED = "konghq.com/plugins"
_INGRESS_CLASS = "kubernetes.io/ingress.class"


@dataclass(frozen=True)
class Manifest:
    """One object of a manifest; `path` leads to it in its document, where that is a list."""

    document: Document
    path: Path
    body: Mapping[str, Any]

    @property
    def kind(self) -> str:
        """What it is."""
        return str(self.body.get("kind", ""))

    @property
    def name(self) -> str:
        """How it is called."""
        name = self._metadata.get("name")
        return name if isinstance(name, str) else ""

    @property
    def label(self) -> str:
        """Which of the documents of a file it is, for people."""
        return printable(f"{self.kind}/{self.name}" if self.name else self.kind, 100)

    @property
    def _metadata(self) -> Mapping[str, Any]:
        metadata = self.body.get("metadata")
        return metadata if isinstance(metadata, Mapping) else {}

    def metadata(self, group: str) -> Mapping[str, Any]:
        """Return its annotations or its labels."""
        found = self._metadata.get(group)
        return found if isinstance(found, Mapping) else {}

    @property
    def attached(self) -> list[str]:
        """The plugins that its annotation names."""
        names = self.metadata("annotations").get(_ATTACHED)
        return [name.strip().rpartition(":")[2] for name in names.split(",")] if isinstance(names, str) else []

    def finding(self, level: Level, rule: str, path: Path, problem: str, remedy: str) -> Finding:
        """Tell something of a part of it."""
        whole = (*self.path, *path)
        return Finding(level, rule, whole, problem, remedy, self.label, self.document.line(whole))


def is_manifest(value: Any) -> bool:
    """Return whether a document is one of Kubernetes."""
    return isinstance(value, Mapping) and "kind" in value and ("apiVersion" in value or value["kind"] in KINDS)


def manifests(documents: Sequence[Document]) -> list[Manifest]:
    """List the objects of all documents, those of lists one by one."""
    found = []
    for document in documents:
        items = document.value.get("items") if document.value.get("kind") == "List" else None
        if isinstance(items, list):
            found += [
                Manifest(document, ("items", index), item)
                for index, item in enumerate(items)
                if isinstance(item, Mapping)
            ]
        else:
            found.append(Manifest(document, (), document.value))
    return found


def plugins_of(objects: Sequence[Manifest], ours: str) -> list[Plugin]:
    """Read which plugins are declared, each once for each object that it is attached to.

    `ours` is what the metering plugin is called.
    """
    found = []
    for manifest in objects:
        if manifest.kind in KINDS:
            plugin = _plugin(manifest, ours)
            scopes = [
                Scope(((_scope_kind(other.kind), other.name),)) for other in objects if manifest.name in other.attached
            ]
            is_global = manifest.kind == "KongClusterPlugin" and manifest.metadata("labels").get("global") == "true"
            found += [replace(plugin, scope=scope) for scope in ([Scope()] if is_global else scopes)]
            if not is_global and not scopes:
                found.append(replace(plugin, scope=Scope((("object", "that is not in this file"),))))
    return found


def _scope_kind(kind: str) -> str:
    return {"Service": "service", "KongConsumer": "consumer"}.get(kind, "route")


def _plugin(manifest: Manifest, ours: str) -> Plugin:
    body = manifest.body
    return Plugin(
        Origin.KUBERNETES,
        manifest.document,
        manifest.path,
        body,
        ours,
        key="plugin",
        config=_config(body),
        elsewhere=_patched(manifest),
        label=manifest.label,
        is_enabled=body.get("disabled") is not True,
    )


def _config(body: Mapping[str, Any]) -> Any:
    """Put in the place of what Secrets hold that it cannot be read."""
    if "configFrom" in body:
        return UNREADABLE
    config, patches = body.get("config"), body.get("configPatches")
    if not isinstance(patches, list) or not (config is None or isinstance(config, Mapping)):
        return config
    patched: dict[str, Any] = dict(config or {})
    for patch in patches:
        names = _pointer(patch)
        if names:
            inner = patched
            for name in names[:-1]:
                deeper = inner.get(name)
                inner[name] = dict(deeper) if isinstance(deeper, Mapping) else {}
                inner = inner[name]
            inner[names[-1]] = UNREADABLE
    return patched


def _patched(manifest: Manifest) -> dict[str, Path]:
    """Tell where the settings are named that come out of Secrets."""
    patches = manifest.body.get("configPatches")
    pointers = [_pointer(patch) for patch in patches] if isinstance(patches, list) else []
    return {
        names[0]: (*manifest.path, "configPatches", index, "path")
        for index, names in enumerate(pointers)
        if len(names) == 1
    }


def _pointer(patch: Any) -> list[str]:
    path = patch.get("path") if isinstance(patch, Mapping) else None
    return path[1:].split("/") if isinstance(path, str) and path.startswith("/") and path[1:] else []


# -------------------------------------------------------------------------------------------------------- what is wrong


def manifest_findings(manifest: Manifest, is_attached: bool) -> Iterator[Finding]:  # noqa: FBT001
    """Find what is wrong in an object around the plugin's configuration."""
    body, finding = manifest.body, manifest.finding
    if body.get("apiVersion") != API_VERSION:
        yield finding(
            Level.ERROR, "api-version", ("apiVersion",), f"a {manifest.kind} is of {API_VERSION}", "write that"
        )
    if not manifest.name:
        yield finding(Level.ERROR, "manifest-name", ("metadata", "name"), "it has no name", "give it one")
    for key in body:
        if key not in _KEYS:
            near = nearest(str(key), _KEYS)
            what = "its members stand at the top, beside `kind`" if key == "spec" else f"is it {near}?" if near else ""
            remedy = what or f"the members of a {manifest.kind} are {', '.join(_KEYS)}"
            yield finding(Level.ERROR, "unknown-field", (str(key),), f"a {manifest.kind} has no such member", remedy)
    yield from _secret_findings(manifest)
    yield from _class_findings(manifest, is_attached=is_attached)


def _secret_findings(manifest: Manifest) -> Iterator[Finding]:
    body, finding = manifest.body, manifest.finding
    if "configFrom" in body:
        for other in ("config", "configPatches"):
            if other in body:
                yield finding(
                    Level.ERROR,
                    "two-configurations",
                    (other,),
                    f"with configFrom there can be no {other}: the ingress controller refuses both",
                    "keep config with configPatches for the token, or configFrom alone",
                )
        yield finding(
            Level.NOTE,
            "secret-not-read",
            ("configFrom",),
            "the configuration is in a Secret, which is not read here",
            "check it with `kubectl get secret NAME -o jsonpath='{.data.KEY}' | base64 -d | kong-metering check -`",
        )
    patches = body.get("configPatches")
    for index, patch in enumerate(patches if isinstance(patches, list) else ()):
        path: Path = ("configPatches", index)
        if not _pointer(patch):
            yield finding(
                Level.ERROR,
                "patch-path",
                (*path, "path"),
                "it does not say which setting it sets",
                "write a path from config on with slashes, such as `path: /api_token`",
            )
        else:
            yield finding(
                Level.NOTE,
                "secret-not-read",
                path,
                f"the value of {printable('.'.join(_pointer(patch)), 80)} is in a Secret, which is not read here",
                "the Secret's value is JSON: a token in it has quotation marks around it, and no line break",
            )


def _class_findings(manifest: Manifest, *, is_attached: bool) -> Iterator[Finding]:
    is_global = "global" in manifest.metadata("labels")
    value, finding = manifest.metadata("labels").get("global"), manifest.finding
    if is_global and value != "true":
        yield finding(
            Level.ERROR,
            "global-label",
            ("metadata", "labels", "global"),
            'expected the text "true", and found something else',
            "write `global: 'true'`, with quotation marks: Kubernetes takes no other values in labels",
        )
    if manifest.kind == "KongPlugin" and is_global:
        yield finding(
            Level.ERROR,
            "global-label",
            ("metadata", "labels", "global"),
            "a KongPlugin is never global, whatever its labels say",
            "make it a KongClusterPlugin, or attach it to a service, an ingress or a consumer",
        )
    if manifest.kind == "KongClusterPlugin" and _INGRESS_CLASS not in manifest.metadata("annotations"):
        yield finding(
            Level.WARNING,
            "ingress-class",
            ("metadata", "annotations"),
            f"without the annotation {_INGRESS_CLASS} the ingress controller does not look at it",
            f"add `{_INGRESS_CLASS}: kong`, or the class that your controller has",
        )
    if not is_attached and not is_global:
        yield finding(
            Level.NOTE,
            "not-attached",
            ("metadata",),
            "nothing in this file uses it",
            f"attach it: `kubectl annotate service NAME {_ATTACHED}={printable(manifest.name or 'NAME', 80)}`, or an "
            "ingress, an httproute or a kongconsumer in the place of the service",
        )
