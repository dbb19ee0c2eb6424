"""The thread that makes what was written survive a power cut, once a second (`--spool-sync second`).

Contract: it holds no lock over a sync, so nobody waits for it, however slow the disk is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from kong_metering.eventlog.syncing import synced
from kong_metering.upkeep.guard import guarded

if TYPE_CHECKING:
    from kong_metering.clock import Clock
    from kong_metering.eventlog.files import Unsynced
    from kong_metering.measures import Histogram

_SYNC_SECONDS = 1.0


class Syncer:
    """The thread; `written` gives what was written since the last time."""

    def __init__(self, written: Callable[[], Iterable[Unsynced]], clock: Clock, times: Histogram) -> None:
        """Take what gives what was written, and where the time of each sync is counted."""
        self._written = written
        self._clock = clock
        self._times = times
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metering syncer", daemon=True)

    def start(self) -> None:
        """Begin; raises `RuntimeError` when no thread can be started."""
        self._thread.start()

    def end(self, timeout: float) -> None:
        """End, and wait for it, `timeout` seconds at most."""
        self._ending.set()
        if self._thread.ident is not None:
            self._thread.join(timeout)

    def _run(self) -> None:
        while not self._ending.wait(_SYNC_SECONDS):
            guarded(self._sync)

    def _sync(self) -> None:
        for unsynced in self._written():
            began = self._clock.monotonic()
            if synced(unsynced):
                self._times.observe(self._clock.monotonic() - began)
