"""What the sandbox asks the plugin server itself."""

from __future__ import annotations

import shutil
import socket
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest

from kong_metering_sandbox.status import plugin_status
from tests.support.plugin_server import short_directory

if TYPE_CHECKING:
    from kong_metering_sandbox.gateways import Gateway


@pytest.mark.timeout(20)
def test_a_plugin_server_that_ends_the_connection_is_not_waited_for() -> None:
    directory = short_directory()
    gateway = cast("Gateway", SimpleNamespace(socket_path=directory / "socket"))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(gateway.socket_path))
        listener.listen()

        def hang_up() -> None:
            connection, _ = listener.accept()
            connection.recv(4096)
            connection.close()

        server = threading.Thread(target=hang_up)
        server.start()
        with pytest.raises(ConnectionError, match="ended the connection"):
            plugin_status(gateway)
        server.join()
    shutil.rmtree(directory)
