"""What the spool may keep: so many bytes, and nothing older than so long; beyond it the oldest events are dropped.

Contract: on the janitor's thread. Events in logs, dead letters (which have a bound of their own within this one) and
what is kept of delivered events count; what damage left in `damaged/` does not. What was delivered goes first. What is
dropped is counted and said by the one whose log it is.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from kong_metering.errors import DISK_ERRORS

if TYPE_CHECKING:
    from kong_metering.spool.delivered import Delivered, KeptSegment

# A clock that says less has not been set since the machine started; what was accepted then has no known age.
_PLAUSIBLE_MS = 1_577_836_800_000  # 2020-01-01
# Of some 1,000 events each, in one log and one round.
_MAX_PIECES = 50
_BETWEEN_PIECES_SECONDS = 0.001


class BoundedLog(Protocol):
    """A log from which the oldest events can be dropped. What reads from the disk raises one of `DISK_ERRORS`."""

    def oldest_ms(self) -> int | None:
        """Tell when the oldest event was accepted, in milliseconds since 1970; None when nothing waits."""
        ...

    def bytes_on_disk(self) -> int:
        """Tell the size of the log."""
        ...

    def drop_segment(self) -> None:
        """Drop the oldest segment."""
        ...

    def drop_older_than(self, time_ms: int) -> int:
        """Drop the oldest events that were accepted before this time, some of them; tell how many."""
        ...


def bytes_used(root: Path) -> int:
    """Tell the bytes of all segments in the spool, those of other processes included."""
    total = 0
    for path in _directories(root):
        if path.name != "damaged":
            total += _segment_bytes(path) + sum(_segment_bytes(log) for log in _directories(path))
    return total


def forget_delivered(delivered: Delivered, time_ms: int, excess: int) -> int:
    """Remove what is kept since before this time, and of the rest the oldest until `excess` bytes are free.

    Returns how many bytes went. Raises the system's `OSError`.
    """
    going: list[KeptSegment] = []
    freed = 0
    for segment in delivered.segments():
        if segment.kept_ms >= time_ms and freed >= excess:
            break
        going.append(segment)
        freed += segment.size
    delivered.remove(going)
    return freed


def drop_beyond_bytes(logs: Sequence[BoundedLog], excess: int) -> None:
    """Drop the oldest segments, wherever they are, until `excess` bytes are free or nothing is left to drop."""
    candidates = list(logs)
    while excess > 0 and candidates:
        oldest = min(candidates, key=_age_key)
        before = oldest.bytes_on_disk()
        oldest.drop_segment()
        freed = before - oldest.bytes_on_disk()
        excess -= freed
        if freed <= 0:
            candidates.remove(oldest)


def drop_beyond_age(logs: Sequence[BoundedLog], time_ms: int) -> None:
    """Drop what was accepted before this time."""
    for log in logs:
        with contextlib.suppress(*DISK_ERRORS):
            oldest_ms = log.oldest_ms()
            if oldest_ms is not None and _PLAUSIBLE_MS < oldest_ms < time_ms:
                _drop_piece_by_piece(log, time_ms)


def _drop_piece_by_piece(log: BoundedLog, time_ms: int) -> None:
    for _ in range(_MAX_PIECES):
        if not log.drop_older_than(time_ms):
            return
        # The log is locked for a piece; whoever writes to it comes first now.
        time.sleep(_BETWEEN_PIECES_SECONDS)


def _age_key(log: BoundedLog) -> float:
    """Order logs by their oldest event; those that cannot be read, or hold nothing, come last."""
    try:
        oldest_ms = log.oldest_ms()
    except DISK_ERRORS:
        return float("inf")
    return float("inf") if oldest_ms is None else oldest_ms


def _directories(path: Path) -> list[Path]:
    with contextlib.suppress(OSError), os.scandir(path) as entries:
        return [Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False)]
    return []


def _segment_bytes(path: Path) -> int:
    total = 0
    with contextlib.suppress(OSError), os.scandir(path) as entries:
        for entry in entries:
            if entry.name.endswith(".seg"):
                with contextlib.suppress(FileNotFoundError):
                    total += entry.stat(follow_symlinks=False).st_size
    return total
