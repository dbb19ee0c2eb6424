"""What has to be done about the spool besides writing events: it may take its time, and no event waits for it.

Contract: the public methods may be called from any thread; the work happens on the thread `metering janitor`, once a
second and when a queue goes. Each round goes through the steps in `_keep_house`, in that order: what dead processes
left is poured and adopted (`adoption.py`); a queue sends nothing before that was done once (`look_for_others` has it
done at once: a process that ends may not have got that far). Logs that are done with are removed, those of idle queues
closed; what the disk refused is tried again; the bounds are kept (`bounds.py`); requests of people are answered; idle
connections are closed.
"""

from __future__ import annotations

import functools
import threading
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kong_metering.log import LOGGER, trouble
from kong_metering.upkeep.guard import guarded

if TYPE_CHECKING:
    from kong_metering.backlog.spooled import Shared, SpooledBacklog
    from kong_metering.ingest.connections import Connections
    from kong_metering.spool.accepted import Acceptances
    from kong_metering.spool.directory import HeldLog
    from kong_metering.upkeep.adoption import Adoptions
    from kong_metering.upkeep.bounds import Bounds
    from kong_metering.upkeep.logmoves import LogMoves
    from kong_metering.upkeep.redirection import Redirection
    from kong_metering.upkeep.requestdesk import RequestDesk
    from kong_metering.upkeep.writer import Writer

ROUND_SECONDS = 1.0
# A log whose queue has had nothing to do for so many rounds is closed.
_IDLE_ROUNDS = 10
# How long the writer may take to let go of logs that are gone.
_LETTING_GO_SECONDS = 1.0


class Janitor:
    """The backlogs that are open in this process, and all that is theirs on disk."""

    def __init__(  # noqa: PLR0913 - what it is made of
        self,
        shared: Shared,
        writer: Writer,
        *,
        adoptions: Adoptions,
        bounds: Bounds,
        log_moves: LogMoves,
        connections: Connections,
        acceptances: Acceptances,
        round_seconds: float = ROUND_SECONDS,
    ) -> None:
        self._root = shared.options.directory
        self._holdings = shared.holdings
        self._clock = shared.clock
        self._writer = writer
        self._adoptions = adoptions
        self._bounds = bounds
        self._log_moves = log_moves
        self._connections = connections
        self._acceptances = acceptances
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
        # How many rounds have begun, and are over; and who waits for the end of one.
        self._rounds_begun = 0
        self.rounds = 0
        self._round_over = threading.Condition()
        self._round_ended_at = self._clock.monotonic()
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

    def look_for_others(self, timeout: float) -> None:
        """Have what dead processes left taken over now, `timeout` seconds at most; at once if that was done before."""
        with self._round_over:
            if all(backlog.has_begun or not backlog.waits for backlog in self.backlogs()):
                return
            # One that is under way may be past its look.
            needed = self._rounds_begun + 1
            self._wanted.set()
            self._round_over.wait_for(lambda: self.rounds >= needed or self._is_ending, timeout)

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
            with self._round_over:
                self._wanted.clear()
                self._rounds_begun += 1
            self._keep_house()
            with self._round_over:
                self.rounds = self._rounds_begun
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
            self._adoptions.pour,
            self._adoptions.tidy_strays,
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

    def _adopt_all(self) -> None:
        self._adoptions.adopt_for(self._open_here())

    def _keep_bounds(self) -> None:
        self._bounds.keep(self.backlogs(), self._open_here())

    def _open_here(self) -> dict[str, SpooledBacklog]:
        with self._lock:
            return dict(self._backlogs)

    def _answer(self) -> None:
        if self._desk is not None:
            self._desk.look(list(self._open_here().values()))

    def _try_again(self) -> None:
        self.order_spills()
        for backlog in self.backlogs():
            guarded(backlog.try_again)

    def _close_idle_connections(self) -> None:
        self._connections.sweep(self._clock.monotonic())
