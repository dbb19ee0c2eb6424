"""The events of a queue on disk: an ordered list of sources.

What dead processes left comes first, then this process's own log, then memory, which holds events only while the disk
refuses them.

Contract: `put` is the thread's that answers Kong, and touches the inbox alone. `write`, `spill` and `let_go` are the
writer's, which waits for none of the others. Couriers read, mark and settle; the janitor adopts, takes settled logs
away, keeps the bounds and has the disk tried again. `_lock` is held for memory only.

While the disk refuses, events wait in memory within `max_entries` and `max_bytes` (and 64 MiB), beyond them the oldest
are dropped; they are sent from there, behind what is in the logs. A write that is under way may still complete: nothing
of it is sent meanwhile, however long the disk hangs.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from kong_metering.delivery import batching
from kong_metering.delivery.burials import Burials
from kong_metering.delivery.logsource import LogSource
from kong_metering.delivery.sending import Sending, by_source, noted
from kong_metering.delivery.source import Entry, MemorySource, Source
from kong_metering.errors import DISK_ERRORS, SpoolError
from kong_metering.log import cause_of
from kong_metering.stats import Buried, Dropped

if TYPE_CHECKING:
    from kong_metering.clock import EpochClock
    from kong_metering.config import Queue
    from kong_metering.delivery.account import QueueAccount
    from kong_metering.spool.directory import HeldLog
    from kong_metering.spool.format import Mark
    from kong_metering.spool.identity import QueueIdentity
    from kong_metering.spool.letterbox import LetterBox
    from kong_metering.spool.log import Damage
    from kong_metering.spool.options import SpoolOptions
    from kong_metering.spool.unsynced import Unsynced
    from kong_metering.upkeep.holdings import Holdings

_MAX_MEMORY_BYTES = 64 * 1024 * 1024
# One write for each so many events: a full disk takes what still fits.
_EVENTS_A_WRITE = 1000


class Disk(Enum):
    """The state of the disk, as the last write of a queue found it."""

    WORKS = "works"
    # A write is under way; if that lasts, the disk hangs.
    WRITING = "writing"
    # The last write failed; events are sent from memory.
    REFUSES = "refuses"


@dataclass(frozen=True)
class Shared:
    """What the backlogs of a process share."""

    holdings: Holdings
    letters: LetterBox
    options: SpoolOptions
    clock: EpochClock


class Intake(Protocol):
    """The way into the inbox for the events of one queue."""

    @property
    def is_kept(self) -> bool:
        """Whether what is in the inbox outlives this process."""
        ...

    def take(self, event: bytes) -> bool:
        """Take an event in; False when there is no room for it."""
        ...

    def log_opened(self, directory: Path) -> None:
        """Take note of where the queue's log is, before events are written there."""
        ...


