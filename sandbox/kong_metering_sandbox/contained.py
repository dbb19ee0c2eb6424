"""Runs something, and leaves neither a process nor a temporary file of it behind, whatever ends it.

    python -m kong_metering_sandbox.contained COMMAND [ARGUMENT]...

Contract: the work runs in a child process, with a temporary directory of its own (`TMPDIR`). This process only waits.
It adopts every process below it whose parent has ended (Linux's "child subreaper"), so that it knows them all, daemons
too. When the child has ended, by itself or by a signal (SIGTERM, SIGHUP and SIGINT are passed on to it), what still
runs is told to end, killed after `_PATIENCE_SECONDS`, and the directory removed, with what its spools have in shared
memory. Only SIGKILL of this process itself
goes past that.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from kong_metering_sandbox.leftovers import remove_shared_memory

_PR_SET_CHILD_SUBREAPER = 36
_PASSED_ON = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
_SENT_BY_A_PROCESS = 0  # SI_USER; what a terminal sends, it sends to the child as well
_AWAITED = (*_PASSED_ON, signal.SIGCHLD)
_PATIENCE_SECONDS = 10.0
_ENDING_SECONDS = 2.0
_POLL_SECONDS = 0.01
_PASSABLE = 0o711
# A socket's path may have 107 bytes, and those of a gateway lie deep in here.
_LONGEST_BASE = 24
_SIGNALLED = 128


def contained(work: Callable[[], int]) -> int:
    """Run the work in a child process; returns its exit status, or 128 and the number of the signal that ended it.

    If the child has ended by itself and processes are left, these are told on standard error, and the status is 1.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.pthread_sigmask(signal.SIG_BLOCK, _AWAITED)
    directory = Path(tempfile.mkdtemp(prefix="km-", dir=short_base()))
    # What lies in it may be for other users, such as PostgreSQL's.
    directory.chmod(_PASSABLE)
    try:
        status = _wait_for(_start(work, directory))
        if status < 0:
            return _SIGNALLED - status
        left = _await_the_last(_ENDING_SECONDS)
        for process in left:
            sys.stderr.write(f"left behind: process {process.pid}: {process.command}\n")
        return status or int(bool(left))
    finally:
        _end_all()
        remove_shared_memory(directory)
        shutil.rmtree(directory, ignore_errors=True)


def short_base() -> str:
    """Give the directory for temporary files, or another one if its name is too long for what is to lie in it."""
    base = tempfile.gettempdir()
    return base if len(base) <= _LONGEST_BASE else "/tmp"  # noqa: S108 - the directory in it is our own


def _start(work: Callable[[], int], directory: Path) -> int:
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.environ["TMPDIR"] = tempfile.tempdir = str(directory)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _AWAITED)
        status = work()
    except KeyboardInterrupt:
        status = _SIGNALLED + signal.SIGINT
    except SystemExit as ending:
        status = ending.code if isinstance(ending.code, int) else 1
    except BaseException:  # noqa: BLE001 - it is shown, and this process ends
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        os._exit(status)


def _wait_for(child: int) -> int:
    """Reap what ends, and pass signals on, until the child has ended; returns its status, as `subprocess` gives it."""
    while True:
        received = signal.sigwaitinfo(_AWAITED)
        if received.si_signo in _PASSED_ON and received.si_code <= _SENT_BY_A_PROCESS:
            os.kill(child, received.si_signo)
        for pid, status in _reaped():
            if pid == child:
                return os.waitstatus_to_exitcode(status)


def _reaped() -> Iterator[tuple[int, int]]:
    try:
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            yield ended
    except ChildProcessError:
        return


def _await_the_last(seconds: float) -> list[_Process]:
    """Wait until no process is left below this one; returns those that are."""
    deadline = time.monotonic() + seconds
    while True:
        list(_reaped())
        left = _descendants()
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(_POLL_SECONDS)


def _end_all() -> None:
    """Tell all to end; kill, again and again, those that do not, and those that they have started meanwhile."""
    _signal_all(signal.SIGTERM)
    seconds = _PATIENCE_SECONDS
    while _await_the_last(seconds):
        _signal_all(signal.SIGKILL)
        seconds = _POLL_SECONDS


def _signal_all(number: int) -> None:
    for process in _descendants():
        try:
            os.kill(process.pid, number)
        except ProcessLookupError:
            continue


@dataclass(frozen=True)
class _Process:
    pid: int
    parent: int

    @property
    def command(self) -> str:
        try:
            return (
                Path(f"/proc/{self.pid}/cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace").strip()
            )
        except OSError:
            return "ended"


def _descendants() -> list[_Process]:
    """List the processes below this one, parents first."""
    found = [process for path in Path("/proc").glob("[0-9]*/stat") if (process := _process(path)) is not None]
    known, grown = [], {os.getpid()}
    while grown:
        below = [process for process in found if process.parent in grown]
        known += below
        grown = {process.pid for process in below}
    return known


def _process(stat: Path) -> _Process | None:
    try:
        fields = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return _Process(int(stat.parent.name), int(fields[1]))


def _command(arguments: list[str]) -> int:
    os.execvp(arguments[0], arguments)  # noqa: S606 - there is to be no shell


if __name__ == "__main__":
    sys.exit(contained(lambda: _command(sys.argv[1:])))
