"""What an earlier installation was given, read from what it has made: its unit, its dump, its lines in kong.conf. Pure.

Contract: what is not known is None. What somebody wrote into the unit that cannot be read as what `install` writes is a
`StartupError`, and never taken for nothing.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from kong_metering import PLUGIN_NAME
from kong_metering.errors import StartupError
from kong_metering.installation.kongconf import plugin_in
from kong_metering.installation.places import FLAGS
from kong_metering.installation.serverflags import PROGRAM, flags_in, meaning_of
from kong_metering.installation.unit import command_in
from kong_metering.plugin_identity import PRIORITY, PluginIdentity

NAME_FLAG, PRIORITY_FLAG = "--plugin-name", "--priority"


@dataclass(frozen=True)
class Given:
    """What an installation is given that ends in what it makes; `flags` are words, None is what is not known."""

    plugin_name: str | None = None
    priority: int | None = None
    flags: tuple[str, ...] | None = None

    def or_else(self, other: Given) -> Given:
        """Return this, and what the other one has where nothing is known."""
        return Given(
            other.plugin_name if self.plugin_name is None else self.plugin_name,
            other.priority if self.priority is None else self.priority,
            other.flags if self.flags is None else self.flags,
        )

    @property
    def is_complete(self) -> bool:
        """Whether all is known."""
        return None not in (self.plugin_name, self.priority, self.flags)

    @property
    def identity(self) -> PluginIdentity:
        """What Kong is to call the plugin: the default, where it is not known."""
        return PluginIdentity(
            PLUGIN_NAME if self.plugin_name is None else self.plugin_name,
            PRIORITY if self.priority is None else self.priority,
        )

    @property
    def words(self) -> dict[str, str]:
        """What is known, by the option that gives it, as it would be typed."""
        known = {
            NAME_FLAG: self.plugin_name,
            PRIORITY_FLAG: self.priority,
            "--flags": None if self.flags is None else shlex.join(self.flags),
        }
        return {option: shlex.quote(str(value)) for option, value in known.items() if value is not None}


DEFAULTS = Given(PLUGIN_NAME, PRIORITY, ())


def given_in(flags: Sequence[str]) -> Given:
    """Return what flags of the server say, but for those that each installation writes.

    A name or a priority that the server would not take stays a flag.
    """
    rest: list[str] = []
    name, priority = None, None
    for flag in flags_in(flags):
        if flag.name == NAME_FLAG and not flag.complaints:
            name = meaning_of(flag.words)["plugin_name"]
        elif flag.name == PRIORITY_FLAG and not flag.complaints:
            priority = meaning_of(flag.words)["priority"]
        elif flag.words not in FLAGS:
            rest += flag.words
    return Given(name, priority, tuple(rest))


def given_in_unit(text: str) -> Given:
    """Return what the service's command says. Raises `StartupError` with a clause that tells why it does not."""
    program, *flags = command_in(text)
    if PurePath(program).name != PROGRAM:
        raise StartupError(f"it runs {program}")
    return given_in(flags)


def given_in_dump(text: str) -> Given:
    """Return what the file says that describes the plugin; it is the server's user's, so not anything goes."""
    with suppress(ValueError, LookupError, TypeError):
        described: Any = json.loads(text)
        (plugin,) = described["Plugins"] if isinstance(described, dict) else described
        found = given_in([f"{NAME_FLAG}={plugin['Name']}", f"{PRIORITY_FLAG}={plugin['Priority']}"])
        return Given(found.plugin_name, found.priority)
    return Given()


def given_in_kong_conf(text: str) -> Given:
    """Return what our lines say."""
    name = plugin_in(text)
    return Given() if name is None else Given(given_in([f"{NAME_FLAG}={name}"]).plugin_name)
