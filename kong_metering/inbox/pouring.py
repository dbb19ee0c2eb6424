"""What dead processes left in their rings goes into their logs, before anybody adopts those.

For each ring whose process is dead, and each queue in it: the queue's unread events, but for those that its log has
already, which are the longest run at their start that is the end of the log, byte for byte, with what was delivered of
it and is kept (`delivered.py`): if the disk hangs, that may be before they leave the ring. They go into the log that
the process wrote; where that is gone, was never made or is somebody else's, into one in a part of the spool that is
named after the ring, with the queue's identity, for anybody to adopt. Then the ring's file is removed.

Contract: one thread of a process; several processes may, since each ring is locked by one of them. It may be killed at
any time: whoever comes next goes on, and each event is in a log exactly once. That holds as long as nobody adopts a log
whose ring is not poured yet, so whoever adopts hands `held_back` to `SpoolDirectory.adopt`, and pours before. It is
also as good as true for those who cannot see the ring (another container on the same spool): only if they adopt,
deliver and remove a log while a killed process had a part of its ring poured there does that part come twice, with the
same ids. A disk that fails leaves the ring where it is, for the next try, and its logs may be adopted meanwhile; what
they have already is noted in the ring.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from kong_metering.errors import InboxError, SpoolFormatError
from kong_metering.eventlog import files
from kong_metering.eventlog.log import DAMAGED, Damage, EventLog
from kong_metering.inbox.place import Place
from kong_metering.inbox.queues import QueueList, decode_list, encode_poured
from kong_metering.inbox.remains import Remains, parts_of, sorted_out
from kong_metering.inbox.ring import HEADER_BYTES, read_header, read_unread
from kong_metering.inbox.strays import tidy
from kong_metering.spool import locks
from kong_metering.spool.free import PART
from kong_metering.spool.identity import load_identity, save_identity

if TYPE_CHECKING:
    from kong_metering.eventlog.log import Keeper
    from kong_metering.inbox.place import RingFile, Rings
    from kong_metering.inbox.strays import Stray
    from kong_metering.spool.delivered import Delivered
    from kong_metering.spool.identity import QueueIdentity


@dataclass(frozen=True)
class Unpoured:
    """A ring that could not be poured, or only its bytes be kept, and why."""

    path: Path
    reason: str


@dataclass
class Poured:
    """What one round did: rings that are done, events put into logs, those that logs had, and what went wrong."""

    rings: int = 0
    events: int = 0
    left_out: int = 0
    damage: list[Damage] = field(default_factory=list)
    unpoured: list[Unpoured] = field(default_factory=list)


@dataclass(frozen=True)
class HeldBack:
    """The logs that must not be adopted yet."""

    directories: frozenset[Path]
    parts: frozenset[str]

    def __contains__(self, directory: object) -> bool:
        if not isinstance(directory, Path):
            return False
        # A part of a ring that was made second has a number behind the name of the first.
        return directory in self.directories or "-".join(directory.parent.name.split("-")[:3]) in self.parts


class Pouring:
    """Pours rings into one spool."""

    def __init__(
        self, places: Sequence[Rings], root: Path, now_ms: Callable[[], int], delivered: Delivered | None = None
    ) -> None:
        """Take where the rings are, the spool's root, which is there, and the wall clock, in milliseconds.

        `delivered` keeps the segments in which all is delivered; None to keep nothing.
        """
        self._places = places
        self._root = root
        self._now_ms = now_ms
        self._delivered = delivered
        self._failed: set[str] = set()

    def pour(self) -> Poured:
        """Pour the rings of all processes that are dead. Never raises for the disk's sake: it tells what went wrong."""
        poured = Poured()
        self._failed.clear()
        for place in self._places:
            try:
                for ring in place.orphans():
                    self._pour(ring, poured)
            except InboxError as error:
                poured.unpoured.append(Unpoured(self._root, str(error)))
        return poured

    def strays(self) -> list[Stray]:
        """Clear away what is empty in shared memory and belongs to no spool here; tell of what is not empty."""
        return [stray for place in self._places if isinstance(place, Place) for stray in tidy(place)]

    def held_back(self) -> HeldBack:
        """Give the logs of rings that are not poured yet, of living processes too, but not of those that failed here.

        To be asked after it is known which logs are free.
        """
        directories: set[Path] = set()
        parts: set[str] = set()
        for place in self._places:
            # One that cannot be used has no rings that anybody will pour.
            with contextlib.suppress(InboxError):
                for stem, data in place.lists():
                    if stem not in self._failed:
                        queues = decode_list(data).queues.values()
                        directories |= {self._root / queue.directory for queue in queues if queue.directory}
                        parts.add(PART + stem)
        return HeldBack(frozenset(directories), frozenset(parts))

    def _pour(self, ring: RingFile, poured: Poured) -> None:
        try:
            data = ring.read()
            header = read_header(data)
            if header is None:
                kept_in = self._keep(ring, data)
                poured.unpoured.append(Unpoured(ring.path, f"its header is damaged, so it was moved to {kept_in}"))
            else:
                listed = decode_list(data[HEADER_BYTES + header.capacity :])
                self._pour_all(ring, listed, read_unread(data, header), poured)
            ring.remove()
            poured.rings += 1
        except (OSError, SpoolFormatError, InboxError) as error:
            self._failed.add(ring.stem)
            poured.unpoured.append(Unpoured(ring.path, str(error)))

    def _pour_all(self, ring: RingFile, listed: QueueList, events: list[tuple[int, bytes]], poured: Poured) -> None:
        errors: list[OSError | SpoolFormatError] = []
        for remains in sorted_out(listed, events, lambda counts: _note_poured(ring, counts)):
            try:
                self._pour_queue(remains, ring.stem, poured)
            except (OSError, SpoolFormatError) as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def _pour_queue(self, remains: Remains, stem: str, poured: Poured) -> None:
        """Put what is left into the first log that can be had; the others may have a part of it already."""
        if remains.home:
            self._pour_into(self._root / remains.home, remains, poured)
        names = parts_of(stem)
        while remains.events:
            directory = self._root / next(names) / remains.key
            self._make(directory, remains.identity)
            self._pour_into(directory, remains, poured)

    def _make(self, directory: Path, identity: QueueIdentity | None) -> None:
        with locks.root_lock(self._root):
            files.make_directory(directory.parent)
            files.make_directory(directory)
            if identity:
                save_identity(directory, identity)

    def _pour_into(self, directory: Path, remains: Remains, poured: Poured) -> None:
        """Put what is left into this log; if it is somebody else's, leave out only what it has already."""
        with locks.root_lock(self._root):
            lock = None if locks.is_locked(directory.parent) else locks.take(directory)
        if lock is None:
            poured.left_out += remains.leave_out_known(directory)
            return
        try:
            log = EventLog.open(directory, keeper=self._keeper(directory))
            try:
                poured.damage += log.take_damage()
                poured.left_out += remains.leave_out_known(directory, log)
                log.append(remains.events, self._now_ms())
                poured.events += len(remains.events)
                remains.leave_out(len(remains.events))
            finally:
                log.close()
        finally:
            locks.release(lock)

    def _keeper(self, directory: Path) -> Keeper | None:
        return self._delivered.keeper(directory, load_identity(directory)) if self._delivered else None

    def _keep(self, ring: RingFile, data: bytes) -> Path:
        files.make_directory(self._root / DAMAGED)
        kept_in = self._root / DAMAGED / ring.name
        files.write_file(kept_in, data, is_lasting=True)
        return kept_in


def _note_poured(ring: RingFile, counts: Mapping[int, int]) -> None:
    # Without the note the logs are compared with again, as long as they are there.
    with contextlib.suppress(OSError):
        ring.add_line(encode_poured(counts))
