"""Processes with a spool that are killed, each a program of its own: `doomed.py STORY ROOT INBOX`.

INBOX is a directory for shared memory, or `-` for none. Tells what it did on its standard output, a line each.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from unittest import mock

from kong_metering.inbox.place import Place
from tests.support.waiting import wait_until
from tests.unit.delivery.fakes import (
    IDENTITY,
    FakeEndpoint,
    HangingDisk,
    Process,
    SpooledQueue,
    SteeredClock,
    broken_disk,
    down,
    numbered,
    on_disk,
)
from tests.unit.inbox.helpers import unread

IDENTITIES = [replace(IDENTITY, entity_id=f"{number}-entity", name=f"queue {number}") for number in range(3)]


def tell(words: str) -> None:
    os.write(1, f"{words}\n".encode())


def put_for_ever(queues: list[SpooledQueue], meanwhile: Callable[[], None] | None = None) -> None:
    """Put one event after the other, and tell the number of each whose `put` returned.

    `meanwhile`: what happens when 300 are put.
    """
    number = 0
    while True:
        queues[number % len(queues)].put(b"%d" % number)
        tell(str(number))
        number += 1
        if number == 300 and meanwhile is not None:
            meanwhile()


def works(process: Process) -> None:
    """Put events into three queues, until somebody kills it."""
    put_for_ever([process.open(down(), identity) for identity in IDENTITIES])


def hangs(process: Process, meanwhile: Callable[[], None] | None = None) -> None:
    """Do the same on a disk that hangs from the 30th event on: no later one is written."""
    queues = [process.open(down(), identity) for identity in IDENTITIES]
    for number in range(30):
        queues[number % 3].put_on_disk(b"%d" % number)
    disk = HangingDisk()
    disk.hang()
    with mock.patch.object(os, "pwrite", disk.pwrite):
        put_for_ever(queues, meanwhile)


def is_evicted(process: Process) -> None:
    """Do that while somebody removes all that is in shared memory, and go on when there is a ring again."""
    inbox = process.inbox
    assert inbox is not None

    def evict() -> None:
        for place in inbox.iterdir():
            shutil.rmtree(place)
        wait_until(lambda: has_events(inbox.glob("*/*.ring")), "there is a ring again")

    hangs(process, evict)


def loses_its_spool(process: Process) -> None:
    """Do that while somebody moves the spool's directory away, and go on when the ring is where the new one's is."""
    inbox = process.inbox
    assert inbox is not None

    def move_away() -> None:
        process.root.rename(process.root.with_name("moved"))
        place = Place(inbox, process.root)
        wait_until(
            lambda: process.root.is_dir() and has_events(place.path.glob("*.ring")), "the ring is in the new place"
        )

    hangs(process, move_away)


def has_events(rings: Iterable[Path]) -> bool:
    return any(unread(ring.read_bytes()) for ring in rings)


def spills(process: Process) -> None:
    """Have events in memory and in flight while the disk refuses them, and die when they are on disk."""
    it = process.open(max_batch_size=5)
    it.endpoint.hold()
    with broken_disk():
        it.put(*numbered(20))
        it.endpoint.wait_for_request()
    wait_until(lambda: len(on_disk(process.root)) == 20, "they are on disk")
    os.kill(os.getpid(), signal.SIGKILL)


def writes(process: Process) -> None:
    """Have 100 events written, put 100 others, and die at once."""
    it = process.open(FakeEndpoint(), max_coalescing_delay=3600, max_batch_size=1000)
    it.put_on_disk(*numbered(100))
    it.put(*numbered(100, first=100))
    os.kill(os.getpid(), signal.SIGKILL)


def overflows(process: Process) -> None:
    """Put more than shared memory holds on a disk that hangs, end so, tell what is left and what is not, and die."""
    it = process.open(down())
    disk = HangingDisk()
    disk.hang()
    with mock.patch.object(os, "pwrite", disk.pwrite):
        it.put(b"0")
        disk.wait_for_write()
        it.put(*[b"%d" % number + b"x" * 500_000 for number in range(1, 40)])
        it.queue.end(process.clock.monotonic(), is_written=False)
        account = process.account()
        tell(f"{account.left} {account.dropped.get('process_ended', 0)}")
        os.kill(os.getpid(), signal.SIGKILL)


STORIES: dict[str, Callable[[Process], None]] = {
    "works": works,
    "hangs": hangs,
    "is evicted": is_evicted,
    "loses its spool": loses_its_spool,
    "spills": spills,
    "writes": writes,
    "overflows": overflows,
}

if __name__ == "__main__":
    _, story, root, inbox = sys.argv
    STORIES[story](Process(Path(root), SteeredClock(), None if inbox == "-" else Path(inbox)))
