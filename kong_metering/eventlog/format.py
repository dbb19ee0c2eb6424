r"""The bytes of a log on disk, its segments and its position, format version 1. The only module that knows them.

All integers are little-endian and unsigned. Every checksum is zlib's CRC32.

**Preamble**, 16 bytes at the start of a segment and of each slot of a position file; it is the same in every version of
the format, past and future, so that a version that is not known is told from damage:

    magic 8 bytes | format version u32 | checksum of those 12 bytes u32

**Segment** (`00000000000000000001.seg`, named by the sequence number of its first record, in 20 digits):

    preamble, magic "KMSEGMT\n" | first sequence number u64 | checksum of those 24 bytes u32 | 4 zero bytes
    then records until the end of the file

A segment that is kept after it was delivered is the same file under a longer name: see `spool/delivered.py`.

**Record**: sequence numbers go up by one from record to record.

    length of the payload u32 | checksum of all that follows u32 | sequence number u64
    | time of acceptance u64, milliseconds since 1970 | kind u8 | payload

Kinds are `EVENT` and `REMOVED`, a record that was taken out in place; never 0, so that zeros are no record.

**Position file** (`position`): two slots of 4,096 bytes, preallocated and written in turn, so that a torn write leaves
the other one. The valid slot with the higher turn counts:

    preamble, magic "KMPOSIT\n" | checksum of the used rest of the slot u32 | number of marks u32 | turn u64
    | sequence number up to which all is done u64 | marks: first u64, last u64, time u64

A mark says that the events first to last were sent at that time and may have arrived, though no answer did.

Reading trusts no byte: a record counts when its checksum fits, its kind is known and its sequence number lies where it
can. After one that does not, the next good one is found where its length points to, or else by searching the rest for
a record whose sequence number and checksum fit, so that a flipped bit costs one event at most.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple
from zlib import crc32

from kong_metering.errors import SpoolFormatError

FORMAT_VERSION = 1
EVENT = 1
REMOVED = 2

# A length above this one is damage; no event comes near it.
MAX_PAYLOAD_BYTES = 64 * 1024 * 1024
# What one position slot has room for.
MAX_MARKS = 160

_PREAMBLE = struct.Struct("<8sII")
_SEGMENT_REST = struct.Struct("<QI4x")
_PREFIX = struct.Struct("<II")
_HEAD = struct.Struct("<QQB")
_RECORD = struct.Struct("<IIQQB")
_SLOT = struct.Struct("<IIQQ")
_MARK = struct.Struct("<QQQ")
_SEGMENT_MAGIC = b"KMSEGMT\n"
_POSITION_MAGIC = b"KMPOSIT\n"
# Six bytes of milliseconds last until the year 10889; the two zeros above them help to recognise a record.
_MAX_TIME_MS = (1 << 48) - 1
_LOW_BYTES_OF_SEQUENCE = 3

SEGMENT_HEADER_BYTES = _PREAMBLE.size + _SEGMENT_REST.size
RECORD_HEADER_BYTES = _RECORD.size
SLOT_BYTES = 4096
POSITION_BYTES = 2 * SLOT_BYTES


class StoredEvent(NamedTuple):
    """An event as it was accepted: its sequence number, when in milliseconds since 1970, and its bytes."""

    sequence: int
    time_ms: int
    payload: bytes


class Record(NamedTuple):
    """One good record, and the offset in its buffer where it starts and where the next one does."""

    start: int
    end: int
    sequence: int
    time_ms: int
    kind: int
    payload: bytes


@dataclass(frozen=True)
class Mark:
    """Events `first` to `last` were sent at `time_ms` (wall clock, milliseconds); whether they arrived is not known."""

    first: int
    last: int
    time_ms: int


@dataclass(frozen=True)
class Position:
    """How far a log is done: everything up to and including `done`; the marks are above it, in order."""

    done: int = 0
    marks: tuple[Mark, ...] = ()


def segment_name(first: int) -> str:
    """Name the segment whose first record has this sequence number."""
    return f"{first:020d}.seg"


def segment_first(name: str) -> int | None:
    """Read the first sequence number from a segment's name; None for a file that is no segment."""
    match = re.fullmatch(r"([0-9]{20})\.seg", name)
    return int(match[1]) if match else None


