"""Runs a collector as a process of its own, for tests and for the demo."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Final

from kong_metering_sandbox.collector.client import CollectorClient
from kong_metering_sandbox.ports import port_of, reserve_port

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Self

    from kong_metering_sandbox.collector.faults import FaultRule

_POLL_SECONDS: Final = 0.01
_STOP_SECONDS: Final = 5.0


class CollectorError(Exception):
    """The collector's process did not start; the text holds what it wrote to stderr."""


class CollectorProcess:
    """A context manager around one collector on a free loopback port, which is its own until the context ends.

    ``tokens`` are the bearer tokens to accept, none for everyone. ``database`` is a SQLite file to keep; without it,
    the events go when the context ends. ``start_timeout`` is in seconds. ``url`` and ``client`` are there once
    the context is entered; entering raises :class:`CollectorError` when the process does not start.
    """

    url: str
    client: CollectorClient

    def __init__(
        self, *, tokens: Sequence[str] = (), database: Path | None = None, start_timeout: float = 60.0
    ) -> None:
        self._tokens = tokens
        self._database = database
        self._start_timeout = start_timeout
        self._resources = ExitStack()
        self._child: subprocess.Popen[bytes] | None = None
        self._kept_faults: list[FaultRule] = []

    def __enter__(self) -> Self:
        with ExitStack() as resources:
            self._directory = Path(resources.enter_context(TemporaryDirectory(prefix="collector-")))
            self._port = port_of(resources.enter_context(reserve_port()))
            resources.callback(self._stop)
            self.url = self._start(self._tokens)
            self.client = resources.enter_context(CollectorClient(self.url))
            self._resources = resources.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._resources.close()

    @property
    def ingest_v1(self) -> str:
        """The URL of OpenMeter's v1 ingest path."""
        return f"{self.url}/api/v1/events"

    @property
    def ingest_v3(self) -> str:
        """The URL of OpenMeter's v3 ingest path."""
        return f"{self.url}/api/v3/openmeter/events"

    def pause(self) -> None:
        """Close the port. When this returns, connections are refused and open ones have ended."""
        self._kept_faults = self.client.faults_left()
        self._stop()

    def resume(self) -> None:
        """Open the same port again, with the same events, totals, tokens and fault rules."""
        # No tokens: the database remembers them, also those that were set after the start.
        self._start(())
        self.client.faults(*self._kept_faults)

    def _start(self, tokens: Sequence[str]) -> str:
        ready_file = self._directory / "ready.json"
        ready_file.unlink(missing_ok=True)
        with self._log.open("wb") as log:
            self._child = subprocess.Popen(
                self._command(tokens, ready_file),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
            )
        return self._wait_until_ready(self._child, ready_file)

    def _command(self, tokens: Sequence[str], ready_file: Path) -> list[str]:
        database = self._database or self._directory / "events.sqlite"
        command = [sys.executable, "-m", __package__, "--port", str(self._port)]
        command += ["--database", str(database), "--ready-file", str(ready_file)]
        return command + [f"--token={token}" for token in tokens]

    def _wait_until_ready(self, child: subprocess.Popen[bytes], ready_file: Path) -> str:
        deadline = time.monotonic() + self._start_timeout
        while not ready_file.exists():
            if child.poll() is not None or time.monotonic() >= deadline:
                said = self._log.read_text(errors="replace")
                raise CollectorError(f"collector not ready, exit status {child.poll()}, stderr: {said}")
            time.sleep(_POLL_SECONDS)
        return str(json.loads(ready_file.read_bytes())["url"])

    def _stop(self) -> None:
        if self._child is None:
            return
        self._child.terminate()
        try:
            self._child.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._child = None

    @property
    def _log(self) -> Path:
        return self._directory / "stderr.log"
