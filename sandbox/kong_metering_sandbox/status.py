"""Asks a plugin server itself for its account, with an RPC of Kong's protocol."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgpack

from kong_metering import PLUGIN_NAME

if TYPE_CHECKING:
    from kong_metering_sandbox.gateways import Gateway


def plugin_status(gateway: Gateway) -> Mapping[str, Any]:
    """Ask for it.

    Raises `ConnectionError` when it ends the connection instead, as one that dies does.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(10)
        connection.connect(str(gateway.socket_path))
        connection.sendall(msgpack.packb([0, 1, "plugin.GetStatus", [None]]))
        unpacker = msgpack.Unpacker()
        while data := connection.recv(65536):
            unpacker.feed(data)
            for answer in unpacker:
                status: Mapping[str, Any] = answer[3]["Plugins"][PLUGIN_NAME]["Status"]
                return status
    raise ConnectionError("the plugin server ended the connection before it told its account")