def segment_header(first: int) -> bytes:
    """Make the header of a segment that starts with this sequence number."""
    start = _preamble(_SEGMENT_MAGIC) + first.to_bytes(8, "little")
    return start + crc32(start).to_bytes(4, "little") + bytes(4)


def is_segment_header(data: bytes, first: int) -> bool:
    """Whether `data` begins with the header of this segment; False for damage.

    Raises `SpoolFormatError` when an intact preamble tells of a format that this version does not know.
    """
    _check_version(data, 0, _SEGMENT_MAGIC)
    return data.startswith(segment_header(first))


def encode_records(payloads: Sequence[bytes], first: int, time_ms: int, kind: int = EVENT) -> bytes:
    """Make the records of these payloads, numbered from `first`; all are accepted at the same time."""
    time_ms = max(0, min(time_ms, _MAX_TIME_MS))
    parts: list[bytes] = []
    # This loop is what an event costs on its way to the disk: most of it is the checksum.
    add, prefix, head_of = parts.append, _PREFIX.pack, _HEAD.pack
    for sequence, payload in enumerate(payloads, first):
        head = head_of(sequence, time_ms, kind)
        add(prefix(len(payload), crc32(payload, crc32(head))))
        add(head)
        add(payload)
    return b"".join(parts)


def removed_header(record: Record) -> bytes:
    """Make the header that, written over the one of `record`, takes it out; its length stays."""
    head = _HEAD.pack(record.sequence, record.time_ms, REMOVED)
    return _PREFIX.pack(len(record.payload), crc32(record.payload, crc32(head))) + head


def claimed_record_bytes(buffer: bytes, offset: int) -> int:
    """Tell how many bytes the record at `offset` says that it has; a header's size when not even that is there."""
    if len(buffer) - offset < RECORD_HEADER_BYTES:
        return RECORD_HEADER_BYTES
    return RECORD_HEADER_BYTES + int.from_bytes(buffer[offset : offset + 4], "little")


def parse_events(
    buffer: bytes, offset: int, first: int, max_events: int, max_bytes: int
) -> tuple[list[StoredEvent], int]:
    """Read the events from `offset` on, the first of them numbered `first`.

    Stops without an error at whatever is not the next good event, at `max_events`, and before `max_bytes` of payloads
    are exceeded. Gives the events and the offset behind the last of them.
    """
    events: list[StoredEvent] = []
    view = memoryview(buffer)
    # This loop is what an event costs on its way back: half of it is the checksum.
    add, unpack, size, make = events.append, _RECORD.unpack_from, len(buffer), tuple.__new__
    for sequence in range(first, first + max_events):
        start = offset + RECORD_HEADER_BYTES
        if start > size:
            break
        length, checksum, found, time_ms, kind = unpack(buffer, offset)
        stop = start + length
        if (
            found != sequence
            or stop > size
            or kind != EVENT
            or length > max_bytes
            or crc32(view[offset + 8 : stop]) != checksum
        ):
            break
        add(make(StoredEvent, (sequence, time_ms, buffer[start:stop])))
        max_bytes -= length
        offset = stop
    return events, offset


def record_at(buffer: bytes, offset: int) -> Record | None:
    """Read the record that starts at `offset`; None when no good one does."""
    start = offset + RECORD_HEADER_BYTES
    if start > len(buffer):
        return None
    length, checksum, sequence, time_ms, kind = _RECORD.unpack_from(buffer, offset)
    end = start + length
    if length > MAX_PAYLOAD_BYTES or end > len(buffer) or kind not in (EVENT, REMOVED):
        return None
    if crc32(memoryview(buffer)[offset + 8 : end]) != checksum:
        return None
    return Record(offset, end, sequence, time_ms, kind, buffer[start:end])


