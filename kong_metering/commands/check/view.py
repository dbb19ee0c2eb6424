"""The settings of a plugin entity, as rules look at them. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kong_metering.commands.check.settings import CONFIG
from kong_metering.commands.check.violations import Spec, Unreadable, fields_of, is_reference

if TYPE_CHECKING:
    from kong_metering.commands.check.entities import Plugin
    from kong_metering.commands.check.findings import Finding, Level, Path


@dataclass(frozen=True)
class Settings:
    """The configuration of a plugin entity with all defaults, and the way to tell something of it."""

    plugin: Plugin
    values: Mapping[str, Any]

    @classmethod
    def of(cls, plugin: Plugin) -> Settings:
        """Add the defaults to what an entity says, unless Kong keeps what it has."""
        given = plugin.config if isinstance(plugin.config, Mapping) else {}
        return cls(plugin, given if plugin.is_partial else _filled(CONFIG, given))

    def text(self, *path: str | int) -> str | None:
        """Return a setting that is a text, and known here."""
        value = self.value(*path)
        return value if isinstance(value, str) and not is_reference(value) else None

    def number(self, *path: str | int) -> float | None:
        """Return a setting that is a number."""
        value = self.value(*path)
        return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None

    def value(self, *path: str | int) -> Any:
        """Return a setting, whatever it is; None if there is no such."""
        value: Any = self.values
        for part in path:
            try:
                value = value[part]
            except (KeyError, IndexError, TypeError):
                return None
        return value

    def has(self, *path: str) -> bool:
        """Return whether a setting is given, and not its default."""
        value: Any = self.plugin.config
        for part in path:
            value = value.get(part) if isinstance(value, Mapping) else None
        return value is not None

    def find(self, level: Level, rule: str, path: Path, problem: str, remedy: str) -> Finding:
        """Tell something of a setting."""
        return self.plugin.find(level, rule, self.plugin.path_of(path), problem, remedy)


def _filled(spec: Spec, given: Any) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, field in fields_of(spec).items():
        value = given.get(name) if isinstance(given, Mapping) else None
        if field["type"] == "record" and not isinstance(value, Unreadable):
            values[name] = _filled(field, value)
        else:
            values[name] = field.get("default") if value is None else value
    return values
