"""Ports that are known before the process that serves on them has started."""

from __future__ import annotations

import socket


def reserve_port() -> socket.socket:
    """Take a free loopback port; it is nobody else's until the socket is closed.

    The socket is bound and does not listen: connections are refused, as where nobody is. A server that sets
    `SO_REUSEADDR` before it binds, as asyncio's and nginx do, can serve there meanwhile, and stop and start again.
    """
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("127.0.0.1", 0))
    return reserved


def port_of(reserved: socket.socket) -> int:
    """Give the port's number."""
    port: int = reserved.getsockname()[1]
    return port
