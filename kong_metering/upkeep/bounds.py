"""The spool's bounds, by bytes and by age, over all that is in it: this process's logs, free ones, what was delivered.

Contract: called on the janitor's thread only, each round; the disk is looked at every few seconds, and each round once
half of the space is used. What was delivered goes first, then the oldest events (`retention.py`).
"""

from __future__ import annotations

import math
import os
import shutil
import sys
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

from kong_metering.upkeep.freelogs import FreeLog, FreeLogsReport
from kong_metering.upkeep.retention import bytes_used, drop_beyond_age, drop_beyond_bytes, forget_delivered

if TYPE_CHECKING:
    from pathlib import Path

    from kong_metering.backlog.spooled import Shared, SpooledBacklog
    from kong_metering.spool.delivered import Delivered
    from kong_metering.spool.times import Record, SpoolTimes
    from kong_metering.stats import Stats
    from kong_metering.upkeep.adoption import Adoptions
    from kong_metering.upkeep.retention import BoundedLog

# How often the bounds are looked at; each round once half of the space is used.
_BOUNDS_SECONDS = 5.0
# How often logs are looked at whose queues are not open here.
_FREE_LOGS_SECONDS = 60.0
# What was delivered leaves this part of the spool's bound free on its disk: more than the alert on it asks for.
_SHARE_LEFT_FREE = 5


class Bounds:
    """Keeps the spool within its bounds."""

    def __init__(
        self, shared: Shared, adoptions: Adoptions, *, delivered: Delivered, stats: Stats, times: SpoolTimes
    ) -> None:
        self._root = shared.options.directory
        self._options = shared.options
        self._holdings = shared.holdings
        self._clock = shared.clock
        self._adoptions = adoptions
        self._delivered = delivered
        self._stats = stats
        self._times = times
        self._bounds_at = shared.clock.monotonic()
        self._free_logs_at = shared.clock.monotonic() + _FREE_LOGS_SECONDS
        self._report = FreeLogsReport()

    def waiting_for_instances(self) -> dict[str, int]:
        """Tell how many events waited on disk, within the last minute, for queues that are not open here."""
        return self._report.waiting

    def keep(self, backlogs: Iterable[SpooledBacklog], open_here: Collection[str]) -> None:
        """Drop what is beyond the bounds; of the logs here, and of those whose queues, by their keys, are not open."""
        now = self._clock.monotonic()
        if now < self._bounds_at:
            return
        used = bytes_used(self._root)
        # What others need on this disk goes before what was delivered.
        short = self._options.max_bytes // _SHARE_LEFT_FREE - _bytes_free(self._root)
        is_roomy = used < self._options.max_bytes / 2 and short <= 0
        self._bounds_at = now + (_BOUNDS_SECONDS if is_roomy else 0)
        # On a disk that is read-only just now, dropping events would free nothing.
        excess = used - self._options.max_bytes if os.access(self._root, os.W_OK) else 0
        clock = self._times.look()
        excess -= self._forget_delivered(max(excess, int(max(0, short))), clock)
        is_due = now >= self._free_logs_at
        free = self._borrow(open_here) if excess > 0 or is_due else []
        try:
            ours = [log for backlog in backlogs for log in backlog.chores.bounded()]
            logs: list[BoundedLog] = [*free, *ours]
            if clock.is_steady:
                drop_beyond_age(logs, clock.older_than_ms(self._options.max_age))
            drop_beyond_bytes(logs, excess)
            if is_due:
                self._free_logs_at = now + _FREE_LOGS_SECONDS
                self._report.say([log.held for log in free], now)
        finally:
            for log in free:
                self._holdings.retire(log.held)

    def _forget_delivered(self, excess: int, clock: Record) -> int:
        """Keep what was delivered within its bounds, `excess` bytes less; tell how many went."""
        keep = self._options.keep_delivered
        oldest_ms = clock.older_than_ms(keep) if keep and clock.is_steady else 0 if keep else sys.maxsize
        return forget_delivered(self._delivered, oldest_ms, excess)

    def _borrow(self, open_here: Collection[str]) -> list[FreeLog]:
        return [FreeLog(log, self._stats) for log in self._adoptions.borrow(open_here)]


def _bytes_free(root: Path) -> float:
    """Return what the disk has left; infinity where that cannot be told."""
    try:
        return shutil.disk_usage(root).free
    except OSError:
        return math.inf
