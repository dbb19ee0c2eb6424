"""Which plugin entities a document of Kong's declares, and for whom. Pure.

A kong.yaml nests plugins under services, routes, consumers and consumer groups, or names these in the plugin; the Admin
API takes one entity at a time, and gives lists of them. Kubernetes is `kubernetes.py`'s.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING, Any

from kong_metering.commands.check.findings import Finding, Level
from kong_metering.commands.check.violations import UNREADABLE

if TYPE_CHECKING:
    from kong_metering.commands.check.documents import Document
    from kong_metering.commands.check.findings import Path

COLLECTIONS = ("services", "routes", "consumers", "consumer_groups")
_SCOPES = {"services": "service", "routes": "route", "consumers": "consumer", "consumer_groups": "consumer_group"}
# A setting that hardly any other plugin has.
OWN_SETTING = "ingest_endpoint"
# Services in consumer groups in routes: deeper, nobody nests them, but for an alias of YAML that holds itself.
_DEEPEST = 6
# The keys of Kong's plugin entities, and decK's own.
ENTITY_KEYS = (
    "id",
    "name",
    "instance_name",
    "config",
    "enabled",
    "protocols",
    "tags",
    *_SCOPES.values(),
    "created_at",
    "updated_at",
    "ordering",
    "partials",
    "condition",
    "run_on",
    "_config",
    "_comment",
    "_ignore",
)


class Origin(Enum):
    """What a document is."""

    DECLARATIVE = "kong.yaml"
    ADMIN_API = "Admin API"
    KUBERNETES = "Kubernetes"


@dataclass(frozen=True)
class Scope:
    """For which requests a plugin runs: names by kind, such as service, nothing for all; and of what is around it.

    `service` of a route is the service that the route is declared in.
    """

    names: tuple[tuple[str, str], ...] = ()
    service: str | None = None

    @property
    def kinds(self) -> tuple[str, ...]:
        """Which kinds of entities it is for."""
        return tuple(kind for kind, _ in self.names)

    @property
    def told(self) -> str:
        """The scope in words."""
        return " and ".join(f"{kind} {name}" for kind, name in self.names) or "all requests"


@dataclass(frozen=True)
class Plugin:
    """One plugin entity as it is declared.

    `key` is the member that has the plugin's name, `config_at` leads to its configuration. `config` has `UNREADABLE`
    where a value is elsewhere; where a part of it stands in another place of the document, `elsewhere` has its path.
    `is_partial`: what is not there stays as Kong has it (PATCH). `ours` is what the metering plugin is called.
    """

    origin: Origin
    document: Document
    path: Path
    body: Mapping[str, Any]
    ours: str
    scope: Scope = Scope()
    key: str = "name"
    config_at: Path = ("config",)
    config: Any = None
    elsewhere: Mapping[str, Path] = field(default_factory=dict)
    label: str = ""
    is_enabled: bool = True
    is_partial: bool = False

    @property
    def name(self) -> str:
        """The plugin's name, empty if there is none."""
        name = self.body.get(self.key)
        return name if isinstance(name, str) else ""

    @property
    def is_ours(self) -> bool:
        """True if it is the metering plugin."""
        return self.name == self.ours

    @property
    def is_alike(self) -> bool:
        """True if it is not called so, and configured as if it were."""
        return bool(self.name) and not self.is_ours and isinstance(self.config, Mapping) and OWN_SETTING in self.config

    @property
    def config_path(self) -> Path:
        """Where its configuration stands."""
        return (*self.path, *self.config_at)

    def find(self, level: Level, rule: str, path: Path, problem: str, remedy: str) -> Finding:
        """Tell something of a part of it, by the path in the document."""
        return Finding(level, rule, path, problem, remedy, self.label, self.document.line(path))

    def path_of(self, inner: Path) -> Path:
        """Tell where a part of its configuration stands in the document."""
        if inner and (other := self.elsewhere.get(str(inner[0]))) is not None:
            return (*other, *inner[1:])
        return (*self.config_path, *inner)


@dataclass(frozen=True)
class Declared:
    """What a document declares: plugins; routes with the service of each; and what is no list of entities.

    `ours` is what the metering plugin is called.
    """

    ours: str
    plugins: list[Plugin] = field(default_factory=list)
    routes: list[tuple[str, str | None]] = field(default_factory=list)
    malformed: list[tuple[Path, str]] = field(default_factory=list)


def is_declarative(value: Any) -> bool:
    """Return whether a document is a kong.yaml."""
    return isinstance(value, Mapping) and not {"plugins", *COLLECTIONS, "_format_version"}.isdisjoint(value)


def is_body(value: Any) -> bool:
    """Return whether a document is what the Admin API takes or gives for a plugin, or for several."""
    if not isinstance(value, Mapping):
        return False
    return isinstance(value.get("data"), list) or not {"name", "config", "instance_name"}.isdisjoint(value)


