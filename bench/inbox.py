"""What it costs that events, and what access phases captured, outlive the process.

Events on their way through the inbox stand next to a `list` and a `deque` that end with their process, and headers that
are kept from the access to the log phase in memory of the supervisor's next to those that are in the process alone.

    python bench/inbox.py [--rounds 200] [--events 500] [--bytes 700] [--directory /dev/shm]

Each round appends so many events, drains them and advances past them, and keeps the headers of as many requests and
takes them; all candidates take turns in the same process. The figures are medians over the rounds, for each event or
request; the ring goes round many times. Fails if an event or a request is missing.
"""

from __future__ import annotations

import argparse
import itertools
import os
import secrets
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

from kong_metering.captured import CapturedHeaders
from kong_metering.capturememory import CaptureMemory
from kong_metering.clock import SystemClock
from kong_metering.errors import InboxError
from kong_metering.inbox.inbox import Inbox
from kong_metering.inbox.place import Place
from kong_metering.spool.options import INBOX_DIRECTORY

_QUEUE = 1


@dataclass
class Captures:
    """Headers that are kept for the log phase, and what keeping and taking took, in seconds."""

    name: str
    captured: CapturedHeaders
    seconds: list[float] = field(default_factory=list)

    def run(self, requests: Sequence[str]) -> None:
        """Do one round: so many requests are under way at its middle."""
        keep, take = self.captured.keep, self.captured.take
        began = time.perf_counter()
        for request_id in requests:
            keep(request_id, {"x-tenant-id": "acme", ":asked": "x-tenant-id"})
        found = sum(take(request_id) is not None for request_id in requests)
        self.seconds.append(time.perf_counter() - began)
        if found != len(requests):
            raise SystemExit(f"{self.name}: {len(requests)} requests were kept, and {found} found")


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
        try:
            shared = Inbox.open(Place(options.directory, Path(root)), _no_wake)
        except InboxError as error:
            raise SystemExit(f"no shared memory: {error}") from error
        inboxes = [shared, Inbox.in_memory(_no_wake)]
        captures = [_captures("in the process alone", None), _captures("in the supervisor's memory as well", _memory())]
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
            requests = [secrets.token_hex(16) for _ in range(options.events)]
            for each in captures:
                each.run(requests)
        for inbox in inboxes:
            inbox.close()
    CONSOLE.print(f"{options.rounds} rounds of {options.events:,} events of {options.bytes:,} bytes; none is missing")
    CONSOLE.print(_table(candidates, options.events))
    CONSOLE.print(_captures_table(captures, options.events))
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


def _memory() -> CaptureMemory:
    return CaptureMemory(os.memfd_create("bench-inbox"))


def _captures(name: str, memory: CaptureMemory | None) -> Captures:
    captured = CapturedHeaders(SystemClock())
    if memory is not None:
        captured.mirror_to(memory)
    return Captures(name, captured)


def _captures_table(captures: list[Captures], requests: int) -> Table:
    table = Table("headers of a request", Column("keep and take µs", justify="right"))
    for each in captures:
        table.add_row(each.name, f"{median(each.seconds) / requests * 1e6:.2f}")
    return table


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
