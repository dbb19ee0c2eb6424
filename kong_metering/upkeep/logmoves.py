"""Logs that change their queue: what waits at an endpoint that never accepted anything goes to the corrected one.

What somebody redirects goes where that one says instead (`redirection.py`), and its marks stay.

Contract: `begin` may be called by any thread, once the old queue sends nothing more and its writer has let go of its
log; `carry_on`, `given` and `redirect` are the janitor's, and `end` is the last. A log is one queue's or the other's at
any time, on disk too: the identity in it is replaced. The events' marks go: where they go now nobody has sent them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from kong_metering.backlog.logsource import LogSource
from kong_metering.errors import DISK_ERRORS
from kong_metering.log import LOGGER, cause_of, trouble

if TYPE_CHECKING:
    from kong_metering.backlog.spooled import SpooledBacklog
    from kong_metering.spool.directory import HeldLog
    from kong_metering.spool.options import SpoolOptions
    from kong_metering.upkeep.holdings import Holdings
    from kong_metering.upkeep.redirection import Redirection


class _Moving(NamedTuple):
    """A log on its way from one queue to the other; so many events wait in it."""

    held: HeldLog
    old: SpooledBacklog
    heir: SpooledBacklog
    waiting: int


class LogMoves:
    """Those that are under way in this process."""

    def __init__(self, holdings: Holdings, options: SpoolOptions) -> None:
        self._holdings = holdings
        self._options = options
        self._begun: deque[tuple[SpooledBacklog, SpooledBacklog]] = deque()
        self._moving: list[_Moving] = []
        self._redirected: deque[Redirection] = deque()
        self._not_free: list[HeldLog] = []

    def redirect(self, redirection: Redirection) -> None:
        """Have all logs of a queue go where somebody wants them."""
        self._redirected.append(redirection)

    def begin(self, old: SpooledBacklog, heir: SpooledBacklog) -> None:
        """Have all logs of a queue given to its heir."""
        # In this order: a log that comes for it from yet another one is among its own, or goes to the heir.
        old.heir = heir
        self._begun.append((old, heir))

    def carry_on(self) -> None:
        """Give what can be given now; what the disk does not allow is tried again with the next call."""
        self._set_free_again()
        while self._redirected:
            redirection = self._redirected.popleft()
            redirection.carry_out()
            self._not_free += redirection.not_free
        while self._begun:
            old, heir = self._begun.popleft()
            self._moving += [_Moving(held, old, heir, waiting) for held, waiting in old.chores.give_up()]
        moving, self._moving = self._moving, []
        for each in moving:
            if not self._move(each):
                self._moving.append(each)

    def _set_free_again(self) -> None:
        """Set redirected logs free that could not be: nobody else can take them over before, or until we end."""
        held_logs, self._not_free = self._not_free, []
        for held in held_logs:
            try:
                self._holdings.set_free(held)
            except OSError as error:
                self._not_free.append(held)
                message = f"events in {held.directory} cannot be set free for who has their queue open, for now"
                LOGGER.error("%s: %s", message, cause_of(error), extra=trouble("not free"))

    def given(self, held: HeldLog, heir: SpooledBacklog) -> LogSource:
        """Make a log the heir's, on disk. Raises one of `DISK_ERRORS`."""
        log = LogSource(self._holdings.reassign(held, heir.identity), self._options)
        log.forget_sent()
        return log

    def end(self, retire: Callable[[HeldLog], None]) -> None:
        """Leave what could not be given on disk, under the name that it has there."""
        self.carry_on()
        for each in self._moving:
            each.old.chores.leave(each.waiting)
            retire(each.held)
        self._moving = []

    def _move(self, moving: _Moving) -> bool:
        heir = moving.heir.last_heir
        try:
            log = self.given(moving.held, heir)
        except DISK_ERRORS as error:
            message = f"events in {moving.held.directory} cannot be given to another endpoint, for now"
            LOGGER.error("%s: %s", message, cause_of(error), extra=trouble("takeover"))
            return False
        if not heir.chores.take_over(log, moving.waiting, moving.old.chores):
            self._holdings.retire(log.held)
        return True
