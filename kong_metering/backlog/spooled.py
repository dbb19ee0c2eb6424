"""The events of one queue on disk, as its queue and its couriers see them.

Contract: `put` is the thread's that answers Kong, and touches the inbox alone; from there on events are the writer's
(`writing`). Couriers read, mark, settle and reject, and wait for the disk. The logs are kept by the janitor
(`chores`), who also has what the disk refused tried again. All of these look at the same `sources`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from kong_metering.backlog.burials import Burials
from kong_metering.backlog.chores import LogChores
from kong_metering.backlog.logsource import LogSource
from kong_metering.backlog.sourcelist import Disk, SourceList
from kong_metering.backlog.stock import Sending, by_source, note_undelivered, noted
from kong_metering.backlog.writing import Writing
from kong_metering.errors import DISK_ERRORS
from kong_metering.log import cause_of
from kong_metering.outages import Outage, in_words
from kong_metering.plurals import counted, form
from kong_metering.reasons import Buried, Dropped
from kong_metering.spool.times import STEADY_SECONDS
from kong_metering.trial import batching

if TYPE_CHECKING:
    from kong_metering.account import QueueAccount
    from kong_metering.backlog.burials import LetterBox
    from kong_metering.backlog.source import Entry, MemorySource, Source
    from kong_metering.clock import EpochClock
    from kong_metering.config import Queue
    from kong_metering.eventlog.format import Mark
    from kong_metering.spool.identity import QueueIdentity
    from kong_metering.spool.options import SpoolOptions
    from kong_metering.spool.times import SpoolTimes
    from kong_metering.upkeep.holdings import Holdings


@dataclass(frozen=True)
class Shared:
    """What the backlogs of a process share."""

    holdings: Holdings
    letters: LetterBox
    options: SpoolOptions
    clock: EpochClock
    times: SpoolTimes


class Intake(Protocol):
    """The way into the inbox for the events of one queue."""

    def lost_with_process(self, events: int) -> int:
        """Tell how many of the queue's events in the inbox, which are so many, end with this process."""
        ...

    def take(self, event: bytes) -> bool:
        """Take an event in; False when there is no room for it."""
        ...

    def log_opened(self, directory: Path) -> None:
        """Take note of where the queue's log is, before events are written there."""
        ...


