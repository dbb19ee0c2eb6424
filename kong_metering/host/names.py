"""What `ps` and /proc/PID/comm show of the plugin server's processes; all have the same command line."""

from __future__ import annotations

import contextlib
from pathlib import Path

SUPERVISOR_NAME = "metering-super"
SERVER_NAME = "metering-server"
WATCHER_NAME = "metering-watch"


def name_process(name: str) -> None:
    """Give this process a name, of 15 bytes at most, where the system lets it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text(name, encoding="ascii")
