"""What was in memory alone, and was spilled into a log while couriers held it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import pytest

from kong_metering.backlog.source import Entry, MemorySource

if TYPE_CHECKING:
    from kong_metering.backlog.source import Source


class UnsavedLog:
    """A log that lets entries go, and cannot write that down."""

    def __init__(self) -> None:
        self.settled: list[bytes] = []
        self.undelivered: list[bytes] = []

    def append(self, events: Sequence[bytes], now_ms: int, now: float) -> None:  # noqa: ARG002 - as a log
        assert not events

    def append_in_flight(self, events: Sequence[bytes], now_ms: int) -> list[Entry]:
        return [Entry(event, number, cast("Source", self), now_ms) for number, event in enumerate(events, 1)]

    def note_undelivered(self, entries: Sequence[Entry]) -> None:
        self.undelivered += [entry.event for entry in entries]

    def settle(self, entries: Sequence[Entry]) -> int:
        self.settled += [entry.event for entry in entries]
        raise OSError(28, "no space")


def in_flight(memory: MemorySource) -> list[Entry]:
    memory.add([b"1", b"2", b"3"], 0.0)
    return memory.read(10, 1000)


def test_all_are_settled_in_the_log_though_it_cannot_write_down_the_first() -> None:
    memory, log = MemorySource(), UnsavedLog()
    entries = in_flight(memory)
    memory.spill(log, 0, 0.0)
    with pytest.raises(OSError, match="no space"):
        memory.settle(entries)
    assert log.settled == [b"1", b"2", b"3"]


def test_it_is_noted_in_the_log_that_they_were_not_delivered() -> None:
    memory, log = MemorySource(), UnsavedLog()
    entries = in_flight(memory)
    memory.note_undelivered(entries)
    memory.spill(log, 0, 0.0)
    memory.note_undelivered(entries[1:])
    assert log.undelivered == [b"2", b"3"]


def test_so_are_those_that_were_settled_while_they_were_spilled() -> None:
    memory = MemorySource()
    entries = in_flight(memory)

    class Slow(UnsavedLog):
        def append_in_flight(self, events: Sequence[bytes], now_ms: int) -> list[Entry]:
            memory.settle(entries)
            return super().append_in_flight(events, now_ms)

    log = Slow()
    with pytest.raises(OSError, match="no space"):
        memory.spill(log, 0, 0.0)
    assert log.settled == [b"1", b"2", b"3"]
    assert memory.is_empty
