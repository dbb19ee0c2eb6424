"""Log lines for Kong's error log: single, escaped, bounded, and never in the way.

Contract: any thread may log, and none waits for whoever reads the log (`outlet.py`): lines that cannot be written at
once are dropped and counted. Kong reads our stdout and stderr line by line from one pipe, so a line is written with one
`write` that the kernel keeps whole (at most 4,096 bytes). A line that may repeat carries `extra=trouble(key)`:
`Repeats` lets the first of each key pass, counts the others, and sums them up once a minute, so that no client can
flood the log. Kong gives our lines the level info, which its default `log_level = notice` hides; `Relay` keeps warnings
and errors for a log phase to say them once more through `kong.log`, where they show.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kong_metering.outlet import outlet_of
from kong_metering.plurals import counted

if TYPE_CHECKING:
    from kong_metering.clock import Clock

LOGGER = logging.getLogger("kong_metering")

_MAX_LINE_BYTES = 2048
_MAX_TROUBLES = 1000
_MAX_RELAYED = 50
_FLUSH_SECONDS = 2.0
_STDERR = 2
_KEY = "trouble"
_IS_OURS_ONLY = "is_ours_only"
# What stands for all troubles beyond the most that are told apart.
_OTHERS = ""
_SUMMARY = "%s (and %d more like this in the last minute)"


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
        self._outlet = outlet_of(descriptor)
        self._lost = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Write the line, or count it as lost; logging never raises into the code that logs."""
        were = counted(self._lost, "log line was", "log lines were") if self._lost else ""
        lost = f" ({were} lost before this one)".encode() if were else b""
        line = f"{record.levelname.lower()}: {_message_of(record)}".encode()[: _MAX_LINE_BYTES - len(lost)]
        line = line.decode("utf-8", "ignore").encode()  # without half a character at its end
        self._lost = 0 if self._outlet.write(line + lost + b"\n") else self._lost + 1

    def flush(self) -> None:
        """Wait until all lines are written, for a second or two at most."""
        self._outlet.flush(_FLUSH_SECONDS)

    def close(self) -> None:
        """Let go of what belongs to this handler only."""
        self._outlet.close()
        super().close()


class Relay(logging.Handler):
    """Keeps the newest warnings and errors until somebody takes them."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._kept: deque[tuple[int, str]] = deque(maxlen=_MAX_RELAYED)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record's level and text."""
        if getattr(record, _IS_OURS_ONLY, False):
            return
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


def trouble(key: str) -> dict[str, str]:
    """Return the `extra` of a line that may repeat; lines with the same key are said once a minute, with their count.

    Keys are made of our own names, never of client bytes, so that there are few of them.
    """
    return {_KEY: key}


def not_through_kong() -> dict[str, bool]:
    """Return the `extra` of a line that means nothing any more once Kong could say it."""
    return {_IS_OURS_ONLY: True}


@dataclass
class _Trouble:
    level: int
    message: str
    said_at: float
    unsaid: int = 0


class Repeats(logging.Filter):
    """Lets the first line of each trouble pass, and sums the next ones up once in `interval` seconds.

    It belongs on the logger, not on a handler, so that each line is counted once.
    """

    def __init__(self, clock: Clock, interval: float = 60.0, logger: logging.Logger = LOGGER) -> None:
        super().__init__()
        self._clock = clock
        self._interval = interval
        self._logger = logger
        self._lock = threading.Lock()
        self._troubles: dict[str, _Trouble] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a line is to be said now; one that is tells how many like it were not."""
        key = getattr(record, _KEY, None)
        if key is None:
            return True
        message, now = _message_of(record), self._clock.monotonic()
        with self._lock:
            if key not in self._troubles and len(self._troubles) >= _MAX_TROUBLES:
                key = _OTHERS
            known = self._troubles.get(key)
            if known is not None and now - known.said_at < self._interval:
                known.unsaid += 1
                known.message, known.level = message, record.levelno
                return False
            self._troubles[key] = _Trouble(record.levelno, message, now)
        if known is not None and known.unsaid:
            record.msg, record.args = _SUMMARY, (message, known.unsaid)
        return True

    def summarise(self) -> None:
        """Log the repeats that were only counted for an interval, forget the quiet ones; to be called each second."""
        now = self._clock.monotonic()
        with self._lock:
            due = [item for item in self._troubles.items() if now - item[1].said_at >= self._interval]
            for key, known in due:
                del self._troubles[key]
                if known.unsaid:
                    self._troubles[key] = _Trouble(known.level, known.message, now)
        self._say(known for _, known in due)

    def flush(self) -> None:
        """Log all repeats that were only counted, however recent; for the end of the process."""
        self._say(self._forgotten())

    def forget(self) -> None:
        """Begin anew: a process that was forked leaves it to its parent to say what that one has counted."""
        self._lock = threading.Lock()
        self._forgotten()

    def _forgotten(self) -> list[_Trouble]:
        with self._lock:
            troubles = list(self._troubles.values())
            self._troubles.clear()
        return troubles

    def _say(self, troubles: Iterable[_Trouble]) -> None:
        for known in troubles:
            if known.unsaid:
                self._logger.log(known.level, _SUMMARY, known.message, known.unsaid)


class Once:
    """Remembers what was said, where once is enough for a process; forgets all of it when it becomes too much."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def is_first(self, key: str) -> bool:
        """Return whether this is asked for the first time; keys are made of names of Kong's entities and settings."""
        if key in self._said:
            return False
        if len(self._said) >= _MAX_TROUBLES:
            self._said.clear()
        self._said.add(key)
        return True


@dataclass(frozen=True)
class ProcessLog:
    """What a process keeps of its log: what Kong is to say, and which troubles were said.

    `complaints` are what is wrong with the settings of this start, to be said again each hour.
    """

    relay: Relay
    repeats: Repeats
    complaints: tuple[str, ...] = ()


def configure(level: int, log: ProcessLog) -> None:
    """Send this package's log to stderr, at `level` and above, and its warnings and errors to the relay as well."""
    LOGGER.handlers[:] = [LineHandler(), log.relay]
    LOGGER.filters[:] = [log.repeats]
    LOGGER.setLevel(level)
    LOGGER.propagate = False


class Reminder:
    """Says what is wrong for as long as the process lives again, once in `interval` seconds."""

    def __init__(self, complaints: Sequence[str], clock: Clock, interval: float = 3600.0) -> None:
        """Begin to count: they were just said."""
        self._complaints = tuple(complaints)
        self._clock = clock
        self._interval = interval
        self._said_at = clock.monotonic()

    def remind(self) -> None:
        """Say it if it is time to; to be called each second."""
        if self._clock.monotonic() - self._said_at >= self._interval:
            self._said_at = self._clock.monotonic()
            for complaint in self._complaints:
                LOGGER.error("%s", complaint)


def flush() -> None:
    """Wait until what was logged is written, for a second or two at most; for a process that ends at once."""
    for handler in LOGGER.handlers:
        handler.flush()
