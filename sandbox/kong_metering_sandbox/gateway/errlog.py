"""The error log, in nginx's style: to stderr and to the prefix's logs/error.log."""

from __future__ import annotations

import os
import sys
from datetime import datetime
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from pathlib import Path


class ErrorLog:
    """Writes lines like `2026/11/22 15:06:02 [info] 123#0: text`, each as soon as it comes."""

    def __init__(self, *streams: TextIO) -> None:
        self._streams = streams

    def write(self, level: str, text: str) -> None:
        """Write one line at an nginx log level: debug, info, notice, warn, error, crit, alert, emerg."""
        now = datetime.now().astimezone()
        line = f"{now:%Y/%m/%d %H:%M:%S} [{level}] {os.getpid()}#0: {text}\n"
        for stream in self._streams:
            stream.write(line)
            stream.flush()

    def kong(self, level: str, text: str) -> None:
        """Write a line that Kong itself would write."""
        self.write(level, f"[kong] {text}")

    def error(self, text: str) -> None:
        """Write a line of Kong's at level error."""
        self.kong("error", text)

    def notice(self, text: str) -> None:
        """Write a line of Kong's at level notice."""
        self.kong("notice", text)


def open_log(prefix: Path) -> ErrorLog:
    """Open the log of a prefix, whose folders are made if need be."""
    folder = prefix / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / "error.log").open("a", encoding="utf-8", errors="replace")
    return ErrorLog(sys.stderr, file)
