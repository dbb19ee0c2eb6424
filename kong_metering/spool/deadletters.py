"""Events that will not be delivered by themselves, kept with the reason until somebody decides.

    DIRECTORY/lock             held while something is added or removed, and while a file is read
    DIRECTORY/00...01.seg      as `eventlog/format.py` describes; a record's payload is one line of JSON, then the event
    DIRECTORY/dropped          how many letters went because there were too many, ever; 20 digits
    DIRECTORY/damaged/         segments that are done with, but for bytes that nobody could read

Contract: several processes use one directory at a time, the running servers and `kong-metering spool`; within a process
the caller locks. A letter survives the death of the process once `add` returned, and a power cut once a sync of
`unsynced` returned. A letter's id is its sequence number. Removing marks it in place, which also a full disk allows; a
segment goes when all in it are removed. Above `max_bytes` the oldest segment goes: `dropped` counts its letters, and
so does the file, for all processes. A segment that the disk does not give keeps nobody from adding letters: it counts
as full, and goes to `damaged/` when it is the oldest beyond the bound.
"""

from __future__ import annotations

import bisect
import contextlib
import fcntl
import json
import os
from collections import Counter, deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from kong_metering.errors import DISK_ERRORS
from kong_metering.eventlog import files
from kong_metering.eventlog.files import Unsynced
from kong_metering.eventlog.format import (
    EVENT,
    SEGMENT_HEADER_BYTES,
    Record,
    encode_records,
    is_segment_header,
    next_record,
    removed_header,
    segment_first,
    segment_name,
)
from kong_metering.eventlog.log import DAMAGED
from kong_metering.eventlog.segment import Segment, SegmentWriter
from kong_metering.spool.identity import NO_RESOURCES, QueueIdentity

# The directory's name in the spool's.
DEAD_LETTERS = "dead-letters"
SEGMENT_BYTES = 1024 * 1024
MAX_BYTES = 256 * 1024 * 1024

_LOCK = "lock"
_DROPPED = "dropped"
_NO_END = 1 << 63


@dataclass(frozen=True)
class DeadLetter:
    """An event that was given up: why in a word, the endpoint's own answer, whose it is, and when it was accepted.

    `accepted_ms` is the wall clock's, in milliseconds since 1970.
    """

    reason: str
    answer: str
    queue: QueueIdentity
    accepted_ms: int
    event: bytes


@dataclass(frozen=True)
class StoredLetter:
    """A dead letter with its id, and when it became one."""

    id: int
    time_ms: int
    letter: DeadLetter


@dataclass(frozen=True)
class _Content:
    """What is in a segment: its good records, and whether there is anything else in it."""

    records: list[Record]
    end: int
    size: int
    is_damaged: bool

    @property
    def live(self) -> int:
        return sum(1 for record in self.records if record.kind == EVENT)


