"""What the plugin is called in Kong, by what its kong.conf says. Pure, but for the reading that is handed in.

Kong learns it from `query_cmd`: our program says it, by its --plugin-name, or a file with what that has printed.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kong_metering.commands.check.entities import OWN_SETTING
from kong_metering.commands.check.kongconf import Called, command_of

if TYPE_CHECKING:
    from kong_metering.commands.check.kongconf import KongConf, Setting


def called_in(conf: KongConf, read: Callable[[Path], str | None], otherwise: Called) -> Called:
    """Tell what the plugin is called by a kong.conf, or `otherwise` where it does not say so here.

    `read` gives the text of a file; None where it cannot be read.
    """
    unread = None
    for setting in _commands(conf):
        command, file = command_of(setting), _file_of(setting)
        if command is not None:
            return Called(str(command.options["plugin_name"]))
        if file is None:
            continue
        if (text := read(file)) is None:
            unread = unread or setting
        elif (name := _name_in(text)) is not None:
            return Called(name)
    return replace(otherwise, unread=unread)


def _commands(conf: KongConf) -> list[Setting]:
    """List the command lines, those that Kong asks first."""
    suffixes = ("_query_cmd", "_start_cmd")
    return [one for suffix in suffixes for one in conf.settings.values() if one.name.endswith(suffix)]


def _file_of(setting: Setting) -> Path | None:
    """Return the file that a `query_cmd` prints."""
    try:
        words = shlex.split(setting.value)
    except ValueError:
        return None
    return Path(words[1]) if len(words) == 2 and Path(words[0]).name == "cat" else None  # noqa: PLR2004 - cat FILE


def _name_in(dump: str) -> str | None:
    """Return what the metering plugin is called in what a `query_cmd` prints, in either of Kong's protocols."""
    try:
        said = json.loads(dump)
    except (ValueError, RecursionError):
        return None
    plugins = said.get("Plugins") if isinstance(said, Mapping) else said
    return next(_names(plugins if isinstance(plugins, list) else []), None)


def _names(plugins: Sequence[Any]) -> Iterator[str]:
    for plugin in plugins:
        name = plugin.get("Name") if isinstance(plugin, Mapping) else None
        if isinstance(name, str) and f'"{OWN_SETTING}"' in json.dumps(plugin):
            yield name
