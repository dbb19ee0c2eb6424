"""One log on disk as a queue uses it: how far it was read, and which of the events that were read are not settled yet.

Contract: one thread at a time, the backlog's lock held. An event is done, and its space free, once it and all before it
are settled.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kong_metering.spool.directory import HeldLog
    from kong_metering.spool.format import StoredEvent
    from kong_metering.spool.unsynced import Unsynced


class WaitingLog:
    """A log that this process holds, and the events in it that wait."""

    def __init__(self, held: HeldLog) -> None:
        self.held = held
        self.log = held.log
        self.read_up_to = held.log.done_up_to
        self._unsettled: dict[int, None] = {}
        self._lost = 0

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
        self.log.append(events, time_ms)

    def unsynced(self) -> Unsynced:
        """Tell what has to be synced to survive a power cut."""
        return self.log.unsynced()

    def read(self, max_events: int, max_bytes: int) -> list[StoredEvent]:
        """Read on; none are given when nothing that is left can be read. Raises what `EventLog.read` raises."""
        before = self.unread
        events = self.log.read(self.read_up_to, max_events, max_bytes)
        self.read_up_to = events[-1].sequence if events else self.last
        self._unsettled.update((event.sequence, None) for event in events)
        self._lost += before - len(events) - self.unread
        if not events:
            self._finish()
        return events

    def take_lost(self) -> int:
        """Tell how many events turned out to be unreadable since the last call."""
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

    def doubt_all(self) -> None:
        """Take all events for sent when the first of them came: it is not known any more which ones were."""
        oldest = self.log.oldest()
        if oldest is not None:
            self.log.mark_ambiguous(self.log.done_up_to + 1, self.last, oldest.time_ms)

    def drop_segment(self) -> int:
        """Drop the oldest segment; tell how many events that were not read yet went with it."""
        before = self.unread
        self.log.drop_oldest_segment()
        self.read_up_to = max(self.read_up_to, self.log.done_up_to)
        return before - self.unread

    def drop_older_than(self, time_ms: int) -> int:
        """Drop the events that were not read yet and are older than this; tell how many. Raises what `read` raises."""
        before = self.unread
        self.read_up_to = max(self.read_up_to, self.log.last_older_than(self.read_up_to, time_ms))
        self._finish()
        return before - self.unread

    def _finish(self) -> None:
        first = next(iter(self._unsettled), None)
        self.log.done(self.read_up_to if first is None else first - 1)
