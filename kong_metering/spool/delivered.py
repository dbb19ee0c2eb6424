"""What was delivered, kept for a while to be read back: whole segments, moved here when all in them is settled.

    ROOT/delivered/KEY/queue.json        whose they are, as in a log
    ROOT/delivered/KEY/lock              held by the process that verifies them
    ROOT/delivered/KEY/TIME.PART.LOG.FIRST.seg            a segment as `eventlog/format.py` describes it: when it was
                                         moved (milliseconds since 1970), from which part and log, its first number
    ROOT/delivered/KEY/TIME.PART.LOG.FIRST.checked.seg    the same, once a server has read it back
    ROOT/delivered/KEY/PART.LOG.FIRST.undelivered         which events of a segment, here or in its log still, were not
                                         delivered from it: 16 bytes each, the number u64 (little-endian) and 8 of the
                                         event's BLAKE2b, since the names of a log that has gone are used again

Contract: a segment comes here by a rename, which needs no space and no waiting; where that cannot be, it is removed as
if nothing were kept. Any number of processes move, read and remove at a time: whoever reads takes a file that is gone
for one that was removed. Settled is not delivered: dead letters stand in these segments too, and events that came to
stand once more at the end of their log. That is noted before they are settled, whatever becomes of the letter then; one
that was noted, and is delivered after a crash in between, is not read back. Nothing here is waited for on the disk:
after a power cut some may be missing, or be back in their log and come again.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING

from kong_metering.errors import SpoolFormatError
from kong_metering.eventlog import files
from kong_metering.eventlog.format import (
    EVENT,
    SEGMENT_HEADER_BYTES,
    StoredEvent,
    is_segment_header,
    next_record,
    parse_events,
    segment_first,
    segment_name,
)
from kong_metering.spool import locks
from kong_metering.spool.identity import load_identity, save_identity

if TYPE_CHECKING:
    from kong_metering.eventlog.log import Keeper
    from kong_metering.spool.identity import QueueIdentity

# The directory's name in the spool's.
DELIVERED = "delivered"

_SUFFIX = ".seg"
_CHECKED = ".checked"
_NAME_PARTS = 4
_NO_END = 1 << 62
_READ_EVENTS = 1000

# Its number, and what tells it from one with the same number in a segment that had the same name before.
_NOTE = struct.Struct("<Q8s")
_NOTES = ".undelivered"


@dataclass(frozen=True)
class KeptSegment:
    """A segment that is kept: `kept_ms` since 1970, the `part` and the `log` that it was of, its first number."""

    path: Path
    kept_ms: int
    part: str
    log: str
    first: int
    size: int
    is_checked: bool

    def events(self) -> Iterator[StoredEvent]:
        """Go through its events, in order; what is damaged is passed over.

        Raises `SpoolFormatError` for a format that this version does not know, and the system's `OSError`.
        """
        return read_segment(self.path, self.first)

    def undelivered(self) -> Undelivered:
        """Return which of its events were not delivered from it; to be asked for before they are read."""
        return Undelivered(_notes_path(self.path.parent, self.part, self.log, self.first))


class Undelivered:
    """Which events of a segment were settled without being delivered from it; none where that cannot be read."""

    def __init__(self, path: Path) -> None:
        self._notes: frozenset[tuple[int, bytes]] = frozenset()
        with contextlib.suppress(OSError):
            data = path.read_bytes()
            self._notes = frozenset(_NOTE.iter_unpack(data[: len(data) - len(data) % _NOTE.size]))

    def __contains__(self, event: StoredEvent) -> bool:
        return bool(self._notes) and (event.sequence, _digest(event.payload)) in self._notes


@dataclass(frozen=True)
class KeptQueue:
    """What is kept of one queue, the oldest first."""

    directory: Path
    identity: QueueIdentity

    def segments(self) -> list[KeptSegment]:
        """Return its segments, the one that was settled first in front."""
        return _segments(self.directory)


class Delivered:
    """What is kept below one spool's root."""

    def __init__(self, root: Path, wall_ms: Callable[[], int]) -> None:
        """Take the spool's root, and the wall clock in milliseconds."""
        self.directory = root / DELIVERED
        self._wall_ms = wall_ms

    def keeper(self, log: Path, identity: QueueIdentity | None) -> Keeper | None:
        """Return what moves the settled segments of a log here; None for a log of which nothing is kept.

        That is one of which nobody knows whose it is, and one that became another queue's: what was delivered before
        went to another endpoint.
        """
        if identity is None or not is_first_owner(log, identity):
            return None
        return _LogKeeper(self.directory, log, identity, self._wall_ms)

    def queues(self) -> list[KeptQueue]:
        """Return the queues of which something is kept. Raises the system's `OSError`."""
        found: list[KeptQueue] = []
        for directory in _directories(self.directory):
            with contextlib.suppress(SpoolFormatError):
                if (identity := load_identity(directory)) is not None and _segments(directory):
                    found.append(KeptQueue(directory, identity))
        return found

    def segments(self) -> list[KeptSegment]:
        """Return all segments of all queues, the one that was settled first in front. Raises the system's `OSError`."""
        found = [segment for directory in _directories(self.directory) for segment in _segments(directory)]
        return sorted(found, key=lambda segment: segment.kept_ms)

    def remove(self, segments: list[KeptSegment]) -> None:
        """Remove segments, and the directories that are empty then. Raises the system's `OSError`."""
        for segment in segments:
            segment.path.unlink(missing_ok=True)
        for directory in {segment.path.parent for segment in segments}:
            with contextlib.suppress(FileNotFoundError):
                self._forget_notes(directory)
            if not _segments(directory):
                self._remove_queue(directory)

    def _forget_notes(self, directory: Path) -> None:
        """Remove the notes on segments that are neither here nor in their log."""
        notes = {path: _noted_segment(path) for path in directory.glob(f"*{_NOTES}")}
        root = self.directory.parent
        # In this order: a segment comes here from its log.
        gone = {path: of for path, of in notes.items() if not (root / of[0] / of[1] / of[2]).is_file()}
        here = {(segment.part, segment.log, segment_name(segment.first)) for segment in _segments(directory)}
        for path, of in gone.items():
            if of not in here:
                path.unlink(missing_ok=True)

    def _remove_queue(self, directory: Path) -> None:
        """Remove a queue's directory; one that somebody verifies just now, or moves something to, stays."""
        with contextlib.suppress(OSError, SpoolFormatError), verifying(directory) as is_ours:
            identity = load_identity(directory)
            if is_ours:
                for path in directory.iterdir():
                    if path.suffix not in (_SUFFIX, _NOTES):
                        path.unlink(missing_ok=True)
                try:
                    directory.rmdir()
                except OSError:
                    # What was moved here meanwhile, or is noted, has nobody who would tell whose it is.
                    if identity:
                        save_identity(directory, identity)


