"""One log on disk as a queue uses it: how far it was read, and which of the events that were read are not settled yet.

Contract: one thread at a time, the backlog's lock held. An event is done, and its space free, once it and all before it
are settled.
"""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import groupby, repeat
from operator import attrgetter
from typing import TYPE_CHECKING

from kong_metering.spool.format import StoredEvent

if TYPE_CHECKING:
    from kong_metering.spool.directory import HeldLog
    from kong_metering.spool.unsynced import Unsynced

# What is kept in memory of events that wait on disk, at most: as much as Kong's queue keeps by default.
_RECENT_EVENTS = 10_000
_RECENT_BYTES = 8 * 1024 * 1024


class WaitingLog:
    """A log that this process holds, and the events in it that wait."""

    def __init__(self, held: HeldLog) -> None:
        self.held = held
        self.log = held.log
        self.read_up_to = held.log.done_up_to
        self.waiting_at_first = self.unread
        self._unsettled: dict[int, StoredEvent] = {}
        # How many there were to read; fewer without a reason are those that damage has cost.
        self._expected = self.waiting_at_first
        self._lost = 0
        # The events that were not read yet, while they are few and written by this process: no need to read them back.
        self._recent: deque[StoredEvent] = deque()
        self._recent_bytes = 0
        if held.log.was_position_lost:
            self._doubt_all()

    def since_ms(self) -> float:
        """Tell when the oldest event was accepted, infinite when nothing waits. Raises what `EventLog.read` raises."""
        oldest = self.log.oldest()
        return oldest.time_ms if oldest else math.inf

    @property
    def unread(self) -> int:
        """How many events were not read yet."""
        return self.log.waiting_after(self.read_up_to)

    @property
    def last(self) -> int:
        """The number of the last event."""
        return self.log.next_sequence - 1

    @property
    def is_finished(self) -> bool:
        """Whether nothing waits in it any more."""
        return not self._unsettled and not self.unread

    def append(self, events: Sequence[bytes], time_ms: int) -> None:
        """Write events behind the last one, all or none. Raises the system's `OSError`."""
        is_all_recent = self.unread == len(self._recent)
        numbers = self.log.append(events, time_ms)
        self._expected += len(events)
        if is_all_recent and len(self._recent) + len(events) <= _RECENT_EVENTS:
            self._recent_bytes += sum(map(len, events))
            self._recent.extend(map(StoredEvent, numbers, repeat(time_ms), events))
        if not is_all_recent or self._recent_bytes > _RECENT_BYTES or len(self._recent) < self.unread:
            self._forget_recent()

    def append_read(self, events: Sequence[bytes], time_ms: int) -> range:
        """Write events that are being sent already, when there is nothing to read; give their numbers."""
        numbers = self.log.append(events, time_ms)
        self.read_up_to = self.last
        stored = (StoredEvent(number, time_ms, event) for number, event in zip(numbers, events, strict=True))
        self._unsettled.update((event.sequence, event) for event in stored)
        return numbers

    def unsynced(self) -> Unsynced:
        """Tell what has to be synced to survive a power cut."""
        return self.log.unsynced()

    def read(self, max_events: int, max_bytes: int) -> list[StoredEvent]:
        """Read on; none are given when nothing that is left can be read. Raises what `EventLog.read` raises."""
        events = self._recall(max_events, max_bytes) or self.log.read(self.read_up_to, max_events, max_bytes)
        self.read_up_to = events[-1].sequence if events else self.last
        self._unsettled.update((event.sequence, event) for event in events)
        self._expected -= len(events)
        self._count_lost()
        if not events:
            self._finish()
        return events

    def _recall(self, max_events: int, max_bytes: int) -> list[StoredEvent]:
        """Give the next events from memory, none if they are not there."""
        if not self._recent or self._recent[0].sequence != self.read_up_to + 1 or self._recent_bytes > max_bytes:
            self._forget_recent()
            return []
        events = [self._recent.popleft() for _ in range(min(max_events, len(self._recent)))]
        self._recent_bytes -= sum(len(event.payload) for event in events)
        return events

    def _forget_recent(self) -> None:
        self._recent.clear()
        self._recent_bytes = 0

    def take_lost(self) -> int:
        """Tell how many events turned out to be unreadable since the last call, whoever came upon them."""
        self._count_lost()
        lost, self._lost = self._lost, 0
        return lost

    def settle(self, sequences: Iterable[int]) -> None:
        """Let events go that were read."""
        for sequence in sequences:
            self._unsettled.pop(sequence, None)
        self._finish()

    def was_sent_before(self, sequence: int, time_ms: int) -> bool:
        """Whether the event was sent before this time and may have arrived."""
        sent_at = self.log.sent_at(sequence)
        return sent_at is not None and sent_at < time_ms

    def has_sent_before(self, time_ms: int) -> bool:
        """Whether there is any event of which `was_sent_before` is true."""
        return any(mark.time_ms < time_ms for mark in self.log.marks)

    def _doubt_all(self) -> None:
        """Take all events for sent when the first of them came: it is not known any more which ones were."""
        oldest = self.log.oldest()
        if oldest is not None:
            self.log.mark_ambiguous(self.log.done_up_to + 1, self.last, oldest.time_ms)
            # The log has a position again by now, which would tell the next one that none was sent.
            with contextlib.suppress(OSError):
                self.log.save_position()

    def drop_segment(self) -> int:
        """Drop the oldest segment; tell how many events that were not read yet went with it."""
        self._count_lost()
        self.log.drop_oldest_segment()
        self.read_up_to = max(self.read_up_to, self.log.done_up_to)
        return self._dropped()

    def drop_older_than(self, time_ms: int) -> int:
        """Drop the events that were not read yet and are older than this; tell how many. Raises what `read` raises."""
        last = self.log.last_older_than(self.read_up_to, time_ms)
        self._count_lost()
        self.read_up_to = max(self.read_up_to, last)
        self._finish()
        return self._dropped()

    def close_ranks(self) -> None:
        """Write what is not settled once more, behind the last event, if others overtook it or it is gone from disk.

        Those others would come again with it, as all does that stands behind it. Raises the system's `OSError`.
        """
        first = next(iter(self._unsettled), self.read_up_to + 1)
        if first > self.log.done_up_to and self.log.waiting - self.unread == len(self._unsettled):
            return
        for time_ms, run in groupby(list(self._unsettled.values()), attrgetter("time_ms")):
            events = list(run)
            sent_at = [self.log.sent_at(event.sequence) for event in events]
            self.append([event.payload for event in events], time_ms)
            for sequence, sent_ms in enumerate(sent_at, self.last + 1 - len(events)):
                if sent_ms is not None:
                    self.log.mark_ambiguous(sequence, sequence, sent_ms)
            self.settle(event.sequence for event in events)

    def _count_lost(self) -> None:
        self._lost += self._expected - self.unread
        self._expected = self.unread

    def _dropped(self) -> int:
        dropped, self._expected = self._expected - self.unread, self.unread
        return dropped

    def _finish(self) -> None:
        first = next(iter(self._unsettled), None)
        self.log.done(self.read_up_to if first is None else first - 1)
