"""The events of a queue on disk: appended by the spool's thread, read back to be sent, gone once they are settled.

Contract: `add` only appends to a list in memory and wakes the spool's thread, which calls `work` within milliseconds;
nothing that `add` does waits for the disk. Everything else may. Events come out of the log only, in the order in which
they went in, those of adopted logs first; so memory holds what is not written yet and what is being sent, however much
waits on disk.

While the disk refuses writes, what is not written yet waits in memory within `max_entries` and `max_bytes`, beyond them
the oldest of it is dropped; it is sent from there, once the logs are empty. `work` tries again each second, and writes
what is being sent from memory as well.

Before events are sent it is written down that they may arrive; whatever kills the process, nobody will send them
blindly later than the deduplication window. Each event that was taken is settled once: delivered, or as a dead letter
(the spool's thread writes those, and settles the event when its letter is on disk).
"""

from __future__ import annotations

import logging
import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING, Protocol

from kong_metering.delivery import policy
from kong_metering.delivery.backlog import Entry, Sending
from kong_metering.delivery.borrowed import Borrowed
from kong_metering.delivery.waitinglog import WaitingLog
from kong_metering.errors import SpoolError, SpoolFormatError
from kong_metering.log import cause_of
from kong_metering.spool.deadletters import DeadLetter
from kong_metering.stats import Buried, Dropped

if TYPE_CHECKING:
    from kong_metering.config import Queue
    from kong_metering.delivery.account import QueueAccount
    from kong_metering.delivery.bounds import BoundedLog
    from kong_metering.spool.directory import HeldLog
    from kong_metering.spool.format import Mark
    from kong_metering.spool.identity import QueueIdentity
    from kong_metering.spool.log import Damage
    from kong_metering.spool.unsynced import Unsynced

# What a disk that hangs, but does not fail, can make this process hold for one queue.
_MAX_UNWRITTEN_BYTES = 64 * 1024 * 1024
# One write for each so many events: the queue's lock is free in between, and a full disk takes what still fits.
_EVENTS_A_WRITE = 1000
_MAX_BATCH_BYTES = 64 * 1024 * 1024
# How often the moment is kept at which events came, for the coalescing delay.
_MAX_ARRIVALS = 1000

DISK_ERRORS = (OSError, SpoolError, SpoolFormatError)


class Spool(Protocol):
    """What the backlogs of a process ask of the spool that they share."""

    @property
    def syncs_each_write(self) -> bool:
        """Whether what is written has to survive a power cut at once."""
        ...

    @property
    def dedupe_window(self) -> float:
        """For how many seconds the endpoint tells events that come twice."""
        ...

    def now_ms(self) -> int:
        """Tell the time since 1970 in milliseconds; nobody sets it while the process lives."""
        ...

    def wall_ms(self) -> int:
        """Tell the time since 1970 in milliseconds, as the machine knows it."""
        ...

    def wake(self, backlog: SpooledBacklog) -> None:
        """Have `work` called soon."""
        ...

    def open_log(self, identity: QueueIdentity) -> HeldLog:
        """Open this process's own log of a queue."""
        ...

    def look_for_others(self) -> None:
        """Have what dead processes left adopted now; never raises."""
        ...

    def keep_letters(self, letters: Sequence[DeadLetter]) -> None:
        """Write dead letters, all or none; raises one of `DISK_ERRORS`."""
        ...


@dataclass(frozen=True)
class _Burial:
    """Events to make dead letters of; or, without events, a trace of some that cannot be read."""

    entries: Sequence[Entry]
    reason: Buried
    answer: str


@dataclass
class _Unwritten:
    """Events that wait for the disk, or instead of it."""

    entries: deque[Entry] = field(default_factory=deque)
    bytes: int = 0

    def add(self, entry: Entry) -> None:
        self.entries.append(entry)
        self.bytes += len(entry.event)

    def put_back(self, entries: Sequence[Entry]) -> None:
        self.entries.extendleft(reversed(entries))
        self.bytes += sum(len(entry.event) for entry in entries)

    def take_all(self) -> list[Entry]:
        taken = list(self.entries)
        self.entries.clear()
        self.bytes = 0
        return taken

    def take(self, limit: int) -> list[Entry]:
        taken = [self.entries.popleft() for _ in range(min(limit, len(self.entries)))]
        self.bytes -= sum(len(entry.event) for entry in taken)
        return taken

    def trim(self, max_entries: float, max_bytes: float) -> int:
        """Forget the oldest beyond the bounds; tell how many."""
        trimmed = 0
        while self.entries and (len(self.entries) > max_entries or self.bytes > max_bytes):
            self.bytes -= len(self.entries.popleft().event)
            trimmed += 1
        return trimmed


