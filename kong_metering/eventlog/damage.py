"""What of a log cannot be read: when it counts as lost, what is told of it once, and its bytes, kept in `damaged/`.

    LOG/damaged/00...01.seg            a segment that the disk did not give, or without a good event
    LOG/damaged/00...01.seg.json       what was known of it: up to which number its events were settled, and its marks
    LOG/damaged/00...01-OFFSET.bytes   a stretch of a segment

Contract of `Patience`: a file system that tells of its own damage (EUCLEAN, EBADMSG) and a file that is not there are
final. EIO may pass: it is final once it lasted for a minute, tried again by those who read. Anything else says nothing
about the file. Any thread; a file is asked about by one at a time.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from kong_metering.eventlog import files

if TYPE_CHECKING:
    from kong_metering.eventlog.format import Mark
    from kong_metering.eventlog.segment import Segment

DAMAGED = "damaged"
ABOUT = ".json"
PATIENCE_SECONDS = 60.0

_FINAL = (errno.ENOENT, errno.EUCLEAN, errno.EBADMSG)


class DamageKind(str, Enum):
    """What was found in place of good events."""

    # The end of a write that a crash cut short; the events in it were not acknowledged.
    TORN = "torn"
    # Bytes that are no good event.
    UNREADABLE = "unreadable"
    # Nothing: a file is not there, or shorter than it was.
    MISSING = "missing"


@dataclass(frozen=True)
class Damage:
    """A stretch of a log that cannot be read.

    `events` are the waiting events that are lost with it, at least; `kept_in` is the file with its bytes, None when
    there were none or they could not be kept.
    """

    kind: DamageKind
    segment: str
    offset: int
    length: int
    events: int
    kept_in: Path | None


class DamageKeeper:
    """Keeps the damaged bytes of one log, and what is to be told of them; beside a view nothing is kept."""

    def __init__(self, directory: Path, marks: Callable[[], tuple[Mark, ...]], *, is_view: bool) -> None:
        """Keep them in this log's directory; `marks` gives the log's of the moment."""
        self.is_view = is_view
        self._marks = marks
        self._directory = directory
        self._found: list[Damage] = []

    def add(self, damage: Damage) -> None:
        """Have this told."""
        self._found.append(damage)

    def take(self) -> list[Damage]:
        """Give what was found since the last call."""
        taken, self._found = self._found, []
        return taken

    def move(self, segment: Segment, settled: int) -> Path | None:
        """Keep a whole file, which leaves the log with that; None when that cannot be.

        Its events up to `settled` are not lost.
        """
        if self.is_view:
            return None
        target = self._directory / DAMAGED / segment.path.name
        try:
            files.make_directory(target.parent)
            segment.path.replace(target)
        except OSError:
            return None
        # Without it nobody takes the events back in unasked.
        with contextlib.suppress(OSError):
            files.write_file(target.with_name(target.name + ABOUT), self._about(settled))
        return target

    def _about(self, settled: int) -> bytes:
        marks = [[mark.first, mark.last, mark.time_ms] for mark in self._marks()]
        return json.dumps({"settled": settled, "marks": marks}).encode("ascii")

    def copy(self, segment: Segment, offset: int, data: bytes) -> Path | None:
        """Keep these bytes of a segment; None when that cannot be, or there are none."""
        if self.is_view or not data:
            return None
        target = self._directory / DAMAGED / f"{segment.path.stem}-{offset}.bytes"
        try:
            # On the disk itself: what is copied may be cut off next.
            is_new = files.make_directory(target.parent)
            files.write_file(target, data, is_lasting=True)
            if is_new:
                files.sync(self._directory)
        except OSError:
            return self._link(segment)
        return target

    def _link(self, segment: Segment) -> Path | None:
        """Keep the whole segment by a second name: that asks for no space on a full disk."""
        target = self._directory / DAMAGED / segment.path.name
        try:
            os.link(segment.path, target)
        except FileExistsError:
            return target
        except OSError:
            return None
        return target


class Patience:
    """Tells when the content of a file that the disk does not give counts as lost."""

    def __init__(self, seconds: float = PATIENCE_SECONDS, clock: Callable[[], float] = time.monotonic) -> None:
        """Wait for as long with EIO, by a clock that never goes back."""
        self._seconds = seconds
        self._clock = clock
        # Where in the file it failed first, and when.
        self._failing: dict[Path, tuple[int, float]] = {}

    def is_over(self, path: Path, error: OSError, at: int = 0) -> bool:
        """Tell whether what is in the file from `at` on is lost, now that reading it failed; else it may come back."""
        if error.errno != errno.EIO:
            return error.errno in _FINAL
        now = self._clock()
        return now - self._failing.setdefault(path, (at, now))[1] >= self._seconds

    def was_read(self, path: Path, up_to: int) -> None:
        """Take note that the file can be read to below `up_to`: if that is where it failed, it was a passing error."""
        failing = self._failing.get(path)
        if failing and failing[0] < up_to:
            self.forget(path)

    def forget(self, path: Path) -> None:
        """Start anew with this file."""
        self._failing.pop(path, None)
