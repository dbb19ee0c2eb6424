"""The spool of a process: the one thread that writes what all queues accept, and another one that syncs it.

Contract: `backlog` gives a queue its place on disk and may be called from any thread, as `wake`, `release` and `close`.
It waits for the place, `_PREPARING_SECONDS` at most: the first event comes at once, and has to be written as soon as
any other. An event is written within `ROUND_SECONDS` and the time of one round. The thread `metering spool` has nothing
else to do but that, to make places and to write dead letters: what may take longer is left to `housekeeping`, and to
the thread that syncs, so that a slow disk does not keep events from being written.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kong_metering.clock import EpochClock
from kong_metering.delivery.housekeeping import Housekeeping, guarded
from kong_metering.delivery.openlogs import OpenLogs
from kong_metering.delivery.spooled import SpooledBacklog
from kong_metering.delivery.spooloptions import Sync
from kong_metering.errors import StartupError
from kong_metering.log import cause_of
from kong_metering.spool.deadletters import DEAD_LETTERS, DeadLetter, DeadLetters

if TYPE_CHECKING:
    from kong_metering.clock import Clock
    from kong_metering.config import Queue
    from kong_metering.delivery.account import QueueAccount
    from kong_metering.delivery.spooloptions import SpoolOptions
    from kong_metering.log import TroubleLog
    from kong_metering.spool.directory import HeldLog
    from kong_metering.spool.identity import QueueIdentity
    from kong_metering.spool.unsynced import Unsynced
    from kong_metering.stats import Stats

# Kong is answered before; what comes meanwhile is written together.
ROUND_SECONDS = 0.006
_PREPARING_SECONDS = 0.02
_SYNC_SECONDS = 1.0
_ENDING_SECONDS = 1.0


class _Alarm:
    """Wakes one thread. A `threading.Event` that is waited for with a timeout costs several times as much."""

    def __init__(self) -> None:
        self._quiet = threading.Lock()
        self._quiet.acquire()

    def ring(self) -> None:
        """End the wait that is on, or else the next one; any thread may."""
        if self._quiet.locked():
            with contextlib.suppress(RuntimeError):  # another thread was faster
                self._quiet.release()

    def wait(self) -> None:
        """Wait for the ring."""
        self._quiet.acquire()


class Spooler:
    """The spool of this process."""

    def __init__(self, options: SpoolOptions, *, clock: Clock, stats: Stats, troubles: TroubleLog) -> None:
        self._options = options
        self._troubles = troubles
        self._clock = EpochClock(clock)
        self._logs = OpenLogs(options.directory)
        self._house = Housekeeping(options, self._logs, clock=self._clock, stats=stats, troubles=troubles)
        self._letters = DeadLetters(options.directory / DEAD_LETTERS, max_bytes=options.max_bytes // 4)
        self._letters_lock = threading.Lock()
        self._dirty: deque[SpooledBacklog] = deque()
        self._new: deque[SpooledBacklog] = deque()
        # Whether the last place was ready in time; a disk that hangs holds nobody up twice.
        self._is_quick = True
        self._awake = _Alarm()
        self._ending = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, name="metering spool", daemon=True),
            threading.Thread(target=self._keep_syncing, name="metering spool sync", daemon=True),
        ]

    def start(self) -> None:
        """Begin to write; raises `StartupError` when that cannot be."""
        try:
            for thread in self._threads:
                thread.start()
            self._house.start()
        except RuntimeError as error:
            raise StartupError(f"no thread can be started to write the spool: {error}") from error

    # -- for the queues -----------------------------------------------------------------------------------------------

    def backlog(self, identity: QueueIdentity, settings: Queue, account: QueueAccount) -> SpooledBacklog:
        """Give a queue its place; what waits on disk for it from before comes in soon."""
        backlog = SpooledBacklog(identity, settings, self, account)
        self._house.look_after(backlog)
        self._new.append(backlog)
        self._awake.ring()
        if self._is_quick:
            self._is_quick = backlog.is_prepared.wait(_PREPARING_SECONDS)
        return backlog

    def release(self, backlog: SpooledBacklog) -> None:
        """Close what a queue that has ended has on disk; what waits there stays."""
        self._house.release(backlog)

    def waiting_for_instances(self) -> dict[str, int]:
        """Tell how many events waited on disk, within the last minute, for queues that are not open here."""
        return self._house.waiting_for_instances()

    def close(self) -> None:
        """Close everything, for others to take over at once. All queues have ended."""
        self._ending.set()
        self._awake.ring()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(_ENDING_SECONDS)
        self._house.close()

    # -- for the backlogs ---------------------------------------------------------------------------------------------

    @property
    def syncs_each_write(self) -> bool:
        """Whether what is written has to survive a power cut at once."""
        return self._options.sync is Sync.COMMIT

    @property
    def dedupe_window(self) -> float:
        """For how many seconds the endpoint tells events that come twice."""
        return self._options.dedupe_window

    def now_ms(self) -> int:
        """Tell the time since 1970 in milliseconds; nobody sets it while the process lives."""
        return self._clock.now_ms()

    def wall_ms(self) -> int:
        """Tell the time since 1970 in milliseconds, as the machine knows it."""
        return self._clock.wall_ms()

    def wake(self, backlog: SpooledBacklog) -> None:
        """Have a backlog written soon."""
        self._dirty.append(backlog)
        self._awake.ring()

    def open_log(self, identity: QueueIdentity) -> HeldLog:
        """Open this process's own log of a queue. Raises `SpoolError`."""
        self._house.retire_released()
        return self._logs.own(identity)

    def look_for_others(self) -> None:
        """Have what dead processes left adopted now; never raises."""
        self._house.look_for_others()

    def keep_letters(self, letters: Sequence[DeadLetter]) -> None:
        """Write dead letters, all or none; raises one of `DISK_ERRORS`."""
        with self._letters_lock:
            self._letters.add(letters, self.wall_ms())
            if self.syncs_each_write:
                self._sync_all([self._letters.unsynced()])
            dropped, self._letters.dropped = self._letters.dropped, 0
        if dropped:
            self._troubles.report(
                "letters", f"{dropped} dead letters, the oldest, were dropped to make room for new ones"
            )

    # -- on the thread that writes ------------------------------------------------------------------------------------

    def _run(self) -> None:
        is_busy = False
        while not self._ending.is_set():
            # Under load the alarm is not even asked: each time that a thread waits costs the loop's thread as well.
            if not is_busy:
                self._awake.wait()
            self._prepare_new()
            time.sleep(ROUND_SECONDS)
            is_busy = bool(self._dirty)
            guarded(self._write_dirty, self._troubles)

    def _prepare_new(self) -> None:
        while self._new:
            guarded(self._new.popleft().prepare, self._troubles)
            self._is_quick = True

    def _write_dirty(self) -> None:
        dirty = dict.fromkeys(self._dirty.popleft() for _ in range(len(self._dirty)))
        for backlog in dirty:
            if not backlog.is_failing:
                guarded(backlog.work, self._troubles)

    # -- on the thread that syncs -------------------------------------------------------------------------------------

    def _keep_syncing(self) -> None:
        while self._options.sync is Sync.SECOND and not self._ending.wait(_SYNC_SECONDS):
            guarded(self._sync, self._troubles)

    def _sync(self) -> None:
        with self._letters_lock:
            written = [self._letters.unsynced()]
        for backlog in self._house.backlogs():
            written += backlog.unsynced()
        self._sync_all(written)

    def _sync_all(self, written: Sequence[Unsynced]) -> None:
        for unsynced in written:
            try:
                unsynced.sync()
            except OSError as error:
                self._troubles.report("sync", f"the disk does not confirm what was written: {cause_of(error)}")
