"""Which server has which of Kong's workers, for all servers and their supervisor.

Contract: all connections of a worker go to the same server, so that the steps of one event meet, and the events of a
worker keep their order; a worker that is new goes to the server with the fewest living workers. A process that is gone
is forgotten when the next one comes. The table is in memory that the processes share, behind a lock that the system
frees when its holder dies; whoever has asked for a worker once does not ask the table again. Where a connection does
not tell its process (Kong runs in another namespace of processes), all go to the first server.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import struct
from collections import Counter
from collections.abc import Iterator

# Kong has a worker for each core at most; the others are who asks for a status.
_MAX_WORKERS = 4096
_ENTRY = struct.Struct("<ii")  # process, server
_HEAD = struct.Struct("<qq")  # how often workers were forgotten; how many entries there are
_HAS_MET_UNKNOWN = _HEAD.size
_ENTRIES = _HEAD.size + 8
_FIRST = 0


class Workers:
    """The table; made before the first server is started."""

    def __init__(self, servers: int) -> None:
        self._servers = servers
        self._memory = mmap.mmap(-1, _ENTRIES + _MAX_WORKERS * _ENTRY.size)
        self._lock = os.memfd_create("metering workers", os.MFD_CLOEXEC)
        self._known: dict[int, int] = {}
        self._known_at = 0

    def server_of(self, process: int) -> int:
        """Tell which server has a worker, by its process id; 0 for one that is not known."""
        if process <= 0 or self._servers == 1:
            return _FIRST
        forgotten, _ = _HEAD.unpack_from(self._memory)
        if forgotten != self._known_at:
            self._known, self._known_at = {}, forgotten
        server = self._known.get(process)
        if server is None:
            server = self._known[process] = self._looked_up(process)
        return server

    def meets_unknown(self) -> bool:
        """Whether a connection that does not tell its process is the first one, for all servers."""
        is_first = not self._memory[_HAS_MET_UNKNOWN]
        self._memory[_HAS_MET_UNKNOWN] = 1
        return is_first

    def of(self, server: int) -> list[int]:
        """List the living workers that a server has."""
        with self._locked():
            return [process for process, its in self._entries() if its == server and is_living(process)]

    def _looked_up(self, process: int) -> int:
        with self._locked():
            entries = self._entries()
            server = dict(entries).get(process)
            if server is not None:
                return server
            self._forget_the_dead(entries)
            counts = Counter(its for one, its in entries if one)
            server = min(range(self._servers), key=lambda index: (counts[index], index))
            self._add(entries, process, server)
            return server

    def _forget_the_dead(self, entries: list[tuple[int, int]]) -> None:
        dead = [index for index, (one, _) in enumerate(entries) if one and not is_living(one)]
        if dead:
            forgotten, count = _HEAD.unpack_from(self._memory)
            _HEAD.pack_into(self._memory, 0, forgotten + 1, count)
        for index in dead:
            self._put(entries, index, (0, 0))

    def _add(self, entries: list[tuple[int, int]], process: int, server: int) -> None:
        """Write it where nothing is, in one piece: whoever dies amid it has written nothing."""
        free = next((index for index, (one, _) in enumerate(entries) if not one), len(entries))
        if free == len(entries) < _MAX_WORKERS:
            entries.append((0, 0))
        if free < len(entries):
            self._put(entries, free, (process, server))
            forgotten, _ = _HEAD.unpack_from(self._memory)
            _HEAD.pack_into(self._memory, 0, forgotten, len(entries))

    def _entries(self) -> list[tuple[int, int]]:
        _, count = _HEAD.unpack_from(self._memory)
        places = range(_ENTRIES, _ENTRIES + count * _ENTRY.size, _ENTRY.size)
        return [_ENTRY.unpack_from(self._memory, at) for at in places]

    def _put(self, entries: list[tuple[int, int]], index: int, entry: tuple[int, int]) -> None:
        entries[index] = entry
        _ENTRY.pack_into(self._memory, _ENTRIES + index * _ENTRY.size, *entry)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        fcntl.lockf(self._lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.lockf(self._lock, fcntl.LOCK_UN)


def is_living(process: int) -> bool:
    """Whether a process is there."""
    if process <= 0:
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
