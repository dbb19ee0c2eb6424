"""A log as a queue's source, while the janitor looks on without its lock."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest

from kong_metering.backlog.logsource import LogSource
from kong_metering.spool.delivered import Delivered
from kong_metering.spool.directory import SpoolDirectory
from kong_metering.spool.identity import QueueIdentity
from kong_metering.spool.settled import delivered_events

QUEUE = QueueIdentity("id-1", "metering", "https://ingest.example/")


def test_a_log_that_was_made_here_and_changes_its_queue_is_not_in_doubt(tmp_path: Path) -> None:
    held = SpoolDirectory(tmp_path).log_for(QUEUE)
    LogSource(held).append([b"one", b"two"], 1, 0.0)
    assert LogSource(held).unread == 2
    assert held.log.marks == ()


def test_what_others_overtook_is_written_once_more_and_counts_as_delivered_from_one_place(tmp_path: Path) -> None:
    spool = SpoolDirectory(tmp_path, delivered=Delivered(tmp_path, lambda: 1))
    held = spool.log_for(QUEUE)
    source = LogSource(held)
    source.append([b"one", b"two", b"three"], 1, 0.0)
    source.settle(source.read(3, 1 << 20)[1:])
    source.close_in_order()
    held.log.done(4)
    spool.retire(held)
    spool.close()
    assert sorted(each.payload for each in delivered_events(tmp_path, lambda _: True)) == [b"one", b"three", b"two"]


def test_what_one_process_dropped_does_not_count_as_delivered_when_the_next_one_delivers_the_rest(
    tmp_path: Path,
) -> None:
    delivered = Delivered(tmp_path, lambda: 1)
    for first in (True, False):
        spool = SpoolDirectory(tmp_path, delivered=delivered)
        held = spool.log_for(QUEUE) if first else spool.adopt().logs[0]
        source = LogSource(held)
        if first:
            source.append([b"one", b"two"], 1, 0.0)
            source.append([b"three", b"four"], 3, 0.0)
            source.settle(source.read(1, 1 << 20))
            assert source.drop_older_than(2) == 1
        source.settle(source.read(1, 1 << 20))
        spool.retire(held)
        spool.close()
    assert [each.payload for each in delivered_events(tmp_path, lambda _: True)] == [b"one", b"three", b"four"]


@pytest.mark.parametrize("where", ["in memory", "on disk"])
def test_what_was_read_and_not_settled_is_never_taken_for_settled(tmp_path: Path, where: str) -> None:
    """Or the log is given up while its events are on their way, and whoever adopts it sends them again."""
    held, interval, is_over = SpoolDirectory(tmp_path).log_for(QUEUE), sys.getswitchinterval(), threading.Event()
    sources = [LogSource(held)]
    too_early: list[int] = []
    # Odd while something waits; another number each time.
    waits = 0

    def look_on() -> None:
        while not is_over.is_set():
            before, source = waits, sources[-1]
            if before % 2 and source.is_settled and waits == before:
                too_early.append(before)

    looking = threading.Thread(target=look_on)
    sys.setswitchinterval(1e-6)
    looking.start()
    try:
        for _ in range(3000):
            sources[-1].append([b"event"], 1, 0.0)
            if where == "on disk":
                sources.append(LogSource(held))
            waits += 1
            entries = sources[-1].read(10, 1 << 20)
            waits += 1
            sources[-1].settle(entries)
    finally:
        is_over.set()
        looking.join()
        sys.setswitchinterval(interval)
    assert too_early == []
