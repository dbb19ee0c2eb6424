"""Memory that the supervisor keeps for its servers: what one that is killed has left there, the next one is given.

Contract: the supervisor has one `Keeping` for each server's place, and uses it from its one thread. A memory is a file
without a name in any directory, which lives as long as a process has it open, and the supervisor always has: it needs
no place for shared memory, and it ends with the last process of the plugin server. A server that is forked is lent an
empty one for each use, and all those of dead servers of its place that are not empty. Empty is one without a byte: by
cutting it to nothing, a server gives it back. Each memory is lent to one process at a time, so that nobody needs a
lock. Where the system grants none a server gets none; nothing here raises.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

# Servers that die one after the other, each with something left that the next one cannot put away.
_MOST = 128


class Use(Enum):
    """What a server does with a memory."""

    EVENTS = "events"
    REQUESTS = "requests"


class Memory(NamedTuple):
    """A memory, what no other one was ever called, and what it is used for."""

    name: str
    descriptor: int
    use: Use


@dataclass(frozen=True)
class Lent:
    """What a server is lent: memories that are empty, if there are any, and those that dead servers have left."""

    empty: tuple[Memory, ...] = ()
    left: tuple[Memory, ...] = ()

    def empty_for(self, use: Use) -> Memory | None:
        """Return the empty one for this use, if there is one."""
        return next((memory for memory in self.empty if memory.use is use), None)

    def left_for(self, use: Use) -> tuple[Memory, ...]:
        """Return what dead servers used so."""
        return tuple(memory for memory in self.left if memory.use is use)


class Keeping:
    """The memories of one server's place."""

    def __init__(self) -> None:
        # Those that nobody is lent: with nothing in them, and with something; and what each process is lent.
        self._empty: list[int] = []
        self._left: list[Memory] = []
        self._lent: dict[int, Lent] = {}

    def lend(self) -> Lent:
        """Take out what the next server is lent; `note` or `put_back` is to come next."""
        left, self._left = self._left, []
        empty = tuple(self._renewed()) if len(left) < _MOST else ()
        return Lent(empty, tuple(left))

    def note(self, process: int, lent: Lent) -> None:
        """Take note of which process is lent this."""
        self._lent[process] = lent

    def put_back(self, lent: Lent) -> None:
        """Take back what nobody has now."""
        for memory in (*lent.left, *lent.empty):
            if os.fstat(memory.descriptor).st_size:
                self._left.append(memory)
            else:
                self._empty.append(memory.descriptor)

    def reclaim(self, process: int) -> None:
        """Take back what a process that is dead was lent, if it was lent anything."""
        self.put_back(self._lent.pop(process, Lent()))

    def close(self) -> None:
        """Let go of all of them, but for what was taken out, in a process that was just forked."""
        for process in tuple(self._lent):
            self.reclaim(process)
        for descriptor in (*self._empty, *(memory.descriptor for memory in self._left)):
            os.close(descriptor)
        self._empty, self._left = [], []

    def _renewed(self) -> Iterator[Memory]:
        """Give an empty one for each use, under a name of its own; none where the system has none to give."""
        for use in Use:
            with contextlib.suppress(OSError, AttributeError):
                descriptor = self._empty.pop() if self._empty else _made()
                yield Memory(f"{os.getpid()}-{secrets.token_hex(4)}", descriptor, use)


def _made() -> int:
    descriptor = os.memfd_create("kong-metering")
    # One process after the other adds to it.
    fcntl.fcntl(descriptor, fcntl.F_SETFL, os.O_APPEND)
    return descriptor
