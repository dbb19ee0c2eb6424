"""`kong-metering health`: whether the server serves, and whether delivery is alive; one line, for probes.

Contract: asks the server itself, over its socket, and changes nothing. Exit status 0: all is well; 1: nobody serves, or
Kong cannot connect; 3: it serves, and delivery is not alive; 2: a wrong call. Imports little: a probe may run each
second. An endpoint that fails is not this program's illness: what waits then is in the line, and the status 0.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import msgpack
from click.core import ParameterSource

from kong_metering import ENVIRONMENT_PREFIX, PLUGIN_NAME
from kong_metering.host.handover import status_request
from kong_metering.host.kongs import who_cannot_connect
from kong_metering.host.paths import reachable
from kong_metering.log import printable
from kong_metering.quantities import Duration, PluginName

# Where a server is that Kong does not start.
USUAL_SOCKET = Path("/run/kong-metering/kong-metering.sock")
_DOES_NOT_SERVE = 1
_DELIVERY_IS_NOT_ALIVE = 3
_ANSWER_BYTES = 65_536
_LONGEST_LINE = 1000


@dataclass(frozen=True)
class Verdict:
    """What a probe is told: the exit status, and why in a line."""

    status: int
    line: str


@click.command(epilog="Exit status: 0 well, 1 does not serve, 3 serves but does not deliver, 2 wrong call.")
@click.option(
    "-p",
    "--kong-prefix",
    metavar="DIR",
    type=click.Path(path_type=Path),
    default="/usr/local/kong",
    show_default=True,
    envvar=f"{ENVIRONMENT_PREFIX}KONG_PREFIX",
    show_envvar=True,
    help="The server's --kong-prefix.",
)
@click.option(
    "--socket-name",
    metavar="NAME",
    envvar=f"{ENVIRONMENT_PREFIX}SOCKET_NAME",
    show_envvar=True,
    help="The server's --socket-name.",
)
@click.option(
    "--socket",
    "socket_path",
    metavar="PATH",
    type=click.Path(path_type=Path),
    envvar=f"{ENVIRONMENT_PREFIX}SOCKET",
    show_envvar=True,
    help="The server's --socket.",
)
@click.option(
    "--plugin-name",
    metavar="NAME",
    type=PluginName(),
    default=PLUGIN_NAME,
    show_default=True,
    envvar=f"{ENVIRONMENT_PREFIX}PLUGIN_NAME",
    show_envvar=True,
    help="The server's --plugin-name.",
)
@click.option(
    "--timeout",
    metavar="TIME",
    type=Duration(),
    default="5s",
    show_default=True,
    help="How long to wait for an answer.",
)
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
    path = socket_path or kong_prefix / (socket_name or f"{plugin_name}.sock")
    is_told = socket_path or socket_name or context.get_parameter_source("kong_prefix") is not ParameterSource.DEFAULT
    if not is_told and USUAL_SOCKET.exists():
        path = USUAL_SOCKET
    verdict = judged(path, timeout, only_serving=serving)
    click.echo(printable(verdict.line, _LONGEST_LINE))
    context.exit(verdict.status)


def judged(path: Path, timeout: float, *, only_serving: bool = False) -> Verdict:
    """Ask the server at a path."""
    try:
        status = _asked(path, timeout)
    except (OSError, ValueError) as error:
        return Verdict(_DOES_NOT_SERVE, f"does not serve: {path}: {_cause(error, timeout)}")
    (plugin,) = status["Plugins"].values()
    figures = plugin["Status"]
    if (hindered := who_cannot_connect(path)) is not None:
        return Verdict(_DOES_NOT_SERVE, f"nothing is metered: {hindered}")
    stalled = [name for name, count in figures.get("stalled", {}).items() if count]
    if stalled and not only_serving:
        line = f"serves, and delivery is not alive: {', '.join(stalled)} stalled for two minutes; {_told(figures)}"
        return Verdict(_DELIVERY_IS_NOT_ALIVE, line)
    return Verdict(0, f"ok: process {status['Pid']} serves on {path}; {_told(figures)}")


def _told(figures: Mapping[str, Any]) -> str:
    started = figures.get("instances_started", 0)
    kong = f"Kong has started {started} instances" if started else "Kong has not come yet"
    dead = sum(figures.get("dead_letters", {}).values())
    return f"{kong}; {figures.get('waiting', 0)} events wait, {dead} dead letters in this server's life"


def _asked(path: Path, timeout: float) -> Mapping[str, Any]:
    """Ask for the status. Raises `OSError`, or `ValueError` when it is no plugin server of ours."""
    unpacker = msgpack.Unpacker(strict_map_key=False)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout)
        with reachable(path) as address:
            connection.connect(address)
        connection.sendall(status_request())
        while data := connection.recv(_ANSWER_BYTES):
            unpacker.feed(data)
            for message in unpacker:
                if isinstance(message, list) and len(message) == len(("kind", "id", "error", "result")):
                    status: Mapping[str, Any] = message[3]
                    return status
    raise ConnectionResetError(errno.ECONNRESET, "the connection was ended without an answer")


def _cause(error: OSError | ValueError, timeout: float) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer within {timeout:g} s"
    if isinstance(error, FileNotFoundError):
        return "there is no socket"
    if isinstance(error, ConnectionRefusedError):
        return "nobody listens"
    if isinstance(error, PermissionError):
        return "this user may not connect; ask as the server's user, or as root"
    return getattr(error, "strerror", None) or str(error)
