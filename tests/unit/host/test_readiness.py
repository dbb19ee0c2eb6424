"""A service manager that wants to know when the server is there is told: systemd's `Type=notify`."""

from __future__ import annotations

import signal
import socket
from pathlib import Path

import pytest

from tests.support.plugin_server import PluginServerProcess

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("is_abstract", [False, True])
def test_the_manager_is_told_at_the_start_and_at_a_restart(prefix: Path, is_abstract: bool) -> None:  # noqa: FBT001
    address = f"@{prefix}/notify" if is_abstract else f"{prefix}/notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address.replace("@", "\0", 1))
        manager.settimeout(100)
        with PluginServerProcess(prefix=prefix, environment={"NOTIFY_SOCKET": address}) as server:
            assert manager.recv(100) == b"READY=1"
            server.process.send_signal(signal.SIGHUP)
            assert manager.recv(100) == b"READY=1"


def test_a_manager_that_is_gone_does_no_harm(prefix: Path) -> None:
    with PluginServerProcess(prefix=prefix, environment={"NOTIFY_SOCKET": f"{prefix}/gone"}) as server:
        assert server.complaints() == []
