"""What has to be done about the spool besides writing events: it may take its time, and no event waits for it.

Contract: the public methods may be called from any thread; the work happens on the thread
`metering janitor`, once a second and when a queue goes. What dead processes left is poured from their inboxes into
their logs, and these are taken over for the queues that are open here; a queue sends nothing before they were looked
for once (`look_for_others` has that done at once: a process that ends may not have got that far). Logs that are done
with are removed, those of idle queues closed; what the disk refused is tried again; the bounds are kept; requests are
answered; idle connections are closed.

Logs of queues that are not open here stay free, for another process or `kong-metering spool deliver`; they are counted
in the log, and bounded as all others.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import shutil
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import TYPE_CHECKING

from kong_metering.delivery.logsource import LogSource
from kong_metering.delivery.outages import told
from kong_metering.errors import DISK_ERRORS
from kong_metering.log import LOGGER, Once, cause_of, printable, trouble
from kong_metering.upkeep.freelogs import FreeLog, FreeLogsReport
from kong_metering.upkeep.guard import guarded
from kong_metering.upkeep.logmoves import LogMoves
from kong_metering.upkeep.retention import bytes_used, drop_beyond_age, drop_beyond_bytes, forget_delivered

if TYPE_CHECKING:
    from pathlib import Path

    from kong_metering.delivery.spooled import Shared, SpooledBacklog
    from kong_metering.eventlog.log import Damage
    from kong_metering.inbox.pouring import Pouring
    from kong_metering.ingest.connections import Connections
    from kong_metering.spool.accepted import Acceptances
    from kong_metering.spool.delivered import Delivered
    from kong_metering.spool.directory import Adoption, HeldLog
    from kong_metering.spool.identity import QueueIdentity
    from kong_metering.spool.times import Record, SpoolTimes
    from kong_metering.stats import Stats
    from kong_metering.upkeep.redirection import Redirection
    from kong_metering.upkeep.requestdesk import RequestDesk
    from kong_metering.upkeep.retention import BoundedLog
    from kong_metering.upkeep.writer import Writer

ROUND_SECONDS = 1.0
# How often the bounds are looked at; each round once half of the space is used.
_BOUNDS_SECONDS = 5.0
# How often logs are looked at whose queues are not open here.
_FREE_LOGS_SECONDS = 60.0
# A log whose queue has had nothing to do for so many rounds is closed.
_IDLE_ROUNDS = 10
# How long the writer may take to let go of logs that are gone.
_LETTING_GO_SECONDS = 1.0
# A write that takes longer is said.
_HANGING_SECONDS = 5.0
# What was delivered leaves this part of the spool's bound free on its disk: more than the alert on it asks for.
_SHARE_LEFT_FREE = 5


class Janitor:
    """The backlogs that are open in this process, and all that is theirs on disk."""

    def __init__(  # noqa: PLR0913 - what it is made of
        self,
        shared: Shared,
        writer: Writer,
        pouring: Pouring | None,
        *,
        delivered: Delivered,
        stats: Stats,
        connections: Connections,
        acceptances: Acceptances,
        times: SpoolTimes,
        round_seconds: float = ROUND_SECONDS,
    ) -> None:
        self._root = shared.options.directory
        self._options = shared.options
        self._holdings = shared.holdings
        self._clock = shared.clock
        self._writer = writer
        self._pouring = pouring
        self._delivered = delivered
        self._stats = stats
        self._connections = connections
        self._acceptances = acceptances
        self._times = times
        self._log_moves = LogMoves(shared.holdings, shared.options)
        self._round_seconds = round_seconds
        self._lock = threading.Lock()
        self._backlogs: dict[str, SpooledBacklog] = {}
        # Those that another one of the same queue goes on for, until they have given up their logs.
        self._set_aside: list[SpooledBacklog] = []
        self._desk: RequestDesk | None = None
        self._released: deque[SpooledBacklog] = deque()
        self._idle_rounds: dict[SpooledBacklog, int] = {}
        self._wanted = threading.Event()
        self._is_ending = False
        # How many rounds are over, and who waits for the end of one.
        self.rounds = 0
        self._round_over = threading.Condition()
        self._round_ended_at = self._clock.monotonic()
        self._bounds_at = self._clock.monotonic()
        self._free_logs_at = self._clock.monotonic() + _FREE_LOGS_SECONDS
        self._report = FreeLogsReport()
        self._strays_at = self._clock.monotonic()
        self._told = Once()
        # The write that hangs: when it began.
        self._hangs_since: float | None = None
        self._thread = threading.Thread(target=self._run, name="metering janitor", daemon=True)

    def start(self) -> None:
        """Begin; raises `RuntimeError` when no thread can be started."""
        self._thread.start()

    def is_stalled(self, seconds: float) -> bool:
        """Whether it has ended though nobody told it to, or no round has ended for so long."""
        if self._is_ending:
            return False
        return not self._thread.is_alive() or self._clock.monotonic() - self._round_ended_at >= seconds

    def backlogs(self) -> list[SpooledBacklog]:
        """Give those that are open."""
        with self._lock:
            return [*self._backlogs.values(), *self._set_aside]

    def backlog_of(self, key: str) -> SpooledBacklog | None:
        """Return the one that is open for a queue."""
        with self._lock:
            return self._backlogs.get(key)

    def answer_at(self, desk: RequestDesk) -> None:
        """Have the requests of people answered from now on."""
        self._desk = desk

    def look_after(self, backlog: SpooledBacklog) -> None:
        """Take charge of one that was opened: what waits on disk for it from before comes in with the next round."""
        with self._lock:
            # The one that was looked at last is where the plugin sends now.
            self._backlogs.pop(backlog.identity.key, None)
            self._backlogs[backlog.identity.key] = backlog

    def take_over(self, old: SpooledBacklog, heir: SpooledBacklog) -> None:
        """Have the logs of a backlog that hands over given to another one."""
        self._forget(old)
        self._log_moves.begin(old, heir)
        self._wanted.set()

    def set_aside(self, backlog: SpooledBacklog) -> None:
        """Take note that another one of the same queue goes on for it; what is its own is still to be looked after."""
        with self._lock:
            if self._backlogs.get(backlog.identity.key) is backlog:
                del self._backlogs[backlog.identity.key]
                self._set_aside.append(backlog)

    def redirect(self, old: SpooledBacklog, redirection: Redirection) -> None:
        """Have the logs of a backlog that was set aside go to another endpoint."""
        self._forget(old)
        self._log_moves.redirect(redirection)
        self._wanted.set()

    def release(self, backlog: SpooledBacklog) -> None:
        """Close what a queue that has ended has on disk; what waits there stays."""
        self._forget(backlog)
        self._released.append(backlog)
        self._wanted.set()

    def _forget(self, backlog: SpooledBacklog) -> None:
        with self._lock:
            if self._backlogs.get(backlog.identity.key) is backlog:
                del self._backlogs[backlog.identity.key]
            self._set_aside = [each for each in self._set_aside if each is not backlog]

    def waiting_for_instances(self) -> dict[str, int]:
        """Tell how many events waited on disk, within the last minute, for queues that are not open here."""
        return self._report.waiting

    def look_for_others(self, timeout: float) -> None:
        """Have what dead processes left taken over now, `timeout` seconds at most; at once if that was done before."""
        with self._round_over:
            if all(backlog.has_begun or not backlog.waits for backlog in self.backlogs()):
                return
            begun = self.rounds
            self._wanted.set()
            self._round_over.wait_for(lambda: self.rounds > begun + 1 or self._is_ending, timeout)

    def order_spills(self) -> None:
        """Have the writer try again where the disk refused the last write."""
        for backlog in self.backlogs():
            if backlog.is_refused:
                self._writer.order(backlog.writing.spill)

    def end(self, timeout: float) -> None:
        """End, after what was released is closed, and wait for it, `timeout` seconds at most."""
        self._is_ending = True
        self._wanted.set()
        if self._thread.ident is not None:
            self._thread.join(timeout)

    # -- on the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._is_ending:
            self._wanted.clear()
            self._keep_house()
            with self._round_over:
                self.rounds += 1
                self._round_ended_at = self._clock.monotonic()
                self._round_over.notify_all()
            self._wanted.wait(self._round_seconds)
        guarded(functools.partial(self._log_moves.end, self._holdings.retire))
        guarded(self._retire_released)

    def _keep_house(self) -> None:
        for step in (
            self._leave_what_is_gone,
            self._retire_released,
            self._retire_settled,
            self._pour,
            self._tidy_strays,
            self._acceptances.learn,
            self._log_moves.carry_on,
            self._adopt_all,
            self._answer,
            self._try_again,
            self._keep_bounds,
            self._close_idle_connections,
        ):
            guarded(step)

    def _leave_what_is_gone(self) -> None:
        """Begin anew when somebody has removed the directory from under us."""
        gone = [backlog for backlog in self.backlogs() if not backlog.chores.is_own_log_there]
        has_left = self._holdings.leave(is_gone=bool(gone))
        for backlog in gone:
            self._writer.order(backlog.writing.let_go)
        if has_left:
            # From then on nothing is written to files that have no name any more.
            self._writer.flush(_LETTING_GO_SECONDS)
            LOGGER.error("%s was removed while it was in use", self._root, extra=trouble("spool gone"))

    def _retire(self, logs: Sequence[HeldLog]) -> None:
        for held in logs:
            self._holdings.retire(held)

    def _retire_released(self) -> None:
        while self._released:
            backlog = self._released.popleft()
            backlog.end(is_written=True)
            self._retire(backlog.chores.take_all())

    def _retire_settled(self) -> None:
        backlogs = self.backlogs()
        self._idle_rounds = {
            backlog: self._idle_rounds.get(backlog, 0) + 1 for backlog in backlogs if backlog.chores.is_idle
        }
        for backlog, rounds in self._idle_rounds.items():
            if rounds >= _IDLE_ROUNDS:
                self._writer.order(backlog.writing.let_go)
        for backlog in backlogs:
            self._retire(backlog.chores.take_settled())
            backlog.chores.rest_quiet()

    def _pour(self) -> None:
        if self._pouring is None:
            return
        poured = self._pouring.pour()
        if poured.events:
            LOGGER.info("put %d events into logs that a process which was killed had not written yet", poured.events)
        for damage in poured.damage:
            self._say_damage("found in the log of a process that was killed", damage)
        for unpoured in poured.unpoured:
            LOGGER.error(
                "events in %s stay there, for now: %s",
                unpoured.path,
                unpoured.reason,
                extra=trouble(f"unpoured:{unpoured.path}"),
            )

    def _tidy_strays(self) -> None:
        """Clear up what is left in shared memory of spools that were replaced; say what holds events."""
        if self._pouring is None or self._clock.monotonic() < self._strays_at:
            return
        self._strays_at = self._clock.monotonic() + _FREE_LOGS_SECONDS
        for stray in self._pouring.strays():
            if self._told.is_first(str(stray.directory)):
                # No trouble of this spool's, and perhaps another Kong's that is just down.
                LOGGER.info(
                    "%s holds %d events of killed servers of another spool, which was replaced or whose servers do not "
                    "run: they stay there for them (`kong-metering spool status` shows it)",
                    stray.directory,
                    stray.events,
                )

    def _adopt_all(self) -> None:
        with self._lock:
            open_here = dict(self._backlogs)
        left: set[str] = set()
        guarded(lambda: left.update(self._adopt(open_here)))
        for key, backlog in open_here.items():
            if key not in left:
                backlog.begin()

    def _adopt(self, open_here: dict[str, SpooledBacklog]) -> set[str]:
        """Take over what was found for the open queues; give the keys of those whose turn comes later."""
        heirs = {backlog.identity.entity_id: backlog for backlog in open_here.values()}
        adoption = self._adopted(lambda identity: self._owner(identity, open_here, heirs) is not None)
        for log in self._looked_into(adoption.logs):
            self._give_to_queue(log, self._owner(log.held.identity, open_here, heirs))
        self._say_troubles(adoption)
        later = [self._owner(identity, open_here, heirs) for identity in adoption.left]
        return {owner.identity.key for owner in later if owner}

    def _adopted(self, is_wanted: Callable[[QueueIdentity | None], bool]) -> Adoption:
        return self._holdings.adopt(is_wanted, self._pouring.held_back if self._pouring else tuple)

    def _owner(
        self, identity: QueueIdentity | None, open_here: dict[str, SpooledBacklog], heirs: dict[str, SpooledBacklog]
    ) -> SpooledBacklog | None:
        """Give whose a log is; if its endpoint never accepted anything, that of the one where its plugin sends now."""
        if identity is None:
            return None
        if identity.key in open_here:
            return open_here[identity.key]
        heir = heirs.get(identity.entity_id)
        return None if heir is None or self._acceptances.has(identity.key) else heir

    def _give_to_queue(self, log: LogSource, backlog: SpooledBacklog | None) -> None:
        identity = log.held.identity
        where = ""
        if backlog is not None and identity is not None and identity.key != backlog.identity.key:
            try:
                log = self._log_moves.given(log.held, backlog)
            except DISK_ERRORS as error:
                message = f"events in {log.held.directory} cannot be given to another endpoint, for now"
                LOGGER.error("%s: %s", message, cause_of(error), extra=trouble("takeover"))
                backlog = None
            where = f" for {printable(identity.endpoint)}, which never accepted an event"
        if backlog is None or not backlog.chores.adopt(log):
            self._retire([log.held])
            return
        LOGGER.info(
            "queue %s: took over %d events that another process left%s",
            backlog.identity.name,
            log.waiting_at_first,
            where,
        )

    def _say_troubles(self, adoption: Adoption) -> None:
        for refused in adoption.refused:
            LOGGER.error(
                "events in %s stay there, they cannot be read: %s",
                refused.directory,
                refused.reason,
                extra=trouble(f"refused:{refused.directory}"),
            )
        for damage in adoption.damage:
            self._say_damage("found in a spool that was done", damage)

    def _say_damage(self, where: str, damage: Damage) -> None:
        kept = f", they are kept in {damage.kept_in}" if damage.kept_in else ""
        message = f"{where}: {damage.length} bytes of {damage.segment} were {damage.kind.value}{kept}"
        LOGGER.log(logging.WARNING, message, extra=trouble("damage"))

    def _looked_into(self, held_logs: Sequence[HeldLog]) -> list[LogSource]:
        """Line logs up, the one with the oldest event first; those that cannot be read now are left for later."""
        found: list[tuple[float, LogSource]] = []
        for held in held_logs:
            try:
                log = LogSource(held, self._options)
                found.append((log.oldest_ms() or float("inf"), log))
            except DISK_ERRORS as error:
                message = f"events in {held.directory} cannot be read, for now: {cause_of(error)}"
                LOGGER.error(message, extra=trouble("adopt"))
                self._retire([held])
        return [log for _, log in sorted(found, key=itemgetter(0))]

    def _answer(self) -> None:
        if self._desk is not None:
            with self._lock:
                open_here = list(self._backlogs.values())
            self._desk.look(open_here)

    def _try_again(self) -> None:
        self.order_spills()
        for backlog in self.backlogs():
            guarded(backlog.try_again)
        self._look_at_writer()

    def _look_at_writer(self) -> None:
        """Say that the disk hangs, and when it goes on."""
        since = self._writer.writing_since
        if self._hangs_since is not None and since != self._hangs_since:
            lasted = told(self._clock.monotonic() - self._hangs_since)
            LOGGER.warning("the disk works again after it hung for %s", lasted, extra=trouble("disk works"))
            self._hangs_since = None
        if since is not None and self._clock.monotonic() - since > _HANGING_SECONDS:
            self._hangs_since = since
            LOGGER.error(
                "the disk hangs: a write has taken %.0f s by now; events wait in memory meanwhile",
                self._clock.monotonic() - since,
                extra=trouble("disk hangs"),
            )

    def _close_idle_connections(self) -> None:
        self._connections.sweep(self._clock.monotonic())

    # -- the bounds ---------------------------------------------------------------------------------------------------

    def _keep_bounds(self) -> None:
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
        free = self._borrow() if excess > 0 or is_due else []
        try:
            ours = [log for backlog in self.backlogs() for log in backlog.chores.bounded()]
            logs: list[BoundedLog] = [*free, *ours]
            if clock.is_steady:
                drop_beyond_age(logs, clock.older_than_ms(self._options.max_age))
            drop_beyond_bytes(logs, excess)
            if is_due:
                self._free_logs_at = now + _FREE_LOGS_SECONDS
                self._report.say([log.held for log in free], now)
        finally:
            self._retire([log.held for log in free])

    def _forget_delivered(self, excess: int, clock: Record) -> int:
        """Keep what was delivered within its bounds, `excess` bytes less; tell how many went."""
        keep = self._options.keep_delivered
        oldest_ms = clock.older_than_ms(keep) if keep and clock.is_steady else 0 if keep else sys.maxsize
        return forget_delivered(self._delivered, oldest_ms, excess)

    def _borrow(self) -> list[FreeLog]:
        """Take the logs whose queues are not open here, for a moment."""
        with self._lock:
            open_here = set(self._backlogs)
        adoption = self._adopted(lambda identity: identity is None or identity.key not in open_here)
        self._say_troubles(adoption)
        borrowed = self._looked_into(adoption.logs)
        for log in borrowed:
            for damage in log.take_damage()[0]:
                self._say_damage(f"found in {log.held.directory}", damage)
        return [FreeLog(log, self._stats) for log in borrowed]


def _bytes_free(root: Path) -> float:
    """Return what the disk has left; infinity where that cannot be told."""
    try:
        return shutil.disk_usage(root).free
    except OSError:
        return math.inf