class SpooledBacklog:
    """The backlog of one queue, on disk.

    `intake` takes an event to the writer.
    """

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
        self.identity = identity
        self.disk = Disk.WORKS
        self._settings = settings
        self._holdings = shared.holdings
        self._options = shared.options
        self._clock = shared.clock
        self._account = account
        self._intake = intake
        self._on_ready: Callable[[], None] = lambda: None
        self._burials = Burials(identity, shared.letters, shared.clock, account, self.settle)
        self._lock = threading.Lock()
        self._adopted: tuple[LogSource, ...] = ()
        self._own: LogSource | None = None
        self._memory = MemorySource()
        # Whether what dead processes left was looked for: it goes before what is accepted here.
        self.has_begun = False
        self._cannot_be_read = False
        self._is_ended = False
        # Whose all is that was here, and what still comes out of the inbox.
        self._heir: SpooledBacklog | None = None

    def on_ready(self, callback: Callable[[], None]) -> None:
        """Have this called when there is more to read."""
        self._on_ready = callback

    def reconfigure(self, settings: Queue) -> None:
        """Go by other parameters from now on."""
        self._settings = settings

    def put(self, event: bytes) -> None:
        """Take an event to the writer."""
        if not self._intake.take(event):
            self._account.drop(Dropped.QUEUE_FULL, 1, "the disk hangs, and memory is full")

    # -- the writer's -------------------------------------------------------------------------------------------------

    def write(self, events: Sequence[bytes]) -> None:
        """Write events to this process's own log; keep them in memory while the disk refuses."""
        if self._heir is not None:
            self.pass_account(len(events), self._heir)
            # Whoever pours the inbox of this process, should it die, looks there for what it had written.
            with contextlib.suppress(*DISK_ERRORS):
                self._intake.log_opened(self._heir.own_directory())
            self._heir.write(events)
            return
        if self.disk is Disk.REFUSES and not self._memory.is_empty:
            # It is for `spill` to find out when it works again: the order is to be kept.
            self._remember(events)
            return
        before, self.disk = self.disk, Disk.WRITING
        written = 0
        try:
            own = self._own or self._open_own()
            for start in range(0, len(events), _EVENTS_A_WRITE):
                piece = events[start : start + _EVENTS_A_WRITE]
                own.append(piece, self._clock.wall_ms(), self._clock.monotonic())
                written += len(piece)
        except DISK_ERRORS as error:
            self._refuse(events[written:], error)
        else:
            self._note_that_it_works(before)
        self._on_ready()

    def spill(self) -> None:
        """Write what is in memory, if the disk works again."""
        if self.disk is not Disk.REFUSES or self._memory.is_empty:
            return
        before, self.disk = self.disk, Disk.WRITING
        try:
            own = self._own or self._open_own()
            self._memory.spill(own, self._clock.wall_ms(), self._clock.monotonic())
            own.rest_appending()
        except DISK_ERRORS as error:
            self._refuse([], error)
        else:
            self._note_that_it_works(before)
        # In either case: who looked meanwhile saw nothing of what is in memory.
        self._on_ready()

    def prepare(self) -> None:
        """Make the log before the first event comes, which would have to wait for it."""
        if self._own is None and self.disk is Disk.WORKS and not self._is_ended:
            # What goes wrong is for the first event to find out.
            with contextlib.suppress(*DISK_ERRORS):
                self._open_own()

    def rest(self) -> None:
        """Hold no file open until the next write."""
        if self._own is not None:
            self._own.rest_appending()

    def hand_over(self, heir: SpooledBacklog) -> None:
        """Give what comes out of the inbox, and what is in memory, to another queue's backlog; the logs are to follow.

        No event may be on its way.
        """
        self.let_go()
        self._heir = heir
        if in_memory := self._memory.take_out():
            self.write(in_memory)

    def let_go(self) -> None:
        """Append no more to the log of this process: the next event gets a new one."""
        self.rest()
        with self._lock:
            if self._own is not None:
                self._adopted = (*self._adopted, self._own)
                self._own = None

    def own_directory(self) -> Path:
        """Give where events are written; the log is made if need be. Raises one of `DISK_ERRORS`."""
        if self._heir is not None:
            return self._heir.own_directory()
        return (self._own or self._open_own()).held.directory

    def _open_own(self) -> LogSource:
        held = self._holdings.own_log(self.identity)
        self._intake.log_opened(held.directory)
        self._own = LogSource(held, syncs_each_write=self._options.syncs_each_write)
        return self._own

    def _refuse(self, events: Sequence[bytes], error: Exception) -> None:
        words = str(error) if isinstance(error, SpoolError) else cause_of(error)
        self._account.say("spool", f"EVENTS CANNOT BE WRITTEN TO DISK and wait in memory, for now: {words}")
        self._remember(events)
        self.disk = Disk.REFUSES

    def _remember(self, events: Sequence[bytes]) -> None:
        self._memory.add(events, self._clock.monotonic())
        max_bytes = min(self._settings.max_bytes or _MAX_MEMORY_BYTES, _MAX_MEMORY_BYTES)
        if forgotten := self._memory.forget_oldest(self._settings.max_entries, max_bytes):
            self._account.drop(Dropped.QUEUE_FULL, forgotten, "the spool cannot be written, and memory is full")

    def _note_that_it_works(self, before: Disk) -> None:
        self.disk = Disk.WORKS
        if before is Disk.REFUSES:
            self._account.say("spool works", "events are written to disk again", logging.WARNING)

    # -- the couriers' ------------------------------------------------------------------------------------------------

    def _logs(self) -> tuple[LogSource, ...]:
        with self._lock:
            return (*self._adopted, self._own) if self._own else self._adopted

    def _sources(self) -> tuple[LogSource | MemorySource, ...]:
        return (*self._logs(), self._memory) if self.disk is Disk.REFUSES else self._logs()

    @property
    def unread(self) -> int:
        """How many events can be read now."""
        if self._cannot_be_read or not self.has_begun or self._burials.is_full:
            return 0
        return sum(source.unread for source in self._sources())

    def oldest_at(self) -> float | None:
        """Tell when the first of the unread came (monotonic); None when there is none."""
        times = [at for source in self._sources() if (at := source.oldest_at()) is not None]
        return min(times, default=None)

    def read(self, limit: int) -> list[Entry]:
        """Read the oldest events that were not read yet; what is too large to be sent becomes a dead letter."""
        max_bytes = min(self._settings.max_bytes or batching.MAX_BATCH_BYTES, batching.MAX_BATCH_BYTES)
        for source in self._sources():
            if source.unread:
                if entries := self._read(source, limit, max_bytes):
                    return self._without_too_large(entries)
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
            self._look_after(source)

    def _without_too_large(self, entries: list[Entry]) -> list[Entry]:
        for entry in entries:
            if len(entry.event) > batching.MAX_EVENT_BYTES:
                words = f"an event of {len(entry.event)} bytes is too large to be sent"
                self._burials.bury([entry], Buried.TOO_LARGE, words)
        return [entry for entry in entries if len(entry.event) <= batching.MAX_EVENT_BYTES]

    def begin_send(self, entries: Sequence[Entry]) -> Sending:
        """Note on disk that events are about to go out, whatever kills this process; give those that may."""
        now_ms = self._clock.now_ms()
        return noted(
            entries, now_ms, self._options.dedupe_window, lambda source, run: self._marked(source, run, now_ms)
        )

    def _marked(self, source: Source, entries: list[Entry], now_ms: int) -> Sequence[Mark]:
        try:
            return source.mark_sent(entries, now_ms)
        except OSError as error:
            self._say_position(error)
            return []

    def did_not_arrive(self, sending: Sending) -> None:
        """Take the note of a sending back: the endpoint surely has none of its events."""
        for source, marks in sending.notes:
            try:
                source.unmark(marks)
            except OSError as error:
                self._say_position(error)

    def settle(self, entries: Sequence[Entry]) -> int:
        """Let events go that need not wait any longer; give how many were there still."""
        return sum(self._settled(source, run) for source, run in by_source(entries))

    def _settled(self, source: Source, entries: list[Entry]) -> int:
        try:
            return source.settle(entries)
        except OSError as error:
            self._say_position(error)
            return len(entries)

    def _say_position(self, error: OSError) -> None:
        # The price is paid by those who come after a crash: events are sent once more, with the same ids.
        self._account.say("position", f"what is delivered cannot be written down: {cause_of(error)}")

    def reject(self, entries: Sequence[Entry], reason: Buried, words: str) -> None:
        """Make dead letters of events that will not be delivered."""
        self._burials.bury(entries, reason, words)

    def _look_after(self, source: LogSource | MemorySource) -> None:
        """Say what a look at the disk has found damaged, and keep a dead letter that tells where its bytes are."""
        if isinstance(source, LogSource):
            damages, lost = source.take_damage()
            for damage in damages:
                self._note_damage(damage)
            if lost:
                self._account.bury(Buried.UNREADABLE, lost, f"{lost} events on disk cannot be read")

    def _note_damage(self, damage: Damage) -> None:
        kept = f", its bytes are kept in {damage.kept_in}" if damage.kept_in else ""
        where = f"{damage.kind.value}: {damage.length} bytes at {damage.offset} of {damage.segment}{kept}"
        self._account.say(f"damage {damage.kind.value}", f"found in the spool: {where}", logging.WARNING)
        if damage.events:
            self._burials.bury([], Buried.UNREADABLE, where)

    # -- the janitor's ------------------------------------------------------------------------------------------------

    def adopt(self, log: LogSource) -> bool:
        """Take over a log of another process; False when this queue has ended meanwhile."""
        with self._lock:
            if self._is_ended:
                return False
            self._account.adopt(log.waiting_at_first)
            self._adopted = (*self._adopted, log)
        self._look_after(log)
        self._on_ready()
        return True

    def give_up_logs(self) -> list[tuple[HeldLog, int]]:
        """Give the logs away that another queue takes over, each with how many events wait; none after the end."""
        self._burials.end()
        self._close_ranks()
        with self._lock:
            if self._is_ended:
                return []
            logs, self._adopted = self._adopted, ()
        _closed(logs)
        return [(log.held, log.waiting) for log in logs]

    def pass_account(self, events: int, heir: SpooledBacklog) -> None:
        """Account for events that another queue has taken over."""
        self._account.move(events, heir._account)

    def take_over(self, log: LogSource) -> bool:
        """Take a log of another queue; False when this queue has ended meanwhile."""
        with self._lock:
            if self._is_ended:
                return False
            self._adopted = (*self._adopted, log)
        self._on_ready()
        return True

    def leave(self, events: int) -> None:
        """Account for events that stay on disk."""
        self._account.leave(events)

    def begin(self) -> None:
        """Let events be read: all that dead processes left for this queue until now was adopted."""
        if not self.has_begun:
            self.has_begun = True
            self._on_ready()

    @property
    def waits(self) -> bool:
        """Whether anything waits in it."""
        return self._account.waiting > 0

    @property
    def is_failing(self) -> bool:
        """Whether events are in memory because the disk refused them."""
        return self.disk is Disk.REFUSES and not self._memory.is_empty

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits, so that its log need not be open."""
        own = self._own
        return own is not None and own.is_settled and self._account.waiting == 0

    def take_settled(self) -> list[HeldLog]:
        """Give the logs up in which nothing waits any more, and which nobody appends to."""
        with self._lock:
            settled = [log for log in self._adopted if log.is_settled]
            self._adopted = tuple(log for log in self._adopted if log not in settled)
        return _closed(settled)

    def rest_quiet_logs(self) -> None:
        """Let logs that nobody has used since the last call hold no file open."""
        for log in self._logs():
            log.rest_if_quiet()

    def unsynced(self) -> list[Unsynced]:
        """Tell what has to be synced to survive a power cut."""
        return [log.held.log.unsynced() for log in self._logs()]

    def bounded_logs(self) -> list[BoundedLog]:
        """Give the logs of this queue, for the bounds of the spool."""
        return [BoundedLog(self, log) for log in self._logs()]

    def oldest_ms(self, log: LogSource) -> int | None:
        """Tell when the oldest event of a log was accepted; None when nothing waits."""
        oldest_ms = log.oldest_ms()
        self._look_after(log)
        return oldest_ms

    def drop_segment(self, log: LogSource) -> None:
        """Drop the oldest segment of a log, for the sake of the disk's space."""
        if dropped := log.drop_segment():
            message = f"{dropped} events, the oldest, were dropped: the spool is at --spool-max-bytes"
            self._account.drop(Dropped.SPOOL_BYTES_FULL, dropped, message)
        self._look_after(log)

    def drop_older_than(self, log: LogSource, time_ms: int) -> int:
        """Drop the oldest events of a log that were accepted before this time, some of them; tell how many."""
        if dropped := log.drop_older_than(time_ms):
            message = f"{dropped} events were dropped: they are older than --spool-max-age"
            self._account.drop(Dropped.SPOOL_AGE_EXCEEDED, dropped, message)
        self._look_after(log)
        return dropped

    @property
    def is_own_log_there(self) -> bool:
        """Whether the directory of this process's own log is where it was, if there is one."""
        own = self._own
        return own is None or own.held.directory.is_dir()

    def try_again(self) -> None:
        """Try again to read, and to write dead letters."""
        self._burials.try_again()
        if self._cannot_be_read:
            self._cannot_be_read = False
            self._on_ready()

    # -- the end ------------------------------------------------------------------------------------------------------

    def end(self, *, is_written: bool) -> None:
        """Leave what waits on disk and in the inbox; what is only in memory is dropped. `take_all` comes next.

        Again, it does nothing.
        """
        if self._is_ended:
            return
        self._burials.end()
        with self._lock:
            self._is_ended = True
        if is_written:
            self._close_ranks()
        if in_memory := self._memory.end():
            message = f"{in_memory} events were only in memory when the process ended: the spool cannot be written"
            self._account.drop(Dropped.PROCESS_ENDED, in_memory, message)
        logs = self._logs()
        _closed(logs)
        left = sum(log.waiting for log in logs)
        if in_inbox := 0 if is_written else self._account.waiting - left:
            self._leave_in_inbox(in_inbox)
        if left:
            self._account.leave(left)

    def _leave_in_inbox(self, events: int) -> None:
        if self._intake.is_kept:
            self._account.leave(events)
        else:
            self._account.drop(Dropped.PROCESS_ENDED, events, "the disk hung when the process ended")

    def _close_ranks(self) -> None:
        try:
            for log in self._logs():
                log.close_ranks()
        except DISK_ERRORS as error:
            # The price is paid by the next process: what overtook them is sent once more, with the same ids.
            self._account.say("position", f"what is delivered cannot be written down: {cause_of(error)}")

    def take_all(self) -> list[HeldLog]:
        """Give all logs up, to be closed."""
        logs = self._logs()
        with self._lock:
            self._own, self._adopted = None, ()
        return _closed(logs)


@dataclass(frozen=True)
class BoundedLog:
    """One log of a backlog, for the bounds of the spool."""

    backlog: SpooledBacklog
    log: LogSource

    def oldest_ms(self) -> int | None:
        """Tell when the oldest event was accepted, in milliseconds since 1970; None when nothing waits."""
        return self.backlog.oldest_ms(self.log)

    def bytes_on_disk(self) -> int:
        """Tell the size of the log."""
        return self.log.bytes_on_disk

    def drop_segment(self) -> None:
        """Drop the oldest segment."""
        self.backlog.drop_segment(self.log)

    def drop_older_than(self, time_ms: int) -> int:
        """Drop the oldest events that were accepted before this time, some of them; tell how many."""
        return self.backlog.drop_older_than(self.log, time_ms)


def _closed(logs: Sequence[LogSource]) -> list[HeldLog]:
    for log in logs:
        log.close()
    return [log.held for log in logs]
