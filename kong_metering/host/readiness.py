"""Tells the system's service manager that the server is there, where it wants to know: systemd's `Type=notify`."""

from __future__ import annotations

import contextlib
import os
import socket

_VARIABLE = "NOTIFY_SOCKET"


def tell_ready() -> None:
    """Tell it; nothing happens where nobody asked."""
    address = os.environ.get(_VARIABLE, "")
    if not address.startswith(("/", "@")):
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        # An address that begins with @ is in the abstract namespace.
        manager.connect(address.replace("@", "\0", 1) if address.startswith("@") else address)
        manager.send(b"READY=1", socket.MSG_DONTWAIT)
