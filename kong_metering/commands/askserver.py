"""Asks a running plugin server over the socket that Kong calls it on, in Kong's protocol `MsgPack:1`."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import msgpack

from kong_metering import PLUGIN_NAME
from kong_metering.commands.output import Failure

_TIMEOUT_SECONDS = 5.0
_ANSWER = 1
_CHUNK_BYTES = 65_536


def server_status(path: Path) -> Mapping[str, Any]:
    """Return what the plugin server at a socket tells of itself; raises `Failure` with the reason, and what to do."""
    try:
        answer = _asked(path, "plugin.GetStatus")
    except FileNotFoundError:
        raise Failure(
            f"{path} is not there: no plugin server was started in this prefix; -p/--kong-prefix or --socket names "
            "another"
        ) from None
    except ConnectionRefusedError:
        raise Failure(f"nobody serves at {path}: the plugin server has ended; its log says why") from None
    except PermissionError:
        raise Failure(f"{path} is another user's: run this as the user that the plugin server runs as") from None
    except TimeoutError:
        raise Failure(f"the plugin server at {path} does not answer within {_TIMEOUT_SECONDS:.0f} s") from None
    except OSError as error:
        raise Failure(f"{path} cannot be asked: {error.strerror or error}") from None
    try:
        status: Mapping[str, Any] = answer["Plugins"][PLUGIN_NAME]
    except (KeyError, TypeError):
        raise Failure(f"what serves at {path} is not a plugin server of {PLUGIN_NAME}") from None
    return status


def _asked(path: Path, method: str) -> Any:
    unpacker = msgpack.Unpacker(raw=False, unicode_errors="surrogateescape", strict_map_key=False)
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as connection:
        connection.settimeout(_TIMEOUT_SECONDS)
        connection.connect(str(path))
        connection.sendall(msgpack.packb([0, 1, method, []]))
        while data := connection.recv(_CHUNK_BYTES):
            unpacker.feed(data)
            for message in unpacker:
                if isinstance(message, list) and len(message) == 4 and message[0] == _ANSWER:  # noqa: PLR2004
                    return message[3]
    raise ConnectionResetError("the plugin server ended the connection")
