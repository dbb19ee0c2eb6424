"""A log on disk as a queue's source: how far it was read, and what was read and is not settled yet.

Contract: `append` is the writer's, takes no lock and waits for nobody. What only tells a figure takes none either.
Everything else takes the source's lock, which is held over I/O, by couriers and the janitor; the writer takes it only
to spill memory after an outage of the disk (`append_in_flight`). An event's space is free once it and all before it are
settled. What reads or writes raises one of `DISK_ERRORS`; a position that cannot be saved raises after the rest was
done.

An event whose mark is not on disk looks like one that nobody has sent, to whoever finds the log after a crash, however
much later that is. So it is not sent for the first time while marks cannot be saved (`mark_sent` raises,
`is_unnotable`). Only a disk that is full is given time, half of the deduplication window: what is delivered makes room
there. Nothing is read either while it is not known how long ago some of it was sent (`is_unsure`).
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import math
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple

from kong_metering.backlog.source import Entry
from kong_metering.eventlog.syncing import synced

if TYPE_CHECKING:
    from kong_metering.eventlog.format import Mark
    from kong_metering.eventlog.log import Damage
    from kong_metering.spool.directory import HeldLog
    from kong_metering.spool.options import SpoolOptions

# What is kept in memory of unread events, at most: as much as Kong's queue keeps by default. To read them back from
# disk costs 1.4 µs each.
_RECENT_EVENTS = 10_000
_RECENT_BYTES = 8 * 1024 * 1024
_FULL = (errno.ENOSPC, errno.EDQUOT)


class _Written(NamedTuple):
    """Events that the writer wrote together; `at` is monotonic, `bytes` those of all before and of these."""

    first: int
    events: Sequence[bytes]
    time_ms: int
    at: float
    end_bytes: int


class _Recent:
    """Unread events that are still in memory: the writer adds them, who reads takes them off, and neither waits."""

    def __init__(self) -> None:
        self._written: deque[_Written] = deque()
        # Each side counts its own bytes.
        self._end_bytes = 0
        self._taken_bytes = 0

    @property
    def first(self) -> _Written | None:
        """What comes next of it."""
        with contextlib.suppress(IndexError):  # somebody takes it off just now
            return self._written[0]
        return None

    def add(self, first: int, events: Sequence[bytes], time_ms: int, at: float) -> None:
        """Keep events that were just written, unless that is too much."""
        size = sum(map(len, events))
        if self._end_bytes - self._taken_bytes + size <= _RECENT_BYTES:
            self._end_bytes += size
            self._written.append(_Written(first, events, time_ms, at, self._end_bytes))

    def take(self, source: LogSource, first: int, limit: int, max_bytes: int) -> list[Entry]:
        """Take the events from this number on, as entries of `source`; none if they are not there."""
        entries: list[Entry] = []
        while self._written and len(entries) < limit:
            written = self._written[0]
            start = first - written.first
            if start < 0:
                break
            events = written.events[start : start + limit - len(entries)]
            events = _within(events, max_bytes, needs_one=not entries)
            numbers = range(first, first + len(events))
            entries += [
                Entry(event, number, source, written.time_ms) for event, number in zip(events, numbers, strict=True)
            ]
            first += len(events)
            max_bytes -= sum(map(len, events))
            if start + len(events) < len(written.events):
                break
            self._written.popleft()
            self._taken_bytes = written.end_bytes
        return entries


class LogSource:
    """A log that this process holds."""

    def __init__(self, held: HeldLog, options: SpoolOptions | None = None) -> None:
        """Take a log; without `options` nothing is synced, and a full disk is given no time."""
        self.held = held
        self._log = held.log
        self._syncs_each_write = options is not None and options.syncs_each_write
        self._patience_ms = int(options.dedupe_window * 500) if options else 0
        self._lock = threading.Lock()
        self._cursor = held.log.done_up_to
        self._unsettled: dict[int, Entry] = {}
        # Numbers that were passed in reading, or that are still ahead, whose events damage has cost; and those told of.
        self._lost_behind = 0
        self._lost_told = held.log.gaps_after(self._cursor)
        self._recent = _Recent()
        self._is_quiet = False
        self._is_closed = False
        # What was read, and comes before what was not; it is among the unsettled.
        self._given_back: list[Entry] = []
        # Whether what is on disk of the position and the marks is old, and since when events were sent even so.
        self.is_unsaved = False
        self._unsaved_since_ms: int | None = None
        # Whether nothing is sent from here for the first time until they can be saved; and whether nothing is until
        # it is known how long ago what went out before did.
        self.is_unnotable = False
        self.is_unsure = False
        # When the oldest event was accepted, by the last look at the disk.
        self._looked_oldest_ms: int | None = None
        self.waiting_at_first = self.unread
        # Nothing of it may be sent before.
        held.log.note_doubt()

    @property
    def unread(self) -> int:
        """How many events were not read yet, or were given back."""
        return self.unread_on_disk + len(self._given_back)

    @property
    def unread_on_disk(self) -> int:
        """How many events were never read."""
        return self._log.waiting_after(self._cursor)

    @property
    def waiting(self) -> int:
        """How many events wait, those that were read included."""
        return self.unread_on_disk + len(self._unsettled)

    @property
    def is_held(self) -> bool:
        """Whether nothing is to be read for now."""
        return self.is_unnotable or self.is_unsure

    @property
    def is_settled(self) -> bool:
        """Whether nothing waits in it any more."""
        # In this order: who reads notes what is unsettled before it is no longer unread.
        return not self.unread_on_disk and not self._unsettled

    @property
    def may_go(self) -> bool:
        """Whether nothing waits in it any more, and whoever finds it will know that, if it is still there to be found.

        A disk that takes no position may take no removal either: all would be delivered again.
        """
        return self.is_settled and not (self.is_unsaved and self.held.directory.is_dir())

    def oldest_at(self) -> float | None:
        """Tell when the first unread event came (monotonic), minus infinity if not known, None when there is none."""
        if not self.unread:
            return None
        if self._given_back:
            return -math.inf
        oldest = self._recent.first
        return oldest.at if oldest and oldest.first <= self._cursor + 1 else -math.inf

    @property
    def known_oldest_ms(self) -> int | None:
        """When the oldest event that waits was accepted, as far as that is known without a look at the disk."""
        with contextlib.suppress(RuntimeError, StopIteration):  # somebody settles it just now, or there is none
            return next(iter(self._unsettled.values())).accepted_ms
        return self._looked_oldest_ms if self.unread_on_disk else None

    # -- the writer's -------------------------------------------------------------------------------------------------

    def append(self, events: Sequence[bytes], now_ms: int, now: float) -> None:
        """Write events behind the last one, all or none."""
        if not events:
            return
        numbers = self._log.append(events, now_ms)
        if self.unread_on_disk <= _RECENT_EVENTS:
            self._recent.add(numbers.start, events, now_ms, now)
        if self._syncs_each_write:
            # Written in any case: whoever was told otherwise would keep them in memory, too, and send them twice.
            synced(self._log.unsynced())

    def rest_appending(self) -> None:
        """Hold no file open to append with until the next append."""
        self._log.rest_appending()

    def append_in_flight(self, events: Sequence[bytes], now_ms: int) -> list[Entry]:
        """Write events that couriers hold already; nothing may be unread here. Give their entries."""
        with self._lock:
            numbers = self._log.append(events, now_ms)
            entries = self._in_hand(
                [Entry(event, number, self, now_ms) for event, number in zip(events, numbers, strict=True)]
            )
            self._cursor = numbers.stop - 1
            return entries

    # -- the couriers' ------------------------------------------------------------------------------------------------

    def read(self, limit: int, max_bytes: int) -> list[Entry]:
        """Read the next events; none are given when nothing that is left can be read."""
        with self._lock:
            if self._is_closed or not self.unread:
                return []
            if self._given_back:
                return self._taken_again(limit, max_bytes)
            return self._recall(limit, max_bytes) or self._read_back(limit, max_bytes)

    def give_back(self, entries: Sequence[Entry]) -> None:
        """Have entries read once more, before all that was not read yet: they were not sent."""
        with self._lock:
            there = [entry for entry in entries if entry.number in self._unsettled]
            self._given_back = sorted([*self._given_back, *there], key=attrgetter("number"))

    def _taken_again(self, limit: int, max_bytes: int) -> list[Entry]:
        events = [entry.event for entry in self._given_back[:limit]]
        count = len(_within(events, max_bytes, needs_one=True))
        entries, self._given_back = self._given_back[:count], self._given_back[count:]
        return entries

    def _recall(self, limit: int, max_bytes: int) -> list[Entry]:
        """Take the next events from memory, none if they are not there."""
        entries = self._in_hand(self._recent.take(self, self._cursor + 1, limit, max_bytes))
        self._cursor += len(entries)
        return entries

    def _read_back(self, limit: int, max_bytes: int) -> list[Entry]:
        """Read the next events from disk."""
        in_memory = self._recent.first
        if in_memory:  # that need not be read
            limit = min(limit, max(1, in_memory.first - 1 - self._cursor))
        # Asked before it is read: events come meanwhile.
        end = self._log.next_sequence - 1
        stored = self._log.read(self._cursor, limit, max_bytes)
        last = stored[-1].sequence if stored else end
        self._lost_behind += last - self._cursor - len(stored)
        entries = self._in_hand([Entry(event.payload, event.sequence, self, event.time_ms) for event in stored])
        self._cursor = last
        if not entries:
            self._settle_head()
        return entries

    def _in_hand(self, entries: list[Entry]) -> list[Entry]:
        """Note entries as unsettled; the cursor passes them after that, or they would seem settled meanwhile."""
        self._unsettled.update((entry.number, entry) for entry in entries)
        return entries

    def mark_sent(self, entries: Sequence[Entry], now_ms: int, *, anyhow: bool = False) -> list[Mark]:
        """Note on disk that entries are about to go out. Raises `OSError` when they may not, since it cannot be noted.

        What was noted before may go out in any case, on disk as it is. With `anyhow` nothing is raised: the note is
        saved later, if not now.
        """
        with self._lock:
            if self._is_closed:
                return []
            self._is_quiet = False
            marks = self._marked(entries, now_ms)
            try:
                self._save()
            except OSError as error:
                if marks and not anyhow and not self._may_go_unsaved(error, now_ms):
                    self.is_unnotable = True
                    self._log.unmark(marks)
                    raise
        return marks

    def _marked(self, entries: Sequence[Entry], now_ms: int) -> list[Mark]:
        return [mark for first, last in _runs(entries) for mark in self._log.mark_ambiguous(first, last, now_ms)]

    def _may_go_unsaved(self, error: OSError, now_ms: int) -> bool:
        if error.errno not in _FULL:
            return False
        if self._unsaved_since_ms is None:
            self._unsaved_since_ms = now_ms
        return now_ms - self._unsaved_since_ms < self._patience_ms

    def _save(self) -> None:
        self.is_unsaved = True
        try:
            self._log.save_position()
            if self._syncs_each_write:
                self._log.unsynced().sync()
        except OSError:
            # Whoever comes next finds no log where that has been removed, and needs no note about it.
            if self.held.directory.is_dir():
                raise
        self.is_unsaved = False
        self._unsaved_since_ms = None

    def unmark(self, marks: Sequence[Mark]) -> None:
        """Take such notes back."""
        with self._lock:
            if not self._is_closed:
                self._log.unmark(marks)
                self._save()

    def sent_before(self, entries: Sequence[Entry], time_ms: int) -> list[Entry]:
        """Give those that went out before this time and were not answered."""
        with self._lock:
            if not any(mark.time_ms < time_ms for mark in self._log.marks):
                return []
            return [entry for entry in entries if (self._log.sent_at(entry.number) or time_ms) < time_ms]

    def is_unsure_of(self, over_ms: int, perhaps_over_ms: int) -> bool:
        """Note, and tell, whether something in it went out at a time between these two; nothing is read if it did."""
        with self._lock:
            self.is_unsure = any(over_ms <= mark.time_ms < perhaps_over_ms for mark in self._log.marks)
        return self.is_unsure

    def note_undelivered(self, entries: Sequence[Entry]) -> None:
        """Note that entries which are about to be settled were not delivered."""
        with self._lock:
            if not self._is_closed:
                self._log.note_undelivered([(entry.number, entry.event) for entry in entries])

    def settle(self, entries: Sequence[Entry]) -> int:
        """Let entries go; none are there any more once the log was closed."""
        with self._lock:
            if self._is_closed:
                return 0
            self._is_quiet = False
            settled = sum(self._unsettled.pop(entry.number, None) is not None for entry in entries)
            self._settle_head()
            self._save()
        return settled

    def _settle_head(self) -> None:
        first = next(iter(self._unsettled), None)
        self._log.done(self._cursor if first is None else first - 1)

    # -- the janitor's ------------------------------------------------------------------------------------------------

    def oldest_ms(self) -> int | None:
        """Tell when the oldest event was accepted; None when nothing waits."""
        with self._lock:
            oldest = None if self._is_closed else self._log.oldest()
        self._looked_oldest_ms = oldest.time_ms if oldest else None
        return self._looked_oldest_ms

    @property
    def bytes_on_disk(self) -> int:
        """The size of the log."""
        return self._log.bytes_on_disk

    def drop_segment(self) -> int:
        """Drop the oldest segment; tell how many events that were not read yet went with it."""
        with self._lock:
            if self._is_closed:
                return 0
            gaps = self._log.gaps_after(self._cursor)
            self._log.drop_oldest_segment()
            return self._pass_to(self._log.done_up_to, gaps)

    def drop_older_than(self, time_ms: int) -> int:
        """Drop the unread events that were accepted before this time, some of them; tell how many."""
        with self._lock:
            if self._is_closed:
                return 0
            last = self._log.last_older_than(self._cursor, time_ms)
            if last > self._cursor:
                # Reads what it notes, and so may find damage: before the gaps are counted.
                self._log.dropped(last, self._cursor)
            dropped = self._pass_to(last, self._log.gaps_after(self._cursor))
            self._settle_head()
        return dropped

    def _pass_to(self, cursor: int, gaps: int) -> int:
        """Go on behind this event, past some that were not read; tell how many. `gaps` is how many are unreadable."""
        if cursor <= self._cursor:
            return 0
        lost = gaps - self._log.gaps_after(cursor)
        passed = cursor - self._cursor - lost
        self._lost_behind += lost
        self._cursor = cursor
        return passed

    def begin_segment(self) -> None:
        """Have what is settled be in a segment that nothing is written to any more, so that it can be read back."""
        with self._lock:
            if not self._is_closed:
                self._log.begin_segment()

    def rest_if_quiet(self) -> None:
        """Hold no file open, but for one to append with, if nobody has sent or settled since the last call."""
        with self._lock:
            if self._is_quiet and not self._is_closed:
                self._log.rest()
            self._is_quiet = True

    def take_damage(self) -> tuple[list[Damage], int]:
        """Give what was found damaged since the last call, and how many events that has cost."""
        with self._lock:
            lost = self._lost_behind + self._log.gaps_after(self._cursor)
            new, self._lost_told = lost - self._lost_told, lost
            return self._log.take_damage(), new

    def forget_sent(self) -> None:
        """Note that nobody has sent these events to where they go now."""
        with self._lock:
            self._log.unmark(self._log.marks)
            self._save()

    def save_again(self) -> bool:
        """Save the position and the marks, after the disk refused that; True if events were held, and may go now.

        Raises the system's `OSError`.
        """
        with self._lock:
            if self._is_closed:
                return False
            self._save()
            # Asked with the lock held: a courier may have come to be refused while this waited for it.
            was_held, self.is_unnotable = self.is_unnotable, False
        return was_held

    def close_in_order(self) -> None:
        """Write what is not settled once more, behind the last event, where that is needed, and close in any case.

        It is needed where others overtook it, which would come again with it, as all does that stands behind it; and
        where it is gone from disk. The writer has let go of this log.
        """
        with self._lock:
            if self._is_closed:
                return
            # In the same moment: what is answered in between would come again although it is settled.
            self._is_closed = True
            first = next(iter(self._unsettled), self._cursor + 1)
            if first > self._log.done_up_to and self._log.waiting - self.unread_on_disk == len(self._unsettled):
                return
            for time_ms, run in groupby(list(self._unsettled.values()), attrgetter("accepted_ms")):
                self._write_again(list(run), time_ms)
            self._log.rest_appending()

    def _write_again(self, entries: Sequence[Entry], time_ms: int) -> None:
        sent_at = [self._log.sent_at(entry.number) for entry in entries]
        numbers = self._log.append([entry.event for entry in entries], time_ms)
        for number, sent_ms in zip(numbers, sent_at, strict=True):
            if sent_ms is not None:
                self._log.mark_ambiguous(number, number, sent_ms)
        self._log.note_undelivered([(entry.number, entry.event) for entry in entries])
        for entry in entries:
            del self._unsettled[entry.number]
        self._settle_head()

    def close(self) -> None:
        """Let no courier touch the log any more."""
        with self._lock:
            self._is_closed = True


def _within(events: Sequence[bytes], max_bytes: int, *, needs_one: bool) -> Sequence[bytes]:
    """Cut events off that are too many bytes together."""
    if sum(map(len, events)) <= max_bytes:
        return events
    fitting = sum(1 for total in itertools.accumulate(map(len, events)) if total <= max_bytes)
    return events[: max(fitting, int(needs_one))]


def _runs(entries: Sequence[Entry]) -> Iterator[tuple[int, int]]:
    """Find the stretches of numbers that follow each other: first and last."""
    numbers = sorted(entry.number for entry in entries)
    if numbers[-1] - numbers[0] == len(numbers) - 1:
        # A batch as it was read.
        yield numbers[0], numbers[-1]
        return
    for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        stretch = [number for _, number in run]
        yield stretch[0], stretch[-1]