class _LogKeeper:
    """Keeps what is settled of one log."""

    def __init__(self, delivered: Path, log: Path, identity: QueueIdentity, wall_ms: Callable[[], int]) -> None:
        self._queue = delivered / identity.key
        self._log = log
        self._identity = identity
        self._wall_ms = wall_ms

    def keep(self, segment: Path) -> None:
        """Move a segment here."""
        self._make()
        segment.rename(self._queue / f"{self._wall_ms():014d}.{self._log.parent.name}.{self._log.name}.{segment.name}")

    def note_undelivered(self, segment: Path, events: Sequence[tuple[int, bytes]]) -> None:
        """Note that events of a segment are settled without being delivered from it."""
        self._make()
        part, log = self._log.parent.name, self._log.name
        first = segment_first(segment.name) or 0
        notes = files.open_file(_notes_path(self._queue, part, log, first))
        try:
            # Behind the last whole one.
            end = os.fstat(notes).st_size // _NOTE.size * _NOTE.size
            files.write_at(notes, b"".join(_NOTE.pack(number, _digest(event)) for number, event in events), end)
        finally:
            os.close(notes)

    def _make(self) -> None:
        # Each time: nothing is kept of which nobody would know whose it is, and the directory may be gone.
        files.make_directory(self._queue.parent)
        files.make_directory(self._queue)
        save_identity(self._queue, self._identity)


