"""`kong-metering health`: whether the server serves, and whether delivery is alive; one line, for probes.

Contract: asks the server itself, over its socket, and changes nothing. Exit status 0: all is well; 1: nobody serves, or
Kong cannot connect; 3: it serves, and delivery is not alive; 2: a wrong call. Imports little: a probe may run each
second. An endpoint that fails is not this program's illness: what waits then is in the line, and the status 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import click

from kong_metering.commands.serversocket import cause_of_silence, server_options, server_socket, server_status
from kong_metering.host.kongs import who_cannot_connect
from kong_metering.log import printable
from kong_metering.plurals import counted
from kong_metering.watching import verdict
from kong_metering.watching.verdict import Health
from kong_metering.watching.words import waiting

_LONGEST_LINE = 1000


class Told(NamedTuple):
    """What a probe is told: the exit status, and why in a line."""

    status: int
    line: str


@click.command(epilog="Exit status: 0 well, 1 does not serve, 3 serves but does not deliver, 2 wrong call.")
@server_options
@click.option(
    "--serving",
    is_flag=True,
    help="Ask only whether it serves: for probes at whose failure the server is started anew, which mends no disk.",
)
@click.pass_context
def health(  # noqa: PLR0913, PLR0917 - the command's options
    context: click.Context,
    kong_prefix: Path,
    socket_name: str | None,
    socket_path: Path | None,
    plugin_name: str,
    timeout: float,
    serving: bool,  # noqa: FBT001 - click hands it over so
) -> None:
    """Tell whether the server serves, and whether delivery is alive.

    Without --socket, --socket-name and --kong-prefix it is the server that systemd or a container runs, if there is
    one, else the one in Kong's usual prefix.

    It serves when it answers over its socket, and no worker of Kong that is to be seen is kept from connecting.
    Delivery is alive when the threads that write, look after the spool and deliver come round: none has ended, been at
    one thing for two minutes, or left for two minutes what is due. An endpoint that fails is no failure here: events
    wait.
    """
    path = server_socket(context, kong_prefix, socket_name, socket_path, plugin_name)
    told = judged(path, timeout, only_serving=serving)
    click.echo(printable(told.line, _LONGEST_LINE))
    context.exit(told.status)


def judged(path: Path, timeout: float, *, only_serving: bool = False) -> Told:
    """Ask the server at a path."""
    try:
        pid, plugin = server_status(path, timeout)
    except (OSError, ValueError) as error:
        silent = verdict.judged(f"does not serve: {path}: {cause_of_silence(error, timeout)}", None)
        return Told(silent.health.value, silent.why)
    figures = plugin["Status"]
    stalled = [] if only_serving else [name for name, count in figures.get("stalled", {}).items() if count]
    found = verdict.judged(None, who_cannot_connect(path), stalled)
    if found.health is Health.DOES_NOT_SERVE:
        return Told(found.health.value, found.why)
    return Told(found.health.value, f"{found.why or f'ok: process {pid} serves on {path}'}; {_told(figures)}")


def _told(figures: Mapping[str, Any]) -> str:
    started = figures.get("instances_started", 0)
    kong = f"Kong has started {counted(started, 'instance')}" if started else "Kong has not come yet"
    dead = sum(figures.get("dead_letters", {}).values())
    waits = waiting(figures.get("waiting", 0), sum(figures.get("waiting_for_instances", {}).values()))
    return f"{kong}; {waits}; {counted(dead, 'dead letter')} in this server's life"
