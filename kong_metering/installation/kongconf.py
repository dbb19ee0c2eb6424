"""Our lines in kong.conf. Pure: text in, text out.

Contract: `with_ours` and then `without_ours` gives the text that was there before, to the byte, if it ended with a
line's end. Lines of the owner's that ours stand in for are kept, out of force, where they were. Doing it twice is doing
it once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

_BEGIN = (
    "# kong-metering: begin. Written by `kong-metering install --write`, taken out by `kong-metering uninstall --write`"
)
_END = "# kong-metering: end"
_OUT_OF_FORCE = "#kong-metering# "
_SERVER = "metering"
START_COMMAND = f"pluginserver_{_SERVER}_start_cmd"
_OURS = re.compile(rf"plugins|pluginserver_names|pluginserver_{_SERVER}_\w+")
_SETTING = re.compile(r"\s*([\w.]+)\s*=(.*)", re.DOTALL)
# A number sign that no backslash takes its meaning from.
_COMMENT = re.compile(r"(?<!\\)#.*")
# What Kong has where nothing is said.
_DEFAULTS = {"plugins": "bundled"}


@dataclass(frozen=True)
class Connection:
    """What Kong has to know: the plugin's name, where its server listens, and the file that describes it."""

    plugin: str
    socket: Path
    dump: Path


def settings_in(text: str) -> dict[str, str]:
    """Return the settings that are in force, by their names; ours with them."""
    found = {}
    for line in _lines(text):
        if (match := _SETTING.fullmatch(_COMMENT.sub("", line))) is not None:
            found[match[1].lower()] = match[2].strip().strip("'\"")
    return found


def starts_ours(text: str) -> bool:
    """Return whether Kong starts our server itself, by a kong.conf with this text."""
    return bool(settings_in(text).get(START_COMMAND))


def lines_for(connection: Connection, text: str = "") -> list[str]:
    """Return the lines for a kong.conf with this text: they name what it names already, and us."""
    settings = settings_in(without_ours(text))
    return [
        f"plugins = {_joined(settings, 'plugins', connection.plugin)}",
        f"pluginserver_names = {_joined(settings, 'pluginserver_names', _SERVER)}",
        f"pluginserver_{_SERVER}_socket = {connection.socket}",
        f"pluginserver_{_SERVER}_query_cmd = cat {connection.dump}",
    ]


def with_ours(text: str, connection: Connection) -> str:
    """Return a kong.conf with our lines, in the place of those that were there before."""
    before = without_ours(text)
    kept = [_OUT_OF_FORCE + line if _is_in_our_place(line) else line for line in _lines(before)]
    return "\n".join([*kept, _BEGIN, *lines_for(connection, before), _END]) + "\n"


def without_ours(text: str) -> str:
    """Return a kong.conf without our lines, and with those in force that they stood in for."""
    lines = [line.removeprefix(_OUT_OF_FORCE) for line in _outside_of_block(_lines(text))]
    return "".join(f"{line}\n" for line in lines)


def has_ours(text: str) -> bool:
    """Return whether our lines are in a kong.conf."""
    return _BEGIN in _lines(text)


def plugin_in(text: str) -> str | None:
    """Return the plugin's name by our lines in a kong.conf, None where they do not tell."""
    names = _names_that_only_our_lines_have(text, "plugins")
    return names[0] if len(names) == 1 else None


def lost_by(text: str, connection: Connection, former: str) -> list[str]:
    """Return what somebody has written between our marks, and what would go with them.

    `former`: the plugin's name up to now, which is ours to take out; so is one that is alone there.
    """
    ours: dict[str, set[str | None]] = {
        "plugins": {former, connection.plugin, plugin_in(text)},
        "pluginserver_names": {_SERVER},
    }
    found = [
        f"{name} in {setting}"
        for setting, names in ours.items()
        for name in _names_that_only_our_lines_have(text, setting)
        if name not in names
    ]
    after = settings_in(with_ours(text, connection))
    return found + [setting for setting in settings_in(text) if setting not in after and not _OURS.fullmatch(setting)]


def changed_by(text: str, wanted: str) -> list[tuple[str, str, str]]:
    """Return the settings of our lines that get another value, with that of before and the new one."""
    if not has_ours(text):
        return []
    before, after = settings_in(text), settings_in(wanted)
    return [(name, before[name], after[name]) for name in after if name in before and before[name] != after[name]]


def _names_that_only_our_lines_have(text: str, setting: str) -> list[str]:
    if not has_ours(text):
        return []
    before = _names(settings_in(without_ours(text)), setting)
    return [name for name in _names(settings_in(text), setting) if name not in before]


def _lines(text: str) -> list[str]:
    """Return the lines, without their ends; what else Python takes for an end of a line is part of one."""
    lines = text.split("\n")
    return lines if lines[-1] else lines[:-1]


def _outside_of_block(lines: list[str]) -> Iterator[str]:
    is_inside = False
    for line in lines:
        is_inside = is_inside or line == _BEGIN
        if not is_inside:
            yield line
        is_inside = is_inside and line != _END


def _is_in_our_place(line: str) -> bool:
    match = _SETTING.fullmatch(_COMMENT.sub("", line))
    return match is not None and _OURS.fullmatch(match[1].lower()) is not None


def _joined(settings: Mapping[str, str], setting: str, name: str) -> str:
    return ",".join(dict.fromkeys([*_names(settings, setting), name]))


def _names(settings: Mapping[str, str], setting: str) -> list[str]:
    """Return what a list names; `off` is Kong's word for an empty one."""
    value = settings.get(setting) or _DEFAULTS.get(setting, "")
    return [one for one in re.split(r"[,\s]+", value) if one and one != "off"]
