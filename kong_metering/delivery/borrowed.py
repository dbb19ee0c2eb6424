"""Events that were taken from memory to be sent, because the disk refused them, and where they are on disk since then.

Contract: the caller locks. Each has a number, which stands in its entry's `sequence` while `log` is None.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from kong_metering.delivery.backlog import Entry
from kong_metering.spool.format import Mark

if TYPE_CHECKING:
    from kong_metering.delivery.waitinglog import WaitingLog


class Borrowed:
    """Those of one backlog."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._in_memory: dict[int, Entry] = {}
        self._on_disk: dict[int, Entry] = {}
        # When they were first sent, in milliseconds, if they may have arrived.
        self._sent: dict[int, int] = {}

    def __len__(self) -> int:
        """Tell how many are only in memory."""
        return len(self._in_memory)

    def lend(self, entries: Iterable[Entry]) -> list[Entry]:
        """Give them numbers."""
        lent = [entry._replace(sequence=next(self._numbers)) for entry in entries]
        self._in_memory.update((entry.sequence, entry) for entry in lent)
        return lent

    def located(self, entries: Sequence[Entry]) -> list[Entry]:
        """Give the same events as they are now: those that have come onto the disk with their log."""
        if not self._on_disk:
            return list(entries)
        return [entry if entry.log else self._on_disk.get(entry.sequence, entry) for entry in entries]

    def forget(self, entries: Sequence[Entry]) -> None:
        """Let them go, wherever they are."""
        if not (self._in_memory or self._on_disk):
            return
        written = {(entry.log, entry.sequence): number for number, entry in self._on_disk.items()}
        for entry in entries:
            number = written.get((entry.log, entry.sequence)) if entry.log else entry.sequence
            if number:
                for known in (self._in_memory, self._on_disk, self._sent):
                    known.pop(number, None)

    def send(self, entries: Iterable[Entry], now_ms: int) -> list[Mark]:
        """Note that those that are only in memory are sent; give what is new of it, by their numbers."""
        if not self._in_memory:
            return []
        new = [entry.sequence for entry in entries if not entry.log and entry.sequence not in self._sent]
        self._sent.update(dict.fromkeys(new, now_ms))
        return [Mark(number, number, now_ms) for number in new]

    def unsend(self, mark: Mark) -> None:
        """Take such a note back."""
        self._sent.pop(mark.first, None)
        entry = self._on_disk.get(mark.first)
        if entry:
            entry.log.log.unmark([Mark(entry.sequence, entry.sequence, mark.time_ms)])

    def was_sent_before(self, entry: Entry, time_ms: int) -> bool:
        """Whether one that is only in memory was sent before this time, and may have arrived."""
        return self._sent.get(entry.sequence, time_ms) < time_ms

    def events(self) -> list[bytes]:
        """Give those that are only in memory, in order."""
        return [entry.event for entry in self._in_memory.values()]

    def are_on_disk(self, log: WaitingLog, numbers: Sequence[int], time_ms: int) -> None:
        """Take note that all of them have come into a log, under these numbers."""
        for sequence, (number, entry) in zip(numbers, self._in_memory.items(), strict=True):
            self._on_disk[number] = Entry(entry.event, entry.queued_at, sequence, log, time_ms)
            if number in self._sent:
                log.log.mark_ambiguous(sequence, sequence, self._sent[number])
        self._in_memory.clear()
