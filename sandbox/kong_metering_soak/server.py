"""The plugin server as the soak runs it: the real program, with a clock that can be set and, if need be, a full disk.

    python -m kong_metering_soak.server CONTROL_DIRECTORY [flags of the plugin server]

Kong starts it without an environment, so it is steered by files, which it looks at while it runs: `clock` holds the
seconds by which this process's wall clock is wrong; while `full` is there, nothing that makes a file longer succeeds.
Everything else is `kong_metering.cli.main`.
"""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from kong_metering.cli import main
from kong_metering.clock import SystemClock

CLOCK = "clock"
FULL = "full"

_LOOK_AGAIN_SECONDS = 0.02


def skewed(clock: Callable[[], float], file: Path) -> Callable[[], float]:
    """Give a clock that is wrong by what the file says; it is read again every 20 ms."""
    offset, read_at = 0.0, -1.0

    def wall() -> float:
        nonlocal offset, read_at
        now = time.monotonic()
        if now - read_at > _LOOK_AGAIN_SECONDS:
            offset, read_at = _number_in(file), now
        return clock() + offset

    return wall


def _number_in(file: Path) -> float:
    try:
        return float(file.read_text(encoding="ascii") or 0)
    except (OSError, ValueError):
        return 0.0


def _fill_disk_by(file: Path) -> None:
    """Let the calls by which files grow fail as they do on a full disk, while a file is there."""
    write, allocate = os.pwrite, os.posix_fallocate

    def pwrite(descriptor: int, data: bytes, offset: int) -> int:
        _refuse_if_full(file, descriptor, offset + len(data))
        return write(descriptor, data, offset)

    def posix_fallocate(descriptor: int, offset: int, length: int) -> None:
        _refuse_if_full(file, descriptor, offset + length)
        allocate(descriptor, offset, length)

    os.pwrite, os.posix_fallocate = pwrite, posix_fallocate  # type: ignore[assignment]


def _refuse_if_full(file: Path, descriptor: int, end: int) -> None:
    if end > os.fstat(descriptor).st_size and file.exists():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def run(arguments: list[str]) -> int:
    """Take the control directory off the arguments, and run the plugin server with the others."""
    control = Path(arguments[0])
    time.time = skewed(time.time, control / CLOCK)
    SystemClock.wall = staticmethod(time.time)
    _fill_disk_by(control / FULL)
    return main(arguments[1:])


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
