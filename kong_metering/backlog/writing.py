"""How the events of one queue come to its process's own log.

Contract: all of it is the writer's, which waits for none of the other threads. While the disk refuses, events wait in
memory within `max_entries` and `max_bytes` (and 64 MiB), beyond them the oldest are dropped; they are sent from there,
behind what is in the logs. A write that is under way may still complete: nothing of it is sent meanwhile, however long
the disk hangs.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kong_metering.backlog.sourcelist import Disk
from kong_metering.errors import DISK_ERRORS, SpoolError
from kong_metering.log import cause_of
from kong_metering.outages import Outage, in_words
from kong_metering.reasons import Dropped

if TYPE_CHECKING:
    from kong_metering.account import QueueAccount
    from kong_metering.backlog.logsource import LogSource
    from kong_metering.backlog.sourcelist import SourceList
    from kong_metering.clock import EpochClock
    from kong_metering.config import Queue

_MAX_MEMORY_BYTES = 64 * 1024 * 1024
# One write for each so many events: a full disk takes what still fits.
_EVENTS_A_WRITE = 1000


class Writing:
    """The writing of one queue's events."""

    def __init__(  # noqa: PLR0913 - what it is made of
        self,
        settings: Queue,
        sources: SourceList,
        open_log: Callable[[], LogSource],
        clock: EpochClock,
        account: QueueAccount,
        *,
        log_opened: Callable[[Path], None],
    ) -> None:
        """Write into `sources`; `open_log` makes another log of this process, or raises one of `DISK_ERRORS`.

        `log_opened` is told where the events that come out of the inbox are written, before the first of them is.
        """
        self._settings = settings
        self._sources = sources
        self._open_log = open_log
        self._log_opened = log_opened
        self._clock = clock
        self.account = account
        # Whose all is that was here, and what still comes out of the inbox.
        self._heir: Writing | None = None
        # Since when the disk refuses, and how many events went to memory meanwhile.
        self._outage = Outage()
        self._remembered = 0

    def reconfigure(self, settings: Queue) -> None:
        """Go by other bounds of memory from now on; from any thread."""
        self._settings = settings

    def write(self, events: Sequence[bytes]) -> None:
        """Write events to this process's own log; keep them in memory while the disk refuses."""
        if self._heir is not None:
            self.account.move(len(events), self._heir.account)
            # Whoever pours the inbox of this process, should it die, looks there for what it had written.
            with contextlib.suppress(*DISK_ERRORS):
                self._log_opened(self._heir.own_directory())
            self._heir.write(events)
            return
        if self._sources.is_failing:
            # It is for `spill` to find out when it works again: the order is to be kept.
            self._remember(events)
            return
        before = self._sources.begin_write(self._clock.monotonic())
        written = 0
        try:
            own = self._own()
            for start in range(0, len(events), _EVENTS_A_WRITE):
                piece = events[start : start + _EVENTS_A_WRITE]
                own.append(piece, self._clock.wall_ms(), self._clock.monotonic())
                written += len(piece)
        except DISK_ERRORS as error:
            self._refuse(events[written:], error)
        else:
            self._note_that_it_works(before)
        self._sources.on_ready()

    def spill(self) -> None:
        """Write what is in memory, if the disk works again; where nothing is, make a log, to see whether it does."""
        if self._sources.disk is not Disk.REFUSES or self._sources.has_ended or self._heir is not None:
            return
        is_idle = self._sources.memory.is_empty
        before = self._sources.begin_write(self._clock.monotonic())
        try:
            if (own := self._sources.own) is not None and (is_idle or own.unread_on_disk):
                # What is held back there comes before what memory has, in a log of its own.
                self.let_go()
            own = self._own()
            self._sources.memory.spill(own, self._clock.wall_ms(), self._clock.monotonic())
            own.rest_appending()
        except DISK_ERRORS as error:
            if is_idle:
                self._sources.disk = Disk.REFUSES  # Nothing waits for it: it was said when something did.
            else:
                self._refuse([], error)
        else:
            self._note_that_it_works(before)
        # In either case: who looked meanwhile saw nothing of what is in memory.
        self._sources.on_ready()

    def prepare(self) -> None:
        """Make the log before the first event comes, which would have to wait for it."""
        if self._sources.disk is Disk.WORKS and not self._sources.has_ended:
            # What goes wrong is for the first event to find out.
            with contextlib.suppress(*DISK_ERRORS):
                self._own()

    def rest(self) -> None:
        """Hold no file open until the next write."""
        if (own := self._sources.own) is not None:
            own.rest_appending()

    def let_go(self) -> None:
        """Append no more to the log of this process: the next event gets a new one."""
        self.rest()
        self._sources.let_go_of_own()

    def hand_over(self, heir: Writing) -> None:
        """Give what comes out of the inbox, and what is in memory, to another queue; the logs are to follow.

        No event may be on its way.
        """
        self.let_go()
        self._heir = heir
        if in_memory := self._sources.memory.take_out():
            self.write(in_memory)

    def own_directory(self) -> Path:
        """Return where events are written; the log is made if need be. Raises one of `DISK_ERRORS`."""
        return self._own().held.directory if self._heir is None else self._heir.own_directory()

    def _own(self) -> LogSource:
        own = self._sources.own
        if own is None:
            own = self._open_log()
            self._log_opened(own.held.directory)
            self._sources.begin_own(own)
        return own

    def _refuse(self, events: Sequence[bytes], error: Exception) -> None:
        words = str(error) if isinstance(error, SpoolError) else cause_of(error)
        self.account.say("spool", f"EVENTS CANNOT BE WRITTEN TO DISK and wait in memory, for now: {words}")
        self._outage.fails(self._clock.monotonic())
        self._remember(events)
        self._sources.disk = Disk.REFUSES

    def _remember(self, events: Sequence[bytes]) -> None:
        self._remembered += len(events)
        memory = self._sources.memory
        memory.add(events, self._clock.monotonic())
        max_bytes = min(self._settings.max_bytes or _MAX_MEMORY_BYTES, _MAX_MEMORY_BYTES)
        if forgotten := memory.forget_oldest(self._settings.max_entries, max_bytes):
            self.account.drop(Dropped.QUEUE_FULL, forgotten, "the spool cannot be written, and memory is full")

    def _note_that_it_works(self, before: Disk) -> None:
        self._sources.disk = Disk.WORKS
        if before is Disk.REFUSES:
            lasted = self._outage.works(self._clock.monotonic()) or 0.0
            went, self._remembered = self._remembered, 0
            message = f"events are written to disk again after {in_words(lasted)}; {went:,} went to memory meanwhile"
            self.account.say("spool works", message, logging.WARNING)
