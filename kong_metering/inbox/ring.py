"""Events of one process in mapped memory, between those who append and the one who drains.

    header, 4096 bytes   magic 8 bytes | format version u32 | checksum of those 12 bytes u32
                         | capacity u64 | seed u32 | checksum of those 12 bytes u32 | zeros
                         | at 64: read position u64, in the machine's own byte order
    records              in a circle of `capacity` bytes

All integers but that one are little-endian and unsigned; a checksum is zlib's CRC32. A position counts bytes for ever
and is a multiple of 8; its place is position modulo capacity. A record may go round the end:

    length of the payload u32 | checksum of the payload, begun with seed XOR queue, u32 | position u64 | queue u32
    | 4 zero bytes | payload | up to 7 bytes that mean nothing

There is no write position in the memory. A record counts when its position is the one of its place and its checksum
fits, so that at every instant the memory holds the records whose `append` returned, and perhaps the one under way,
whole. The seed is random: no client can send bytes that pass for a record.

Contract: any thread appends, one at a time, by a lock that only those who append take; one thread drains and advances.
Neither side waits for the other. Any thread may have the ring move to other memory: both sides wait while its events
are copied, and notice nothing. An event that has no room is refused, and nothing is changed then. `read_unread` reads
what a dead process left, and believes none of it.
"""

from __future__ import annotations

import mmap
import secrets
import struct
import threading
from typing import NamedTuple
from zlib import crc32

from kong_metering.errors import SpoolFormatError

HEADER_BYTES = 4096
FORMAT_VERSION = 1

_MAGIC = b"KMINBOX\n"
_PREAMBLE = struct.Struct("<8sII")
_REST = struct.Struct("<QII")
_READ_POSITION = slice(64, 72)
# All that a header says.
_SAID = slice(0, 72)
_RECORD = struct.Struct("<IIQI4x")
_RECORD_BYTES = _RECORD.size
# Added to a payload's length before that is rounded down, it makes the length of the record.
_ROUND_UP = _RECORD_BYTES + 7
# More is damage; it only bounds what is asked of the memory.
_MAX_CAPACITY = 1 << 30


class Drained(NamedTuple):
    """Events in the order in which they were appended, with their queues, and what to advance by."""

    events: list[tuple[int, bytes]]
    position: int
    # How many of the events, the last ones, were not in the ring (see `Inbox`).
    overflowed: int = 0


class Header(NamedTuple):
    """What does not change in a ring's header."""

    capacity: int
    seed: int


class Ring:
    """The ring of a living process."""

    def __init__(self, memory: mmap.mmap) -> None:
        """Begin an empty ring in this memory, all of which is the ring's from now on."""
        self._memory = memory
        self._end = len(memory)
        self._capacity = capacity = self._end - HEADER_BYTES
        self._seed = secrets.randbits(32)
        # Not 0, so that zeros are no record.
        self._read = self._written = capacity
        self._largest = capacity // 4
        self._appended = self._advanced = 0
        self._appending = threading.Lock()
        # The other side's, for as long as it uses the memory.
        self._taking = threading.Lock()
        header = _header(capacity, self._seed)
        memory[: len(header)] = header
        self._position = _position_in(memory)
        self._position[0] = self._read

    @property
    def memory(self) -> mmap.mmap:
        """What it is in."""
        return self._memory

    @property
    def capacity(self) -> int:
        """How many bytes of records it has room for."""
        return self._capacity

    @property
    def waiting(self) -> int:
        """How many events were appended and not advanced past."""
        return self._appended - self._advanced

    def append(self, queue: int, event: bytes) -> bool:
        """Put an event behind the others; False when there is no room, or it is larger than a quarter of the ring."""
        # This is what an event costs the thread that answers Kong: the checksum and the lock are half of it.
        length = len(event)
        with self._appending:
            position = self._written
            end = position + (length + _ROUND_UP & -8)
            if end - self._read > self._capacity or length > self._largest:
                return False
            start = position % self._capacity + HEADER_BYTES
            stop = start + _RECORD_BYTES + length
            record = _RECORD.pack(length, crc32(event, self._seed ^ queue), position, queue) + event
            if stop <= self._end:
                self._memory[start:stop] = record
            else:
                room = self._end - start
                self._memory[start : self._end] = record[:room]
                self._memory[HEADER_BYTES : stop - self._capacity] = record[room:]
            self._written = end
            self._appended += 1
        return True

    def drain(self, limit: int) -> Drained:
        """Give the oldest events, `limit` at most; they stay, and are given again, until `advance`."""
        events: list[tuple[int, bytes]] = []
        with self._taking:
            position, written = self._read, self._written
            add, unpack, memory = events.append, _RECORD.unpack, self._memory
            while position < written and len(events) < limit:
                start = position % self._capacity + HEADER_BYTES + _RECORD_BYTES
                if start <= self._end:
                    length, _, _, queue = unpack(memory[start - _RECORD_BYTES : start])
                else:
                    length, _, _, queue = unpack(self._copy(position, _RECORD_BYTES))
                stop = start + length
                add((queue, memory[start:stop] if stop <= self._end else self._copy(position + _RECORD_BYTES, length)))
                position += length + _ROUND_UP & -8
        return Drained(events, position)

    def advance(self, drained: Drained) -> None:
        """Take out what was drained: whoever reads the memory after our death finds none of it."""
        with self._taking:
            # In the memory first: what nobody would read any more may be written over.
            self._position[0] = drained.position
            self._advanced += len(drained.events) - drained.overflowed
            self._read = drained.position

    def move_to(self, other: Ring) -> None:
        """Go on, with all that is here, in the memory of an empty ring as large, which nobody uses any more.

        At every instant one of the two memories has all; the old one has nothing when it is let go of.
        """
        memory = other.memory
        with self._taking, self._appending:
            unread = self._copy(self._read, self._written - self._read)
            start = self._read % self._capacity + HEADER_BYTES
            first, rest = unread[: self._end - start], unread[self._end - start :]
            memory[start : start + len(first)] = first
            memory[HEADER_BYTES : HEADER_BYTES + len(rest)] = rest
            # Until now the other ring's seed makes records of none of them.
            memory[_SAID] = self._memory[_SAID]
            # Whoever finds the old one all the same finds none of it: it would be written, and sent, a second time.
            self._position[0] = self._written
            self._let_go()
            self._memory, self._position = memory, _position_in(memory)

    def close(self) -> None:
        """Let go of the memory and leave it as it is; `append` refuses everything from now on."""
        with self._appending:
            self._largest = -1
        self._written = self._read
        self._let_go()

    def _let_go(self) -> None:
        self._position.release()
        self._memory.close()

    def _copy(self, position: int, length: int) -> bytes:
        start = position % self._capacity + HEADER_BYTES
        found = self._memory[start : start + length]
        return found + self._memory[HEADER_BYTES : HEADER_BYTES + length - len(found)]


