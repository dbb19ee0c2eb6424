"""A spool on a disk that is full, read-only, gone or in the way: metering goes on, says so once, and recovers."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest

from kong_metering.delivery.succession import Succession
from kong_metering.spool.identity import QueueIdentity
from kong_metering.stats import Snapshot
from kong_metering.trial.outcome import Delivered
from tests.support.waiting import wait_until
from tests.unit.delivery.fakes import (
    DOWN,
    REFUSED,
    FakeEndpoint,
    Refusing,
    SpooledQueue,
    broken_disk,
    down,
    letters,
    numbered,
    on_disk,
    take_all,
)
from tests.unit.eventlog.helpers import mounted

if TYPE_CHECKING:
    from tests.support.loglines import LogLines
    from tests.unit.delivery.conftest import ProcessMaker

OTHER = QueueIdentity("11111111-one", "metering", "https://ingest.test/corrected")
CANNOT = "EVENTS CANNOT BE WRITTEN TO DISK and wait in memory"


def remove(root: Path) -> None:
    """Remove a directory that somebody may be writing to: he finds it gone at once, whatever it takes."""
    shutil.rmtree(root.rename(root.with_name("removed")))


def wait_for_memory(it: SpooledQueue) -> None:
    wait_until(lambda: it.backlog.is_refused, "the disk refuses")


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS, errno.EIO, errno.EDQUOT])
def test_events_are_delivered_from_memory_while_the_disk_refuses_and_it_is_said_once(
    process: ProcessMaker, root: Path, log: LogLines, error: int
) -> None:
    it = process().open(max_batch_size=10)
    it.put_on_disk(*numbered(5))
    it.process.settle()
    with broken_disk(error):
        it.put(*numbered(100, first=5))
        assert it.process.settle() == Snapshot(accepted=105, delivered=105)
    assert it.endpoint.delivered == numbered(105)
    (said,) = log.with_text(CANNOT)
    assert os.strerror(error) in said[1]
    it.endpoint.hold()
    it.put(b"after")
    wait_until(lambda: on_disk(root) == [b"after"], "events are on disk again, within a round")
    assert len(log.with_text("events are written to disk again")) == 1


def test_a_disk_that_works_again_is_found_by_the_first_event(process: ProcessMaker, root: Path) -> None:
    it = process().open()
    it.put_on_disk(b"first")
    it.process.settle()
    for number in range(20):
        with broken_disk():
            it.put(b"in memory %d" % number)
            it.process.settle()
        wait_until(lambda: not it.backlog.is_refused, "it works again")
        copy = it.endpoint.requests.copy()
        it.endpoint.hold()
        it.put(b"on disk %d" % number)
        wait_until(lambda number=number: on_disk(root) == [b"on disk %d" % number], "on disk")  # type: ignore[misc]
        it.endpoint.let_go()
        it.process.settle()
        assert it.endpoint.requests[len(copy) :] == [[b"on disk %d" % number]]


def test_that_the_disk_works_again_is_seen_by_a_queue_that_has_nothing_to_do(
    process: ProcessMaker, root: Path, log: LogLines
) -> None:
    it = process().open()
    it.put_on_disk(b"first")
    it.process.settle()
    with broken_disk():
        it.put(*numbered(10))
        it.process.settle()
        it.process.wait_for_a_round()
        assert it.backlog.disk_state == "refuses"
    wait_until(lambda: it.backlog.disk_state == "works", "it is seen")
    assert len(log.with_text(CANNOT)) == 1
    (said,) = log.with_text("events are written to disk again")
    assert "10 went to memory meanwhile" in said[1]
    wait_until(lambda: len(list(root.glob("*/*/position"))) == 1, "the log from before is gone")
    it.put(b"after")
    assert it.process.settle() == Snapshot(accepted=12, delivered=12)


@pytest.mark.parametrize(("settings", "kept"), [({"max_entries": 10}, 10), ({"max_bytes": 30}, 10)])
def test_memory_keeps_to_the_parameters_while_the_disk_refuses(
    process: ProcessMaker, log: LogLines, settings: dict[str, Any], kept: int
) -> None:
    it = process().open(down(), **settings)
    with broken_disk():
        it.put(*[b"%03d" % number for number in range(100)])
        wait_for_memory(it)
        it.endpoint.wait_for_request()
        it.put(*[b"%03d" % number for number in range(100, 200)])
        wait_until(lambda: it.queue.waiting <= kept + 1, "the oldest are dropped")
        it.endpoint.decide = lambda _: Delivered()
        account = it.process.settle()
    assert account.dropped == {"queue_full": 200 - account.delivered}
    assert it.endpoint.delivered[-kept:] == [b"%03d" % number for number in range(200 - kept, 200)]
    assert len(log.with_text("the spool cannot be written, and memory is full")) == 1


def test_what_was_in_memory_is_written_when_the_disk_works_again(
    process: ProcessMaker, root: Path, log: LogLines
) -> None:
    it = process().open(down(), max_batch_size=5)
    it.put_on_disk(*numbered(3))
    with broken_disk():
        it.put(*numbered(20, first=3))
        wait_for_memory(it)
        assert on_disk(root) == numbered(3)
    wait_until(lambda: on_disk(root) == numbered(23), "all are on disk")
    wait_until(lambda: log.with_text("events are written to disk again"), "it is said")
    it.endpoint.decide = lambda _: Delivered()
    assert it.process.settle() == Snapshot(accepted=23, delivered=23)
    assert it.endpoint.delivered == numbered(23)


@pytest.mark.parametrize("ends", [True, False])
def test_a_batch_that_was_taken_from_memory_is_written_too_when_the_disk_works_again(
    process: ProcessMaker, root: Path, *, ends: bool
) -> None:
    it = process().open(down(), max_batch_size=5)
    with broken_disk():
        it.put(*numbered(20))
        it.endpoint.wait_for_request(10)
    if ends:
        assert it.process.close() == Snapshot(accepted=20, left=20)
        assert on_disk(root) == numbered(20)
        it = process().open(max_batch_size=5)
        assert it.process.settle(adopted=20) == Snapshot(adopted=20, delivered=20)
    else:
        wait_until(lambda: on_disk(root) == numbered(20), "all are on disk")
        it.endpoint.decide = lambda _: Delivered()
        assert it.process.settle() == Snapshot(accepted=20, delivered=20)
        wait_until(lambda: not it.backlog._sources.memory._moved, "they are forgotten")
    assert it.endpoint.delivered == numbered(20)
    assert on_disk(root) == []


def test_what_waits_on_disk_goes_before_what_waits_in_memory(process: ProcessMaker) -> None:
    it = process().open(down(), max_batch_size=5)
    it.put_on_disk(*numbered(20))
    with broken_disk():
        it.put(*numbered(20, first=20))
        wait_for_memory(it)
        it.endpoint.decide = lambda _: Delivered()
        assert it.process.settle() == Snapshot(accepted=40, delivered=40)
    assert it.endpoint.delivered == numbered(40)


def test_events_only_in_memory_are_dropped_and_counted_at_the_end(process: ProcessMaker, log: LogLines) -> None:
    it = process().open(down())
    it.put_on_disk(*numbered(3))
    with broken_disk():
        it.put(*numbered(5))
        wait_for_memory(it)
        assert it.process.close() == Snapshot(accepted=8, left=3, dropped={"process_ended": 5})
    assert log.with_text("5 events were only in memory when the process ended: the spool cannot be written")


def test_dead_letters_wait_for_a_full_disk(process: ProcessMaker, root: Path) -> None:
    it = process().open(FakeEndpoint(Refusing(b"3")))
    it.put_on_disk(b"first")
    it.process.settle()
    with broken_disk():
        it.put(*numbered(10))
        wait_until(lambda: it.process.account().delivered == 10, "the others are delivered")
        assert it.queue.waiting == it.process.account().waiting == 1
    assert it.process.settle() == Snapshot(accepted=11, delivered=10, dead_letters={"rejected": 1})
    assert [stored.letter.event for stored in letters(root)] == [b"3"]


@pytest.mark.parametrize("is_in_the_way", [False, True])
def test_what_waits_in_memory_to_become_a_dead_letter_is_no_other_queues_as_well(
    process: ProcessMaker, root: Path, *, is_in_the_way: bool
) -> None:
    it = process(round_seconds=3600).open(FakeEndpoint(Refusing(b"3")))
    heir = it.process.open(identity=OTHER)
    spooler = it.process.spooler
    it.put(b"first")
    heir.put(b"its first")
    spooler.flush(it.process.clock.monotonic() + 20)
    it.process.settle()
    with broken_disk():
        it.put(*numbered(10))
        wait_until(lambda: it.backlog.letters_pending == 1 and it.queue.waiting == 1, "it is to become a dead letter")
    if is_in_the_way:
        (root / "dead-letters").write_text("in the way")
    it.queue.hand_over(Succession(heir.queue, lambda: False, lambda: spooler.take_over(it.backlog, heir.backlog)))
    wait_until(lambda: it.queue.waiting == heir.queue.waiting == 0, "it has left")
    it.process.close()
    if is_in_the_way:
        assert heir.endpoint.delivered == [b"its first", b"3"]
    else:
        assert heir.endpoint.delivered == [b"its first"]
        assert [stored.letter.event for stored in letters(root)] == [b"3"]


def test_a_disk_that_takes_directories_and_no_bytes_gets_no_directory_for_each_try(
    process: ProcessMaker, root: Path
) -> None:
    it = process().open()
    it.put_on_disk(b"first")
    it.process.settle()
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with mock.patch.object(os, "pwrite", side_effect=full), mock.patch.object(os, "posix_fallocate", side_effect=full):
        it.put(*numbered(10))
        it.process.settle()
        for _ in range(5):
            it.process.wait_for_a_round()
        assert it.backlog.disk_state == "refuses"
        assert len([path for path in root.glob("*/*") if path.is_dir()]) <= 1
    wait_until(lambda: it.backlog.disk_state == "works", "it is seen that it works again")


# -- a real full disk --------------------------------------------------------------------------------------------------


def test_a_full_disk_drains_and_is_written_to_again_without_a_restart(
    process: ProcessMaker, tmp_path: Path, log: LogLines
) -> None:
    with mounted(tmp_path / "small", "size=12m") as small:
        it = process(small / "spool").open(down(), max_batch_size=50)
        events = [b"%06d" % number + b"x" * 10_000 for number in range(1500)]
        for start in range(0, 1500, 100):
            it.put_on_disk(*events[start : start + 100])
        wait_for_memory(it)
        assert 900 < len(on_disk(small / "spool")) < 1400
        it.endpoint.decide = lambda _: Delivered()
        assert it.process.settle() == Snapshot(accepted=1500, delivered=1500)
        assert it.endpoint.delivered == events
        it.endpoint.hold()
        it.put(b"after")
        wait_until(lambda: on_disk(small / "spool") == [b"after"], "it is on disk")
        assert len(log.with_text(CANNOT)) == 1
        it.endpoint.let_go()
        it.process.settle()
        it.process.close()


def test_a_disk_that_others_fill_up_costs_nothing(process: ProcessMaker, tmp_path: Path) -> None:
    with mounted(tmp_path / "small", "size=4m") as small:
        it = process(small / "spool").open(FakeEndpoint(Refusing(b"3")), max_batch_size=10)
        it.put_on_disk(*numbered(3))
        it.process.settle()
        with (small / "filler").open("wb") as filler, contextlib.suppress(OSError):
            while True:
                filler.write(b"x" * 65536)
                filler.flush()
        it.put(b"3", *[b"y" * 5000] * 100)
        wait_until(lambda: it.process.account().delivered >= 103, "all others are delivered")
        (small / "filler").unlink()
        assert it.process.settle() == Snapshot(accepted=104, delivered=103, dead_letters={"rejected": 1})
        it.process.close()


# -- no directory ------------------------------------------------------------------------------------------------------


def a_file_in_the_way(root: Path) -> None:
    root.write_text("not a spool")


def nothing_above(root: Path) -> None:
    root.parent.rmdir()


@pytest.mark.parametrize("trouble", [a_file_in_the_way, nothing_above])
def test_a_directory_that_cannot_be_used_at_the_start_is_used_as_soon_as_it_can_be(
    process: ProcessMaker, tmp_path: Path, log: LogLines, trouble: Any
) -> None:
    directory = tmp_path / "above" / "spool"
    directory.parent.mkdir()
    trouble(directory)
    it = process(directory).open()
    it.put(*numbered(10))
    assert it.process.settle() == Snapshot(accepted=10, delivered=10)
    assert len(log.with_text(CANNOT)) == 1
    assert len(log.with_text("choose another place with --spool-dir")) <= 2
    it.endpoint.hold()
    if trouble is a_file_in_the_way:
        directory.unlink()
    else:
        directory.parent.mkdir()
    it.put(b"after")
    wait_until(lambda: on_disk(directory) == [b"after"], "it is on disk")


def test_a_directory_that_may_not_be_written_is_told_of(process: ProcessMaker, root: Path, log: LogLines) -> None:
    root.mkdir()
    denied = PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    with mock.patch("kong_metering.eventlog.files.open_file", side_effect=denied):
        it = process().open()
        it.put(b"event")
        it.process.settle()
    assert log.with_text("let the user that Kong runs as write there, or choose another place with --spool-dir")


def test_a_directory_that_is_removed_while_in_use_is_made_anew(
    process: ProcessMaker, root: Path, log: LogLines
) -> None:
    it = process().open(down(), max_batch_size=10)
    it.put_on_disk(*numbered(30))
    it.endpoint.wait_for_request()
    remove(root)
    wait_until(lambda: log.with_text("was removed while it was in use"), "it is noticed")
    it.put_on_disk(*numbered(20, first=30))
    assert on_disk(root) == numbered(20, first=30)
    it.endpoint.decide = lambda _: Delivered()
    account = it.process.settle()
    assert account.delivered + account.dead_letters.get("unreadable", 0) == account.accepted == 50
    assert it.endpoint.delivered[-20:] == numbered(20, first=30)
    assert len(log.with_text("was removed while it was in use")) == 1
    assert log.with_text("stay there, for now") == []


def test_what_was_in_directories_that_were_removed_one_after_the_other_is_not_held_back(
    process: ProcessMaker, root: Path
) -> None:
    """The second log stands behind the first, so that it was never written down what of it was sent, nor can be."""
    it = process().open(down(), max_batch_size=10)
    for number in range(2):
        it.put_on_disk(*numbered(20, first=20 * number))
        it.process.wait_for_a_round()
        for source in it.backlog._sources.logs():  # as when it was quiet for a while
            source.held.log.rest()
        remove(root)
        it.process.wait_for_a_round()
    it.put_on_disk(*numbered(20, first=40))
    it.endpoint.decide = lambda _: Delivered()
    account = it.process.settle()
    assert account.delivered + account.dead_letters.get("unreadable", 0) == account.accepted == 60
    assert it.endpoint.delivered[-20:] == numbered(20, first=40)


def test_a_directory_that_is_emptied_before_the_first_event_is_used_all_the_same(
    process: ProcessMaker, root: Path
) -> None:
    it = process().open(down())
    wait_until((root / "lock").is_file, "the spool is made")
    for path in root.iterdir():
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    it.put_on_disk(b"1", b"2")
    assert on_disk(root) == [b"1", b"2"]


def test_events_on_disk_that_cannot_be_read_for_a_while_wait(process: ProcessMaker, log: LogLines) -> None:
    before = process().open(down())
    before.put(*numbered(20))
    before.process.close()
    it = process().open(down(), max_batch_size=1)
    it.endpoint.wait_for_request()
    no_files = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    with mock.patch("kong_metering.eventlog.segment.SegmentReader.read", side_effect=no_files):
        it.endpoint.decide = take_all
        wait_until(lambda: log.with_text("events on disk cannot be read, for now"), "it is said")
        assert it.queue.waiting == 19
    assert it.process.settle() == Snapshot(adopted=20, delivered=20)
    assert it.endpoint.delivered == numbered(20)


@pytest.mark.parametrize("outcome", [DOWN, REFUSED], ids=["503", "refused"])
def test_a_position_that_a_full_disk_does_not_take_holds_nothing(
    process: ProcessMaker, log: LogLines, outcome: Any
) -> None:
    it = process().open(max_batch_size=5)
    it.put_on_disk(b"first")
    it.process.settle()
    it.endpoint.script.extend([outcome] * 3)
    broken = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with mock.patch("kong_metering.eventlog.position.PositionFile.save", side_effect=broken):
        it.put(*numbered(20))
        assert it.process.settle() == Snapshot(accepted=21, delivered=21)
    assert len(log.with_text("what is delivered cannot be written down")) == 1
