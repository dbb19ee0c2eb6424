"""Rings in memory that the supervisor keeps and lends to its servers: where there is no place for shared memory.

Contract: what a server was lent is its alone, so that there are no locks. `create` makes its ring in the empty one of
them; the others hold what dead servers left, and are given back, cut to nothing, once that is poured. It is gone with
the supervisor, and no other process sees it: a sibling that adopts a dead server's log before its ring is poured is in
the case of another container (`pouring.py`).
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from kong_metering.errors import InboxError, SpoolFormatError
from kong_metering.inbox.place import RING_BYTES, RingFile, read_from
from kong_metering.inbox.ring import HEADER_BYTES, Ring, read_header

_SUFFIX = ".ring"
# They have no path; this is for people.
_NOWHERE = Path("memory of the supervisor")


class LentMemory(NamedTuple):
    """A file of memory: PID-RANDOM, which no other ring was ever called, and its descriptor, opened to append."""

    stem: str
    descriptor: int


class LentRings:
    """What one server was lent."""

    def __init__(self, fresh: LentMemory | None, left: Sequence[LentMemory]) -> None:
        """Take an empty one for this server's own ring, and those that dead servers have left."""
        self._fresh = fresh
        self._left = dict(left)

    def create(self, capacity: int = RING_BYTES) -> tuple[RingFile, Ring]:
        """Make this server's ring, all of whose space is taken. Raises `InboxError`."""
        if self._fresh is None:
            raise InboxError("the supervisor could have no memory to keep")
        stem, descriptor = self._fresh
        try:
            os.posix_fallocate(descriptor, 0, HEADER_BYTES + capacity)
            ring = Ring(mmap.mmap(descriptor, HEADER_BYTES + capacity))
        except OSError as error:
            os.ftruncate(descriptor, 0)
            raise InboxError(f"the supervisor's memory cannot be used: {error.strerror or error}") from error
        return self._file(stem, descriptor), ring

    def orphans(self) -> Iterator[RingFile]:
        """Give what dead servers left, one after the other, until it is removed."""
        for stem, descriptor in tuple(self._left.items()):
            found = self._file(stem, descriptor)
            try:
                yield found
            finally:
                found.release()

    def lists(self) -> Iterator[tuple[str, bytes]]:
        """Give the list of this server's ring, and of those that are left."""
        for stem, descriptor in (*([] if self._fresh is None else [self._fresh]), *tuple(self._left.items())):
            try:
                header = read_header(os.pread(descriptor, HEADER_BYTES, 0))
            except SpoolFormatError:
                continue
            yield stem, read_from(descriptor, HEADER_BYTES + header.capacity) if header else b""

    def _give_back(self, file: Path) -> None:
        """Give a memory back, which nobody may have mapped any more."""
        stem = file.name.removesuffix(_SUFFIX)
        descriptor = self._left.pop(stem, None)
        if descriptor is None and self._fresh is not None and self._fresh.stem == stem:
            descriptor = self._fresh.descriptor
        if descriptor is not None:
            os.ftruncate(descriptor, 0)

    def _file(self, stem: str, descriptor: int) -> RingFile:
        return RingFile(_NOWHERE / (stem + _SUFFIX), os.dup(descriptor), self._give_back)