def _position_in(memory: mmap.mmap) -> memoryview:
    # An item of it is stored by one instruction.
    return memoryview(memory)[_READ_POSITION].cast("Q")


def _header(capacity: int, seed: int) -> bytes:
    start = _MAGIC + FORMAT_VERSION.to_bytes(4, "little")
    rest = capacity.to_bytes(8, "little") + seed.to_bytes(4, "little")
    return start + crc32(start).to_bytes(4, "little") + rest + crc32(rest).to_bytes(4, "little")


def read_header(data: bytes) -> Header | None:
    """Read the header that `data` begins with; None when it is damaged, or not there.

    Raises `SpoolFormatError` when an intact one tells of a format that this version does not know.
    """
    if len(data) < HEADER_BYTES:
        return None
    magic, version, checksum = _PREAMBLE.unpack_from(data)
    if magic != _MAGIC or crc32(data[:12]) != checksum:
        return None
    if version != FORMAT_VERSION:
        raise SpoolFormatError(
            f"format version {version}, and this is version {FORMAT_VERSION} of the format: "
            "let the version of kong-metering that wrote it start once, or update this one"
        )
    capacity, seed, checksum = _REST.unpack_from(data, _PREAMBLE.size)
    is_good = crc32(data[_PREAMBLE.size : _PREAMBLE.size + 12]) == checksum and 0 < capacity <= _MAX_CAPACITY
    return Header(capacity, seed) if is_good else None


def read_unread(data: bytes, header: Header) -> list[tuple[int, bytes]]:
    """Read the events, with their queues, that a dead process appended and did not advance past, in order.

    `data` is all of its file. Whatever is no good record ends them.
    """
    read = memoryview(data[_READ_POSITION]).cast("Q")[0]
    if read % 8:
        return []
    ring = data[HEADER_BYTES : HEADER_BYTES + header.capacity].ljust(header.capacity, b"\0")
    start = read % header.capacity
    return _read_records(ring[start:] + ring[:start], read, header.seed)


def _read_records(records: bytes, position: int, seed: int) -> list[tuple[int, bytes]]:
    events: list[tuple[int, bytes]] = []
    offset = 0
    while offset + _RECORD_BYTES <= len(records):
        length, checksum, found, queue = _RECORD.unpack_from(records, offset)
        start = offset + _RECORD_BYTES
        stop = start + length
        if found != position + offset or stop > len(records):
            break
        payload = records[start:stop]
        if crc32(payload, seed ^ queue) != checksum:
            break
        events.append((queue, payload))
        offset += length + _ROUND_UP & -8
    return events
