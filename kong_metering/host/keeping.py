"""Memory files that the supervisor keeps for its servers: what one that is killed has left there goes to the next one.

Contract: the supervisor has one `Keeping` for each of its posts, and uses it from its one thread. A memory file has no
name in any directory (`memfd_create`), and lives as long as a process has it open. A server that is forked is lent an
empty one for each use, and all those of dead servers of its post that are not empty; one that runs already, as when
another was told to end, gets nothing of that. A server returns a file by cutting it to nothing. Each file is lent to
one process at a time, so that nobody needs a lock. Where the system grants none a server gets none; nothing raises.

Nothing is kept over the end of the supervisor's program: its death, its leaving the servers to the next one, SIGHUP.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass

from kong_metering.memoryfile import MemoryFile, Use

# With more than that left no empty ones are lent: a server that dies again and again before it can put anything away,
# as while the disk hangs, would use up memory and descriptors, 8 MiB each time.
_MOST_LEFT = 8


@dataclass(frozen=True)
class Lent:
    """What a server is lent: empty files, if there are any, and those that dead servers have left."""

    empty: tuple[MemoryFile, ...] = ()
    left: tuple[MemoryFile, ...] = ()

    def empty_for(self, use: Use) -> MemoryFile | None:
        """Return the empty one for this use, if there is one."""
        return next((file for file in self.empty if file.use is use), None)

    def left_for(self, use: Use) -> tuple[MemoryFile, ...]:
        """Return what dead servers used so."""
        return tuple(file for file in self.left if file.use is use)


class Keeping:
    """The memory files of one post."""

    def __init__(self) -> None:
        # Those that nobody is lent: with nothing in them, and with something; and what each process is lent.
        self._empty: list[int] = []
        self._left: list[MemoryFile] = []
        self._lent: dict[int, Lent] = {}

    def holds(self, use: Use) -> bool:
        """Whether dead servers have left something that nobody has taken over."""
        return any(file.use is use for file in self._left)

    def lend(self) -> Lent:
        """Take out what the next server is lent; `lent_to` or `put_back` is to come next."""
        left, self._left = self._left, []
        empty = tuple(self._renewed()) if len(left) < _MOST_LEFT else ()
        return Lent(empty, tuple(left))

    def lent_to(self, process: int, lent: Lent) -> None:
        """Record which process has it."""
        self._lent[process] = lent

    def put_back(self, lent: Lent) -> None:
        """Take back what nobody has now."""
        for file in (*lent.left, *lent.empty):
            if os.fstat(file.descriptor).st_size:
                self._left.append(file)
            else:
                self._empty.append(file.descriptor)

    def reclaim(self, process: int) -> None:
        """Take back what a process that is dead was lent, if it was lent anything."""
        self.put_back(self._lent.pop(process, Lent()))

    def close(self) -> None:
        """Close all of them, but for what was taken out, in a process that was just forked."""
        for process in tuple(self._lent):
            self.reclaim(process)
        for descriptor in (*self._empty, *(file.descriptor for file in self._left)):
            os.close(descriptor)
        self._empty, self._left = [], []

    def _renewed(self) -> Iterator[MemoryFile]:
        """Give an empty one for each use, under a name of its own; none where the system has none to give."""
        for use in Use:
            with contextlib.suppress(OSError, AttributeError):
                descriptor = self._empty.pop() if self._empty else _create()
                yield MemoryFile(f"{os.getpid()}-{secrets.token_hex(4)}", descriptor, use)


def _create() -> int:
    descriptor = os.memfd_create("kong-metering")
    # A line of a ring's list goes behind all that is there, whoever wrote before, and never over the ring.
    fcntl.fcntl(descriptor, fcntl.F_SETFL, os.O_APPEND)
    return descriptor
