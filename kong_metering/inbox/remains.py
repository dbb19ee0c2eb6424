"""What a dead process's ring has left for each log, without what that log has already; nothing is changed here."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kong_metering.errors import SpoolFormatError
from kong_metering.eventlog.format import segment_first
from kong_metering.eventlog.log import EventLog
from kong_metering.spool.delivered import kept_of, read_segment
from kong_metering.spool.free import PART

if TYPE_CHECKING:
    from kong_metering.eventlog.format import StoredEvent
    from kong_metering.inbox.queues import QueueList
    from kong_metering.spool.identity import QueueIdentity

# Told how many of the unread events of each queue are in logs by now.
NotePoured = Callable[[Mapping[int, int]], None]


class Remains:
    """The events of one queue that a ring still has, in order, and where its log was, below the spool's root."""

    def __init__(
        self, counts: dict[int, int], identity: QueueIdentity | None, key: str, note_poured: NotePoured
    ) -> None:
        self.identity = identity
        self.key = key
        self.home: str | None = None
        self.events: list[bytes] = []
        self._numbers: list[int] = []
        self._counts = counts
        self._note_poured = note_poured

    def add(self, number: int, event: bytes) -> None:
        """Put an event behind the others."""
        self._numbers.append(number)
        self.events.append(event)

    def leave_out(self, count: int) -> None:
        """Forget the first ones, which are in a log, and note that."""
        if not count:
            return
        for number in self._numbers[:count]:
            self._counts[number] = self._counts.get(number, 0) + 1
        del self._numbers[:count], self.events[:count]
        self._note_poured(self._counts)

    def leave_out_known(self, log: Path, view: EventLog | None = None) -> int:
        """Leave out the longest run of the first events that is the end of the log; tell how many.

        `view`: the log, if it is open; it may be gone.
        """
        end, done = _state_of(log) if view is None else (view.next_sequence, view.done_up_to)
        tail = _tail(log, end, len(self.events))
        known = self._known_by(tail)
        if not known and end is not None and 0 < end - 1 - len(tail) <= done:
            known = self._known_behind(tail)
        self.leave_out(known)
        return known

    def _known_by(self, tail: list[bytes]) -> int:
        events = self.events
        lengths = range(len(tail), 0, -1)
        return next((length for length in lengths if tail[-length:] == events[:length]), 0)

    def _known_behind(self, tail: list[bytes]) -> int:
        """Return how many events the log had where the first of them are gone, and this is all that is left of it.

        They were written in this order, so that what stands before these here was in the log, and settled.
        """
        events = self.events
        ends = range(len(tail) + 1, len(events) + 1) if tail else ()
        return next((end for end in ends if events[end - len(tail) : end] == tail), 0)


def sorted_out(listed: QueueList, events: Sequence[tuple[int, bytes]], note_poured: NotePoured) -> list[Remains]:
    """Sort a ring's unread events by the logs that they belong to, without those that were poured already."""
    to_pass = dict(listed.poured)
    by_key: dict[str, Remains] = {}
    for number, event in events:
        if to_pass.get(number, 0):
            to_pass[number] -= 1
            continue
        queue = listed.queues.get(number)
        # Whose events they are is lost with the list's line; they are kept all the same.
        key = queue.identity.key if queue else f"unknown-{number}"
        if key not in by_key:
            by_key[key] = Remains(listed.poured, queue.identity if queue else None, key, note_poured)
        by_key[key].home = (queue and queue.directory) or by_key[key].home
        by_key[key].add(number, event)
    return list(by_key.values())


def parts_of(stem: str) -> Iterator[str]:
    """Name the parts of the spool, one after the other, that a ring is poured into where its own logs are not there."""
    return (f"{PART}{stem}{suffix}" for suffix in itertools.chain([""], (f"-{n}" for n in itertools.count(1))))


def _state_of(log: Path) -> tuple[int | None, int]:
    """Return the next number of a log that may be somebody else's, None when it is gone, and how far it is done."""
    with contextlib.suppress(FileNotFoundError), contextlib.closing(EventLog.view(log)) as view:
        return view.next_sequence, view.done_up_to
    return None, 0


def _tail(log: Path, end: int | None, count: int) -> list[bytes]:
    """Read the last events of a log, `count` at most, in order.

    They may be done long ago, and their segments among what was delivered.
    """
    newest_first: list[bytes] = []
    for first, events in _segments(log):
        for event in reversed(events):
            # What is damaged cannot be compared, and so ends the run.
            if end not in (None, event.sequence + 1) or len(newest_first) == count:
                break
            newest_first.append(event.payload)
            end = event.sequence
        if first != end:
            break
    return newest_first[::-1]


def _segments(log: Path) -> Iterator[tuple[int, list[StoredEvent]]]:
    """Give the events of a log by their segments, the last one first, and behind them what is kept of it."""
    for path in sorted(log.glob("*.seg"), reverse=True):
        if (first := segment_first(path.name)) is not None:
            yield first, list(read_segment(path, first))
    # What is kept of an earlier log of this name follows nothing. Without what cannot be read all is poured.
    with contextlib.suppress(OSError, SpoolFormatError):
        for kept in kept_of(log.parent.parent, log.parent.name, log.name):
            yield kept.first, list(kept.events())
