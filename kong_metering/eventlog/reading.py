"""Reading a log in order, past what cannot be read.

Contract: one thread at a time, the caller's lock held, while another one may append. Each call takes the appender's
`next` first and reads up to there: what comes during it is for the next one.

A stretch that is no good event is kept aside, told of, and a gap from then on. A segment that the disk does not give at
all is tried again as `Patience` has it (the error is raised), and moved aside then: that costs its events from the one
that failed on, never the log. If it is the one that is appended to, the next append begins another.
"""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Iterator
from operator import attrgetter
from typing import TYPE_CHECKING

from kong_metering.eventlog.damage import Damage, DamageKeeper, DamageKind
from kong_metering.eventlog.format import MAX_PAYLOAD_BYTES, StoredEvent
from kong_metering.eventlog.segment import Segment, SegmentReader

if TYPE_CHECKING:
    from kong_metering.eventlog.appending import Appender
    from kong_metering.eventlog.damage import Patience
    from kong_metering.eventlog.position import Settled

# What `last_older_than` reads at a time: mostly one of the first events decides.
_SCAN_EVENTS = (1, 20, 100, 500, 500)
_SCAN_BYTES = 1024 * 1024


class Reader:
    """Reads the events that are not settled. Its methods mean, and raise, what those of `EventLog` do."""

    def __init__(self, appender: Appender, settled: Settled, damage: DamageKeeper, patience: Patience) -> None:
        # One value, so that any thread may look at it.
        self.settled = settled
        self._appender = appender
        self._damage = damage
        self._patience = patience
        self._current: SegmentReader | None = None
        self._oldest: StoredEvent | None = None
        # Where `last_older_than` stopped the last time: number and time.
        self._younger = (0, 0)
        # What was told of: where the segment begins, and the offset in it.
        self._known_damage: set[tuple[int, int]] = set()

    def read(self, after: int, max_events: int, max_bytes: int) -> list[StoredEvent]:
        """Read events in order from the first one above `after` that is not settled."""
        end = self._appender.next
        events: list[StoredEvent] = []
        sequence = self.settled.next_after(after)
        while max_bytes > 0 and sequence < end:
            try:
                found = self._read_some(sequence, end, max_events - len(events), max_bytes, needs_one=not events)
            except OSError:
                if events:
                    break
                raise
            events += found
            next_one = self.settled.next_after(found[-1].sequence if found else sequence - 1)
            if next_one == sequence or len(events) == max_events:
                break
            max_bytes -= sum(len(event.payload) for event in found)
            sequence = next_one
        return events

    def oldest(self) -> StoredEvent | None:
        """Give the first event that is not settled, None when nothing waits."""
        done = self.settled.done
        if self._oldest is None or self._oldest.sequence <= done:
            with self._reading_elsewhere(done + 1):
                self._oldest = next(iter(self.read(done, 1, 1)), None)
        return self._oldest

    def last_older_than(self, after: int, time_ms: int) -> int:
        """Tell up to which number all events above `after` were appended before this time; `after` when none was."""
        end = self._appender.next
        after = max(after, self.settled.done)
        sequence = self.settled.next_after(after)
        younger, its_time = self._younger
        if sequence == younger and its_time >= time_ms:
            return sequence - 1
        with self._reading_elsewhere(sequence):
            for count in _SCAN_EVENTS:
                found = self.read(after, count, _SCAN_BYTES)
                stop = next((event for event in found if event.time_ms >= time_ms), None)
                if stop:
                    self._younger = (stop.sequence, stop.time_ms)
                    return stop.sequence - 1
                if not found:
                    return max(after, end - 1)
                after = found[-1].sequence
        return after

    def forget(self, segment: Segment) -> None:
        """Let go of a segment that is no part of the log any more."""
        if self._current and self._current.segment is segment:
            self.close()
        self._known_damage = {known for known in self._known_damage if known[0] != segment.first}
        self._patience.forget(segment.path)

    def rest(self) -> None:
        """Hold no descriptor until the next read, which goes on where the last one ended."""
        if self._current:
            self._current.rest()

    def close(self) -> None:
        """Let go of the file that is being read."""
        if self._current:
            self._current.close()
            self._current = None

    def _read_some(
        self, sequence: int, end: int, max_events: int, max_bytes: int, *, needs_one: bool
    ) -> list[StoredEvent]:
        """Read from one segment; none are given when there is only damage, or the next event is too large."""
        index = bisect.bisect_right(self._appender.segments, sequence, key=attrgetter("first")) - 1
        segment = self._appender.segments[index]
        try:
            reader = self._reader_at(segment, sequence)
            found = reader.read(max_events, max_bytes, end)
            if needs_one and not found:
                found = reader.read(1, MAX_PAYLOAD_BYTES, end)
        except OSError as error:
            failed_at = self._current.next if self._current else segment.first
            self.close()
            if not self._patience.is_over(segment.path, error, failed_at) or not self._appender.seal(segment):
                raise
            self._set_aside(segment, sequence)
            return []
        self._patience.was_read(segment.path, reader.next)
        return found

    def _reader_at(self, segment: Segment, sequence: int) -> SegmentReader:
        reader = self._current
        if reader is None or reader.segment is not segment or reader.next > sequence:
            self.close()
            self._current = reader = SegmentReader(segment, self._found_damage)
        if reader.next < sequence:
            reader.skip_to(sequence)
        return reader

    @contextlib.contextmanager
    def _reading_elsewhere(self, sequence: int) -> Iterator[None]:
        """Let `read` read from here on, and go on afterwards where it was."""
        kept = self._current
        # From the start of the segment it may be thousands of events.
        is_near = kept is not None and kept.segment.first <= kept.next <= sequence < kept.segment.end
        self._current = kept.twin() if kept and is_near else None
        try:
            yield
        finally:
            self.close()
            self._current = kept

    def _found_damage(self, segment: Segment, offset: int, data: bytes, first: int, end: int) -> None:
        """Take note of damage that reading came upon, once; events that are done already are no loss."""
        if (segment.first, offset) in self._known_damage or first < end <= self.settled.done + 1:
            return
        self._known_damage.add((segment.first, offset))
        kind = DamageKind.UNREADABLE if data else DamageKind.MISSING
        kept_in = self._damage.copy(segment, offset, data)
        self._damage.add(Damage(kind, segment.path.name, offset, len(data), self._lose(first, end), kept_in))

    def _set_aside(self, segment: Segment, sequence: int) -> None:
        """Take a sealed segment that the disk does not give us any more out of the log, from this event on."""
        self._appender.segments.remove(segment)
        events, kept_in = self._lose(sequence, segment.end), self._damage.move(segment, sequence - 1)
        kind = DamageKind.UNREADABLE if kept_in else DamageKind.MISSING
        self._damage.add(Damage(kind, segment.path.name, 0, segment.size, events, kept_in))
        self.forget(segment)

    def _lose(self, first: int, end: int) -> int:
        """Remember that events `first` to below `end` cannot be read; tell how many that was not known of."""
        before, self.settled = self.settled, self.settled.with_gap(first, end)
        return before.waiting(end, first - 1)
