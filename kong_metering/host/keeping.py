"""Memory that the supervisor keeps for its servers: what one that is killed has left there, the next one is given.

Contract: the supervisor has one `Keeping` and uses it from its one thread. A memory is a file without a name in any
directory, which lives as long as a process has it open, and the supervisor always has: it needs no place for shared
memory, and it ends with the last process of the plugin server. A server that is forked is lent one that is empty, and
all those of dead servers that are not. Empty is one without a byte: by cutting it to nothing, a server gives it back.
Each memory is lent to one process at a time, so that nobody needs a lock. Where the system grants none a server gets
none; nothing here raises.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from dataclasses import dataclass
from typing import NamedTuple

# Servers that die one after the other, each with something left that the next one cannot put away.
_MOST = 64


class Memory(NamedTuple):
    """A memory, and what no other one was ever called."""

    name: str
    descriptor: int


@dataclass(frozen=True)
class Lent:
    """What a server is lent: a memory that is empty, if there is one, and those that dead servers have left."""

    fresh: Memory | None = None
    left: tuple[Memory, ...] = ()


class Keeping:
    """The memories of one plugin server."""

    def __init__(self) -> None:
        # Those that nobody is lent, and what each process is.
        self._free: list[Memory] = []
        self._lent: dict[int, Lent] = {}

    def lend(self) -> Lent:
        """Take out what the next server is lent; `note` or `put_back` is to come next."""
        left = tuple(memory for memory in self._free if not _is_empty(memory))
        empty = [memory.descriptor for memory in self._free if _is_empty(memory)]
        if not empty and len(left) < _MOST:
            empty = _made()
        self._free = [Memory("", descriptor) for descriptor in empty[1:]]
        fresh = Memory(f"{os.getpid()}-{secrets.token_hex(4)}", empty[0]) if empty else None
        return Lent(fresh, left)

    def note(self, process: int, lent: Lent) -> None:
        """Take note of which process is lent this."""
        self._lent[process] = lent

    def put_back(self, lent: Lent) -> None:
        """Take back what nobody has now."""
        self._free += [*lent.left, *([] if lent.fresh is None else [lent.fresh])]

    def reclaim(self, process: int) -> None:
        """Take back what a process that is dead was lent, if it was lent anything."""
        self.put_back(self._lent.pop(process, Lent()))

    def close(self) -> None:
        """Let go of all of them, but for what was taken out, in a process that was just forked."""
        for process in tuple(self._lent):
            self.reclaim(process)
        for memory in self._free:
            os.close(memory.descriptor)
        self._free = []


def _is_empty(memory: Memory) -> bool:
    return os.fstat(memory.descriptor).st_size == 0


def _made() -> list[int]:
    """Make one; none where the system has none to give."""
    with contextlib.suppress(OSError):
        descriptor = os.memfd_create("kong-metering")
        # One process after the other adds to it.
        fcntl.fcntl(descriptor, fcntl.F_SETFL, os.O_APPEND)
        return [descriptor]
    return []
