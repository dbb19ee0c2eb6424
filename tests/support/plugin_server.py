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
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from kong_metering.plurals import counted
from kong_metering_sandbox.conf import read_example
from kong_metering_sandbox.contained import short_base
from kong_metering_sandbox.leftovers import remove_shared_memory
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from typing_extensions import Self

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent

_LINE = re.compile(r"(debug|info|warning|error|critical): [^\n]*")
_STOP_SECONDS = 15.0


def short_directory() -> Path:
    """Make a directory whose path leaves room for a socket's name: 107 bytes is all that such a path may have."""
    return Path(tempfile.mkdtemp(prefix="km-", dir=short_base()))


def remove_directory(directory: Path) -> None:
    """Remove a directory, with what killed servers that had their spools in it have left in shared memory.

    A later spool whose directory gets the same inode would take over what is left there.
    """
    remove_shared_memory(directory)
    shutil.rmtree(directory)


def example_settings(prefix: Path) -> dict[str, str]:
    """Read the lines of kong.conf.example, for a Kong in `prefix` and the programs of this environment."""
    return read_example(bin_directory=BIN, prefix=prefix, example=ROOT / "kong.conf.example")


def children_of(pid: int) -> list[int]:
    """List the living processes that a process has started, the oldest first."""
    stats = {int(path.parent.name): _stat(path) for path in Path("/proc").glob("[0-9]*/stat")}
    children = [child for child, stat in stats.items() if stat and stat[0] != "Z" and int(stat[1]) == pid]
    return sorted(children, key=lambda child: (int(stats[child][19]), child))


def _stat(path: Path) -> list[str]:
    """Read what the system tells of a process, from its state on; nothing if it is gone."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


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
        """The process that was started: the supervisor, if it is one."""
        return self.process.pid

    def server_pids(self) -> list[int]:
        """List the processes that it has started, the oldest first."""
        return children_of(self.pid)

    @property
    def server_pid(self) -> int:
        """The one process that serves."""
        (pid,) = self.server_pids()
        return pid

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
        """Start the process and wait until all its servers serve."""
        self.launch()
        self.wait_until_it_serves()
        return self

    def wait_until_it_serves(self) -> None:
        """Wait until it says so of each server."""
        told = re.search(r"--servers[ =](\d+)", self.command)
        servers = 1 if told is None else int(told[1])

        def serves() -> bool:
            return sum(line.startswith("info: serving on ") for line in list(self.log)) >= servers

        wait_until(lambda: serves() or self.process.poll() is not None, counted(servers, "server"))
        assert serves(), f"the plugin server ended: {self.log}"

    def wait(self, seconds: float = _STOP_SECONDS) -> int:
        """Wait for the process to end by itself, and give its exit status; `log` is complete then."""
        status = self.process.wait(seconds)
        assert self._reader is not None
        self._reader.join(_STOP_SECONDS)
        return status

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End the process with a signal and give its exit status; by SIGKILL, those that it has started as well.

        A server whose supervisor is killed goes on, and where an endpoint hangs for longer than anybody waits here.
        """
        if number == signal.SIGKILL:
            self.kill()
        elif self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.wait()
        finally:
            self.kill()

    def kill(self) -> None:
        """End the process and those that it has started at once, whatever their state."""
        if self.process.poll() is None:
            # Held, so that it starts no more of them.
            self.process.send_signal(signal.SIGSTOP)
            wait_until(lambda: _stat(Path(f"/proc/{self.pid}/stat"))[:1] in (["T"], ["Z"], []), "it is held")
            started = self.server_pids()
            self.process.kill()
            for pid in started:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
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
        """Tell how much memory of the machine the server has, besides what is shared and of a fixed size."""
        pages = Path(f"/proc/{self.server_pid}/statm").read_text(encoding="ascii").split()
        return (int(pages[1]) - int(pages[2])) * os.sysconf("SC_PAGE_SIZE")

    def open_files(self) -> list[str]:
        """List what the descriptors of the process, and of those that it has started, are open on."""
        directories = [Path(f"/proc/{pid}/fd") for pid in (self.pid, *self.server_pids())]
        found: list[str] = []
        for directory in directories:
            for descriptor in directory.iterdir():
                with suppress(FileNotFoundError):  # it was closed just now
                    found.append(str(descriptor.readlink()))
        return found

    def __enter__(self) -> Self:
        return self if self._process is not None else self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

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
            if self._own_prefix is not None and self._own_prefix.exists():
                remove_directory(self._own_prefix)


def script_command(script: Path, prefix: Path, *flags: str) -> str:
    """Give the command that runs a plugin server written for a test."""
    return " ".join([str(BIN / "python"), str(script), "--kong-prefix", str(prefix), *flags])
