"""The plugin server with faults of its disk, its clock and its code: the real program, in a process that can be hurt.

    python -m kong_metering_sandbox.faulty_server CONTROL_DIRECTORY SPOOL_DIRECTORY [flags of the plugin server]

Kong starts it without an environment, so it is steered by files, which `Faults` writes and which it looks at while it
runs. What the system would refuse is refused where Python calls it, below the spool's directory and nowhere else: calls
with a path by an audit hook, those with a descriptor by standing in their way. Everything else is
`kong_metering.cli.main`.
"""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kong_metering.cli import main
from kong_metering.clock import SystemClock

if TYPE_CHECKING:
    from kong_metering.reasons import Skipped
    from kong_metering.request import FinishedRequest

_CLOCK = "clock"
_DISK = "disk"
_BUG = "bug"

_LOOK_AGAIN_SECONDS = 0.02
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link")
_CALLS_WITH_PATH = frozenset((*_CHANGES, "open", "os.listdir", "os.scandir"))
_CHANGES_BY_DESCRIPTOR = ("pwrite", "posix_fallocate", "ftruncate")
_CALLS_BY_DESCRIPTOR = (*_CHANGES_BY_DESCRIPTOR, "pread", "fsync", "fdatasync")


class DiskFault(Enum):
    """How the spool's disk fails."""

    FULL = "full"
    READ_ONLY = "read-only"
    BROKEN = "broken"  # EIO
    HANGS = "hangs"


_ERRNO = {DiskFault.FULL: errno.ENOSPC, DiskFault.READ_ONLY: errno.EROFS, DiskFault.BROKEN: errno.EIO}


class Faults:
    """Steers the faults of whichever process serves, now and after a restart; none at first."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self._directory = directory

    def command(self, spool: Path) -> list[str]:
        """Give the beginning of the command that starts such a plugin server."""
        return [sys.executable, "-m", __name__, str(self._directory), str(spool)]

    def set_disk(self, fault: DiskFault | None) -> None:
        """Let the spool's disk fail from now on, or, with None, work."""
        self._write(_DISK, fault.value if fault else "")

    def set_clock(self, seconds: float) -> None:
        """Let the wall clock be wrong by so many seconds."""
        self._write(_CLOCK, str(seconds))

    def set_bug(self, *, is_there: bool) -> None:
        """Let the plugin fail at each request."""
        self._write(_BUG, "1" if is_there else "")

    def _write(self, name: str, text: str) -> None:
        draft = self._directory / f"{name}.new"
        draft.write_text(text, encoding="ascii")
        draft.replace(self._directory / name)


class _Watched:
    """What a file says, looked at again each 20 ms."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._read_at = -1.0
        self._text = ""

    def __call__(self) -> str:
        now = time.monotonic()
        if now - self._read_at > _LOOK_AGAIN_SECONDS:
            self._read_at = now
            try:
                self._text = self._file.read_text(encoding="ascii")
            except OSError:
                self._text = ""
        return self._text


class _Disk:
    """Fails the calls of this process that are about what lies below a directory, as a watched file says."""

    def __init__(self, said: Callable[[], str], spool: Path) -> None:
        self._said = said
        self._spool = str(spool)

    def install(self) -> None:
        """Stand in the way of all calls, for as long as the process lives."""
        sys.addaudithook(self._look_at)
        for name in _CALLS_BY_DESCRIPTOR:
            setattr(os, name, self._guarded(name, getattr(os, name)))

    @property
    def _fault(self) -> DiskFault | None:
        said = self._said()
        return DiskFault(said) if said else None

    def _look_at(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in _CALLS_WITH_PATH and self._is_ours(arguments[0]):
            opens_to_write = event == "open" and bool((arguments[2] or 0) & _WRITES)
            self._meet(changes=opens_to_write or event in _CHANGES, grows=False)

    def _guarded(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(descriptor: int, *arguments: Any) -> Any:
            if self._said() and self._is_ours(Path(f"/proc/self/fd/{descriptor}").readlink()):
                end = _end_of(name, arguments)
                grows = end is not None and end > os.fstat(descriptor).st_size
                self._meet(changes=name in _CHANGES_BY_DESCRIPTOR, grows=grows)
            return call(descriptor, *arguments)

        return guarded

    def _is_ours(self, path: object) -> bool:
        if not isinstance(path, (str, bytes, os.PathLike)):
            return False
        return os.fsdecode(path).startswith(self._spool)

    def _meet(self, *, changes: bool, grows: bool) -> None:
        """Let a call go on, hold it up, or fail it."""
        while (fault := self._fault) is DiskFault.HANGS:
            time.sleep(_LOOK_AGAIN_SECONDS)
        fails = {DiskFault.FULL: grows, DiskFault.READ_ONLY: changes, DiskFault.BROKEN: True}
        if fault is not None and fails[fault]:
            raise OSError(_ERRNO[fault], os.strerror(_ERRNO[fault]))


def _end_of(name: str, arguments: tuple[Any, ...]) -> int | None:
    """Tell up to where a call would make a file reach; None when it makes none longer."""
    if name == "pwrite":
        return int(arguments[1]) + len(arguments[0])
    if name == "posix_fallocate":
        return int(arguments[0]) + int(arguments[1])
    return int(arguments[0]) if name == "ftruncate" else None


def _skewed(clock: Callable[[], float], said: Callable[[], str]) -> Callable[[], float]:
    return lambda: clock() + float(said() or 0)


def _put_bug(said: Callable[[], str]) -> None:
    """Let the plugin fail where it makes its events, while a watched file says so."""
    from kong_metering.events import Meter  # noqa: PLC0415 - a supervisor has not imported it, and need not

    make = Meter.events

    def events(self: Meter, request: FinishedRequest) -> list[bytes] | Skipped:
        if said():
            raise RuntimeError("the sandbox has put a bug in here")
        return make(self, request)

    Meter.events = events  # type: ignore[method-assign]


def run(arguments: list[str]) -> int:
    """Take the two directories off the arguments, and run the plugin server with the others."""
    control, spool = map(Path, arguments[:2])
    time.time = _skewed(time.time, _Watched(control / _CLOCK))
    SystemClock.wall = staticmethod(time.time)
    _Disk(_Watched(control / _DISK), spool).install()
    if (control / _BUG).exists():
        _put_bug(_Watched(control / _BUG))
    return main(arguments[2:])


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
