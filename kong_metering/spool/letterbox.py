"""The dead letters of a process: one writer at a time.

Contract: couriers, the janitor and the syncer call; a lock is held over I/O, and the thread that answers Kong and the
writer never come here.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kong_metering.log import LOGGER, trouble
from kong_metering.spool.deadletters import DEAD_LETTERS, DeadLetter, DeadLetters

if TYPE_CHECKING:
    from kong_metering.clock import EpochClock
    from kong_metering.spool.options import SpoolOptions
    from kong_metering.spool.unsynced import Unsynced
    from kong_metering.stats import Stats


class LetterBox:
    """Where the queues of a process put their dead letters."""

    def __init__(self, options: SpoolOptions, clock: EpochClock, stats: Stats) -> None:
        self._letters = DeadLetters(options.directory / DEAD_LETTERS, max_bytes=options.max_bytes // 4)
        self._syncs_each_write = options.syncs_each_write
        self._clock = clock
        self._stats = stats
        self._lock = threading.Lock()

    def keep(self, letters: Sequence[DeadLetter]) -> None:
        """Write dead letters, all or none. Raises one of `DISK_ERRORS`."""
        with self._lock:
            self._letters.add(letters, self._clock.wall_ms())
            if self._syncs_each_write:
                self._letters.unsynced().sync()
            dropped, self._letters.dropped = self._letters.dropped, 0
        if dropped:
            self._stats.drop_letters(dropped)
            LOGGER.error(
                "%d dead letters, the oldest, were dropped to make room for new ones",
                dropped,
                extra=trouble("letters dropped"),
            )

    def unsynced(self) -> Unsynced:
        """Tell what has to be synced to survive a power cut."""
        with self._lock:
            return self._letters.unsynced()
