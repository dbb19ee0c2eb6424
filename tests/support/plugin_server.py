"""A plugin server's process, started as Kong 3.9.1 starts it: with nothing in its environment, and what is not its own.

The command is that of kong.conf.example, run as `sh -c "exec ..."` with an empty environment, umask 0000, descriptors
of the process that starts it, and one pipe for stdout and stderr, which Kong reads line by line.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from kong_metering.sandbox.conf import read_example
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from typing_extensions import Self

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent

_LINE = re.compile(r"(debug|info|warning|error|critical): [^\n]*")
_STOP_SECONDS = 15.0


def short_directory() -> Path:
    """Make a directory whose path leaves room for a socket's name: 107 bytes is all that such a path may have."""
    return Path(tempfile.mkdtemp(prefix="km-", dir="/tmp"))


def example_settings(prefix: Path) -> dict[str, str]:
    """Read the lines of kong.conf.example, for a Kong in `prefix` and the programs of this environment."""
    return read_example(bin_directory=BIN, prefix=prefix, example=ROOT / "kong.conf.example")


class ServerProcess:
    """A plugin server that `command` starts, and that makes its socket at `path`.

    `log` has what it said, line by line. `inherited` are descriptors that it gets besides the usual three.
    """

    def __init__(
        self,
        command: str,
        path: Path,
        *,
        environment: Mapping[str, str] | None = None,
        inherited: Sequence[int] = (),
    ) -> None:
        self.command = command
        self.path = path
        self.log: list[str] = []
        self._environment = dict(environment or {})
        self._inherited = tuple(inherited)
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: threading.Thread | None = None

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, "the server was not started"
        return self._process

    @property
    def pid(self) -> int:
        return self.process.pid

    def launch(self) -> Self:
        """Start the process, and do not wait for it to serve."""
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", f"exec {self.command}"],
            env=self._environment,
            umask=0o000,
            pass_fds=self._inherited,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self._reader = threading.Thread(target=self._read_log, name="log of the plugin server", daemon=True)
        self._reader.start()
        return self

    def start(self) -> Self:
        """Start the process and wait until its socket is there."""
        inode = self._inode()
        self.launch()
        wait_until(lambda: self._serves(inode) or self.process.poll() is not None, "a socket")
        assert self.process.poll() is None, f"the plugin server ended: {self.log}"
        return self

    def wait(self, seconds: float = _STOP_SECONDS) -> int:
        """Wait for the process to end by itself, and give its exit status; `log` is complete then."""
        status = self.process.wait(seconds)
        assert self._reader is not None
        self._reader.join(_STOP_SECONDS)
        return status

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End the process with a signal and give its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.wait()
        finally:
            self.kill()

    def kill(self) -> None:
        """End the process at once, whatever its state."""
        if self.process.poll() is None:
            self.process.kill()
            self.wait()

    def complaints(self) -> list[str]:
        """List the lines that are more than information, among them all that are not in the form of our own."""
        return [
            line for line in list(self.log) if not _LINE.fullmatch(line) or not line.startswith(("debug:", "info:"))
        ]

    def wait_for_log(self, part: str) -> str:
        """Wait for a line that contains `part`, and give it."""
        return wait_until(
            lambda: next((line for line in list(self.log) if part in line), None), f"{part!r} in the log: {self.log}"
        )

    def resident_bytes(self) -> int:
        """Tell how much memory of the machine the process has."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def open_files(self) -> list[str]:
        """List what the process's descriptors are open on."""
        directory = Path(f"/proc/{self.pid}/fd")
        return [str(descriptor.readlink()) for descriptor in directory.iterdir()]

    def __enter__(self) -> Self:
        return self if self._process is not None else self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _serves(self, inode: int | None) -> bool:
        """Whether the socket is this server's: it is a new one, or ours says that it took over the one before."""
        return self._inode() not in (None, inode) or any(", taken over " in line for line in list(self.log))

    def _inode(self) -> int | None:
        try:
            return self.path.stat().st_ino
        except FileNotFoundError:
            return None

    def _read_log(self) -> None:
        stream = self.process.stdout
        assert stream is not None
        with stream:
            for line in stream:
                self.log.append(line.decode("utf-8", "surrogateescape").removesuffix("\n"))


class PluginServerProcess(ServerProcess):
    """Our plugin server, from the lines of kong.conf.example, in a prefix of its own unless one is given.

    `flags` are added to the command.
    """

    def __init__(
        self,
        *flags: str,
        prefix: Path | None = None,
        environment: Mapping[str, str] | None = None,
        inherited: Sequence[int] = (),
    ) -> None:
        self._own_prefix = short_directory() if prefix is None else None
        self.prefix = self._own_prefix or prefix or Path()
        settings = example_settings(self.prefix)
        command = " ".join([settings["pluginserver_metering_start_cmd"], *flags])
        path = Path(settings["pluginserver_metering_socket"])
        super().__init__(command, path, environment=environment, inherited=inherited)

    def stop(self, number: int = signal.SIGTERM) -> int:
        try:
            return super().stop(number)
        finally:
            if self._own_prefix is not None:
                shutil.rmtree(self._own_prefix, ignore_errors=True)


def script_command(script: Path, prefix: Path, *flags: str) -> str:
    """Give the command that runs a plugin server written for a test."""
    return " ".join([str(BIN / "python"), str(script), "--kong-prefix", str(prefix), *flags])
