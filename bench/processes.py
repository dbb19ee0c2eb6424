"""Starts and stops the processes of the benchmarks, and reads what they cost."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kong_metering import PLUGIN_NAME

if TYPE_CHECKING:
    from typing_extensions import Self

BENCH = Path(__file__).parent
_PLUGIN_SERVER = BENCH.parent / "plugin_server.py"
_PDK_SERVER = BENCH / "pdk_server.py"
_STARTING_SECONDS = 20.0
_ENDING_SECONDS = 20.0
_CPUCLOCK_SCHED = 2  # of the whole process, its ended threads included; see clock_getcpuclockid(3)


@dataclass(frozen=True)
class Candidate:
    """A plugin server to measure; `command` is what comes before `-p PREFIX`."""

    name: str
    command: tuple[str, ...]


OURS = Candidate("kong-metering", (sys.executable, str(_PLUGIN_SERVER)))
IN_MEMORY = Candidate("kong-metering, --no-spool", (sys.executable, str(_PLUGIN_SERVER), "--no-spool"))
GEVENT = Candidate("kong-pdk, gevent", (sys.executable, str(_PDK_SERVER), "--no-lua-style", "-g"))
THREADS = Candidate("kong-pdk, threads", (sys.executable, str(_PDK_SERVER), "--no-lua-style"))


def with_switch_interval(seconds: float) -> Candidate:
    """Our server with another switch interval of the interpreter."""
    code = f"import sys; sys.setswitchinterval({seconds}); from kong_metering.cli import main; sys.exit(main())"
    return Candidate(f"{seconds * 1e6:,.0f} µs", (sys.executable, "-c", code))


class Process:
    """A process that runs as long as its context."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """The process that does the work."""
        return self._process.pid

    def cpu_seconds(self) -> float:
        """Tell the CPU time that the process has used, user and system."""
        return cpu_seconds(self.pid)

    def rss_bytes(self) -> int:
        """Tell how much memory the process holds."""
        return rss_bytes(self.pid)

    def stop(self) -> None:
        """End the process."""
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(_ENDING_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()


class Server(Process):
    """A plugin server, started as Kong starts one: by `sh`, without an environment, with umask 0000."""

    def __init__(self, candidate: Candidate, directory: Path) -> None:
        directory.mkdir()
        self.socket = directory / f"{PLUGIN_NAME}.sock"
        command = shlex.join([*candidate.command, "-p", str(directory)])
        with (directory / "log").open("wb") as log:
            process = subprocess.Popen(
                ["/bin/sh", "-c", f"exec {command}"], env={}, umask=0, stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )
        super().__init__(process)
        _wait_until(self.socket.exists, f"{candidate.name} does not serve, see {directory}/log", _STARTING_SECONDS)

    @property
    def pid(self) -> int:
        """The process that serves: the only one that ours has forked, or the one that was started."""
        return next(iter(_children_of(super().pid)), super().pid)

    def serving(self) -> list[int]:
        """List the processes that serve, where it was told to have several."""
        return _children_of(super().pid)


class Collector(Process):
    """The ingest end, see collector.py."""

    def __init__(self) -> None:
        process = subprocess.Popen([sys.executable, str(BENCH / "collector.py")], stdout=subprocess.PIPE)
        if process.stdout is None:
            raise AssertionError("stdout is a pipe")
        super().__init__(process)
        self.url = f"http://127.0.0.1:{int(process.stdout.readline())}"

    def ask(self, path: str = "counts") -> dict[str, int]:
        """Tell the counts; the paths `open`, `close` and `hold` move the gate."""
        with urllib.request.urlopen(f"{self.url}/{path}", timeout=10) as response:  # noqa: S310 - our own http URL
            counts: dict[str, int] = json.load(response)
        return counts

    def subjects(self) -> frozenset[str]:
        """List the subjects that have an event among those posted to `/subjects`."""
        with urllib.request.urlopen(f"{self.url}/subjects", timeout=30) as response:  # noqa: S310 - our own http URL
            return frozenset(json.load(response))

    def wait_for_events(self, events: int, seconds: float = 30.0, spare: int = 0) -> None:
        """Wait until `events` events have arrived in all; raises TimeoutError if they do not.

        Raises RuntimeError if more than `spare` others have arrived.
        """
        _wait_until(lambda: self.ask()["events"] >= events, f"{events} events did not arrive", seconds)
        found = self.ask()["events"]
        if not events <= found <= events + spare:
            raise RuntimeError(f"{events} events were due, {found} arrived")

    def wait_for_refusals(self) -> int:
        """Wait until the closed gate turns batches away; give the count of those that it has turned away."""
        before = self.ask()["refused"]
        _wait_until(lambda: self.ask()["refused"] > before + 1, "no batch came to the gate", _STARTING_SECONDS)
        return self.ask()["refused"]


def cpu_seconds(pid: int) -> float:
    """Tell the CPU time that a process has used, user and system."""
    return time.clock_gettime((~pid << 3) | _CPUCLOCK_SCHED)


def rss_bytes(pid: int) -> int:
    """Tell how much memory a process holds."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) * 1024


def _children_of(pid: int) -> list[int]:
    children = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            if int(stat.read_bytes().rpartition(b")")[2].split()[1]) == pid:
                children.append(int(stat.parent.name))
    return children


def _wait_until(condition: Any, message: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(message)
        time.sleep(0.01)