def next_record(buffer: bytes, offset: int, sequence: int, end: int) -> Record | None:
    """Find the first good record at or after `offset` numbered from `sequence` to below `end`; None if there is none.

    Cheap when it is at `offset`, or where the length of a bad one at `offset` points to. A record that was taken out
    counts as well.
    """
    end = min(end, sequence + (len(buffer) - offset) // RECORD_HEADER_BYTES + 1)
    for candidate in (offset, offset + claimed_record_bytes(buffer, offset)):
        record = record_at(buffer, candidate)
        # Where the length leads only the very next one is believed: the length itself may be what is wrong.
        last = sequence + 2 if candidate > offset else end
        if record and sequence <= record.sequence < min(end, last):
            return record
    return _searched_record(buffer, offset + 1, sequence, end)


def _searched_record(buffer: bytes, offset: int, sequence: int, end: int) -> Record | None:
    """Search for a record byte by byte: by the upper bytes of its number, those of its time, and its kind."""
    tops = {number.to_bytes(8, "little")[_LOW_BYTES_OF_SEQUENCE:] for number in (sequence, max(sequence, end - 1))}
    known_kinds = bytes((EVENT, REMOVED))
    pattern = re.compile(
        b"(?:" + b"|".join(map(re.escape, tops)) + b").{6}\\0\\0[" + re.escape(known_kinds) + b"]", re.DOTALL
    )
    at = offset + _PREFIX.size + _LOW_BYTES_OF_SEQUENCE
    while match := pattern.search(buffer, at):
        record = record_at(buffer, match.start() - _PREFIX.size - _LOW_BYTES_OF_SEQUENCE)
        if record and sequence <= record.sequence < end:
            return record
        at = match.start() + 1
    return None


def is_torn(tail: bytes) -> bool:
    """Whether what follows the last good record is a write that did not finish, rather than damage.

    It is when it stops short of what it promised, or when it is all zeros: space whose bytes never reached the disk.
    """
    return len(tail) < claimed_record_bytes(tail, 0) or not any(tail)


def encode_slot(position: Position, turn: int) -> bytes:
    """Make the position slot of this turn; which of the two it is, is `slot_offset`."""
    marks = b"".join(_MARK.pack(mark.first, mark.last, mark.time_ms) for mark in position.marks)
    rest = _SLOT.pack(0, len(position.marks), turn, position.done)[4:] + marks
    slot = _preamble(_POSITION_MAGIC) + crc32(rest).to_bytes(4, "little") + rest
    return slot.ljust(SLOT_BYTES, b"\0")


def slot_offset(turn: int) -> int:
    """Tell where in the position file the slot of this turn is written."""
    return turn % 2 * SLOT_BYTES


def decode_position(data: bytes) -> tuple[Position, int] | None:
    """Read a position file: the position and its turn; None when neither slot is good.

    Raises `SpoolFormatError` when it is of a format that this version does not know.
    """
    slots = [slot for offset in (0, SLOT_BYTES) if (slot := _decode_slot(data, offset))]
    return max(slots, key=lambda slot: slot[1], default=None)


def _decode_slot(data: bytes, offset: int) -> tuple[Position, int] | None:
    if not _check_version(data, offset, _POSITION_MAGIC):
        return None
    start = offset + _PREAMBLE.size
    if len(data) < start + _SLOT.size:
        return None
    checksum, count, turn, done = _SLOT.unpack_from(data, start)
    end = start + _SLOT.size + min(count, MAX_MARKS) * _MARK.size
    if crc32(data[start + 4 : end]) != checksum:
        return None
    marks = tuple(Mark(*fields) for fields in _MARK.iter_unpack(data[start + _SLOT.size : end]))
    return Position(done, marks), turn


def _preamble(magic: bytes) -> bytes:
    start = magic + FORMAT_VERSION.to_bytes(4, "little")
    return start + crc32(start).to_bytes(4, "little")


def _check_version(data: bytes, offset: int, magic: bytes) -> bool:
    """Whether an intact preamble of our version is there; False for damage."""
    if len(data) < offset + _PREAMBLE.size:
        return False
    found, version, checksum = _PREAMBLE.unpack_from(data, offset)
    if found != magic or crc32(data[offset : offset + 12]) != checksum:
        return False
    if version != FORMAT_VERSION:
        raise SpoolFormatError(
            f"format version {version}, and this is version {FORMAT_VERSION} of the format: "
            "let the version of kong-metering that wrote it deliver it, or update this one"
        )
    return True
