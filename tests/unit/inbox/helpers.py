"""What the tests of the inbox share."""

from __future__ import annotations

import mmap

from kong_metering.inbox.ring import HEADER_BYTES, Ring, read_header, read_unread
from kong_metering.spool.identity import QueueIdentity

QUEUE = QueueIdentity("entity-1", "metering on route r", "https://metering.example/events")
OTHER = QueueIdentity("entity-2", "metering on route s", "https://metering.example/events")


def new_memory(capacity: int) -> mmap.mmap:
    return mmap.mmap(-1, HEADER_BYTES + capacity)


def unread(data: bytes) -> list[tuple[int, bytes]]:
    """Read what a dead process's file has; nothing when its header is damaged."""
    header = read_header(data)
    return read_unread(data, header) if header else []


def left_in(memory: mmap.mmap) -> list[tuple[int, bytes]]:
    """Read what would be found if the process died now."""
    return unread(memory[:])


def fill(ring: Ring, event: bytes = b"x" * 100) -> int:
    """Append until there is no more room; tell how many events went in."""
    count = 0
    while ring.append(1, event):
        count += 1
    return count