class SpooledBacklog:
    """The backlog of one queue, on disk."""

    keeps = True
    largest = policy.MAX_EVENT_BYTES

    def __init__(self, identity: QueueIdentity, settings: Queue, spool: Spool, account: QueueAccount) -> None:
        self.identity = identity
        self._settings = settings
        self._spool = spool
        self._account = account
        self._on_ready: Callable[[], None] = lambda: None
        # Held while a log is used; taken before `_lock`, never after it.
        self._disk = threading.Lock()
        self._own: WaitingLog | None = None
        self._adopted: list[WaitingLog] = []
        self.is_prepared = threading.Event()
        # Held for the few fields below, by `add` too.
        self._lock = threading.Lock()
        self._unwritten = _Unwritten()
        self._writing = 0
        self._unread = 0
        # Those that were taken from the logs, those from memory, and those that are too large to be sent.
        self._taken = 0
        self._borrowed = Borrowed()
        self._refused = 0
        self._arrivals: deque[tuple[int, float]] = deque()
        self._burials: deque[_Burial] = deque()
        # Held while one of them is made; taken before all other locks.
        self._burying = threading.Lock()
        self._is_waked = False
        self._is_failing = False
        self._has_said_failing = False
        self._is_blocked = False
        # Whether what dead processes left has been looked for: it goes before what is accepted here.
        self._has_adopted = False
        self._ended = False

    def on_ready(self, callback: Callable[[], None]) -> None:
        """Have this called, on the spool's thread, when there is more to take."""
        self._on_ready = callback
        # A log may have been adopted before anybody listened.
        if self.ready:
            callback()

    def reconfigure(self, settings: Queue) -> None:
        """Go by other parameters from now on."""
        self._settings = settings

    @property
    def waiting(self) -> int:
        """How many events wait, those that were taken included."""
        with self._lock:
            return self._unread + self._taken + self._writing + self._in_memory

    @property
    def _in_memory(self) -> int:
        return len(self._unwritten.entries) + len(self._borrowed) + self._refused

    @property
    def ready(self) -> int:
        """How many events can be taken now: what is in the logs, and what is in memory while the disk fails."""
        if self._is_blocked or not self._has_adopted:
            return 0
        return self._unread + (len(self._unwritten.entries) if self._is_failing else 0)

    @property
    def is_failing(self) -> bool:
        """Whether the disk refused the last write."""
        return self._is_failing

    # -- in -----------------------------------------------------------------------------------------------------------

    def add(self, event: bytes, now: float) -> bool:
        """Take an event in; True when the disk fails, and it can be taken from memory."""
        with self._lock:
            self._unwritten.add(Entry(event, now))
            is_waked, self._is_waked = self._is_waked, True
            trimmed = self._trim() if self._is_failing or self._unwritten.bytes > _MAX_UNWRITTEN_BYTES else 0
        if trimmed:
            self._account.drop(Dropped.QUEUE_FULL, trimmed, "the spool cannot be written, and memory is full")
        if not is_waked:
            self._spool.wake(self)
        return self._is_failing

    def refuse(self, event: bytes) -> None:
        """Make a dead letter of an event that is too large."""
        with self._lock:
            self._refused += 1
        self._bury([Entry(event, 0.0)], Buried.TOO_LARGE, f"an event of {len(event)} bytes is too large to be sent")

    def _trim(self) -> int:
        if not self._is_failing:
            return self._unwritten.trim(math.inf, _MAX_UNWRITTEN_BYTES)
        max_bytes = self._settings.max_bytes
        return self._unwritten.trim(self._settings.max_entries, math.inf if max_bytes is None else max_bytes)

    def work(self) -> None:
        """Write what is not written yet, events and dead letters; says so when the disk refuses."""
        self._commit()
        with self._burying:
            self._bury_pending()

    def _commit(self) -> None:
        with self._disk:
            with self._lock:
                if self._ended or not (self._unwritten.entries or self._borrowed):
                    # With nothing to try it on, the next event finds out whether the disk works again.
                    self._is_waked = self._is_failing = False
                    return
                entries = self._unwritten.take_all()
                self._writing, self._is_waked = len(entries), False
                # As all others see it now.
                ready_before = self.ready
            try:
                own = self._own or self._open_own()
                self._write_borrowed(own)
                for start in range(0, len(entries), _EVENTS_A_WRITE):
                    self._write(own, entries[start : start + _EVENTS_A_WRITE])
            except DISK_ERRORS as error:
                self._keep_in_memory(entries, error)
            else:
                self._note_that_disk_works()
        # The one who waits for a batch to fill up, or pauses, need not be woken each time; others may wait besides.
        is_filled = ready_before < policy.batch_size(self._settings) <= self.ready
        if is_filled or not ready_before or self._settings.concurrency_limit != 1:
            self._on_ready()

    def _open_own(self) -> WaitingLog:
        self._own = WaitingLog(self._spool.open_log(self.identity))
        return self._own

    def _write(self, own: WaitingLog, entries: list[Entry]) -> None:
        own.append([entry.event for entry in entries], self._spool.wall_ms())
        with self._lock:
            self._writing -= len(entries)
            self._unread += len(entries)
            # Those who came later are taken for as old as the last that is kept: it leaves a bit earlier then.
            if len(self._arrivals) < _MAX_ARRIVALS:
                self._arrivals.append((own.last, entries[0].queued_at))
            else:
                self._arrivals[-1] = (own.last, self._arrivals[-1][1])
        if self._spool.syncs_each_write:
            own.unsynced().sync()

    def _write_borrowed(self, own: WaitingLog) -> None:
        """Write what was taken from memory while the disk refused it: it is older than all that is not written yet."""
        if not self._borrowed or own.unread:
            return
        now_ms = self._spool.wall_ms()
        numbers = own.append_read(self._borrowed.events(), now_ms)
        with self._lock:
            self._borrowed.are_on_disk(own, numbers, now_ms)
            self._taken += len(numbers)

    def _keep_in_memory(self, entries: list[Entry], error: Exception) -> None:
        with self._lock:
            self._unwritten.put_back(entries[len(entries) - self._writing :])
            self._writing = 0
            self._is_failing = self._has_said_failing = True
            trimmed = self._trim()
        words = cause_of(error) if not isinstance(error, SpoolError) else str(error)
        self._account.say("spool", f"EVENTS CANNOT BE WRITTEN TO DISK and wait in memory, for now: {words}")
        if trimmed:
            self._account.drop(Dropped.QUEUE_FULL, trimmed, "the spool cannot be written, and memory is full")

    def _note_that_disk_works(self) -> None:
        has_said, self._is_failing, self._has_said_failing = self._has_said_failing, False, False
        if has_said:
            self._save_positions(self._logs())
            self._account.say("spool works", "events are written to disk again", logging.WARNING)

    # -- out ----------------------------------------------------------------------------------------------------------

    def due_in(self, now: float) -> float | None:
        """Tell in how many seconds a batch may be taken; None when there is nothing to take."""
        with self._lock:
            ready = self.ready
            if not ready:
                return None
            return policy.due_in(self._settings, ready, 0, now - self._oldest_at())

    def _oldest_at(self) -> float:
        if self._unread:
            return self._arrivals[0][1] if self._arrivals and not self._adopted else -math.inf
        return self._unwritten.entries[0].queued_at

    def take(self, limit: int) -> list[Entry]:
        """Read the oldest events that were not read yet; those in memory when there are none, while the disk fails."""
        with self._disk:
            if self._ended:
                return []
            try:
                for log in self._logs():
                    if log.unread and (entries := self._read(log, limit)):
                        return entries
            except DISK_ERRORS as error:
                # Until `unblock`: there is no way past events that cannot be read now and may be tomorrow.
                self._is_blocked = True
                self._account.say("reading", f"events on disk cannot be read, for now: {cause_of(error)}")
            with self._lock:
                borrows = self._is_failing and not self._unread
                return self._borrowed.lend(self._unwritten.take(limit)) if borrows else []

    def _logs(self) -> list[WaitingLog]:
        return [*self._adopted, self._own] if self._own else self._adopted

    def _read(self, log: WaitingLog, limit: int) -> list[Entry]:
        stored = log.read(limit, min(self._settings.max_bytes or _MAX_BATCH_BYTES, _MAX_BATCH_BYTES))
        entries = [Entry(event.payload, 0.0, event.sequence, log, event.time_ms) for event in stored]
        with self._lock:
            self._taken += len(entries)
            if log is self._own:
                while self._arrivals and self._arrivals[0][0] <= log.read_up_to:
                    self._arrivals.popleft()
        self._look_after(log)
        return entries

    def _look_after(self, log: WaitingLog) -> None:
        """Take note of what a look at the disk may have changed."""
        self._count_unread()
        self._note_damage(log.log.take_damage(), log.take_lost())

    def _count_unread(self) -> None:
        unread = sum(log.unread for log in self._logs())
        with self._lock:
            self._unread = unread

    def begin_send(self, entries: list[Entry]) -> Sending:
        """Note on disk that events are about to be sent, and give those that may be.

        What was sent without an answer, longer ago than the endpoint can tell events that come twice, becomes a dead
        letter instead: if it did arrive, sending it again would bill it twice.
        """
        now_ms = self._spool.now_ms()
        too_old_ms = now_ms - int(self._spool.dedupe_window * 1000)
        marks: list[tuple[WaitingLog | None, Mark]] = []
        with self._disk:
            if self._ended:
                return Sending([])
            stale, fresh = self._told_apart(self._borrowed.located(entries), too_old_ms)
            marks += [(None, mark) for mark in self._borrowed.send(fresh, now_ms)]
            for log, first, last in _runs(fresh):
                marks += [(log, mark) for mark in log.log.mark_ambiguous(first, last, now_ms)]
            self._save_positions(_logs_of(fresh), is_synced=self._spool.syncs_each_write)
        if stale:
            hours = self._spool.dedupe_window / 3600
            answer = f"sent more than {hours:g} hours ago without an answer, and may have arrived"
            self._bury(stale, Buried.AMBIGUOUS, answer)
        return Sending(fresh, marks)

    def did_not_arrive(self, sending: Sending) -> None:
        """Take the note of a sending back: the endpoint surely has none of its events."""
        with self._disk:
            if self._ended:
                return
            for log, mark in sending.marks:
                if log is None:
                    self._borrowed.unsend(mark)
                else:
                    log.log.unmark([mark])
            self._save_positions(_logs_of(self._borrowed.located(sending.entries)))

    def settle(self, entries: Sequence[Entry]) -> bool:
        """Let events go that need not wait any longer; False when `end` was faster."""
        with self._disk:
            if self._ended:
                return False
            located = self._borrowed.located(entries)
            for log, run in groupby(located, attrgetter("log")):
                if log is not None:
                    log.settle([entry.sequence for entry in run])
            self._save_positions(_logs_of(located))
            with self._lock:
                self._taken -= sum(entry.log is not None for entry in located)
                self._refused -= sum(entry.log is None and not entry.sequence for entry in located)
                self._borrowed.forget(entries)
        return True

    def _told_apart(self, entries: list[Entry], time_ms: int) -> tuple[list[Entry], list[Entry]]:
        """Tell those that were sent before this time, and may have arrived, from the others."""
        if not self._borrowed and not any(log.has_sent_before(time_ms) for log in _logs_of(entries)):
            return [], entries
        stale: list[Entry] = []
        fresh: list[Entry] = []
        for entry in entries:
            if entry.log:
                was_sent = entry.log.was_sent_before(entry.sequence, time_ms)
            else:
                was_sent = self._borrowed.was_sent_before(entry, time_ms)
            (stale if was_sent else fresh).append(entry)
        return stale, fresh

    def _save_positions(self, logs: Iterable[WaitingLog], *, is_synced: bool = False) -> None:
        try:
            for log in logs:
                log.log.save_position()
                if is_synced:
                    log.unsynced().sync()
        except OSError as error:
            # The price is paid by those who come after a crash: events are sent once more, with the same ids.
            self._account.say("position", f"what is delivered cannot be written down: {cause_of(error)}")

    # -- dead letters -------------------------------------------------------------------------------------------------

    def reject(self, entries: Sequence[Entry], answer: str) -> None:
        """Make dead letters of events that the endpoint refuses for themselves."""
        self._bury(entries, Buried.REJECTED, answer)

    def _bury(self, entries: Sequence[Entry], reason: Buried, answer: str) -> None:
        self._burials.append(_Burial(entries, reason, answer))
        self._spool.wake(self)

    def _bury_pending(self) -> None:
        while self._burials and not self._ended:
            burial = self._burials[0]
            try:
                self._spool.keep_letters(self._letters(burial))
            except DISK_ERRORS as error:
                self._account.say("letters", f"dead letters cannot be written, for now: {cause_of(error)}")
                return
            self._burials.popleft()
            if burial.entries and self.settle(burial.entries):
                self._account.bury(burial.reason, len(burial.entries), f"kept as dead letters: {burial.answer}")

    def _letters(self, burial: _Burial) -> list[DeadLetter]:
        now_ms = self._spool.wall_ms()
        return [
            DeadLetter(burial.reason.value, burial.answer, self.identity, entry.accepted_ms or now_ms, entry.event)
            for entry in burial.entries or [Entry(b"", 0.0)]
        ]

    def _note_damage(self, damages: Sequence[Damage], lost: int) -> None:
        """Say what was found damaged, and keep a dead letter of it that tells where its bytes are."""
        for damage in damages:
            kept = f", its bytes are kept in {damage.kept_in}" if damage.kept_in else ""
            where = f"{damage.kind.value}: {damage.length} bytes at {damage.offset} of {damage.segment}{kept}"
            self._account.say(f"damage {damage.kind.value}", f"found in the spool: {where}", logging.WARNING)
            if damage.events:
                self._bury([], Buried.UNREADABLE, where)
        if lost:
            self._account.bury(Buried.UNREADABLE, lost, f"{lost} events on disk cannot be read")

    # -- logs that come and go, called by the housekeeping ------------------------------------------------------------

    def adopt(self, log: WaitingLog) -> bool:
        """Take over a log of another process; False when this queue has ended meanwhile."""
        with self._disk:
            if self._ended:
                return False
            self._account.stats.adopt(log.waiting_at_first)
            self._adopted.append(log)
            self._look_after(log)
        self._on_ready()
        return True

    def begin(self) -> None:
        """Let events be taken: all that dead processes left for this queue until now was adopted."""
        if not self._has_adopted:
            self._has_adopted = True
            self._on_ready()

    def take_finished(self) -> list[HeldLog]:
        """Give the adopted logs in which nothing waits any more."""
        with self._disk:
            finished = [log for log in self._adopted if log.is_finished]
            self._adopted = [log for log in self._adopted if not log.is_finished]
        return [log.held for log in finished]

    def unsynced(self) -> list[Unsynced]:
        """Tell what has to be synced to survive a power cut."""
        with self._disk:
            return [] if self._ended else [log.unsynced() for log in self._logs()]

    def bounded_logs(self) -> list[BoundedLog]:
        """Give the logs of this queue, for the bounds of the spool."""
        with self._disk:
            return [_BoundedLog(self, log) for log in self._logs()]

    def oldest_ms(self, log: WaitingLog) -> int | None:
        """Tell when the oldest event of a log was accepted; None when nothing waits."""
        with self._disk:
            if self._ended:
                return None
            oldest = log.log.oldest()
            self._look_after(log)
        return oldest.time_ms if oldest else None

    def drop_segment(self, log: WaitingLog) -> None:
        """Drop the oldest segment of a log, for the sake of the disk's space."""
        with self._disk:
            if self._ended:
                return
            dropped = log.drop_segment()
            self._look_after(log)
        if dropped:
            message = f"{dropped} events, the oldest, were dropped: the spool is at --spool-max-bytes"
            self._account.drop(Dropped.SPOOL_BYTES_FULL, dropped, message)

    def drop_older_than(self, log: WaitingLog, time_ms: int) -> int:
        """Drop the oldest events of a log that were accepted before this time, some of them; tell how many."""
        with self._disk:
            if self._ended:
                return 0
            dropped = log.drop_older_than(time_ms)
            self._look_after(log)
        if dropped:
            message = f"{dropped} events were dropped: they are older than --spool-max-age"
            self._account.drop(Dropped.SPOOL_AGE_EXCEEDED, dropped, message)
        return dropped

    @property
    def is_own_log_there(self) -> bool:
        """Whether the directory of this process's own log is where it was, if there is one."""
        own = self._own
        return own is None or own.held.directory.is_dir()

    def renounce_own_log(self) -> None:
        """Append no more to this process's own log, whose directory has gone; the next event gets a new one."""
        with self._disk:
            if self._own:
                self._adopted.append(self._own)
            self._own = None
            with self._lock:
                self._arrivals.clear()
        self._on_ready()

    def prepare(self) -> None:
        """Open the log before the first event comes. Raises one of `DISK_ERRORS`."""
        try:
            with self._disk:
                if not (self._own or self._ended):
                    self._open_own()
        finally:
            self.is_prepared.set()

    def try_again(self) -> None:
        """Try again to write and to read what the disk refused."""
        if self._is_blocked:
            self._is_blocked = False
            self._on_ready()
        if self._is_failing or self._burials:
            self.work()

    def flush(self) -> None:
        """Write what is not written yet, now, and see to it that it can be taken: the queue ends."""
        self.work()
        # With nothing to send there is nothing to come first; an empty queue ends on the thread that serves Kong.
        if self.waiting and not self._has_adopted:
            self._spool.look_for_others()

    def end(self) -> None:
        """Leave what waits on disk; what is only in memory is dropped. The logs are `take_all`'s to close."""
        self._commit()
        with self._burying:
            self._bury_pending()
            with self._disk:
                self._close_ranks()
                left, in_memory = self._end()
        if left:
            self._account.stats.leave(left)
        if in_memory:
            message = f"{in_memory} events were only in memory when the process ended: the spool cannot be written"
            self._account.drop(Dropped.PROCESS_ENDED, in_memory, message)

    def _end(self) -> tuple[int, int]:
        """End; tell how many events are left, and how many were only in memory."""
        with self._lock:
            self._ended = True
            in_memory = self._in_memory
            left = self._unread + self._taken
            self._unwritten = _Unwritten()
            self._borrowed = Borrowed()
            self._unread = self._taken = self._refused = 0
        return left, in_memory

    def _close_ranks(self) -> None:
        try:
            for log in self._logs():
                log.close_ranks()
        except DISK_ERRORS as error:
            # The price is paid by the next process: what overtook them is sent once more, with the same ids.
            self._account.say("position", f"what is delivered cannot be written down: {cause_of(error)}")

    def take_all(self) -> list[HeldLog]:
        """Give all logs up, to be closed."""
        with self._disk:
            held = [log.held for log in self._logs()]
            self._own, self._adopted = None, []
        return held


