"""The spool of a process: the one thread that writes what all queues accept, and looks after what is on disk.

Contract: `backlog` gives a queue its place on disk and may be called from any thread, as `wake`, `release` and `close`.
An event is written within `ROUND_SECONDS` and the time of one round. All that may take longer happens on the thread
`metering spool`, about once a second: logs that dead processes left are taken over, for the queues that are open here;
logs that are done with are removed; what the disk refused is tried again; the bounds are kept. A second thread syncs,
so that a slow disk does not keep events from being written.

Logs of queues that are not open here stay free, for another process or `kong-metering spool deliver`; they are counted
in the log, and bounded as all others.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING

from kong_metering.delivery.bounds import bytes_used, keep_age, keep_bytes
from kong_metering.delivery.freelogs import FreeLog, FreeLogsReport
from kong_metering.delivery.spooled import DISK_ERRORS, SpooledBacklog
from kong_metering.delivery.waitinglog import WaitingLog
from kong_metering.errors import SpoolError, StartupError
from kong_metering.log import LOGGER, cause_of
from kong_metering.spool.deadletters import DEAD_LETTERS, DeadLetter, DeadLetters
from kong_metering.spool.directory import Adoption, HeldLog, SpoolDirectory

if TYPE_CHECKING:
    from kong_metering.clock import Clock
    from kong_metering.config import Queue
    from kong_metering.delivery.account import QueueAccount
    from kong_metering.log import TroubleLog
    from kong_metering.spool.identity import QueueIdentity
    from kong_metering.spool.log import Damage
    from kong_metering.spool.unsynced import Unsynced
    from kong_metering.stats import Stats

# Kong is answered before; what comes meanwhile is written together.
ROUND_SECONDS = 0.006
_HOUSEKEEPING_SECONDS = 1.0
_SYNC_SECONDS = 1.0
# How often logs are looked at whose queues are not open here.
_FREE_LOGS_SECONDS = 60.0


class Sync(str, Enum):
    """When what was written is made to survive a power cut as well."""

    COMMIT = "commit"
    SECOND = "second"
    OFF = "off"


@dataclass(frozen=True)
class SpoolOptions:
    """How the spool is kept; sizes in bytes, times in seconds."""

    directory: Path
    sync: Sync = Sync.SECOND
    max_bytes: int = 1024**3
    max_age: float = 30 * 86_400
    dedupe_window: float = 86_400


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

    def wait(self, timeout: float) -> bool:
        """Wait for the ring; False when it did not come."""
        return self._quiet.acquire(timeout=timeout)


class Spooler:
    """The spool of this process."""

    def __init__(self, options: SpoolOptions, *, clock: Clock, stats: Stats, troubles: TroubleLog) -> None:
        self._options = options
        self._clock = clock
        self._stats = stats
        self._troubles = troubles
        # Nobody sets this clock: what it says of two events of one process is right, whatever happens to the wall's.
        self._epoch = clock.wall() - clock.monotonic()
        self._letters = DeadLetters(options.directory / DEAD_LETTERS, max_bytes=options.max_bytes // 4)
        self._lock = threading.Lock()
        self._backlogs: dict[str, SpooledBacklog] = {}
        self._released: deque[SpooledBacklog] = deque()
        # Held while the directory is used.
        self._directory_lock = threading.Lock()
        self._directory: SpoolDirectory | None = None
        self._former: list[SpoolDirectory] = []
        self._homes: dict[HeldLog, SpoolDirectory] = {}
        self._own_logs: dict[str, HeldLog] = {}
        self._dirty: deque[SpooledBacklog] = deque()
        self._awake = _Alarm()
        self._ending = threading.Event()
        self._housekeeping_at = clock.monotonic()
        self._free_logs_at = clock.monotonic() + _FREE_LOGS_SECONDS
        self._report = FreeLogsReport(troubles)
        self._threads = [
            threading.Thread(target=self._run, name="metering spool", daemon=True),
            threading.Thread(target=self._keep_syncing, name="metering spool sync", daemon=True),
        ]

    def start(self) -> None:
        """Begin to write; raises `StartupError` when that cannot be."""
        try:
            for thread in self._threads:
                thread.start()
        except RuntimeError as error:
            raise StartupError(f"no thread can be started to write the spool: {error}") from error

    # -- for the queues -----------------------------------------------------------------------------------------------

    def backlog(self, identity: QueueIdentity, settings: Queue, account: QueueAccount) -> SpooledBacklog:
        """Give a queue its place; what waits on disk for it from before comes in soon."""
        backlog = SpooledBacklog(identity, settings, self, account)
        with self._lock:
            self._backlogs[identity.key] = backlog
        self._housekeep_soon()
        return backlog

    def release(self, backlog: SpooledBacklog) -> None:
        """Close what a queue that has ended has on disk; what waits there stays."""
        with self._lock:
            self._released.append(backlog)
            if self._backlogs.get(backlog.identity.key) is backlog:
                del self._backlogs[backlog.identity.key]
        self._housekeep_soon()

    def close(self) -> None:
        """Close everything, for others to take over at once. All queues have ended."""
        self._ending.set()
        self._awake.ring()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(_HOUSEKEEPING_SECONDS)
        self._retire_released()
        with self._directory_lock:
            for directory in (*self._former, self._directory):
                if directory is not None:
                    directory.close()

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
        return int((self._epoch + self._clock.monotonic()) * 1000)

    def wall_ms(self) -> int:
        """Tell the time since 1970 in milliseconds, as the machine knows it."""
        return int(self._clock.wall() * 1000)

    def wake(self, backlog: SpooledBacklog) -> None:
        """Have a backlog written soon."""
        self._dirty.append(backlog)
        self._awake.ring()

    def open_log(self, identity: QueueIdentity) -> HeldLog:
        """Open this process's own log of a queue. Raises `SpoolError`."""
        self._retire_released()
        with self._directory_lock:
            still_open = self._own_logs.get(identity.key)
            if still_open and self._homes[still_open] is self._directory:
                # By a queue that is just ending, and one directory may not be open twice: begin another part.
                self._former.append(self._homes[still_open])
                self._directory = None
            directory = self._opened_directory()
            held = self._own_logs[identity.key] = directory.log_for(identity)
            self._homes[held] = directory
            return held

    def keep_letters(self, letters: Sequence[DeadLetter]) -> None:
        """Write dead letters, all or none; raises one of `DISK_ERRORS`."""
        with self._directory_lock:
            self._opened_directory()
            self._letters.add(letters, self.wall_ms())
            if self.syncs_each_write:
                self._sync_all([self._letters.unsynced()])
            dropped, self._letters.dropped = self._letters.dropped, 0
        if dropped:
            self._troubles.report(
                "letters", f"{dropped} dead letters, the oldest, were dropped to make room for new ones"
            )

    def _opened_directory(self) -> SpoolDirectory:
        if self._directory is None:
            self._directory = SpoolDirectory(self._options.directory)
        return self._directory

    # -- on the spool's thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        is_busy = False
        while not self._ending.is_set():
            # Under load the alarm is not even asked: each time that a thread waits costs the loop's thread as well.
            if is_busy or self._awake.wait(max(0.0, self._housekeeping_at - self._clock.monotonic())):
                time.sleep(ROUND_SECONDS)
                is_busy = bool(self._dirty)
                self._guarded(self._write_dirty)
            if self._clock.monotonic() >= self._housekeeping_at:
                self._housekeeping_at = self._clock.monotonic() + _HOUSEKEEPING_SECONDS
                self._keep_house()

    def _guarded(self, step: Callable[[], None]) -> None:
        """Do one thing; what goes wrong in it is said, and keeps nothing else from being done."""
        try:
            step()
        except SpoolError as error:
            self._troubles.report("spool", str(error))
        except Exception as error:  # noqa: BLE001 - the thread has to live on
            self._troubles.report(f"spool:{type(error).__name__}", f"the spool: {cause_of(error)}")

    def _write_dirty(self) -> None:
        dirty = dict.fromkeys(self._dirty.popleft() for _ in range(len(self._dirty)))
        for backlog in dirty:
            if not backlog.is_failing:
                self._guarded(backlog.work)

    def _housekeep_soon(self) -> None:
        self._housekeeping_at = 0.0
        self._awake.ring()

    def _keep_house(self) -> None:
        for step in (
            self._leave_what_is_gone,
            self._retire_released,
            self._retire_finished,
            self._adopt,
            self._try_again,
            self._keep_bounds,
        ):
            self._guarded(step)
            # Each of them may take long, and events must not wait for it.
            self._guarded(self._write_dirty)

    def _all(self) -> list[SpooledBacklog]:
        with self._lock:
            return list(self._backlogs.values())

    def _leave_what_is_gone(self) -> None:
        """Begin anew when somebody has removed the directory from under us."""
        gone = [backlog for backlog in self._all() if not backlog.is_own_log_there]
        with self._directory_lock:
            if self._directory is None or (self._options.directory.is_dir() and not gone):
                return
            self._former.append(self._directory)
            self._directory = None
        self._troubles.report("spool gone", f"{self._options.directory} was removed while it was in use")
        for backlog in gone:
            backlog.renounce_own_log()

    def _retire(self, logs: Sequence[HeldLog]) -> None:
        with self._directory_lock:
            for held in logs:
                self._homes.pop(held).retire(held)
                if held.identity and self._own_logs.get(held.identity.key) is held:
                    del self._own_logs[held.identity.key]

    def _retire_released(self) -> None:
        with self._lock:
            released = list(self._released)
            self._released.clear()
        for backlog in released:
            self._retire(backlog.take_all())

    def _retire_finished(self) -> None:
        for backlog in self._all():
            self._retire(backlog.take_finished())

    def _adopt(self) -> None:
        with self._lock:
            open_here = dict(self._backlogs)
        with self._directory_lock:
            directory = self._opened_directory()
            adoption = directory.adopt(lambda identity: identity is not None and identity.key in open_here)
            self._homes.update(dict.fromkeys(adoption.logs, directory))
        for log in self._looked_into(adoption.logs):
            self._take_over(log, open_here)
        self._say_troubles(adoption)

    def _say_troubles(self, adoption: Adoption) -> None:
        for refused in adoption.refused:
            message = f"events in {refused.directory} stay there, they cannot be read: {refused.reason}"
            self._troubles.report(f"refused:{refused.directory}", message)
        for damage in adoption.damage:
            self._say_damage("found in a spool that was done", damage)

    def _say_damage(self, where: str, damage: Damage) -> None:
        kept = f", they are kept in {damage.kept_in}" if damage.kept_in else ""
        message = f"{where}: {damage.length} bytes of {damage.segment} were {damage.kind.value}{kept}"
        self._troubles.report("damage", message, logging.WARNING)

    def _looked_into(self, held_logs: Sequence[HeldLog]) -> list[WaitingLog]:
        """Line logs up, the one with the oldest event first; those that cannot be read now are left for later."""
        found: list[tuple[float, WaitingLog]] = []
        for held in held_logs:
            try:
                log = WaitingLog(held)
                found.append((log.since_ms(), log))
            except DISK_ERRORS as error:
                message = f"events in {held.directory} cannot be read, for now: {cause_of(error)}"
                self._troubles.report("adopt", message)
                self._retire([held])
        return [log for _, log in sorted(found, key=itemgetter(0))]

    def _take_over(self, log: WaitingLog, open_here: dict[str, SpooledBacklog]) -> None:
        identity = log.held.identity
        backlog = open_here[identity.key] if identity else None
        if backlog is None or not backlog.adopt(log):
            self._retire([log.held])
            return
        LOGGER.info(
            "queue %s: took over %d events that another process left", backlog.identity.name, log.waiting_at_first
        )

    def _try_again(self) -> None:
        for backlog in self._all():
            backlog.unblock()
            self._guarded(backlog.work)

    def _keep_bounds(self) -> None:
        # On a disk that is read-only just now, dropping events would free nothing.
        is_writable = os.access(self._options.directory, os.W_OK)
        excess = bytes_used(self._options.directory) - self._options.max_bytes if is_writable else 0
        now = self._clock.monotonic()
        is_due = now >= self._free_logs_at
        free = self._borrow() if excess > 0 or is_due else []
        try:
            logs = [*free, *(log for backlog in self._all() for log in backlog.bounded_logs())]
            # By the clock that shows less: when it was set, what was accepted between would look older than it is.
            keep_age(logs, int(min(self.now_ms(), self.wall_ms()) - self._options.max_age * 1000))
            keep_bytes(logs, excess)
            if is_due:
                self._free_logs_at = now + _FREE_LOGS_SECONDS
                self._report.say([log.held for log in free], now)
        finally:
            self._retire([log.held for log in free])

    def _borrow(self) -> list[FreeLog]:
        """Take the logs whose queues are not open here, for a moment."""
        with self._lock:
            open_here = set(self._backlogs)
        with self._directory_lock:
            directory = self._opened_directory()
            adoption = directory.adopt(lambda identity: identity is None or identity.key not in open_here)
            self._homes.update(dict.fromkeys(adoption.logs, directory))
        self._say_troubles(adoption)
        borrowed = self._looked_into(adoption.logs)
        for log in borrowed:
            for damage in log.log.take_damage():
                self._say_damage(f"found in {log.held.directory}", damage)
        return [FreeLog(log, self._stats, self._troubles) for log in borrowed]

    # -- on the thread that syncs -------------------------------------------------------------------------------------

    def _keep_syncing(self) -> None:
        while self._options.sync is Sync.SECOND and not self._ending.wait(_SYNC_SECONDS):
            self._guarded(self._sync)

    def _sync(self) -> None:
        with self._directory_lock:
            written = [self._letters.unsynced()]
        for backlog in self._all():
            written += backlog.unsynced()
        self._sync_all(written)

    def _sync_all(self, written: Sequence[Unsynced]) -> None:
        for unsynced in written:
            try:
                unsynced.sync()
            except OSError as error:
                self._troubles.report("sync", f"the disk does not confirm what was written: {cause_of(error)}")
