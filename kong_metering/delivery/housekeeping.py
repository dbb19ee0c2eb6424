"""What has to be done about the spool besides writing events: it may take its time, and no event waits for it.

Contract: all of it happens on the thread `metering spool house`, once a second and when a queue goes; the rest may be
called from any thread. Logs that dead processes left are taken over, for the queues that are open here, and a queue
sends nothing before they were looked for once (`look_for_others` does so at once: a process that ends may not have got
that far). Logs that are done with are removed; what the disk refused is tried again; the bounds are kept.

Logs of queues that are not open here stay free, for another process or `kong-metering spool deliver`; they are counted
in the log, and bounded as all others.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import TYPE_CHECKING

from kong_metering.delivery.bounds import bytes_used, keep_age, keep_bytes
from kong_metering.delivery.freelogs import FreeLog, FreeLogsReport
from kong_metering.delivery.openlogs import OpenLogs
from kong_metering.delivery.spooled import DISK_ERRORS, SpooledBacklog
from kong_metering.delivery.waitinglog import WaitingLog
from kong_metering.errors import SpoolError
from kong_metering.log import LOGGER, cause_of

if TYPE_CHECKING:
    from kong_metering.clock import EpochClock
    from kong_metering.delivery.spooloptions import SpoolOptions
    from kong_metering.log import TroubleLog
    from kong_metering.spool.directory import Adoption, HeldLog
    from kong_metering.spool.log import Damage
    from kong_metering.stats import Stats

_ROUND_SECONDS = 1.0
# How often the bounds are looked at; each round once half of the space is used.
_BOUNDS_SECONDS = 5.0
# How often logs are looked at whose queues are not open here.
_FREE_LOGS_SECONDS = 60.0


def guarded(step: Callable[[], None], troubles: TroubleLog) -> None:
    """Do one thing; what goes wrong in it is said, and keeps nothing else from being done."""
    try:
        step()
    except SpoolError as error:
        troubles.report("spool", str(error))
    except Exception as error:  # noqa: BLE001 - the thread has to live on
        troubles.report(f"spool:{type(error).__name__}", f"the spool: {cause_of(error)}")


class Housekeeping:
    """The backlogs that are open in this process, and all that is theirs on disk."""

    def __init__(
        self, options: SpoolOptions, own_logs: OpenLogs, *, clock: EpochClock, stats: Stats, troubles: TroubleLog
    ) -> None:
        """Take the logs that are written; those that are taken over are opened apart from them."""
        self._root = options.directory
        self._max_bytes = options.max_bytes
        self._max_age = options.max_age
        self._own_logs = own_logs
        self._adopted_logs = OpenLogs(options.directory)
        self._clock = clock
        self._stats = stats
        self._troubles = troubles
        # Held while logs are taken over; taken before `_lock`.
        self._adopting = threading.Lock()
        self._lock = threading.Lock()
        self._backlogs: dict[str, SpooledBacklog] = {}
        self._released: deque[SpooledBacklog] = deque()
        self._wanted = threading.Event()
        self._is_ending = False
        # How many rounds are over.
        self.rounds = 0
        self._bounds_at = clock.monotonic()
        self._free_logs_at = clock.monotonic() + _FREE_LOGS_SECONDS
        self._report = FreeLogsReport(troubles)
        self._thread = threading.Thread(target=self._run, name="metering spool house", daemon=True)

    def start(self) -> None:
        """Begin; raises `RuntimeError` when no thread can be started."""
        self._thread.start()

    def backlogs(self) -> list[SpooledBacklog]:
        """Give those that are open."""
        with self._lock:
            return list(self._backlogs.values())

    def look_after(self, backlog: SpooledBacklog) -> None:
        """Take charge of one that was opened.

        What waits on disk for it from before comes in with the next round, and not at once, when its first events have
        to be written; they are not sent before.
        """
        with self._lock:
            self._backlogs[backlog.identity.key] = backlog

    def release(self, backlog: SpooledBacklog) -> None:
        """Close what a queue that has ended has on disk; what waits there stays."""
        with self._lock:
            self._released.append(backlog)
            if self._backlogs.get(backlog.identity.key) is backlog:
                del self._backlogs[backlog.identity.key]
        self._wanted.set()

    def retire_released(self) -> None:
        """Close what was released, now."""
        with self._lock:
            released = list(self._released)
            self._released.clear()
        for backlog in released:
            self._retire(backlog.take_all())

    def waiting_for_instances(self) -> dict[str, int]:
        """Tell how many events waited on disk, within the last minute, for queues that are not open here."""
        return self._report.waiting

    def look_for_others(self) -> None:
        """Take over what dead processes left, now, and let the queues that are open send."""
        with self._adopting:
            with self._lock:
                open_here = dict(self._backlogs)
            guarded(functools.partial(self._adopt, open_here), self._troubles)
            for backlog in open_here.values():
                backlog.begin()

    def close(self) -> None:
        """End, and close everything, for others to take over at once."""
        self._is_ending = True
        self._wanted.set()
        if self._thread.ident is not None:
            self._thread.join(_ROUND_SECONDS)
        self.retire_released()
        self._own_logs.close()
        self._adopted_logs.close()

    # -- on the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._is_ending:
            self._wanted.clear()
            self._keep_house()
            self.rounds += 1
            self._wanted.wait(_ROUND_SECONDS)

    def _keep_house(self) -> None:
        for step in (
            self._leave_what_is_gone,
            self.retire_released,
            self._retire_finished,
            self.look_for_others,
            self._try_again,
            self._keep_bounds,
        ):
            guarded(step, self._troubles)

    def _leave_what_is_gone(self) -> None:
        """Begin anew when somebody has removed the directory from under us."""
        gone = [backlog for backlog in self.backlogs() if not backlog.is_own_log_there]
        were_left = [logs.leave(is_gone=bool(gone)) for logs in (self._own_logs, self._adopted_logs)]
        if any(were_left):
            self._troubles.report("spool gone", f"{self._root} was removed while it was in use")
        for backlog in gone:
            backlog.renounce_own_log()

    def _retire(self, logs: Sequence[HeldLog]) -> None:
        self._own_logs.retire(logs)
        self._adopted_logs.retire(logs)

    def _retire_finished(self) -> None:
        for backlog in self.backlogs():
            self._retire(backlog.take_finished())

    def _adopt(self, open_here: dict[str, SpooledBacklog]) -> None:
        adoption = self._adopted_logs.adopt(lambda identity: identity is not None and identity.key in open_here)
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
        for backlog in self.backlogs():
            guarded(backlog.try_again, self._troubles)

    def _keep_bounds(self) -> None:
        now = self._clock.monotonic()
        if now < self._bounds_at:
            return
        used = bytes_used(self._root)
        self._bounds_at = now + (_BOUNDS_SECONDS if used < self._max_bytes / 2 else 0)
        # On a disk that is read-only just now, dropping events would free nothing.
        excess = used - self._max_bytes if os.access(self._root, os.W_OK) else 0
        is_due = now >= self._free_logs_at
        free = self._borrow() if excess > 0 or is_due else []
        try:
            logs = [*free, *(log for backlog in self.backlogs() for log in backlog.bounded_logs())]
            # By the clock that shows less: when it was set, what was accepted between would look older than it is.
            keep_age(logs, int(min(self._clock.now_ms(), self._clock.wall_ms()) - self._max_age * 1000))
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
        adoption = self._adopted_logs.adopt(lambda identity: identity is None or identity.key not in open_here)
        self._say_troubles(adoption)
        borrowed = self._looked_into(adoption.logs)
        for log in borrowed:
            for damage in log.log.take_damage():
                self._say_damage(f"found in {log.held.directory}", damage)
        return [FreeLog(log, self._stats, self._troubles) for log in borrowed]
