"""One queue's logs on their way to another endpoint, because somebody wants that.

Contract: `carry_out` is the janitor's, once the queue sends nothing more and its writer has let go of its log; then
`is_done` says so. A log is one queue's or the other's at any time, on the disk itself before anything of it is sent to
the new endpoint. The events keep their ids and their marks: what was sent without an answer may have arrived. A log
whose new queue is not open here is free for whoever has it open. What the disk does not allow stays with the queue.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from kong_metering.backlog.logsource import LogSource
from kong_metering.errors import DISK_ERRORS
from kong_metering.eventlog import files
from kong_metering.log import LOGGER, cause_of, printable, trouble
from kong_metering.plurals import counted, form
from kong_metering.spool.identity import identity_files

if TYPE_CHECKING:
    from kong_metering.backlog.spooled import SpooledBacklog
    from kong_metering.spool.directory import HeldLog
    from kong_metering.spool.identity import QueueIdentity
    from kong_metering.spool.options import SpoolOptions
    from kong_metering.upkeep.holdings import Holdings


class Renewal(NamedTuple):
    """A queue's backlog that gives its logs up, and the one that goes on in its place."""

    old: SpooledBacklog
    new: SpooledBacklog


class Redirection:
    """Where the logs of one queue go, and what came of it: how many events have `moved`, or are `left`, and why."""

    def __init__(
        self,
        renewal: Renewal,
        target: QueueIdentity,
        holdings: Holdings,
        opened: Callable[[str], SpooledBacklog | None],
        options: SpoolOptions,
    ) -> None:
        """Take note; `opened` returns the backlog with a key that is open in this process, None if none is."""
        self._old, self._new = renewal
        self._target = target
        self._holdings = holdings
        self._opened = opened
        self._options = options
        self.is_done = False
        self.moved = 0
        self.left = 0
        self.problem = ""
        # Those that are the other queue's, and have to be set free again for whoever has that open.
        self.not_free: list[HeldLog] = []

    def carry_out(self) -> None:
        """Move the logs."""
        for held, waiting in self._old.chores.give_up():
            if waiting:
                self._move(held, waiting)
            else:
                self._holdings.retire(held)
        LOGGER.info(
            "queue %s: somebody has redirected %s that waited at %s: %s to %s",
            self._target.name,
            counted(self.moved, "event"),
            printable(self._old.identity.endpoint),
            form(self.moved, "it goes", "they go"),
            printable(self._target.endpoint),
        )
        self.is_done = True

    def _move(self, held: HeldLog, waiting: int) -> None:
        try:
            held = self._holdings.reassign(held, self._target)
            sync_identity(held)
            log = LogSource(held, self._options)
            # What was sent without an answer has to be known there too.
            log.save_again()
        except DISK_ERRORS as error:
            self._note(held, waiting, error)
            self._keep(held, waiting)
            return
        heir = self._opened(self._target.key)
        if heir is not None and heir.chores.take_over(log, waiting, self._old.chores):
            self.moved += waiting
            return
        if heir is None:
            self._old.chores.leave(waiting)
        self._set_free(held, waiting)

    def _keep(self, held: HeldLog, waiting: int) -> None:
        """Leave a log to the queue that goes on, which may be said on disk already to be the other one's."""
        try:
            held = self._holdings.reassign(held, self._old.identity)
        except DISK_ERRORS:
            self._old.chores.leave(waiting)
            self._holdings.retire(held)
            return
        log = LogSource(held, self._options)
        # If not now, that is tried again by the queue.
        with contextlib.suppress(OSError):
            log.save_again()
        if not self._new.last_heir.chores.take_over(log, waiting, self._old.chores):
            self._holdings.retire(held)

    def _set_free(self, held: HeldLog, waiting: int) -> None:
        try:
            self._holdings.set_free(held)
        except OSError as error:
            self._note(held, waiting, error)
            self.not_free.append(held)
        else:
            self.moved += waiting

    def _note(self, held: HeldLog, waiting: int, error: Exception) -> None:
        self.left += waiting
        self.problem = f"events in {held.directory} cannot be given to another endpoint: {cause_of(error)}"
        LOGGER.error("%s", self.problem, extra=trouble("redirect"))


def sync_identity(held: HeldLog) -> None:
    """Wait until whose a log is survives a power cut. Raises the system's `OSError`."""
    for path in (*identity_files(held.directory), held.directory):
        files.sync(path)
