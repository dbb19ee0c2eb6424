"""What one queue reads from, in order: the logs that dead processes left, this process's own log, memory.

Contract: any thread looks. The writer sets the own log and the state of the disk; the janitor adds logs and takes them
away. Memory holds events only while the disk refuses them, and is read only then. The lock is held for memory only.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from enum import Enum
from typing import TYPE_CHECKING

from kong_metering.backlog.source import MemorySource

if TYPE_CHECKING:
    from kong_metering.backlog.logsource import LogSource


# A write that is under way for so long hangs.
_HANGS_AFTER_SECONDS = 5.0


class Disk(Enum):
    """The state of the disk, as the last write of a queue found it."""

    WORKS = "works"
    # A write is under way.
    WRITING = "writing"
    # The last write failed; events are sent from memory.
    REFUSES = "refuses"
    # A write has been under way for long. For those who watch: what is written goes by the others.
    HANGS = "hangs"


class SourceList:
    """The sources of one queue, and the state of the disk below them."""

    def __init__(self) -> None:
        self.disk = Disk.WORKS
        self.memory = MemorySource()
        # Called when there is more to read.
        self.on_ready: Callable[[], None] = lambda: None
        self._lock = threading.Lock()
        self._adopted: tuple[LogSource, ...] = ()
        self._own: LogSource | None = None
        self._has_ended = False
        # What it was before the write that is under way, and when that began (monotonic).
        self._before = Disk.WORKS
        self._writing_since = 0.0

    @property
    def own(self) -> LogSource | None:
        """The log of this process, if there is one."""
        return self._own

    @property
    def has_ended(self) -> bool:
        """Whether no log is taken in any more."""
        return self._has_ended

    def begin_write(self, now: float) -> Disk:
        """Have the disk be written to from now on (monotonic); return what it was before."""
        self._before, self._writing_since, self.disk = self.disk, now, Disk.WRITING
        return self._before

    def seen(self, now: float) -> Disk:
        """Return the state as people see it: what it was before the write under way, unless that hangs."""
        disk, before, since = self.disk, self._before, self._writing_since
        if disk is not Disk.WRITING:
            return disk
        return Disk.HANGS if now - since >= _HANGS_AFTER_SECONDS else before

    def hangs_for(self, now: float) -> float:
        """Tell for how many seconds a write has been under way that hangs; 0 when none does."""
        return now - self._writing_since if self.seen(now) is Disk.HANGS else 0.0

    @property
    def is_failing(self) -> bool:
        """Whether events are in memory because the disk refused them."""
        return self.disk is Disk.REFUSES and not self.memory.is_empty

    def logs(self) -> tuple[LogSource, ...]:
        """Return the logs, in order."""
        with self._lock:
            return (*self._adopted, self._own) if self._own else self._adopted

    def readable(self) -> tuple[LogSource | MemorySource, ...]:
        """Return what may be read now, in order; logs that are held back are passed."""
        logs = tuple(log for log in self.logs() if not log.is_held)
        return (*logs, self.memory) if self.disk is Disk.REFUSES else logs

    @property
    def held_back(self) -> int:
        """How many events on disk may not be sent now, because the disk does not take the note."""
        return sum(log.waiting for log in self.logs() if log.is_unnotable)

    @property
    def is_unsaved(self) -> bool:
        """Whether it is still to be written down, in one of the logs, how far that is settled."""
        return any(log.is_unsaved for log in self.logs())

    @property
    def unsure(self) -> int:
        """How many events on disk may not be sent now, because it is not known how long ago some of them went out."""
        return sum(log.waiting for log in self.logs() if log.is_unsure)

    def begin_own(self, log: LogSource) -> None:
        """Have a log of this process."""
        self._own = log

    def let_go_of_own(self) -> None:
        """Have nothing more written to the log of this process: it is one of the others."""
        with self._lock:
            if self._own is not None:
                self._adopted = (*self._adopted, self._own)
                self._own = None

    def add(self, log: LogSource, *, count: Callable[[int], None] = lambda _: None) -> bool:
        """Take a log in behind the others, after `count` was told of its events; False when this has ended."""
        with self._lock:
            if self._has_ended:
                return False
            count(log.waiting_at_first)
            self._adopted = (*self._adopted, log)
        return True

    def take_adopted(self) -> tuple[LogSource, ...]:
        """Take all logs out but the own one; none after the end."""
        with self._lock:
            if self._has_ended:
                return ()
            logs, self._adopted = self._adopted, ()
        return logs

    def take_settled(self) -> list[LogSource]:
        """Take the logs out in which nothing waits any more, by the disk too, and which nobody appends to."""
        with self._lock:
            settled = [log for log in self._adopted if log.may_go]
            self._adopted = tuple(log for log in self._adopted if log not in settled)
        return settled

    def end(self) -> None:
        """Take no log in any more."""
        with self._lock:
            self._has_ended = True

    def take_all(self) -> tuple[LogSource, ...]:
        """Take all logs out."""
        with self._lock:
            logs = (*self._adopted, self._own) if self._own else self._adopted
            self._own, self._adopted = None, ()
        return logs
