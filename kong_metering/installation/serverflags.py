"""Flags of the plugin server, as words of a command line: which are one flag, and which the server would not take.

Contract: nothing is started, and nothing printed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import click

from kong_metering import cli
from kong_metering.lenient import complaints_of

PROGRAM = "kong-metering-plugin-server"


@dataclass(frozen=True)
class Flag:
    """A flag, with the words that it consists of: a value may be one of its own."""

    name: str
    words: tuple[str, ...]

    @property
    def complaints(self) -> list[str]:
        """What the server would say of it, by itself; nothing if it takes it."""
        return complaints_about(self.words)


def flags_in(words: Sequence[str]) -> list[Flag]:
    """Return the flags of a command line; one that the server does not know has all up to the next flag."""
    takes_value = {
        name: not (option.is_flag or option.count)
        for option in cli.program.params
        if isinstance(option, click.Option)
        for name in option.opts
    }
    found, rest = [], list(words)
    while rest:
        own = [rest.pop(0)]
        name, equals, _ = own[0].partition("=")
        if name not in takes_value:
            while rest and not rest[0].startswith("-"):
                own.append(rest.pop(0))
        elif takes_value[name] and not equals and rest:
            own.append(rest.pop(0))
        found.append(Flag(name, tuple(own)))
    return found


def meaning_of(words: Sequence[str]) -> Mapping[str, Any]:
    """Return what the server takes a command line for, by the names of its options."""
    return _read(words).params


def complaints_about(words: Sequence[str]) -> list[str]:
    """Return what the server would say of a command line, and go on without."""
    return complaints_of(_read(words))


def _read(words: Sequence[str]) -> click.Context:
    return cli.program.make_context(PROGRAM, list(words))
