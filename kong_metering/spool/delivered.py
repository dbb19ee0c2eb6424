"""What was delivered, kept for a while to be read back: whole segments, moved here when all in them is settled.

    ROOT/delivered/KEY/queue.json        whose they are, as in a log
    ROOT/delivered/KEY/lock              held by the process that verifies them
    ROOT/delivered/KEY/TIME.PART.LOG.FIRST.seg            a segment as `eventlog/format.py` describes it: when it was
                                         moved (milliseconds since 1970), from which part and log, its first number
    ROOT/delivered/KEY/TIME.PART.LOG.FIRST.checked.seg    the same, once a server has read it back

Contract: a segment comes here by a rename, which needs no space and no waiting; where that cannot be, it is removed as
if nothing were kept. Any number of processes move, read and remove at a time: whoever reads takes a file that is gone
for one that was removed. Settled is not delivered: dead letters stand in these segments too, and events that came to
stand once more at the end of their log. Nothing here is waited for on the disk: after a power cut some may be missing,
or be back in their log and come again.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
)
from kong_metering.spool import locks
from kong_metering.spool.identity import load_identity, save_identity

if TYPE_CHECKING:
    from kong_metering.spool.identity import QueueIdentity

# The directory's name in the spool's.
DELIVERED = "delivered"

_SUFFIX = ".seg"
_CHECKED = ".checked"
_NAME_PARTS = 4
_NO_END = 1 << 62
_READ_EVENTS = 1000

Keep = Callable[[Path], None]


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

    def keeper(self, log: Path, identity: QueueIdentity | None) -> Keep | None:
        """Return what moves a settled segment of a log here; None for a log of which nothing is kept.

        That is one of which nobody knows whose it is, and one that became another queue's: what was delivered before
        went to another endpoint.
        What it returns raises the system's `OSError` if that cannot be; the segment is where it was then.
        """
        if identity is None or not is_first_owner(log, identity):
            return None
        queue = self.directory / identity.key

        def keep(segment: Path) -> None:
            target = queue / f"{self._wall_ms():014d}.{log.parent.name}.{log.name}.{segment.name}"
            # Each time: nothing is kept of which nobody would know whose it is, and the directory may be gone.
            self._make(queue, identity)
            segment.rename(target)

        return keep

    def queues(self) -> list[KeptQueue]:
        """Return the queues of which something is kept. Raises the system's `OSError`."""
        found: list[KeptQueue] = []
        for directory in _directories(self.directory):
            with contextlib.suppress(SpoolFormatError):
                if (identity := load_identity(directory)) is not None:
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
            if not _segments(directory):
                self._remove_queue(directory)

    def _make(self, queue: Path, identity: QueueIdentity) -> None:
        files.make_directory(self.directory)
        files.make_directory(queue)
        save_identity(queue, identity)

    def _remove_queue(self, directory: Path) -> None:
        """Remove a queue's directory; one that somebody verifies just now, or moves something to, stays."""
        with contextlib.suppress(OSError, SpoolFormatError), verifying(directory) as is_ours:
            identity = load_identity(directory)
            if is_ours:
                for path in directory.iterdir():
                    if path.suffix != _SUFFIX:
                        path.unlink(missing_ok=True)
                try:
                    directory.rmdir()
                except OSError:
                    # What was moved here meanwhile has nobody who would tell whose it is.
                    if identity:
                        save_identity(directory, identity)


def kept_of(root: Path, part: str, log: str) -> list[KeptSegment]:
    """Return what is kept of one log of a spool, the segment that was settled last in front."""
    found = _segments(root / DELIVERED / log.partition("-")[0])
    return [segment for segment in reversed(found) if (segment.part, segment.log) == (part, log)]


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


def _directories(path: Path) -> list[Path]:
    try:
        return sorted(entry for entry in path.iterdir() if entry.is_dir())
    except (FileNotFoundError, NotADirectoryError):
        return []
