"""What an event costs on its way through the inbox, next to a `list` and a `deque` that do not outlive their process.

    python bench/inbox.py [--rounds 200] [--events 500] [--bytes 700] [--directory /dev/shm]

Each round appends so many events, drains them and advances past them; all candidates take turns in the same process.
The figures are medians over the rounds, for each event; the ring goes round many times. Fails if an event is missing.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from rich.table import Column, Table
from terminal import CONSOLE, argument_parser, say_progress

from kong_metering.inbox.inbox import Inbox
from kong_metering.inbox.place import Place
from kong_metering.spool.options import INBOX_DIRECTORY

_QUEUE = 1


@dataclass
class Candidate:
    """Something that takes events and gives them again, and what it took for that, in seconds."""

    name: str
    append: Callable[[int, bytes], object]
    take: Callable[[int], int]
    append_seconds: list[float] = field(default_factory=list)
    take_seconds: list[float] = field(default_factory=list)

    def run(self, events: Sequence[bytes]) -> None:
        """Do one round."""
        append = self.append
        began = time.perf_counter()
        for event in events:
            append(_QUEUE, event)
        appended = time.perf_counter()
        count = self.take(len(events))
        taken = time.perf_counter()
        if count != len(events):
            raise SystemExit(f"{self.name}: {len(events)} events went in, and {count} came out")
        self.append_seconds.append(appended - began)
        self.take_seconds.append(taken - appended)


def main() -> int:
    """Run what the arguments ask for."""
    options = _options()
    with tempfile.TemporaryDirectory(prefix="bench-inbox-") as root:
        inboxes = [
            Inbox.open(Place(options.directory, Path(root)), _no_wake),
            Inbox.in_memory(_no_wake),
        ]
        if inboxes[0].name is None:
            return 1
        candidates = [
            _of_list(),
            _of_deque(),
            _of_inbox("inbox, in memory alone", inboxes[1]),
            _of_inbox(f"inbox, in a file in {options.directory}", inboxes[0]),
        ]
        numbers = itertools.count()
        for number in range(options.rounds):
            say_progress(f"round {number + 1} of {options.rounds}")
            events = [(b"%d:" % next(numbers)).ljust(options.bytes, b"x") for _ in range(options.events)]
            for candidate in candidates:
                candidate.run(events)
        for inbox in inboxes:
            inbox.close()
    CONSOLE.print(f"{options.rounds} rounds of {options.events:,} events of {options.bytes:,} bytes; none is missing")
    CONSOLE.print(_table(candidates, options.events))
    return 0


def _options() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--events", type=int, default=500, help="in each round; those of 8 MB fit the ring")
    parser.add_argument("--bytes", type=int, default=700, help="of each event")
    parser.add_argument("--directory", type=Path, default=INBOX_DIRECTORY, help="where the ring's file is made")
    return parser.parse_args()


def _no_wake() -> None:
    """Nobody sleeps."""


def _of_list() -> Candidate:
    held: list[tuple[int, bytes]] = []

    def append(queue: int, event: bytes) -> None:
        held.append((queue, event))

    def take(limit: int) -> int:
        taken = held[:limit]
        del held[:limit]
        return len(taken)

    return Candidate("list.append", append, take)


def _of_deque() -> Candidate:
    held: deque[tuple[int, bytes]] = deque()

    def append(queue: int, event: bytes) -> None:
        held.append((queue, event))

    def take(limit: int) -> int:
        return len([held.popleft() for _ in range(min(limit, len(held)))])

    return Candidate("deque.append", append, take)


def _of_inbox(name: str, inbox: Inbox) -> Candidate:
    def take(limit: int) -> int:
        drained = inbox.drain(limit)
        inbox.advance(drained)
        return len(drained.events)

    return Candidate(name, inbox.append, take)


def _table(candidates: list[Candidate], events: int) -> Table:
    titles = ("append µs", "drain and advance µs", "both µs", "the fastest round's append µs")
    table = Table("of an event", *(Column(title, justify="right") for title in titles))
    for one in candidates:
        append, take = median(one.append_seconds), median(one.take_seconds)
        figures = (append, take, append + take, min(one.append_seconds))
        table.add_row(one.name, *(f"{figure / events * 1e6:.2f}" for figure in figures))
    return table


if __name__ == "__main__":
    sys.exit(main())