class DeadLetters:
    """The dead letters of a spool. Everything raises the system's `OSError`, and `SpoolFormatError`."""

    def __init__(self, directory: Path, *, max_bytes: int = MAX_BYTES, segment_bytes: int = SEGMENT_BYTES) -> None:
        self.directory = directory
        self.dropped = 0
        self._max_bytes = max_bytes
        self._segment_bytes = segment_bytes
        # What was written since the last sync, and what a sync that failed gave back, from any thread.
        self._unsynced: dict[Path, None] = {}
        self._failed: deque[Path] = deque()
        # Whether the directory itself was among it: nobody knows whether those who made it had it synced.
        self._is_directory_noted = False
        # The end of the newest segment as this object left it, so that adding need not read it again.
        self._known_end: Segment | None = None

    def add(self, letters: Sequence[DeadLetter], now_ms: int) -> range:
        """Keep letters, all or none, and give their ids."""
        if not letters:
            return range(0)
        if files.make_directory(self.directory) or not self._is_directory_noted:
            self._unsynced |= dict.fromkeys((*files.above(self.directory), self.directory))
            self._is_directory_noted = True
        with self._locked(fcntl.LOCK_EX):
            newest = self._newest()
            first = newest.end if newest else 1
            end = first + len(letters)
            records = encode_records([_encode(letter) for letter in letters], first, now_ms)
            if newest and newest.size + len(records) <= self._segment_bytes:
                writer = SegmentWriter.resume(newest)
                with contextlib.closing(writer):
                    writer.append(records, end)
            else:
                writer = SegmentWriter.create(self.directory, records, first, end)
                writer.close()
                self._unsynced[self.directory] = None
            self._unsynced[writer.segment.path] = None
            self._known_end = writer.segment
            self._keep_within_bounds()
        return range(first, end)

    def unsynced(self) -> Unsynced:
        """Take note of what has to be synced, so that all letters that were added survive a power cut.

        The caller has it synced: the next call gives only what was written since, and what failed.
        """
        return Unsynced.take(self._unsynced, self._failed)

    def letters(self, after: int = 0) -> Iterator[StoredLetter]:
        """Go through all letters with an id above `after`, in order; others may add and remove meanwhile."""
        for first, end in self._ranges():
            if end > after + 1:
                for record in self._content(first).records:
                    if record.kind == EVENT and record.sequence > after:
                        yield StoredLetter(record.sequence, record.time_ms, _decode(record.payload))

    def get(self, letter_id: int) -> StoredLetter | None:
        """Give one letter; None when there is none with this id."""
        found = next(self.letters(letter_id - 1), None)
        return found if found and found.id == letter_id else None

    def remove(self, ids: Collection[int]) -> int:
        """Take letters out, after a replay or to purge them; tell how many of them were there."""
        wanted, removed = sorted(ids), 0
        for first, end in self._ranges():
            here = wanted[bisect.bisect_left(wanted, first) : bisect.bisect_left(wanted, end)]
            if here:
                with self._locked(fcntl.LOCK_EX):
                    removed += self._remove_from(first, set(here))
        return removed

    def counts(self) -> Counter[tuple[QueueIdentity, str]]:
        """Count the letters by queue and reason."""
        return Counter((stored.letter.queue, stored.letter.reason) for stored in self.letters())

    @property
    def dropped_ever(self) -> int:
        """How many letters all processes dropped to make room for others, as far as that could be noted."""
        try:
            return int((self.directory / _DROPPED).read_bytes())
        except (FileNotFoundError, ValueError):
            return 0

    @property
    def bytes_on_disk(self) -> int:
        """The size of all segments."""
        return sum(size for _, size in self._sizes())

    def _remove_from(self, first: int, ids: set[int]) -> int:
        path = self._path(first)
        try:
            content = _read(path, first)
        except FileNotFoundError:
            return 0
        gone = [record for record in content.records if record.kind == EVENT and record.sequence in ids]
        descriptor = files.open_file(path)
        try:
            for record in gone:
                files.write_at(descriptor, removed_header(record), record.start)
        finally:
            os.close(descriptor)
        if len(gone) == content.live:
            self._discard(first, content)
        return len(gone)

    def _discard(self, first: int, content: _Content) -> None:
        """Let a segment go in which nothing is live; the newest one leaves an empty one, so that no id comes twice."""
        if first == self._sizes()[-1][0]:
            self._known_end = None
            if content.size == SEGMENT_HEADER_BYTES:
                return
            try:
                SegmentWriter.create(self.directory, b"", content.end, content.end).close()
            except OSError:
                return
        self._unlink(first, content)

    def _unlink(self, first: int, content: _Content) -> None:
        path = self._path(first)
        if content.is_damaged:
            files.make_directory(self.directory / DAMAGED)
            path.replace(self.directory / DAMAGED / path.name)
        else:
            path.unlink()

    def _keep_within_bounds(self) -> None:
        sizes = self._sizes()
        total = sum(size for _, size in sizes)
        for first, size in sizes[:-1]:
            if total <= self._max_bytes:
                return
            # The letters of this call are kept: whoever was told otherwise would add them once more.
            try:
                content = self._given(first, size)
                self._note_dropped(content.live)
                self._unlink(first, content)
            except DISK_ERRORS:
                return
            self.dropped += content.live
            total -= size

    def _note_dropped(self, letters: int) -> None:
        """Count them before they go. In place, which a full disk allows; without the note the log has the number."""
        if not letters:
            return
        with contextlib.suppress(OSError):
            total = self.dropped_ever + letters
            descriptor = files.open_file(self.directory / _DROPPED)
            try:
                files.write_at(descriptor, b"%020d\n" % total, 0)
            finally:
                os.close(descriptor)
            self._unsynced[self.directory / _DROPPED] = None

    def _newest(self) -> Segment | None:
        """Tell where the newest segment ends; a damaged one counts as full, so that none of its bytes is touched."""
        sizes = self._sizes()
        if not sizes:
            return None
        first, size = sizes[-1]
        known = self._known_end
        if known and known.first == first and known.size == size:
            return known
        content = self._given(first, size)
        if content.is_damaged and content.end == first:
            # The next segment gets its name.
            self._unlink(first, content)
        return Segment(self._path(first), first, content.end, self._segment_bytes if content.is_damaged else size)

    def _given(self, first: int, size: int) -> _Content:
        """Read a segment; one that the disk does not give is damaged, and ends where it surely does."""
        try:
            return _read(self._path(first), first)
        except OSError as error:
            if error.errno in NO_RESOURCES:
                raise
            # Each letter takes some bytes: none in it has a number as large as this.
            return _Content([], first + size, size, is_damaged=True)

    def _content(self, first: int) -> _Content:
        with self._locked(fcntl.LOCK_SH):
            try:
                return _read(self._path(first), first)
            except FileNotFoundError:
                return _Content([], first, 0, is_damaged=False)

    def _path(self, first: int) -> Path:
        return self.directory / segment_name(first)

    def _ranges(self) -> list[tuple[int, int]]:
        """Give for each segment the ids that it can hold: from the first to below the end."""
        firsts = [first for first, _ in self._sizes()]
        return list(zip(firsts, [*firsts[1:], _NO_END], strict=False))

    def _sizes(self) -> list[tuple[int, int]]:
        """List the segments: first id and size."""
        sizes: list[tuple[int, int]] = []
        with contextlib.suppress(FileNotFoundError):
            for entry in os.scandir(self.directory):
                first = segment_first(entry.name)
                with contextlib.suppress(FileNotFoundError):
                    if first is not None:
                        sizes.append((first, entry.stat().st_size))
        return sorted(sizes)

    @contextlib.contextmanager
    def _locked(self, kind: int) -> Iterator[None]:
        lock = files.open_file(self.directory / _LOCK)
        try:
            fcntl.flock(lock, kind)
            yield
        finally:
            os.close(lock)


def _read(path: Path, first: int) -> _Content:
    data = path.read_bytes()
    is_damaged = not is_segment_header(data, first)
    records: list[Record] = []
    sequence, offset = first, min(SEGMENT_HEADER_BYTES, len(data))
    while record := next_record(data, offset, sequence, _NO_END):
        is_damaged |= record.start != offset
        records.append(record)
        sequence, offset = record.sequence + 1, record.end
    return _Content(records, sequence, offset, is_damaged or offset != len(data))


def _encode(letter: DeadLetter) -> bytes:
    about = {
        "reason": letter.reason,
        "answer": letter.answer,
        "queue": asdict(letter.queue),
        "accepted_ms": letter.accepted_ms,
    }
    return json.dumps(about).encode("ascii") + b"\n" + letter.event


def _decode(payload: bytes) -> DeadLetter:
    line, _, event = payload.partition(b"\n")
    about = json.loads(line)
    return DeadLetter(about["reason"], about["answer"], QueueIdentity(**about["queue"]), about["accepted_ms"], event)
