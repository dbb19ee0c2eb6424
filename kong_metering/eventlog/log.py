"""The events of one queue, on disk in the order in which they came, until they are done.

Contract: a log is a directory that one process owns. Two threads use it at a time and neither waits for the other: one
appends, and one does everything else (reads, marks, settles, saves, drops), the caller's lock held. Any thread may ask
`unsynced`, `next_sequence`, `done_up_to`, `waiting`, `waiting_after` and `bytes_on_disk`; `close` comes when no append
runs any more. Since events come meanwhile, "all" is what was there before: whoever finds nothing to read and gives up
what cannot be read, up to `next_sequence` - 1, has to have asked for that number before it read.

Events are opaque bytes; each has a sequence number that goes up by one and is never used twice.

- An event whose `append` returned survives the death of the process. It survives a power cut once a `sync` returned
  that began afterwards: `unsynced` takes note of what is to be synced, and `Unsynced.sync` needs no lock.
- `append` is all or nothing. When it raises, the log is as it was before and can be used.
- `read` gives events in order, each as it was accepted or not at all: what is damaged is passed over, its bytes are
  kept in `damaged/`, and `take_damage` tells of it. A flipped bit costs one event at most, a file that the disk does
  not give (see `Patience`) its own events at most.
- `done` frees space by unlinking segments, which also a full disk allows; or it hands them to a `Keeper`, which moves
  them elsewhere, unless something in them was dropped. What was done after the last
  `save_position` is done again after a crash: save it before a batch is sent, with the mark of that batch, and no
  event is sent twice without being known as one that may have arrived.
- `open` reads one segment, however many there are; where the position is lost the oldest event, too: all that waits
  counts as sent when that came, for whoever opens the log later as well.

What the two threads share, and why that is safe, the interpreter making each step atomic:
- the appender's segment: `appending.py`, by handing over its writer; its extent is one value, set after the bytes
- the list of segments: one adds at the end, the other one takes out; each is one step
- the next number: set last, so that all below it can be read
- what is to be synced: noted after it was written; `files.Unsynced`
- what is settled: one value that is replaced, by the reading side alone

Files: segments and `position` as `format.py` describes them, and `damaged/`, made when there is something for it.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from kong_metering.errors import DISK_ERRORS
from kong_metering.eventlog.appending import Appender
from kong_metering.eventlog.damage import DAMAGED, Damage, DamageKeeper, DamageKind, Patience
from kong_metering.eventlog.files import Allowance, Unsynced
from kong_metering.eventlog.format import Mark, Position, StoredEvent
from kong_metering.eventlog.position import Marks, PositionFile
from kong_metering.eventlog.reading import Reader
from kong_metering.eventlog.recovery import Recovery

if TYPE_CHECKING:
    from kong_metering.eventlog.segment import Segment

__all__ = ["DAMAGED", "POSITION", "SEGMENT_BYTES", "Damage", "DamageKind", "EventLog", "Keeper"]

POSITION = "position"
SEGMENT_BYTES = 4 * 1024 * 1024
_NOTED_AT_ONCE = 1000


class Keeper(Protocol):
    """Where segments go in which all is done. Raises the system's `OSError`."""

    def keep(self, segment: Path) -> None:
        """Take the file of a segment away; it is where it was if that raises."""
        ...

    def note_undelivered(self, segment: Path, events: Sequence[tuple[int, bytes]]) -> None:
        """Note that events of a segment, with their numbers, are settled without being delivered from here."""
        ...


