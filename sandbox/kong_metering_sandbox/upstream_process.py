"""Runs the echo upstream as a process of its own, for tests and for the demo."""

from __future__ import annotations

import socket
import subprocess
import sys
from typing import TYPE_CHECKING

from kong_metering_sandbox.gateways import wait_for
from kong_metering_sandbox.ports import port_of, reserve_port

if TYPE_CHECKING:
    from typing_extensions import Self

_STOP_SECONDS = 10.0


class UpstreamProcess:
    """A context manager around one upstream on a free loopback port; `port` and `url` are there once it is entered."""

    port: int

    def __enter__(self) -> Self:
        self._reserved = reserve_port()
        self.port = port_of(self._reserved)
        command = [sys.executable, "-m", "kong_metering_sandbox.upstream", "--port", str(self.port)]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            wait_for(self._listens, "the upstream listens")
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def _stop(self) -> None:
        self._process.terminate()
        self._process.wait(_STOP_SECONDS)
        self._reserved.close()

    @property
    def url(self) -> str:
        """Where the upstream is, without a slash at the end."""
        return f"http://127.0.0.1:{self.port}"

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0
