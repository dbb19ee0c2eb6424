"""Log lines for Kong's error log: single, escaped, bounded, and never in the way.

Contract: any thread may log. Kong reads our stdout and stderr line by line from one pipe, so a line is written with
one `write` that the kernel keeps whole (at most 4,096 bytes). A pipe that nobody empties must not stop metering: it
is made non-blocking, and lines that do not fit are dropped and counted. `TroubleLog` says a repeated trouble once,
counts the rest, and sums them up once a minute, so that no client can flood the log. Kong gives our lines the level
info, which its default `log_level = notice` hides; `Relay` keeps warnings and errors for a log phase to say them once
more through `kong.log`, where they show.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import threading
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kong_metering.clock import Clock

LOGGER = logging.getLogger("kong_metering")

_MAX_LINE_BYTES = 2048
_MAX_TROUBLES = 1000
_MAX_RELAYED = 50
_STDERR = 2


def printable(text: str, limit: int = 200) -> str:
    """Make text from outside fit for a log line: no control, invisible or undecodable character, cut to `limit`."""
    cut = text if len(text) <= limit else text[:limit] + "…"
    if cut.isascii() and cut.isprintable():
        return cut
    return "".join(_escaped(char) for char in cut)


def _escaped(char: str) -> str:
    return char if char.isprintable() or char == "…" else char.encode("unicode_escape").decode("ascii")


def cause_of(error: BaseException) -> str:
    """Tell an exception in one line: its type, its text and where it was raised."""
    return f"{type(error).__name__}: {printable(_text_of(error))}{_place_of(error)}"


def _text_of(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # noqa: BLE001 - an exception of somebody else's may not even be able to tell itself
        return "no text"


def _place_of(error: BaseException) -> str:
    """Find the innermost frame by hand: the traceback module would read source files, for each request that fails."""
    trace = error.__traceback__
    if trace is None:
        return ""
    while trace.tb_next is not None:
        trace = trace.tb_next
    return f" at {os.path.basename(trace.tb_frame.f_code.co_filename)}:{trace.tb_lineno}"  # noqa: PTH119


def _message_of(record: logging.LogRecord) -> str:
    """Give the text of a record, printable; without its arguments if they do not fit it."""
    try:
        text = record.getMessage()
    except Exception:  # noqa: BLE001 - logging must not fail the code that logs
        text = str(record.msg)
    return printable(text, _MAX_LINE_BYTES)


class LineHandler(logging.Handler):
    """Writes each record as one line to a file descriptor, without ever waiting for its reader."""

    def __init__(self, descriptor: int = _STDERR) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._lost = 0
        # Only a pipe of our own: a terminal's flags are shared with the user's shell.
        if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
            os.set_blocking(descriptor, False)

    def emit(self, record: logging.LogRecord) -> None:
        """Write the line, or count it as lost; logging never raises into the code that logs."""
        lost = f" ({self._lost} log lines were lost before this one)".encode() if self._lost else b""
        line = f"{record.levelname.lower()}: {_message_of(record)}".encode()[: _MAX_LINE_BYTES - len(lost)]
        line = line.decode("utf-8", "ignore").encode()  # without half a character at its end
        try:
            os.write(self._descriptor, line + lost + b"\n")
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EPIPE, errno.EBADF):
                self._lost += 1
            return
        self._lost = 0


class Relay(logging.Handler):
    """Keeps the newest warnings and errors until somebody takes them."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._kept: deque[tuple[int, str]] = deque(maxlen=_MAX_RELAYED)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record's level and text."""
        self._kept.append((record.levelno, _message_of(record)))

    @property
    def holds_any(self) -> bool:
        """Whether there is one to take."""
        return bool(self._kept)

    def take(self) -> tuple[int, str] | None:
        """Give the oldest one that is kept, and forget it."""
        try:
            return self._kept.popleft()
        except IndexError:
            return None


def configure(level: int, relay: Relay) -> None:
    """Send this package's log to stderr, at `level` and above, and its warnings and errors to `relay` as well."""
    LOGGER.handlers[:] = [LineHandler(), relay]
    LOGGER.setLevel(level)
    LOGGER.propagate = False


@dataclass
class _Trouble:
    level: int
    message: str
    said_at: float
    unsaid: int = 0


class TroubleLog:
    """Says each trouble once, then sums its repeats up, at most once in `interval` seconds."""

    def __init__(self, clock: Clock, interval: float = 60.0, logger: logging.Logger = LOGGER) -> None:
        self._clock = clock
        self._interval = interval
        self._logger = logger
        self._lock = threading.Lock()
        self._troubles: dict[str, _Trouble] = {}

    def report(self, key: str, message: str, level: int = logging.ERROR) -> None:
        """Log `message` if its `key` was quiet for an interval, else count it.

        Keys are made of our own names, never of client bytes, so that there are few of them.
        """
        now = self._clock.monotonic()
        with self._lock:
            trouble = self._troubles.get(key)
            if trouble is not None and now - trouble.said_at < self._interval:
                trouble.unsaid += 1
                trouble.message = message
                return
            repeats = trouble.unsaid if trouble else 0
            if trouble is None and len(self._troubles) >= _MAX_TROUBLES:
                self._troubles.clear()
            self._troubles[key] = _Trouble(level, message, now)
        self._say(level, message, repeats)

    def summarise(self) -> None:
        """Log the repeats that were only counted since their trouble was last said; forget the quiet ones."""
        now = self._clock.monotonic()
        with self._lock:
            due = [item for item in self._troubles.items() if now - item[1].said_at >= self._interval]
            for key, trouble in due:
                del self._troubles[key]
                if trouble.unsaid:
                    self._troubles[key] = _Trouble(trouble.level, trouble.message, now)
        for _, trouble in due:
            if trouble.unsaid:
                self._say(trouble.level, trouble.message, trouble.unsaid)

    def flush(self) -> None:
        """Log all repeats that were only counted, however recent; for the end of the process."""
        with self._lock:
            due = list(self._troubles.values())
            self._troubles.clear()
        for trouble in due:
            if trouble.unsaid:
                self._say(trouble.level, trouble.message, trouble.unsaid)

    def _say(self, level: int, message: str, repeats: int) -> None:
        suffix = f" (and {repeats} more like this in the last minute)" if repeats else ""
        self._logger.log(level, "%s%s", message, suffix)