class EventLog:
    """One queue's log."""

    def __init__(  # noqa: PLR0913 - what it is made of
        self,
        directory: Path,
        sync_first: Sequence[Path],
        patience: Patience,
        segment_bytes: int,
        *,
        allowance: Allowance,
        keeper: Keeper | None,
        is_view: bool,
    ) -> None:
        """Use `open` or `view`."""
        self.directory = directory
        self._position = PositionFile(directory / POSITION, patience)
        self._marks = Marks(self._position.position.marks)
        self._damage = DamageKeeper(directory, self._marks.all, is_view=is_view)
        known = None if self._position.was_lost else self._position.position
        found = Recovery(directory, known, self._damage, patience)
        # What was written since the last sync, in order, and what a sync that failed gave back. Nobody knows what was
        # synced before.
        paths = (*sync_first, directory, *(segment.path for segment in found.segments))
        self._written: dict[Path, None] = dict.fromkeys(paths)
        self._failed: deque[Path] = deque()
        self._appender = Appender(directory, found, self._written, segment_bytes)
        self._reader = Reader(self._appender, found.settled, self._damage, patience)
        self._marks.forget_up_to(found.settled.done)
        # Whether it was not known, when it was opened, how far the log was done: events that were in it may have been
        # delivered long ago; and whether that is still to be noted.
        self.was_position_lost = self._position.was_lost and self.done_up_to + 1 < self.next_sequence
        self._is_in_doubt = self.was_position_lost
        self._allowance = allowance
        self._keeper = keeper
        self._dropped_up_to = 0
        self._has_place = False
        self._is_closed = False
        if not is_view:
            # While there is room: later the disk may be full. Not before what is known is in it: whoever opens the log
            # next would take it for all that there is to know.
            with contextlib.suppress(*DISK_ERRORS):
                self.note_doubt()
                self.save_position()
            self._remove_done_segments()

    @classmethod
    def open(  # noqa: PLR0913 - what it is made of
        cls,
        directory: Path,
        *,
        segment_bytes: int = SEGMENT_BYTES,
        sync_first: Sequence[Path] = (),
        patience: Patience | None = None,
        allowance: Allowance | None = None,
        keeper: Keeper | None = None,
    ) -> EventLog:
        """Open the log in a directory that this process owns, as a crash may have left it, or a new one.

        `sync_first` is what has to survive a power cut as well, so that the events are of use: the first `unsynced`
        has it, before the events. `patience` remembers what could not be read, also over several tries to open a log;
        `allowance` is what the logs of a process share. `keeper` takes the file of a segment away in which all is done;
        without it, or where it cannot, the file is unlinked.

        Raises `SpoolFormatError` when it is of a format that this version does not know, nothing is changed then; and
        the system's `OSError`, after which it can be tried again.
        """
        return cls(
            directory,
            sync_first,
            patience or Patience(),
            segment_bytes,
            allowance=allowance or Allowance(),
            keeper=keeper,
            is_view=False,
        )

    @classmethod
    def view(cls, directory: Path) -> EventLog:
        """Open the log for reading alone, beside the process that owns it: nothing on disk is changed.

        It shows what was there when it was opened; what its owner is done with meanwhile may be missing, and what the
        disk does not give is passed over at once.

        Raises `SpoolFormatError` when it is of a format that this version does not know; and the system's `OSError`.
        """
        return cls(directory, (), Patience(0), SEGMENT_BYTES, allowance=Allowance(), keeper=None, is_view=True)

    @property
    def next_sequence(self) -> int:
        """The sequence number that the next event gets."""
        return self._appender.next

    @property
    def done_up_to(self) -> int:
        """The sequence number up to which all is done."""
        return self._reader.settled.done

    @property
    def waiting(self) -> int:
        """How many events are not done; damage that was not read yet counts as events."""
        return self.waiting_after(0)

    def waiting_after(self, sequence: int) -> int:
        """Tell how many events above `sequence` are not done; damage that was not read yet counts as events."""
        # In this order: what is settled has a number already.
        settled = self._reader.settled
        return settled.waiting(self._appender.next, sequence)

    def gaps_after(self, sequence: int) -> int:
        """Tell how many events above `sequence` are known to be unreadable."""
        return self._reader.settled.unreadable(sequence)

    @property
    def bytes_on_disk(self) -> int:
        """The size of all segments."""
        return sum(segment.size for segment in tuple(self._appender.segments))

    def append(self, events: Sequence[bytes], now_ms: int) -> range:
        """Write the events and give their sequence numbers; `now_ms` is the wall clock's, in milliseconds.

        Raises the system's `OSError`, for a full disk for one, and `ValueError` for an event of more than
        `MAX_PAYLOAD_BYTES`; none of the events is in the log then.
        """
        return self._appender.append(events, now_ms)

    def rest_appending(self) -> None:
        """Hold no descriptor to append with until the next append; on its thread."""
        self._appender.rest()

    def rest(self) -> None:
        """Hold no descriptor, but for one to append with, until it is read or a position is saved."""
        self._reader.rest()
        self._position.close()
        if self._has_place:
            self._has_place = False
            self._allowance.give_back()

    @contextlib.contextmanager
    def _using_files(self) -> Iterator[None]:
        """Open what is needed, and let go of it afterwards unless this log has, or gets, a place for open files."""
        try:
            yield
        finally:
            self._has_place = self._has_place or self._allowance.take()
            if not self._has_place:
                self.rest()

    def unsynced(self) -> Unsynced:
        """Take note of what has to be synced, so that all that was written until now survives a power cut.

        The caller has it synced: the next call gives only what was written since, and what failed.
        """
        return Unsynced.take(self._written, self._failed)

    def sync(self) -> None:
        """Have all that was appended, and the last position saved, survive a power cut.

        Raises the system's `OSError`.
        """
        self.unsynced().sync()

    def read(self, after: int, max_events: int, max_bytes: int) -> list[StoredEvent]:
        """Read events in order from the first one above `after` that is not done.

        There are up to `max_events` with up to `max_bytes` of payload, but at least one if one waits. Reading on where
        the last call ended costs least; anywhere else costs reading a segment from its start.

        Raises `SpoolFormatError` when a segment is of a format that this version does not know; and the system's
        `OSError` when the next event cannot be read now: it has to be tried again.
        """
        with self._using_files():
            return self._reader.read(after, max_events, max_bytes)

    def oldest(self) -> StoredEvent | None:
        """Give the first event that is not done, None when nothing waits.

        Raises what `read` raises.
        """
        with self._using_files():
            return self._reader.oldest()

    def last_older_than(self, after: int, time_ms: int) -> int:
        """Tell up to which number all events above `after` were appended before this time; `after` when none was.

        Looks at the times in the order of the events and stops at the first that is not older, so that a clock that
        was set back hides what comes behind. What is done or damaged is passed as if it were older. Looks at some
        1,000 events, or 5 MB, at most: when there may be more, call again with what it gave. Raises what `read`
        raises.
        """
        with self._using_files():
            return self._reader.last_older_than(after, time_ms)

    def done(self, up_to: int) -> None:
        """Remember that all events up to this sequence number need not be read again, and free their space.

        Never raises for the disk's sake: what cannot be removed now is removed later.
        """
        if up_to >= self.next_sequence:
            raise ValueError(f"{up_to} was not appended yet: the next sequence number is {self.next_sequence}")
        if up_to <= self.done_up_to:
            return
        self._reader.settled = self._reader.settled.up_to(up_to)
        self._marks.forget_up_to(self.done_up_to)
        self._remove_done_segments()

    def save_position(self) -> None:
        """Write down how far the log is done, and the marks, for after a crash; works on a full disk as well.

        Raises the system's `OSError`.
        """
        is_new = not self._position.was_made
        try:
            with self._using_files():
                self._position.save(Position(self.done_up_to, self._marks.all()))
        finally:
            if is_new:
                self._written[self.directory] = None
            self._written[self._position.path] = None

    def mark_ambiguous(self, first: int, last: int, time_ms: int) -> list[Mark]:
        """Remember that these events are being sent at this time, and so may arrive though no answer does.

        An event that is marked keeps the earlier time. Gives the marks that are new, for `unmark` when an answer tells
        that the events did not arrive. `save_position` writes marks down; there is room for `MAX_MARKS`, and beyond
        that neighbours are joined, which can only mark too many events, at too early a time.
        """
        return self._marks.add(first, last, time_ms)

    def note_doubt(self) -> None:
        """Take all events for sent when the first of them came, if it is not known any more which ones were; once.

        Done when the log is opened, if the disk gives its oldest event then. Raises what `read` raises.
        """
        if not self._is_in_doubt:
            return
        oldest = self.oldest()
        if oldest is not None:
            self.mark_ambiguous(self.done_up_to + 1, self.next_sequence - 1, oldest.time_ms)
            # If not now, it is saved with the next mark.
            with contextlib.suppress(OSError):
                self.save_position()
        self._is_in_doubt = False

    def unmark(self, marks: Sequence[Mark]) -> None:
        """Forget marks that `mark_ambiguous` gave: their events did not arrive."""
        for mark in marks:
            self._marks.remove(mark)

    @property
    def marks(self) -> tuple[Mark, ...]:
        """The marks of events that are not done, in order."""
        return self._marks.all()

    def sent_at(self, sequence: int) -> int | None:
        """Tell when the event was first sent, in milliseconds, if it was and may have arrived; else None."""
        return self._marks.time_of(sequence)

    def drop_oldest_segment(self) -> int:
        """Give up the events of the oldest segment with events that are not done; tell how many those are.

        Nothing is dropped and 0 given when nothing waits. While the segment is being appended to, its events go now
        and its space with the next `done` or drop.
        """
        before = self._reader.settled
        oldest = next((each for each in tuple(self._appender.segments) if each.end > before.done + 1), None)
        if oldest is None:
            return 0
        self._appender.seal(oldest)
        end = min(oldest.end, self.next_sequence)
        self.dropped(end - 1)
        self.done(end - 1)
        return before.waiting(end)

    def dropped(self, up_to: int, after: int = 0) -> None:
        """Take note, before they are `done`, that events above `after` up to this number are given up.

        The segments that have them are not kept. One that goes on behind them may be by another process: there they are
        noted as not delivered.
        """
        self._dropped_up_to = max(self._dropped_up_to, up_to)
        goes_on = next((each for each in tuple(self._appender.segments) if each.first <= up_to < each.end - 1), None)
        if self._keeper is not None and goes_on is not None:
            with contextlib.suppress(*DISK_ERRORS):
                self._note_dropped(max(after, goes_on.first - 1), up_to)

    def _note_dropped(self, after: int, up_to: int) -> None:
        while after < up_to and (events := self.read(after, min(_NOTED_AT_ONCE, up_to - after), SEGMENT_BYTES)):
            after = events[-1].sequence
            self.note_undelivered([(each.sequence, each.payload) for each in events if each.sequence <= up_to])

    def note_undelivered(self, events: Sequence[tuple[int, bytes]]) -> None:
        """Note, before they are `done`, that events with these numbers were not delivered: it stays with what is kept.

        Never raises for the disk's sake: they look like delivered ones then.
        """
        if self._keeper is None:
            return
        for segment in tuple(self._appender.segments):
            if here := [event for event in events if segment.first <= event[0] < segment.end]:
                with contextlib.suppress(OSError):
                    self._keeper.note_undelivered(segment.path, here)

    def keep_with(self, keeper: Keeper | None) -> None:
        """Hand segments in which all is done to this one from now on (see `open`)."""
        self._keeper = keeper

    def begin_segment(self) -> None:
        """Have the next append begin a segment, if there is a settled event in the one that is appended to.

        So that it can be kept, and read back, though few events come.
        """
        newest = next(reversed(tuple(self._appender.segments)), None)
        if newest is not None and newest.first <= self.done_up_to:
            self._appender.seal(newest)
            self._remove_done_segments()

    def take_damage(self) -> list[Damage]:
        """Give what was found damaged since the last call."""
        return self._damage.take()

    def close(self) -> None:
        """Save the position, if that can be, and let go of all files; what is done entirely is removed.

        Again, it does nothing: the log may be another process's by then.
        """
        if self._is_closed:
            return
        self._is_closed = True
        self._appender.close()
        if not self._damage.is_view:
            # A position that cannot be saved means that events are sent again, with the same ids.
            with contextlib.suppress(OSError):
                self.save_position()
            self._remove_done_segments()
        self._reader.close()
        self.rest()

    def _remove_done_segments(self) -> None:
        """Unlink the segments in which all is done, except the one that is appended to."""
        if self._damage.is_view or not self._has_done_segment():
            return
        # Both slots, so that damage to one of them does not make done events look like missing ones.
        with contextlib.suppress(OSError):
            self.save_position()
            self.save_position()
        while self._has_done_segment():
            segment = self._appender.segments[0]
            self._reader.forget(segment)
            try:
                self._take_away(segment)
            except OSError:
                return
            del self._appender.segments[0]
            self._written.pop(segment.path, None)

    def _take_away(self, segment: Segment) -> None:
        if self._keeper is not None and segment.first > self._dropped_up_to:
            with contextlib.suppress(OSError):
                self._keeper.keep(segment.path)
                return
        segment.path.unlink(missing_ok=True)

    def _has_done_segment(self) -> bool:
        segments = self._appender.segments
        # In this order: the end of one that is not sealed may go up.
        return bool(segments) and segments[0].is_sealed and segments[0].end <= self.done_up_to + 1
