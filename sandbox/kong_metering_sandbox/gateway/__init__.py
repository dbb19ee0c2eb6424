"""A stand-in for Kong Gateway 3.9.1: enough of it to run, to show and to test an external plugin without Kong.

It is a program, not a library: start it with `python -m kong_metering_sandbox.gateway -c kong.conf`. When it
is ready it writes `standin.json` into its prefix: `{"proxy_url", "admin_url", "pid"}`.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

READY_FILE = "standin.json"


def command(conf: Path, prefix: Path | None = None) -> list[str]:
    """Return the command line that starts a gateway in the foreground; it runs until SIGTERM."""
    line = [sys.executable, "-m", __name__, "-c", str(conf)]
    return line if prefix is None else [*line, "--prefix", str(prefix)]
