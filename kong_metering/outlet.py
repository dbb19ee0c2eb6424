"""Where log lines are written to, whatever it is and whoever reads it or does not.

Contract: `write` takes a line, newline included, and never waits: a line that cannot be written at once is dropped, and
False says so. What others have open too is not changed for them: a pipe or a terminal is opened once more, so that only
our own description of it does not block; a socket is told so with each line. Everything else (a file, whose disk may
hang; what may not be opened again) is written to by a thread, behind a queue of `MOST_LINES`; the thread lives only
while there are lines, so that a process that forks normally has none. Callers do not call `write` from two threads at a
time (a logging handler's lock sees to that); a forked child begins with an empty queue.
"""

from __future__ import annotations

import os
import socket
import stat
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

MOST_LINES = 1000
_OPENED_AGAIN = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


class Outlet(Protocol):
    """Takes lines."""

    def write(self, line: bytes) -> bool:
        """Return True if the line was taken, False if it is lost."""
        ...

    def flush(self, seconds: float) -> None:
        """Wait until the lines that were taken are written, for so many seconds at most."""
        ...

    def close(self) -> None:
        """Let go of what is the outlet's own; nothing is written any more."""
        ...


def outlet_of(descriptor: int) -> Outlet:
    """Return the outlet for a descriptor, which stays the caller's; it may be closed, or somebody else's as well."""
    try:
        mode = os.fstat(descriptor).st_mode
    except OSError:
        mode = 0
    if stat.S_ISSOCK(mode):
        with suppress(OSError):
            own = socket.socket(fileno=os.dup(descriptor))
            return DirectOutlet(lambda line: own.send(line, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL), own.close)
    if (stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)) and _is_opened_again(descriptor):
        return DirectOutlet(lambda line: os.write(descriptor, line))
    return QueuedOutlet(descriptor)


def _is_opened_again(descriptor: int) -> bool:
    """Put a description of our own, which does not block, in the descriptor's place; False where that is refused."""
    try:
        own = os.open(f"/proc/self/fd/{descriptor}", _OPENED_AGAIN)
    except OSError:
        return False
    os.dup2(own, descriptor)
    os.close(own)
    return True


class DirectOutlet:
    """Writes at once, or not at all."""

    def __init__(self, send: Callable[[bytes], int], close: Callable[[], None] = lambda: None) -> None:
        self._send = send
        self._close = close
        self._is_cut = False

    def write(self, line: bytes) -> bool:
        """Write a line, whole if there is room for it."""
        # The line after one that was cut off must not become the rest of it.
        data = b"\n" + line if self._is_cut else line
        try:
            sent = self._send(data)
        except OSError:
            return False
        self._is_cut = 0 < sent < len(data)
        return sent == len(data)

    def flush(self, seconds: float) -> None:
        """Do nothing: what was taken is written."""

    def close(self) -> None:
        """Let go of what is its own."""
        self._close()


class QueuedOutlet:
    """Has a thread write, which may wait as long as it has to."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._begin()

    def _begin(self) -> None:
        self._process = os.getpid()
        self._lines: deque[bytes] = deque()
        self._is_writing = False
        self._changed = threading.Condition(threading.Lock())

    def write(self, line: bytes) -> bool:
        """Leave a line to the thread."""
        if self._process != os.getpid():
            # Forked: the lines are the parent's to write, and its thread is not here.
            self._begin()
        with self._changed:
            if len(self._lines) >= MOST_LINES:
                return False
            self._lines.append(line)
            if self._is_writing:
                return True
            self._is_writing = True
        return self._start()

    def _start(self) -> bool:
        try:
            threading.Thread(target=self._write_all, name="log", daemon=True).start()
        except RuntimeError:  # the system has no thread to give
            with self._changed:
                self._lines.clear()
                self._is_writing = False
            return False
        return True

    def flush(self, seconds: float) -> None:
        """Wait for the thread's end."""
        if self._process == os.getpid():
            with self._changed:
                self._changed.wait_for(lambda: not self._is_writing, seconds)

    def close(self) -> None:
        """Do nothing: the descriptor is the caller's."""

    def _write_all(self) -> None:
        while True:
            with self._changed:
                if not self._lines:
                    self._is_writing = False
                    self._changed.notify_all()
                    return
                line = self._lines[0]
            _write(self._descriptor, line)
            with self._changed:
                self._lines.popleft()


def _write(descriptor: int, data: bytes) -> None:
    """Write all of it, however long that takes; what cannot be written is lost."""
    with suppress(OSError):
        while data:
            data = data[os.write(descriptor, data) :]
