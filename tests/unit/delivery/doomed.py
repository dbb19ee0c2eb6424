"""Processes with a spool that are killed, each a program of its own: `doomed.py STORY ROOT INBOX`.

INBOX is a directory for shared memory, or `-` for none. Tells what it did on its standard output, a line each.
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

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

IDENTITIES = [replace(IDENTITY, entity_id=f"{number}-entity", name=f"queue {number}") for number in range(3)]


def tell(words: str) -> None:
    os.write(1, f"{words}\n".encode())


def put_for_ever(queues: list[SpooledQueue]) -> None:
    """Put one event after the other, and tell the number of each whose `put` returned."""
    number = 0
    while True:
        queues[number % len(queues)].put(b"%d" % number)
        tell(str(number))
        number += 1


def works(process: Process) -> None:
    """Put events into three queues, until somebody kills it."""
    put_for_ever([process.open(down(), identity) for identity in IDENTITIES])


def hangs(process: Process) -> None:
    """Do the same on a disk that hangs from the 30th event on: no later one is written."""
    queues = [process.open(down(), identity) for identity in IDENTITIES]
    for number in range(30):
        queues[number % 3].put_on_disk(b"%d" % number)
    disk = HangingDisk()
    disk.hang()
    with mock.patch.object(os, "pwrite", disk.pwrite):
        put_for_ever(queues)


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


STORIES = {"works": works, "hangs": hangs, "spills": spills, "writes": writes, "overflows": overflows}

if __name__ == "__main__":
    _, story, root, inbox = sys.argv
    STORIES[story](Process(Path(root), SteeredClock(), None if inbox == "-" else Path(inbox)))