@dataclass(frozen=True)
class _BoundedLog:
    """One log of a backlog, for the bounds of the spool."""

    backlog: SpooledBacklog
    log: WaitingLog

    def oldest_ms(self) -> int | None:
        return self.backlog.oldest_ms(self.log)

    def bytes_on_disk(self) -> int:
        return self.log.log.bytes_on_disk

    def drop_segment(self) -> None:
        self.backlog.drop_segment(self.log)

    def drop_older_than(self, time_ms: int) -> int:
        return self.backlog.drop_older_than(self.log, time_ms)


def _logs_of(entries: Sequence[Entry]) -> set[WaitingLog]:
    return {entry.log for entry in entries if entry.log}


def _runs(entries: Sequence[Entry]) -> Iterator[tuple[WaitingLog, int, int]]:
    """Find the stretches of events that stand next to each other: their log, the first and the last number."""
    first, final = (entries[0], entries[-1]) if entries else (None, None)
    if first and final and first.log and first.log is final.log and final.sequence - first.sequence == len(entries) - 1:
        # A batch as it was taken, from one log and in order: no need to look at each event.
        yield first.log, first.sequence, final.sequence
        return
    start: Entry | None = None
    last: Entry | None = None
    for entry in entries:
        if entry.log is None:
            continue
        if start is None or last is None or entry.log is not last.log or entry.sequence != last.sequence + 1:
            if start is not None and last is not None:
                yield start.log, start.sequence, last.sequence
            start = entry
        last = entry
    if start is not None and last is not None:
        yield start.log, start.sequence, last.sequence