class SpooledBacklog:
    """The backlog of one queue, on disk."""

    keeps = True
    unread_bytes = 0

    def __init__(
        self,
        identity: QueueIdentity,
        settings: Queue,
        shared: Shared,
        account: QueueAccount,
        intake: Intake,
    ) -> None:
        """Begin with nothing; `intake` takes an event to the writer."""
        self.identity = identity
        self._settings = settings
        self._holdings = shared.holdings
        self._options = shared.options
        self._clock = shared.clock
        self._times = shared.times
        self._account = account
        self._intake = intake
        self._sources = SourceList()
        self._burials = Burials(identity, shared.letters, shared.clock, account, self._settle_buried)
        self.writing = Writing(
            settings, self._sources, self._open_log, shared.clock, account, log_opened=intake.log_opened
        )
        self.chores = LogChores(self._sources, self._burials, account)
        # Since when the disk takes no notes, so that events are held back.
        self._unnotable = Outage()
        # Whether what dead processes left was looked for: it goes before what is accepted here.
        self.has_begun = False
        self._cannot_be_read = False
        # Whose its logs are, or will be in a moment, once it has handed over.
        self.heir: SpooledBacklog | None = None

    @property
    def last_heir(self) -> SpooledBacklog:
        """The one that has what comes to this one now: itself, or the last one of those that took over."""
        return self if self.heir is None else self.heir.last_heir

    @property
    def disk_state(self) -> str:
        """The state of the disk in a word."""
        return self._sources.seen(self._clock.monotonic()).value

    @property
    def hangs_for(self) -> float:
        """For how many seconds a write has hung; 0 when none does."""
        return self._sources.hangs_for(self._clock.monotonic())

    def on_ready(self, callback: Callable[[], None]) -> None:
        """Have this called when there is more to read."""
        self._sources.on_ready = callback

    def reconfigure(self, settings: Queue) -> None:
        """Go by other parameters from now on."""
        self._settings = settings
        self.writing.reconfigure(settings)

    def put(self, event: bytes) -> None:
        """Take an event to the writer."""
        if not self._intake.take(event):
            self._account.drop(Dropped.QUEUE_FULL, 1, "the disk hangs, and memory is full")

    def _open_log(self) -> LogSource:
        return LogSource(self._holdings.own_log(self.identity), self._options)

    # -- the couriers' ------------------------------------------------------------------------------------------------

    @property
    def unread(self) -> int:
        """How many events can be read now."""
        if self._cannot_be_read or not self.has_begun or self._burials.is_full:
            return 0
        return sum(source.unread for source in self._sources.readable())

    def oldest_at(self) -> float | None:
        """Tell when the first of the unread came (monotonic); None when there is none."""
        times = [at for source in self._sources.readable() if (at := source.oldest_at()) is not None]
        return min(times, default=None)

    @property
    def letters_pending(self) -> int:
        """How many events wait to become dead letters, because the disk does not take these."""
        return self._burials.pending

    @property
    def known_oldest_ms(self) -> int | None:
        """When the oldest event on disk was accepted (epoch), as far as that is known without a look there."""
        times = [ms for log in self._sources.logs() if (ms := log.known_oldest_ms) is not None]
        return min(times, default=None)

    def read(self, limit: int) -> list[Entry]:
        """Read the oldest events that were not read yet."""
        max_bytes = min(self._settings.max_bytes or batching.MAX_BATCH_BYTES, batching.MAX_BATCH_BYTES)
        for source in self._sources.readable():
            if source.unread:
                if entries := self._read(source, limit, max_bytes):
                    return entries
                if self._cannot_be_read:
                    return []
        return []

    def _read(self, source: LogSource | MemorySource, limit: int, max_bytes: int) -> list[Entry]:
        try:
            return source.read(limit, max_bytes)
        except DISK_ERRORS as error:
            self._account.say("reading", f"events on disk cannot be read, for now: {cause_of(error)}")
            self._cannot_be_read = True
            return []
        finally:
            if isinstance(source, LogSource):
                self._burials.bury_damage(source)

    def begin_send(self, entries: Sequence[Entry]) -> Sending:
        """Note on disk that events are about to go out, whatever kills this process; give those that may."""
        window = self._times.now().window(self._options.dedupe_window)
        sending = noted(
            entries, window, self._options.dedupe_window, lambda source, run: self._marked(source, run, window.now_ms)
        )
        if sending.unsure:
            self._say_unsure()
        return sending

    def _marked(self, source: Source, entries: list[Entry], now_ms: int) -> Sequence[Mark] | None:
        try:
            return source.mark_sent(entries, now_ms)
        except OSError as error:
            self._say_held(error)
            return None

    def give_back(self, entries: Sequence[Entry]) -> None:
        """Have events read again that may not be sent yet."""
        for source, run in by_source(entries):
            source.give_back(run)

    def did_not_arrive(self, sending: Sending) -> None:
        """Take the note of a sending back: the endpoint surely has none of its events."""
        for source, marks in sending.notes:
            try:
                source.unmark(marks)
            except OSError as error:
                self._account.say_position_is_lost(error)

    def settle(self, entries: Sequence[Entry]) -> int:
        """Let events go that need not wait any longer; give how many were there still."""
        return sum(self._settled(source, run) for source, run in by_source(entries))

    def _settle_buried(self, entries: Sequence[Entry]) -> int:
        note_undelivered(entries)
        return self.settle(entries)

    def _settled(self, source: Source, entries: list[Entry]) -> int:
        try:
            return source.settle(entries)
        except OSError as error:
            self._account.say_position_is_lost(error)
            return len(entries)

    def _say_unsure(self) -> None:
        unsure = self._sources.unsure
        message = (
            f"{counted(unsure, 'event on disk is', 'events on disk are')} not sent until the machine's clock has run "
            f"evenly for {in_words(STEADY_SECONDS)}: {form(unsure, 'it', 'some of them')} went out without an answer "
            "before the machine started, and nobody knows yet how long ago that was"
        )
        self._account.say("unsure", message, logging.WARNING)

    def _say_held(self, error: OSError) -> None:
        # Whoever found them after a crash would take them for events that nobody has sent, however long ago that was.
        self._unnotable.fails(self._clock.monotonic())
        held = self.held_back
        message = (
            f"{counted(held, 'event on disk is', 'events on disk are')} not sent, until it can be noted there that "
            f"{form(held, 'it was', 'they were')}"
        )
        self._account.say("held", f"{message}: {cause_of(error)}")

    @property
    def held_back(self) -> int:
        """How many events on disk may not be sent now, because the disk does not take the note."""
        return self._sources.held_back

    def reject(self, entries: Sequence[Entry], reason: Buried, words: str) -> None:
        """Make dead letters of events that will not be delivered."""
        self._burials.bury(entries, reason, words)

    def end_burials(self) -> None:
        """Make no dead letter any more, before another queue takes over: what waits to become one waits there then."""
        self._burials.end()

    # -- the janitor's ------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Let events be read: all that dead processes left for this queue until now was adopted."""
        if not self.has_begun:
            self.has_begun = True
            self._sources.on_ready()

    @property
    def waits(self) -> bool:
        """Whether anything waits in it."""
        return self._account.waiting > 0

    @property
    def is_unsaved(self) -> bool:
        """Whether it is still to be written down what is settled; waits for no disk."""
        return self._sources.is_unsaved

    @property
    def is_refused(self) -> bool:
        """Whether the disk refused the last write."""
        return self._sources.disk is Disk.REFUSES

    def try_again(self) -> None:
        """Try again to read, to save positions, and to write dead letters."""
        if self._burials.try_again():
            # While there were too many of them nothing was read.
            self._sources.on_ready()
        for log in self._sources.logs():
            # Held back, and saved nevertheless: what was answered meanwhile has found the disk in order.
            if log.is_unsaved or log.is_unnotable:
                self._save_again(log)
            if log.is_unsure:
                self._ask_clock_again(log)
        if self._cannot_be_read:
            self._cannot_be_read = False
            self._sources.on_ready()

    def _ask_clock_again(self, log: LogSource) -> None:
        window = self._times.now().window(self._options.dedupe_window)
        if not log.is_unsure_of(window.over_ms, window.perhaps_over_ms):
            self._sources.on_ready()

    def _save_again(self, log: LogSource) -> None:
        waiting = log.waiting
        try:
            was_held = log.save_again()
        except OSError as error:
            self._say_held(error) if log.is_unnotable else self._account.say_position_is_lost(error)
            return
        if was_held:
            lasted = self._unnotable.works(self._clock.monotonic())
            if lasted is not None:
                waited = counted(waiting, "event")
                message = f"the disk takes notes again after {in_words(lasted)}; {waited} waited for that"
                self._account.say("held over", message, logging.WARNING)
            self._sources.on_ready()

    def end(self, *, is_written: bool) -> None:
        """Leave what waits on disk and in the inbox; what is only in memory is dropped. `chores.take_all` comes next.

        Again, it does nothing.
        """
        if self._sources.has_ended:
            return
        self._burials.end()
        self._sources.end()
        if in_memory := self._sources.memory.end():
            were = counted(in_memory, "event was", "events were")
            message = f"{were} only in memory when the process ended: the spool cannot be written"
            self._account.drop(Dropped.PROCESS_ENDED, in_memory, message)
        left = self.chores.close_all(in_order=is_written)
        if in_inbox := 0 if is_written else self._account.waiting - left:
            self._leave_in_inbox(in_inbox)
        if left:
            self.chores.leave(left)

    def _leave_in_inbox(self, events: int) -> None:
        if lost := self._intake.lost_with_process(events):
            self._account.drop(Dropped.PROCESS_ENDED, lost, "the disk hung when the process ended")
        if kept := events - lost:
            self.chores.leave(kept)
