"""What `kong-metering install` keeps of an earlier installation where it is not told anew, and what it changes of it.

Contract: nothing of it goes without a line that says so. What cannot be read, and was not given anew, is a
`StartupError`.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kong_metering.errors import StartupError
from kong_metering.installation.earlier import (
    DEFAULTS,
    NAME_FLAG,
    Given,
    given_in_dump,
    given_in_kong_conf,
    given_in_unit,
)
from kong_metering.installation.places import DROP_INS, DUMP, UNIT
from kong_metering.installation.serverflags import complaints_about, flags_in
from kong_metering.installation.unit import (
    Setting,
    command_in,
    foreign_settings,
    kong_conf_in,
    settings_of,
    values_in,
)
from kong_metering.log import printable

if TYPE_CHECKING:
    from kong_metering.installation.changes import Changes

_LONGEST_LINE = 10_000
# Those that follow what the installation is given, of which it is told.
_TOLD_OTHERWISE = ("Description", "User", "ExecStart", "KongConf")


@dataclass(frozen=True)
class Former:
    """An earlier installation: its unit's text, empty where there is none."""

    unit: str

    @classmethod
    def found(cls, changes: Changes) -> Former:
        """Look for it."""
        return cls(changes.text_of(UNIT) or "")

    @property
    def user(self) -> str | None:
        """Whom the service runs as."""
        return next(iter(values_in(self.unit, "User")), None)

    @property
    def kong_conf(self) -> Path | None:
        """Which kong.conf it was told of."""
        return kong_conf_in(self.unit)

    @property
    def foreign(self) -> Sequence[Setting]:
        """Settings that somebody has added to the unit."""
        return foreign_settings(self.unit)

    def given(self, changes: Changes, conf: Path, anew: Given) -> dict[Path, Given]:
        """Return what it was given, by the file that tells it, of which the first counts.

        Raises `StartupError` when the unit says something that is not to be read, and that is not given anew.
        """
        found = {}
        if self.unit:
            try:
                found[UNIT] = given_in_unit(self.unit)
            except StartupError as error:
                if not anew.is_complete:
                    raise StartupError(
                        f"ExecStart in {UNIT} is not as `install` writes it: {error}. Nothing is changed: give "
                        f"{', '.join(DEFAULTS.words)} all three ('' for no flags), and it is written anew; a command "
                        "of your own belongs into `systemctl edit kong-metering`"
                    ) from None
        found[DUMP] = given_in_dump(changes.text_of(DUMP) or "")
        found[conf] = given_in_kong_conf(changes.text_of(conf) or "")
        return found


def settled(anew: Given, former: dict[Path, Given]) -> Given:
    """Return what an installation is given: anew, else what it was given before, else the defaults.

    Raises `StartupError` where the server would not take a flag of before.
    """
    given = anew
    for source, known in former.items():
        if given.flags is None and known.flags is not None:
            _refuse_flags_that_are_gone(source, known.flags)
        given = given.or_else(known)
    return given.or_else(DEFAULTS)


def _refuse_flags_that_are_gone(source: Path, flags: Sequence[str]) -> None:
    complaints = complaints_about(flags)
    if complaints:
        rest = [word for flag in flags_in(flags) if not flag.complaints for word in flag.words]
        raise StartupError(
            f"{source} has flags that this version's server would not take: {'; '.join(complaints)}. Nothing is "
            f"changed: give those that are to stay, such as --flags {shlex.quote(shlex.join(rest))}"
        )


def tell_what_is_kept(anew: Given, former: dict[Path, Given]) -> None:
    """Tell what was not given now, and was before, and where that is known from."""
    known = anew
    for source, found in former.items():
        kept = [
            f"{option} {value}"
            for option, value in found.words.items()
            if option not in known.words and value != DEFAULTS.words[option]
        ]
        if kept:
            _kept(source, " ".join(kept))
        known = known.or_else(found)


def tell_what_is_changed(changes: Changes, former: dict[Path, Given], now: Given) -> None:
    """Tell what was given before, and is something else now."""
    before = Given()
    for found in former.values():
        before = before.or_else(found)
    for option, value in before.words.items():
        if value != now.words[option]:
            end = f"; entities named {value} keep Kong from starting then" if option == NAME_FLAG else ""
            changes.told("changed", f"{option} {value} to {now.words[option]}{end}")


def tell_of_kong_conf(changes: Changes, former: Path | None, anew: Path | None) -> None:
    """Tell which kong.conf is kept, or left for another one."""
    if former is not None and anew is None:
        _kept(UNIT, f"--kong-conf {former}")
    elif former is not None and anew is not None and former != anew.absolute():
        changes.told("changed", f"--kong-conf {former} to {anew.absolute()}; our lines in the former stay there")


def tell_of_user(changes: Changes, former: str | None, anew: str | None, workers: str) -> None:
    """Tell which user is kept, if it is not the one of Kong's workers, or changed."""
    if former is not None and anew is None and former != workers:
        _kept(UNIT, f"--user {former}; Kong's workers are user {workers}: --user {workers}, if it is to be that one")
    elif former is not None and anew is not None and former != anew:
        changes.told("changed", f"--user {former} to {anew}")


def tell_of_the_unit(changes: Changes, former: Former, wanted: str) -> None:
    """Tell what somebody has changed in the unit: what is kept, and what is not."""
    if former.foreign:
        # Without what they say: a variable may be a password.
        _kept(UNIT, ", ".join(dict.fromkeys(setting.key for setting in former.foreign)))
    for before, after in _differences(former.unit, wanted):
        changes.told(
            "changed",
            f"{before} in {UNIT} to {after or 'nothing'}; what you want to differ belongs into `systemctl edit "
            "kong-metering`",
        )
    if former.unit and (before := _program_in(former.unit)) != (after := _program_in(wanted)):
        changes.told("changed", f"{before} in {UNIT} to {after}")
    for path in _drop_ins_with_a_command(changes):
        say(f"{path} has an ExecStart: systemd runs that one, whatever {UNIT} says")


def _differences(former: str, wanted: str) -> Iterator[tuple[str, str]]:
    """Find settings that are not those of before, but for those that follow what the installation is given."""
    coming = settings_of(wanted)
    for setting in settings_of(former):
        if setting not in coming and setting.key not in _TOLD_OTHERWISE:
            instead = [str(one) for one in coming if (one.section, one.key) == (setting.section, setting.key)]
            yield str(setting), " ".join(instead)


def _program_in(unit: str) -> str:
    """Return what is run; the whole of it, where it is not as we write it."""
    try:
        return f"ExecStart's {command_in(unit)[0]}"
    except StartupError:
        return " ".join(f"ExecStart={value}" for value in values_in(unit, "ExecStart")) or "no ExecStart"


def _drop_ins_with_a_command(changes: Changes) -> Iterator[Path]:
    for directory in DROP_INS:
        for place in sorted(changes.at(directory).glob("*.conf")):
            path = directory / place.name
            if any(values_in(changes.text_of(path) or "", "ExecStart")):
                yield path


def say(line: str) -> None:
    """Print a line, in which may be what somebody has written."""
    click.echo(printable(line, _LONGEST_LINE))


def _kept(source: Path, what: str) -> None:
    say(f"kept from {source}: {what}")
