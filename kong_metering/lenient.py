"""A command line that is read to its end, whatever is wrong in it: a plugin server that does not start bills nothing.

A value that cannot be used is the default, a flag that nobody knows is left out; each is told in `complaints_of`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

_COMPLAINTS = "kong_metering.complaints"


def complaints_of(context: click.Context) -> list[str]:
    """Return what was wrong on a command line, to be added to."""
    found: list[str] = context.meta.setdefault(_COMPLAINTS, [])
    return found


class LenientOption(click.Option):
    """An option whose default stands for a value that cannot be used.

    `without`: what comes of that where there is no default.
    """

    def __init__(self, *arguments: Any, without: str = "", **attributes: Any) -> None:
        super().__init__(*arguments, **attributes)
        self._has_default = attributes.get("default") is not None
        self._without = without

    def process_value(self, ctx: click.Context, value: Any) -> Any:
        """Read the value, or the default if that fails."""
        try:
            return super().process_value(ctx, value)
        except click.BadParameter as error:
            default = self.get_default(ctx)
            instead = f"the default is used, {default}" if self._has_default else f"it is left out: {self._without}"
            complaints_of(ctx).append(f"{self.opts[0]}: {error.message}; {instead}")
            return super().process_value(ctx, default)


class LenientCommand(click.Command):
    """A command that leaves out what it does not know."""

    ignore_unknown_options = True
    allow_extra_args = True

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read the command line."""
        rest = list(args)
        while True:
            try:
                left = super().parse_args(ctx, list(rest))
            except click.BadOptionUsage as error:
                shorter = _without(rest, error.option_name)
                if len(shorter) == len(rest):
                    raise
                complaints_of(ctx).append(f"{error.option_name}: {error.message} It is left out.")
                rest = shorter
            else:
                break
        complaints_of(ctx).extend(f"{unknown} is not understood, and left out" for unknown in ctx.args)
        return left


def _without(arguments: Sequence[str], name: str) -> list[str]:
    return [one for one in arguments if one != name and not one.startswith(f"{name}=")]
