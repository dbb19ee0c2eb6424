"""Where a queue reads its events from: what every source can do, and the one in memory.

Contract: an event that was read still waits until it is settled, whatever becomes of it in between. Each method locks
for itself; several couriers may call at a time.

`MemorySource` holds events while the disk refuses them, or instead of it (`--no-spool`). When the disk works again the
writer spills it: what waits becomes the log's, and what is in flight as well; entries that couriers still hold are
forwarded to the log from then on.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from typing import NamedTuple, Protocol

from kong_metering.eventlog.format import Mark


class Entry(NamedTuple):
    """An event that was read: its number in its source, and when it was accepted (wall clock, ms; 0 if not known)."""

    event: bytes
    number: int
    source: Source
    accepted_ms: int


class Source(Protocol):
    """Events of one queue, in the order in which they were accepted."""

    @property
    def unread(self) -> int:
        """How many events were not read yet."""
        ...

    def read(self, limit: int, max_bytes: int) -> list[Entry]:
        """Read the next events: up to `limit`, with up to `max_bytes` together, but one at least if one is there."""
        ...

    def mark_sent(self, entries: Sequence[Entry], now_ms: int, *, anyhow: bool = False) -> list[Mark]:
        """Note that entries are about to go out, and give what is new of it, for `unmark`.

        Raises `OSError` when they may not, because that cannot be noted; with `anyhow` they may, or did.
        """
        ...

    def give_back(self, entries: Sequence[Entry]) -> None:
        """Have entries read once more: they were not sent."""
        ...

    def unmark(self, marks: Sequence[Mark]) -> None:
        """Take such notes back: the endpoint surely has none of their events."""
        ...

    def sent_before(self, entries: Sequence[Entry], time_ms: int) -> list[Entry]:
        """Give those that went out before this time and were not answered."""
        ...

    def is_unsure_of(self, over_ms: int, perhaps_over_ms: int) -> bool:
        """Note, and tell, whether something in it went out at a time between these two; nothing is read if it did."""
        ...

    def note_undelivered(self, entries: Sequence[Entry]) -> None:
        """Note that entries which are about to be settled were not delivered, for whoever reads back what was."""
        ...

    def settle(self, entries: Sequence[Entry]) -> int:
        """Let entries go that need not wait any longer; give how many were there still."""
        ...


class Spillable(Protocol):
    """A log that takes what was in memory."""

    def append(self, events: Sequence[bytes], now_ms: int, now: float) -> None:
        """Write events behind the last one, all or none."""
        ...

    def append_in_flight(self, events: Sequence[bytes], now_ms: int) -> list[Entry]:
        """Write events that couriers hold already, and give their entries."""
        ...


@dataclass(frozen=True)
class _Held:
    event: bytes
    queued_at: float


class MemorySource:
    """Events in memory, numbered from 1."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._next = 1
        self._waiting: deque[tuple[int, _Held]] = deque()
        self._waiting_bytes = 0
        self._in_flight: dict[int, _Held] = {}
        # When those in flight were first sent, in milliseconds.
        self._sent: dict[int, int] = {}
        self._is_spilling = False
        # Where those in flight are since the last spill: their entries in the log, by their numbers here.
        self._moved: dict[int, Entry] = {}
        self._is_ended = False

    @property
    def unread(self) -> int:
        """How many events were not read yet; none while they are on their way into the log."""
        return 0 if self._is_spilling else len(self._waiting)

    @property
    def unread_bytes(self) -> int:
        """The bytes of the events that were not read yet."""
        return self._waiting_bytes

    @property
    def is_empty(self) -> bool:
        """Whether no event is in memory alone."""
        return not (self._waiting or self._in_flight)

    def oldest_at(self) -> float | None:
        """Tell when the first of the unread came (monotonic); None when there is none."""
        with self._lock:
            return self._waiting[0][1].queued_at if self._waiting else None

    def add(self, events: Sequence[bytes], now: float) -> int:
        """Take events in, and return how many were not read yet at that moment; `now` is monotonic."""
        with self._lock:
            for event in events:
                self._waiting.append((self._next, _Held(event, now)))
                self._waiting_bytes += len(event)
                self._next += 1
            return len(self._waiting)

    def forget_oldest(self, max_entries: float, max_bytes: float) -> int:
        """Forget the oldest unread events beyond the bounds; tell how many."""
        forgotten = 0
        with self._lock:
            while self._waiting and not self._is_spilling and self._exceeds(max_entries, max_bytes):
                self._waiting_bytes -= len(self._waiting.popleft()[1].event)
                forgotten += 1
        return forgotten

    def _exceeds(self, max_entries: float, max_bytes: float) -> bool:
        return len(self._waiting) > max_entries or self._waiting_bytes > max_bytes

    def read(self, limit: int, max_bytes: int) -> list[Entry]:
        """Read the next events."""
        entries: list[Entry] = []
        with self._lock:
            while self._waiting and len(entries) < limit and not self._is_spilling:
                number, held = self._waiting[0]
                max_bytes -= len(held.event)
                if entries and max_bytes < 0:
                    break
                self._waiting.popleft()
                self._waiting_bytes -= len(held.event)
                self._in_flight[number] = held
                entries.append(Entry(held.event, number, self, 0))
        return entries

    def give_back(self, entries: Sequence[Entry]) -> None:
        """Never called: what is in memory alone is nobody's to find after a crash, and so is never held."""
        raise AssertionError(f"{len(entries)} events given back")

    def mark_sent(self, entries: Sequence[Entry], now_ms: int, *, anyhow: bool = False) -> list[Mark]:  # noqa: ARG002
        """Note that entries are about to go out."""
        with self._lock:
            new = [each.number for each in entries if each.number in self._in_flight and each.number not in self._sent]
            self._sent.update(dict.fromkeys(new, now_ms))
            moved = [(each.number, self._moved[each.number]) for each in entries if each.number in self._moved]
        new += [number for number, entry in moved if entry.source.mark_sent([entry], now_ms, anyhow=True)]
        return [Mark(number, number, now_ms) for number in new]

    def unmark(self, marks: Sequence[Mark]) -> None:
        """Take such notes back."""
        with self._lock:
            for mark in marks:
                self._sent.pop(mark.first, None)
            moved = [(self._moved[mark.first], mark) for mark in marks if mark.first in self._moved]
        for entry, mark in moved:
            entry.source.unmark([Mark(entry.number, entry.number, mark.time_ms)])

    def sent_before(self, entries: Sequence[Entry], time_ms: int) -> list[Entry]:
        """Give those that went out before this time and were not answered."""
        with self._lock:
            moved = [(each, self._moved[each.number]) for each in entries if each.number in self._moved]
            stale = [each for each in entries if self._sent.get(each.number, time_ms) < time_ms]
        return stale + [each for each, there in moved if there.source.sent_before([there], time_ms)]

    def is_unsure_of(self, over_ms: int, perhaps_over_ms: int) -> bool:  # noqa: ARG002
        """Never: what is in memory was sent by this process."""
        return False

    def note_undelivered(self, entries: Sequence[Entry]) -> None:
        """Note it of those that are in the log by now; of the others nothing is kept."""
        with self._lock:
            moved = self._moved_of(entries)
        for source, there in groupby(moved, attrgetter("source")):
            source.note_undelivered(list(there))

    def settle(self, entries: Sequence[Entry]) -> int:
        """Let entries go, wherever they are."""
        with self._lock:
            if self._is_ended:
                return 0
            moved = self._moved_of(entries)
            settled = 0
            for each in entries:
                self._sent.pop(each.number, None)
                settled += self._in_flight.pop(each.number, None) is not None
                self._moved.pop(each.number, None)
        return settled + _settle_there(moved)

    def _moved_of(self, entries: Sequence[Entry]) -> list[Entry]:
        return [self._moved[each.number] for each in entries if each.number in self._moved] if self._moved else []

    def spill(self, log: Spillable, now_ms: int, now: float) -> None:
        """Write all that is in memory into a log, in order; on the writer's thread. Raises what the log raises.

        What is settled in the meantime is settled in the log too.
        """
        with self._lock:
            self._is_spilling = True
            in_flight = dict(self._in_flight)
        try:
            there = log.append_in_flight([held.event for held in in_flight.values()], now_ms) if in_flight else []
            self._move(dict(zip(in_flight, there, strict=True)))
            with self._lock:
                waiting = [held.event for _, held in self._waiting]
            log.append(waiting, now_ms, now)
            with self._lock:
                self._waiting.clear()
                self._waiting_bytes = 0
        finally:
            self._is_spilling = False

    def _move(self, there: dict[int, Entry]) -> None:
        with self._lock:
            settled = [entry for number, entry in there.items() if number not in self._in_flight]
            marks = [(there[number], time_ms) for number, time_ms in self._sent.items() if number in there]
            for number, entry in there.items():
                if self._in_flight.pop(number, None):
                    self._moved[number] = entry
                self._sent.pop(number, None)
        for entry, time_ms in marks:
            entry.source.mark_sent([entry], time_ms, anyhow=True)
        _settle_there(settled)

    def take_out(self) -> list[bytes]:
        """Give all events away that are in memory alone, in order; nobody may hold any of them."""
        with self._lock:
            held = [self._in_flight[number] for number in sorted(self._in_flight)]
            held += [each for _, each in self._waiting]
            self._in_flight.clear()
            self._sent.clear()
            self._waiting.clear()
            self._waiting_bytes = 0
        return [each.event for each in held]

    def end(self) -> int:
        """Forget everything; tell how many events were in memory alone."""
        with self._lock:
            self._is_ended = True
            left = len(self._waiting) + len(self._in_flight)
            self._waiting.clear()
            self._in_flight.clear()
            self._waiting_bytes = 0
        return left


def _settle_there(entries: Sequence[Entry]) -> int:
    """Settle entries in their logs, all of them, and then raise what a log has raised: it has let them go even so."""
    settled, error = 0, None
    for source, there in groupby(entries, attrgetter("source")):
        try:
            settled += source.settle(list(there))
        except OSError as raised:
            error = raised
    if error is not None:
        raise error
    return settled
