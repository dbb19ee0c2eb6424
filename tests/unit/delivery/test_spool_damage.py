"""Damage to what waits on disk: it costs what it hit, is counted and set aside, and holds nothing else."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING
from zlib import crc32

import pytest

from kong_metering.spool.directory import survey
from kong_metering.stats import Snapshot
from tests.support.waiting import wait_until
from tests.unit.delivery.fakes import IDENTITY, REFUSED, FakeEndpoint, letters, on_disk, take_all
from tests.unit.eventlog.helpers import overwrite

if TYPE_CHECKING:
    from tests.support.loglines import LogLines
    from tests.unit.delivery.conftest import ProcessMaker
    from tests.unit.delivery.fakes import Process, SpooledQueue

EVENTS = [b"event number %04d " % number + b"." * 80 for number in range(100)]


def left(process: ProcessMaker, events: list[bytes] = EVENTS) -> Process:
    """Let a process leave events on disk."""
    it = process().open(FakeEndpoint(lambda _: REFUSED))
    it.put_on_disk(*events)
    it.process.close()
    return it.process


def segment(root: Path) -> Path:
    (path,) = root.rglob("*.seg")
    return path


def flip(path: Path, within: bytes) -> None:
    data = path.read_bytes()
    at = data.index(within) + 3
    overwrite(path, at, bytes([data[at] ^ 1]))


def take_over(process: ProcessMaker, delivered: int) -> SpooledQueue:
    """Let the next process deliver what it can."""
    it = process().open(max_batch_size=10)
    wait_until(lambda: it.process.account().delivered == delivered, "all that can be read is delivered")
    it.process.settle()
    return it


def unbalanced(it: SpooledQueue, before: Process, events: int = 0) -> None:
    """Take note that the one before left more than could be adopted, for the balance."""
    missing = before.account().left - it.process.account().adopted - events
    it.process.from_strangers -= missing


@pytest.mark.parametrize("number", [0, 1, 50, 98])
def test_a_flipped_bit_costs_one_event_which_is_counted_and_told_of(
    process: ProcessMaker, root: Path, log: LogLines, number: int
) -> None:
    left(process)
    flip(segment(root), EVENTS[number])
    it = take_over(process, 99)
    assert it.process.account() == Snapshot(adopted=100, delivered=99, dead_letters={"unreadable": 1})
    assert it.endpoint.delivered == [event for event in EVENTS if event != EVENTS[number]]
    it.process.close()
    (stored,) = letters(root)
    assert stored.letter.reason == "unreadable"
    assert stored.letter.queue == IDENTITY
    (kept,) = (path for path in root.rglob("damaged/**/*") if path.is_file() and path.name.endswith(".bytes"))
    assert kept.name in stored.letter.answer
    assert EVENTS[number][10:] in kept.read_bytes()
    assert len(log.with_text("found in the spool: ")) == 1


def test_damage_that_the_bounds_come_upon_first_is_counted_as_well(process: ProcessMaker, root: Path) -> None:
    left(process)
    for number in (0, 1, 2):
        flip(segment(root), EVENTS[number])
    it = process().open(FakeEndpoint(lambda _: REFUSED), max_batch_size=10)
    it.endpoint.hold()
    wait_until(lambda: it.process.account().adopted, "they are taken over")
    for bounded in it.backlog.chores.bounded():
        bounded.oldest_ms()
    it.endpoint.decide = take_all
    it.endpoint.let_go()
    assert it.process.settle() == Snapshot(adopted=100, delivered=97, dead_letters={"unreadable": 3})


def test_a_queue_whose_only_event_is_damaged_comes_to_an_end(process: ProcessMaker, root: Path) -> None:
    left(process, EVENTS[:2])
    flip(segment(root), EVENTS[0])
    it = process().open(FakeEndpoint(lambda _: REFUSED), max_batch_size=1)
    it.process.wait_for_a_round()
    wait_until(lambda: it.process.account().dead_letters == {"unreadable": 1}, "it is counted")
    assert it.queue.waiting == it.process.account().waiting == 1


def test_a_torn_tail_costs_nothing(process: ProcessMaker, root: Path) -> None:
    before = left(process)
    path = segment(root)
    path.write_bytes(path.read_bytes()[:-50])
    it = take_over(process, 99)
    unbalanced(it, before)
    assert it.process.account() == Snapshot(adopted=99, delivered=99)
    assert it.endpoint.delivered == EVENTS[:99]


def test_a_zeroed_header_costs_nothing_but_is_told_of(process: ProcessMaker, root: Path, log: LogLines) -> None:
    left(process)
    overwrite(segment(root), 0, bytes(32))
    it = take_over(process, 100)
    assert it.endpoint.delivered == EVENTS
    assert log.with_text("found in the spool")


def test_a_missing_segment_costs_its_events_alone(process: ProcessMaker, root: Path) -> None:
    events = [b"%03d" % number + b"x" * 900_000 for number in range(15)]
    it = process().open(FakeEndpoint(lambda _: REFUSED))
    for event in events:
        it.put_on_disk(event)
    it.process.close()
    paths = sorted(root.rglob("*.seg"))
    assert len(paths) > 3
    paths[1].unlink()
    following = process().open(max_batch_size=10)
    wait_until(lambda: following.process.account().adopted, "they are taken over")
    account = following.process.settle()
    assert account.adopted == account.delivered + account.dead_letters["unreadable"] == 15
    assert account.dead_letters["unreadable"] == 4
    assert following.endpoint.delivered == [*events[:4], *events[8:]]


def test_garbage_in_the_spool_is_left_alone_and_in_nobodys_way(process: ProcessMaker, root: Path) -> None:
    left(process)
    part = segment(root).parents[1]
    (root / "proc-garbage").mkdir()
    (root / "proc-garbage" / "notes").write_text("not a log")
    (root / "notes").write_text("not a part")
    (part / "queue").mkdir()
    (part / "queue" / "notes").write_text("not a log")
    (segment(root).parent / "notes").write_text("not a segment")
    it = take_over(process, 100)
    assert it.endpoint.delivered == EVENTS
    it.process.close()
    assert len(list(root.rglob("notes"))) >= 3


def newer_segment(path: Path) -> None:
    start = path.read_bytes()[:8] + struct.pack("<I", 7)
    overwrite(path, 0, start + struct.pack("<I", crc32(start)))


def newer_position(path: Path) -> None:
    position = path.with_name("position")
    start = position.read_bytes()[:8]
    start = (start if start.strip(b"\0") else position.read_bytes()[4096:4104]) + struct.pack("<I", 7)
    for offset in (0, 4096):
        overwrite(position, offset, start + struct.pack("<I", crc32(start)))


def newer_identity(path: Path) -> None:
    for name in ("queue.json", "queue.json.copy"):
        members = json.loads(path.with_name(name).read_bytes())
        del members["checksum"]
        members["format_version"] = 7
        members["checksum"] = crc32(json.dumps(members, sort_keys=True).encode("ascii"))
        path.with_name(name).write_text(json.dumps(members))


@pytest.mark.parametrize("newer", [newer_segment, newer_position, newer_identity])
@pytest.mark.parametrize("is_open", [True, False])
def test_a_newer_format_is_left_untouched_and_said(
    process: ProcessMaker, root: Path, log: LogLines, newer: Callable[[Path], None], *, is_open: bool
) -> None:
    before = left(process)
    newer(segment(root))
    bytes_before = {path: path.read_bytes() for path in root.rglob("*/*/*") if path.name != "lock"}
    it = process(max_bytes=10)
    if is_open:
        queue = it.open()
        queue.put(b"own")
        it.settle()
    wait_until(lambda: log.with_text("they cannot be read"), "it is said")
    for _ in range(3):
        it.wait_for_a_round()
    it.close()
    assert {path: path.read_bytes() for path in bytes_before} == bytes_before
    assert len(log.with_text("update")) == 1
    # The balance at the end of the test cannot read it either.
    it.from_strangers = -before.account().left
    root.rename(root.with_name("aside"))


def test_a_damaged_position_delivers_again_rather_than_losing(process: ProcessMaker, root: Path) -> None:
    left(process)
    overwrite(segment(root).with_name("position"), 0, b"\xff" * 8192)
    it = take_over(process, 100)
    assert it.endpoint.delivered == EVENTS


@pytest.mark.parametrize("copies", [1, 2])
def test_damage_to_the_owners_name_is_survived_once(process: ProcessMaker, root: Path, copies: int) -> None:
    left(process)
    for name in ("queue.json", "queue.json.copy")[:copies]:
        segment(root).with_name(name).write_bytes(b"{}")
    if copies == 1:
        assert take_over(process, 100).endpoint.delivered == EVENTS
        return
    it = process()
    it.open()
    it.look_at_free_logs()
    assert on_disk(root) == EVENTS
    wait_until(lambda: [one.identity for one in survey(root) if one.holder is None] == [None], "it is free again")
