"""Real Kongs as the examples have them: the plugin server runs beside Kong, which only reads its dump, or nowhere."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import requests

from kong_metering_sandbox.gateways import RealKong

_STOP_SECONDS = 20
_SERVER = Path(sys.executable).parent / "kong-metering-plugin-server"


class KongBeside(RealKong):
    """The Kong on the PATH, which does not start the plugin server: with `start_cmd` it answers 500 to `GET /`.

    A context manager like its base.
    """

    _server: subprocess.Popen[bytes] | None = None

    def __init__(self, directory: Path, declarative: str, **options: Any) -> None:
        dump = directory / "dump.json"
        settings = {
            "pluginserver_metering_start_cmd": "",
            "pluginserver_metering_query_cmd": f"cat {dump}",
            **options.pop("settings", {}),
        }
        super().__init__(directory, declarative, settings=settings, **options)
        dump.write_bytes(subprocess.run([_SERVER, "--dump"], check=True, capture_output=True).stdout)

    def _start(self) -> None:
        self._start_server()
        super()._start()

    def _start_server(self) -> None:
        command: list[str | Path] = [_SERVER, "--kong-prefix", self.prefix]
        self._server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def _wait_for_the_end(self) -> None:
        if self._server is not None:
            self._server.terminate()
            self._server.wait(_STOP_SECONDS)
            self._server = None
        super()._wait_for_the_end()


class ControlPlane(KongBeside):
    """A control plane: it neither proxies nor has a plugin server."""

    def wait_until_ready(self) -> None:
        """Wait until the Admin API answers."""
        self._wait_for(self._administers, "the control plane answers")

    def _administers(self) -> bool:
        try:
            return requests.get(self.admin_url, timeout=5).ok
        except requests.RequestException:
            return False

    def _start_server(self) -> None:
        """Start none."""


class DataPlane(KongBeside):
    """A data plane: it has no Admin API."""

    def _answers(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.proxy_port)) == 0
