"""Rings in memory files that the supervisor lends to its servers: where there is no place for shared memory.

Contract: what a server is lent is its own alone, so that no lock is needed. `create` makes its ring in the empty file;
the others hold what dead servers left, and are returned, cut to nothing, once that is poured. No other process sees
them: a sibling that adopts a dead server's log before its ring is poured is like one in another container
(`pouring.py`). Everything raises `InboxError`.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from kong_metering.errors import InboxError, SpoolFormatError
from kong_metering.inbox.place import RING_BYTES, RingFile, read_from, read_list
from kong_metering.inbox.ring import HEADER_BYTES, Ring, read_header, read_unread

if TYPE_CHECKING:
    from kong_metering.memoryfile import MemoryFile

# They have no path; this is for people.
_WHERE = Path("memory of the supervisor")


class LentRings:
    """What one server was lent."""

    def __init__(self, empty: MemoryFile | None, left: Sequence[MemoryFile]) -> None:
        """Take an empty file for this server's own ring, and those that dead servers have left."""
        self._own = empty
        self._left = [memory for memory in left if not _is_returned(memory)]

    def create(self, capacity: int = RING_BYTES) -> tuple[RingFile, Ring]:
        """Make this server's ring, all of whose space is taken."""
        if self._own is None:
            raise InboxError("the supervisor got no memory from the system")
        with _told():
            file = self._opened(self._own)
            try:
                os.posix_fallocate(self._own.descriptor, 0, HEADER_BYTES + capacity)
                return file, Ring(mmap.mmap(self._own.descriptor, HEADER_BYTES + capacity))
            except OSError:
                os.ftruncate(self._own.descriptor, 0)
                file.release()
                raise

    def orphans(self) -> Iterator[RingFile]:
        """Give what dead servers left, one after the other, until it is removed."""
        for memory in tuple(self._left):
            with _told():
                file = self._opened(memory)
            try:
                yield file
            finally:
                file.release()

    def lists(self) -> Iterator[tuple[str, bytes]]:
        """Give the list of this server's ring, and of those that are left."""
        for memory in (*([] if self._own is None else [self._own]), *tuple(self._left)):
            with _told(), contextlib.suppress(SpoolFormatError):
                yield memory.name, read_list(memory.descriptor)

    def _opened(self, memory: MemoryFile) -> RingFile:
        return RingFile(_WHERE, memory.name, os.dup(memory.descriptor), partial(self._give_back, memory))

    def _give_back(self, memory: MemoryFile) -> None:
        """Return a file, which nobody may have mapped any more."""
        with _told():
            os.ftruncate(memory.descriptor, 0)
        if memory in self._left:
            self._left.remove(memory)


def _is_returned(memory: MemoryFile) -> bool:
    """Return a file with no event in it, before the disk is needed for others; tell whether that was done.

    A server that was killed before it had written its ring's header has left zeros.
    """
    with contextlib.suppress(OSError, SpoolFormatError):
        data = read_from(memory.descriptor, 0)
        header = read_header(data)
        is_ring = len(data) > HEADER_BYTES and any(data[:HEADER_BYTES])
        if not is_ring or (header and not read_unread(data, header)):
            os.ftruncate(memory.descriptor, 0)
            return True
    return False


@contextlib.contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InboxError(f"the supervisor's memory cannot be used: {error.strerror or error}") from error
