"""Finds and asks the running server, for the commands that tell what it does.

Contract: asks over the socket that Kong uses, in Kong's protocol `MsgPack:1`, and changes nothing. Imports little: a
probe may run each second.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click
import msgpack
from click.core import ParameterSource

from kong_metering import ENVIRONMENT_PREFIX
from kong_metering.clock import LONGEST_SOCKET_WAIT
from kong_metering.commands.options import plugin_name_option
from kong_metering.host.handover import status_request
from kong_metering.host.paths import reachable
from kong_metering.installation.places import SOCKET
from kong_metering.quantities import Duration

F = TypeVar("F", bound=Callable[..., Any])

_ANSWER_BYTES = 65_536


def server_options(command: F) -> F:
    """Let a command take where the server is: `kong_prefix`, `socket_name`, `socket_path`, `plugin_name`, `timeout`."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


_OPTIONS = (
    click.option(
        "-p",
        "--kong-prefix",
        metavar="DIR",
        type=click.Path(path_type=Path),
        default="/usr/local/kong",
        show_default=True,
        envvar=f"{ENVIRONMENT_PREFIX}KONG_PREFIX",
        show_envvar=True,
        help="The server's --kong-prefix.",
    ),
    click.option(
        "--socket-name",
        metavar="NAME",
        envvar=f"{ENVIRONMENT_PREFIX}SOCKET_NAME",
        show_envvar=True,
        help="The server's --socket-name.",
    ),
    click.option(
        "--socket",
        "socket_path",
        metavar="PATH",
        type=click.Path(path_type=Path),
        envvar=f"{ENVIRONMENT_PREFIX}SOCKET",
        show_envvar=True,
        help="The server's --socket.",
    ),
    plugin_name_option("The server's --plugin-name."),
    click.option(
        "--timeout",
        metavar="TIME",
        type=Duration(),
        default="5s",
        show_default=True,
        help="How long to wait for an answer.",
    ),
)


def server_socket(
    context: click.Context, kong_prefix: Path, socket_name: str | None, socket_path: Path | None, plugin_name: str
) -> Path:
    """Return the socket that is meant.

    Without --socket, --socket-name and --kong-prefix it is that of the server that systemd or a container runs, if
    there is one, else the one in Kong's usual prefix.
    """
    is_told = socket_path or socket_name or context.get_parameter_source("kong_prefix") is not ParameterSource.DEFAULT
    if not is_told and SOCKET.exists():
        return SOCKET
    return socket_path or kong_prefix / (socket_name or f"{plugin_name}.sock")


def server_status(path: Path, timeout: float) -> tuple[int, Mapping[str, Any]]:
    """Ask for the status: the process that answers, and what it tells of the plugin; `timeout` in seconds.

    Raises `OSError`, or `ValueError` when it is no plugin server of ours.
    """
    answer = _asked(path, timeout)
    try:
        (plugin,) = answer["Plugins"].values()
        return answer["Pid"], plugin
    except (KeyError, TypeError, AttributeError):
        raise ValueError("what answers is no plugin server of this plugin") from None


def cause_of_silence(error: OSError | ValueError, timeout: float) -> str:
    """Return in words why a server could not be asked, and what to do where that is known."""
    if isinstance(error, TimeoutError):
        return f"no answer within {timeout:g} s"
    if isinstance(error, FileNotFoundError):
        return "there is no socket; was a server started there? -p, --socket-name and --socket name another place"
    if isinstance(error, ConnectionRefusedError):
        return "nobody listens; the server has ended, and its log says why"
    if isinstance(error, PermissionError):
        return "this user may not connect; ask as the server's user, or as root"
    return getattr(error, "strerror", None) or str(error)


def _asked(path: Path, timeout: float) -> Any:
    unpacker = msgpack.Unpacker(strict_map_key=False, unicode_errors="surrogateescape")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(min(timeout, LONGEST_SOCKET_WAIT))
        with reachable(path) as address:
            connection.connect(address)
        connection.sendall(status_request())
        while data := connection.recv(_ANSWER_BYTES):
            unpacker.feed(data)
            for message in unpacker:
                if isinstance(message, list) and len(message) == len(("kind", "id", "error", "result")):
                    return message[3]
    raise ConnectionResetError(errno.ECONNRESET, "the connection was ended without an answer")