def of_body(document: Document, ours: str) -> Declared:
    """Read what the Admin API takes or gives."""
    declared, value = Declared(ours), document.value
    items: list[tuple[Path, Any]] = [((), value)]
    if isinstance(value.get("data"), list):
        items = [(("data", index), item) for index, item in enumerate(value["data"])]
    for path, body in items:
        if isinstance(body, Mapping):
            # A PATCH leaves the name out.
            is_partial = "name" not in body
            named = {"name": ours, **body} if is_partial else body
            plugin = _plugin(Origin.ADMIN_API, document, path, named, Scope(), ours)
            declared.plugins.append(replace(plugin, is_partial=is_partial))
    return declared


def of_config(document: Document, ours: str) -> Declared:
    """Read a configuration that stands alone, as in a Secret of Kubernetes."""
    plugin = Plugin(Origin.ADMIN_API, document, (), {"name": ours}, ours, config_at=(), config=document.value)
    return Declared(ours, [plugin])


def of_declarative(document: Document, ours: str) -> Declared:
    """Read a kong.yaml."""
    declared = Declared(ours)
    _walk(document, document.value, (), Scope(), declared)
    return declared


def _walk(document: Document, parent: Mapping[str, Any], path: Path, scope: Scope, declared: Declared) -> None:
    for inner, body in _items(parent, "plugins", path, declared):
        declared.plugins.append(_plugin(Origin.DECLARATIVE, document, inner, body, scope, declared.ours))
    for collection in COLLECTIONS if len(path) < _DEEPEST else ():
        for inner, body in _items(parent, collection, path, declared):
            name = _name_of(body) or f"at {'.'.join(map(str, inner))}"
            around = dict(scope.names).get("service") or _reference(body.get("service"))
            kind = _SCOPES[collection]
            own = Scope(((kind, name),), around if kind == "route" else None)
            if kind == "route":
                declared.routes.append((name, around))
            _walk(document, body, inner, own, declared)


def _items(
    parent: Mapping[str, Any], key: str, path: Path, declared: Declared
) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """Give the entities of a list, and note what is none."""
    value = parent.get(key)
    if value is None or (path and not isinstance(value, (list, Mapping))):
        return
    if not isinstance(value, list):
        declared.malformed.append(((*path, key), "a list of entities, each behind a `- `"))
        return
    for index, item in enumerate(value):
        inner = (*path, key, index)
        if isinstance(item, Mapping):
            yield inner, item
        elif not isinstance(item, str) or key == "plugins":
            declared.malformed.append((inner, "an entity: names with values, such as `name: ...`"))


def _plugin(  # noqa: PLR0913, PLR0917 - what a plugin is made of
    origin: Origin, document: Document, path: Path, body: Mapping[str, Any], around: Scope, ours: str
) -> Plugin:
    named = [(kind, name) for kind in _SCOPES.values() if (name := _reference(body.get(kind)))]
    names = tuple(sorted({**dict(around.names), **dict(named)}.items()))
    config, elsewhere = _with_shared(document.value, body)
    return Plugin(
        origin,
        document,
        path,
        body,
        ours,
        Scope(names, around.service),
        config=config,
        elsewhere=elsewhere,
        is_enabled=body.get("enabled") is not False,
    )


def _with_shared(root: Any, body: Mapping[str, Any]) -> tuple[Any, dict[str, Path]]:
    """Add what decK takes over from `_plugin_configs`."""
    config, shared = body.get("config"), root.get("_plugin_configs") if isinstance(root, Mapping) else None
    name = body.get("_config")
    if not isinstance(name, str):
        return config, {}
    common = shared.get(name) if isinstance(shared, Mapping) else None
    if not isinstance(common, Mapping):
        return (config if config is not None else UNREADABLE), {}
    own = config if isinstance(config, Mapping) else {}
    return {**common, **own}, {str(key): ("_plugin_configs", name, key) for key in common if key not in own}


def _name_of(body: Mapping[str, Any]) -> str | None:
    return next((one for key in ("name", "username", "custom_id", "id") if isinstance(one := body.get(key), str)), None)


def _reference(value: Any) -> str | None:
    """Read which entity is meant: by its name or id, or a record that holds one."""
    if isinstance(value, Mapping):
        return _name_of(value)
    return value if isinstance(value, str) and value else None


def nearest(name: str, known: Sequence[str]) -> str | None:
    """Return the known name that was surely meant; None if none is near."""
    plain = {_plain(one): one for one in known}
    if _plain(name) in plain:
        return plain[_plain(name)]
    near = difflib.get_close_matches(_plain(name), list(plain), n=1, cutoff=0.65)
    return plain[near[0]] if near else None


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