def kept_of(root: Path, part: str, log: str) -> list[KeptSegment]:
    """Return what is kept of one log of a spool, the segment that was settled last in front."""
    found = _segments(root / DELIVERED / log.partition("-")[0])
    return [segment for segment in reversed(found) if (segment.part, segment.log) == (part, log)]


def undelivered_of(log: Path, first: int) -> Undelivered:
    """Return which events of a segment that is in its log still were not delivered from it."""
    directory = log.parent.parent / DELIVERED / log.name.partition("-")[0]
    return Undelivered(_notes_path(directory, log.parent.name, log.name, first))


def is_first_owner(log: Path, identity: QueueIdentity) -> bool:
    """Return whether a log belongs to the queue that it was made for: its directory has that one's name."""
    return log.name.partition("-")[0] == identity.key


@contextlib.contextmanager
def verifying(directory: Path) -> Iterator[bool]:
    """Be the only one who verifies a queue meanwhile; gives False if somebody else does.

    Raises the system's `OSError`.
    """
    lock = files.open_file(directory / locks.LOCK)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(lock)


def mark_checked(segment: KeptSegment) -> None:
    """Remember of a segment that it was read back. Raises the system's `OSError`."""
    name = segment.path.name.removesuffix(_SUFFIX) + _CHECKED + _SUFFIX
    with contextlib.suppress(FileNotFoundError):
        segment.path.rename(segment.path.with_name(name))


def read_segment(path: Path, first: int) -> Iterator[StoredEvent]:
    """Go through the events of a segment's file, in order; what is damaged is passed over.

    Raises `SpoolFormatError` for a format that this version does not know, and the system's `OSError`.
    """
    data = path.read_bytes()
    is_segment_header(data, first)
    sequence, offset = first, SEGMENT_HEADER_BYTES
    while True:
        found, offset = parse_events(data, offset, sequence, _READ_EVENTS, _NO_END)
        yield from found
        sequence += len(found)
        if len(found) == _READ_EVENTS:
            continue
        record = next_record(data, offset, sequence, _NO_END)
        if record is None:
            return
        if record.kind == EVENT:
            yield StoredEvent(record.sequence, record.time_ms, record.payload)
        sequence, offset = record.sequence + 1, record.end


def _segments(directory: Path) -> list[KeptSegment]:
    found: list[KeptSegment] = []
    with contextlib.suppress(FileNotFoundError), os.scandir(directory) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                if segment := _segment(Path(entry.path), entry.stat(follow_symlinks=False).st_size):
                    found.append(segment)
    return sorted(found, key=lambda segment: (segment.kept_ms, segment.part, segment.log, segment.first))


def _segment(path: Path, size: int) -> KeptSegment | None:
    """Read a segment's name; None for a file that is none."""
    stem = path.name.removesuffix(_SUFFIX)
    is_checked = stem.endswith(_CHECKED)
    parts = stem.removesuffix(_CHECKED).split(".")
    if path.suffix != _SUFFIX or len(parts) != _NAME_PARTS or not parts[0].isdecimal():
        return None
    first = segment_first(parts[3] + _SUFFIX)
    return None if first is None else KeptSegment(path, int(parts[0]), parts[1], parts[2], first, size, is_checked)


def _notes_path(directory: Path, part: str, log: str, first: int) -> Path:
    return directory / f"{part}.{log}.{segment_name(first).removesuffix(_SUFFIX)}{_NOTES}"


def _noted_segment(path: Path) -> tuple[str, str, str]:
    """Read the part, the log and the file of a segment from the name of what is noted of it."""
    part, log, first = (*path.name.removesuffix(_NOTES).split("."), "", "")[:3]
    return part, log, first + _SUFFIX


def _digest(event: bytes) -> bytes:
    return blake2b(event, digest_size=8).digest()


def _directories(path: Path) -> list[Path]:
    try:
        return sorted(entry for entry in path.iterdir() if entry.is_dir())
    except (FileNotFoundError, NotADirectoryError):
        return []
