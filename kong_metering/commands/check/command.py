"""`kong-metering check`: look at a configuration before Kong has it.

Contract: it only reads, asks nobody over the network, and prints no token and no value that could be one.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from kong_metering.commands import words
from kong_metering.commands.check import kongconf
from kong_metering.commands.check.checking import check_text
from kong_metering.commands.check.files import name_of, read_file, read_if_there
from kong_metering.commands.check.findings import Finding, Level
from kong_metering.commands.check.pluginname import called_in
from kong_metering.commands.check.rules import RULES
from kong_metering.commands.options import json_option, plugin_name_option
from kong_metering.commands.output import cell, console, say, tell
from kong_metering.plurals import counted

Calling = Callable[[kongconf.KongConf | None], kongconf.Called]

_STYLES = {Level.ERROR: "bold red", Level.WARNING: "bold yellow", Level.NOTE: "bold cyan"}


@dataclass
class _Report:
    """What was found, each with its file, and in how many plugin entities."""

    findings: list[tuple[str, Finding]] = field(default_factory=list)
    plugins: int = 0

    def add(self, file: str, found: Iterable[Finding], ignored: Sequence[str]) -> None:
        """Add what was found in a file, in the order of its lines."""
        wanted = sorted((one for one in found if one.rule not in ignored), key=lambda one: one.line or 0)
        self.findings += [(file, one) for one in wanted]

    @property
    def counts(self) -> Counter[Level]:
        """How many there are of each level."""
        return Counter(one.level for _, one in self.findings)


@click.command()
@click.argument("file", required=False, metavar="[FILE|-]")
@click.option("--kong-conf", metavar="FILE", help="Kong's own settings: is the plugin loaded as it should be?")
@plugin_name_option("What the plugin is called: the server's --plugin-name; else what --kong-conf says.")
@click.option("--strict", is_flag=True, help="Exit with 1 for warnings too.")
@click.option(
    "--ignore",
    type=click.Choice(RULES),
    multiple=True,
    metavar="RULE",
    help="Leave out what this rule finds; may be given again.",
)
@json_option("one JSON document with all findings")
@click.pass_context
def check(  # noqa: PLR0913 - its options
    context: click.Context,
    file: str | None,
    kong_conf: str | None,
    *,
    plugin_name: str,
    strict: bool,
    ignore: Sequence[str],
    as_json: bool,
) -> None:
    """Look for mistakes in a configuration before Kong has it.

    FILE is a kong.yaml (for decK, or for a Kong without database), a body for POST /plugins in JSON, or manifests of
    Kubernetes; '-' reads it from stdin. decK's variables are filled in where they are set in the environment. With
    --kong-conf, Kong's own settings are looked at too, or alone.

    Each finding says where it is, what is wrong there and what to do. An error is refused by Kong, or bills nothing as
    it is; a warning works, and is surely not meant; a note is good to know. No token is ever printed, and nothing is
    sent anywhere.

    \b
    Exit status:
      0  no errors
      1  errors; with --strict, warnings too
      2  a wrong call, or a file that cannot be read
    """  # noqa: D301 - click's mark for lines that stay as they are
    if file is not None and kong_conf is None and ".conf" in Path(file).name:
        file, kong_conf = None, file
    if file is None and kong_conf is None:
        raise click.UsageError("name a FILE, '-' for stdin, or --kong-conf FILE")
    source = context.get_parameter_source("plugin_name")
    report = _report(file, kong_conf, partial(_called, plugin_name, source), ignore)
    if as_json:
        say(words.json_document(_as_json(report)))
    else:
        _print(report)
    if report.counts[Level.ERROR] or (strict and report.counts[Level.WARNING]):
        raise click.exceptions.Exit(1)


def _report(file: str | None, kong_conf: str | None, calling: Calling, ignored: Sequence[str]) -> _Report:
    conf = None if kong_conf is None else kongconf.read(read_file(kong_conf))
    report, tool, called = _Report(), None, calling(conf)
    if file is not None:
        checked = check_text(read_file(file), os.environ, called.name)
        report.add(name_of(file), checked.findings, ignored)
        report.plugins, tool = checked.plugins, checked.tool
    if kong_conf is not None and conf is not None:
        report.add(name_of(kong_conf), kongconf.conf_findings(conf, called, tool), ignored)
    return report


def _called(name: str, source: ParameterSource | None, conf: kongconf.KongConf | None) -> kongconf.Called:
    """Tell what the plugin is called: Kong starts its server without this environment, so kong.conf is stronger."""
    told = kongconf.Called(name, is_guess=source is ParameterSource.DEFAULT)
    if conf is None or source is ParameterSource.COMMANDLINE:
        return told
    return called_in(conf, read_if_there, told)


# ---------------------------------------------------------------------------------------------------------- for people


def _print(report: _Report) -> None:
    out = console()
    is_narrow = sys.stdout.isatty()
    for file, one in report.findings:
        place = file if one.line is None else f"{file}:{one.line}"
        where = " ".join(part for part in (one.document, one.place) if part)
        head = cell(f"{place}: ")
        head.append(one.level.value, _STYLES[one.level])
        head.append(f" [{one.rule}]", "dim")
        head.append(f" {where}" if where else "", "bold")
        out.print(head, soft_wrap=True)
        out.print(cell(f"  {one.problem}"), soft_wrap=not is_narrow)
        out.print(cell(f"  -> {one.remedy}"), soft_wrap=not is_narrow)
    tell(_summary(report))


def _summary(report: _Report) -> str:
    counts = [counted(report.counts[level], level.value) for level in Level if report.counts[level]]
    plugins = f" in {counted(report.plugins, 'metering plugin')}" if report.plugins else ""
    return f"{', '.join(counts) or 'Nothing is wrong'}{plugins}."


# -------------------------------------------------------------------------------------------------------- for programs


def _as_json(report: _Report) -> dict[str, Any]:
    return {
        "plugins": report.plugins,
        **{f"{level.value}s": report.counts[level] for level in Level},
        "findings": [
            {
                "level": one.level.value,
                "rule": one.rule,
                "file": file,
                "line": one.line,
                "document": one.document or None,
                "path": one.place or None,
                "problem": one.problem,
                "remedy": one.remedy,
            }
            for file, one in report.findings
        ],
    }
