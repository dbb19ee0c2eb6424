"""Who waits for whom: nobody's trouble with the disk is another one's, and what was accepted outlives a kill."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import pytest

from kong_metering.backlog.burials import MAX_PENDING
from kong_metering.config import parse_config, parse_entity
from kong_metering.delivery.registry import Delivery
from kong_metering.eventlog.log import EventLog
from kong_metering.stats import Snapshot
from kong_metering.trial.outcome import Delivered, Outcome, Rejected
from kong_metering.trial.trial import REACH
from tests.support.waiting import wait_until
from tests.unit.delivery.doomed import IDENTITIES
from tests.unit.delivery.fakes import (
    IDENTITY,
    FakeEndpoint,
    HangingDisk,
    Refusing,
    SteeredClock,
    broken_disk,
    down,
    letters,
    numbered,
    on_disk,
    stalled_adoption,
)

if TYPE_CHECKING:
    from kong_metering.eventlog.format import StoredEvent
    from tests.support.loglines import LogLines
    from tests.unit.delivery.conftest import ProcessMaker
    from tests.unit.delivery.fakes import Process

REPOSITORY = Path(__file__).parents[3]
HOLDER = (
    "import fcntl, sys; lock = open(sys.argv[1]); fcntl.flock(lock, fcntl.LOCK_EX); print(flush=True); sys.stdin.read()"
)


# -- one owner for each thing ------------------------------------------------------------------------------------------


def test_a_queue_is_written_while_an_adoption_stalls_and_another_queue_closes(
    process: ProcessMaker, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_on = stalled_adoption(monkeypatch)
    it = process()
    closing, _, untouched = [it.open(down(), identity) for identity in IDENTITIES]
    closing.put(b"of the one that closes")
    thread = threading.Thread(target=closing.close)
    thread.start()
    untouched.put(b"event")
    wait_until(lambda: b"event" in on_disk(root), "the untouched queue's event is on disk")
    goes_on.set()
    thread.join()


def test_dead_letters_that_another_process_keeps_from_being_written_stop_no_writing(
    process: ProcessMaker, root: Path
) -> None:
    it = process()
    letters_of = it.open(FakeEndpoint(Refusing(b"bad", names_it=True)), max_batch_size=3, max_coalescing_delay=3600)
    other = it.open(down(), replace(IDENTITY, entity_id="22222222-other"))
    letters_of.put_on_disk(b"1", b"2", b"bad")
    it.settle()
    command = [sys.executable, "-c", HOLDER, str(root / "dead-letters" / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout
        holder.stdout.readline()
        letters_of.put_on_disk(b"bad", b"3", b"4")
        # The courier goes from counting these to burying the other one.
        wait_until(lambda: it.account().delivered == 4, "the others are delivered")
        letters_of.put(b"behind")
        other.put(b"other")
        wait_until(lambda: {b"behind", b"other"} <= set(on_disk(root)), "events of both queues are on disk")
        assert it.account().dead_letters == {"rejected": 1}
        assert b"bad" in on_disk(root)
        holder.communicate()
    wait_until(lambda: it.account().dead_letters == {"rejected": 2}, "the letter is written")
    assert len(letters(root)) == 2


def test_a_queue_that_nobody_uses_ends_without_waiting_for_who_looks_at_its_log(
    process: ProcessMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the thread that answers Kong which lets go of it."""
    it = process()
    delivery = Delivery(
        clock=it.clock, stats=it.stats, couriers=it.couriers, connections=it.network.connections, spooler=it.spooler
    )
    url = it.network.endpoint(FakeEndpoint()).url
    config = {"ingest_endpoint": url, "api_token": "token", "queue": {"max_coalescing_delay": 0}}
    queue = delivery.open(parse_entity({"__plugin_id": "one"}), parse_config(config))
    queue.put(b"event")
    it.settle()
    looks, goes_on, oldest = threading.Event(), threading.Event(), EventLog.oldest

    def slowly(log: EventLog) -> StoredEvent | None:
        looks.set()
        goes_on.wait(20)
        return oldest(log)

    monkeypatch.setattr(EventLog, "oldest", slowly)
    # Ages are told by a clock that has run for a while.
    it.clock.advance(700)
    it.spooler._bounds._bounds_at = 0.0
    assert looks.wait(20)
    threading.Timer(10, goes_on.set).start()
    delivery.release(queue)
    assert not goes_on.is_set()
    assert delivery.waiting() == {}
    goes_on.set()


# -- a disk that hangs -------------------------------------------------------------------------------------------------


def test_nothing_is_sent_from_memory_while_a_write_may_still_complete(
    process: ProcessMaker, steered: SteeredClock, log: LogLines
) -> None:
    it = process().open()
    it.put_on_disk(b"first")
    it.process.settle()
    disk = HangingDisk()
    events = [b"%05d" % number + b"x" * 500_000 for number in range(200)]
    with mock.patch.object(os, "pwrite", disk.pwrite):
        disk.hang()
        it.put(events[0])
        disk.wait_for_write()
        # Each returns at once, though nobody takes anything out of the ring.
        it.put(*events[1:])
        steered.advance(6)
        it.process.wait_for_a_round()
        it.process.spooler.say_what_hangs()
        assert it.endpoint.requests == [[b"first"]]
        account = it.process.account()
        full = account.dropped["queue_full"]
        assert 0 < full < 100
        assert account.waiting == 200 - full
        assert log.with_text("the disk hangs: a write has taken")
        assert len(log.with_text("the disk hangs, and memory is full")) == 1
        disk.go_on()
        wait_until(lambda: says_that_it_works(it.process, log), "its end is said")
        assert it.process.settle() == Snapshot(accepted=201, delivered=201 - full, dropped={"queue_full": full})
    assert it.endpoint.delivered == [b"first", *events[: 200 - full]]


def says_that_it_works(process: Process, log: LogLines) -> bool:
    process.spooler.say_what_hangs()
    return bool(log.with_text("the disk works again after it hung for 6 s"))


# -- memory is bounded -------------------------------------------------------------------------------------------------


def refuses_all(_: list[bytes]) -> Outcome:
    return Rejected("https://ingest.test answered 400: no")


def refuses_most(events: list[bytes]) -> Outcome:
    bad = tuple(index for index, event in enumerate(events) if not event.startswith(b"good"))
    return Rejected("https://ingest.test answered 400: no", bad) if bad else Delivered()


@pytest.mark.slow
@pytest.mark.parametrize("decide", [refuses_all, refuses_most])
def test_memory_is_bounded_on_a_full_disk_whatever_the_endpoint_refuses(
    process: ProcessMaker, decide: Callable[[list[bytes]], Outcome]
) -> None:
    it = process().open(FakeEndpoint(decide), max_entries=2000, max_batch_size=100)
    it.put_on_disk(b"good")
    most = 0
    tracemalloc.start()
    with broken_disk():
        for start in range(0, 50_000, 500):
            numbers = range(start, start + 500)
            it.put_on_disk(*[(b"bad %05d" if n % 10 else b"good %05d") % n + b"x" * 1000 for n in numbers])
            most = max(most, it.queue.waiting)
        held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # What waits in memory, what the trial has, dead letters that cannot be written, and what comes meanwhile.
    bound = 2000 + 2 * 100 + REACH + MAX_PENDING + 2 * 500
    assert most <= bound
    assert held < bound * 2000
    account = it.process.account()
    assert account.accepted == 50_001
    buried = sum(account.dead_letters.values())
    assert account.dropped["queue_full"] + account.delivered + buried + account.waiting == 50_001
    assert account.delivered == 0 if decide is refuses_all else account.delivered > 0


# -- killed ------------------------------------------------------------------------------------------------------------


def doomed(story: str, root: Path, inbox: Path | str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.unit.delivery.doomed", story, str(root), str(inbox)]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("story", "events"), [("works", 50), ("works", 3000), ("works", 3001), ("hangs", 500), ("is evicted", 500)]
)
def test_each_event_whose_put_returned_is_delivered_once_and_in_order_by_the_next_process(
    process: ProcessMaker, root: Path, inbox: Path, story: str, events: int
) -> None:
    with doomed(story, root, inbox) as killed:
        assert killed.stdout
        told = [int(killed.stdout.readline()) for _ in range(events)]
        killed.kill()
        told += [int(line) for line in killed.stdout.read().splitlines(keepends=True) if line.endswith(b"\n")]
    written = len(on_disk(root))
    it = process()
    queues = [it.open(identity=identity) for identity in IDENTITIES]
    it.settle(adopted=len(told))
    # One more may have been put whose number was not told any more.
    count = it.account().delivered
    it.from_strangers = count - written
    assert len(told) <= count <= len(told) + 1
    for index, queue in enumerate(queues):
        assert queue.endpoint.delivered == [b"%d" % number for number in range(index, count, 3)]


def test_what_was_not_written_follows_a_spool_that_is_moved_away_into_the_new_one(
    process: ProcessMaker, root: Path, inbox: Path
) -> None:
    with doomed("loses its spool", root, inbox) as killed:
        assert killed.stdout
        told = [int(killed.stdout.readline()) for _ in range(500)]
        killed.kill()
        told += [int(line) for line in killed.stdout.read().splitlines(keepends=True) if line.endswith(b"\n")]
    assert on_disk(root) == []
    it = process()
    queues = [it.open(identity=identity) for identity in IDENTITIES]
    it.settle(adopted=len(told))
    it.from_strangers = count = it.account().delivered
    assert len(told) <= count <= len(told) + 1
    for index, queue in enumerate(queues):
        assert queue.endpoint.delivered == [b"%d" % number for number in range(index, count, 3)]


def test_without_shared_memory_only_what_was_not_written_yet_is_lost(process: ProcessMaker, root: Path) -> None:
    with doomed("writes", root, "-") as killed:
        killed.wait()
    it = process().open()
    it.process.settle(adopted=100)
    count = it.process.account().adopted
    assert 100 <= count <= 200
    assert it.endpoint.delivered == numbered(count)


def test_what_was_spilled_after_an_outage_of_the_disk_outlives_a_kill(
    process: ProcessMaker, root: Path, inbox: Path
) -> None:
    with doomed("spills", root, inbox) as killed:
        killed.wait()
    it = process().open(max_batch_size=5)
    assert it.process.settle(adopted=20) == Snapshot(adopted=20, delivered=20)
    assert it.endpoint.delivered == numbered(20)


def test_what_a_server_tells_of_its_end_on_a_disk_that_hangs_is_what_the_next_one_finds(
    process: ProcessMaker, root: Path, inbox: Path
) -> None:
    with doomed("overflows", root, inbox) as killed:
        assert killed.stdout
        left, lost = map(int, killed.stdout.readline().split())
        killed.wait()
    assert left + lost == 40
    assert lost > 0
    written = len(on_disk(root))
    it = process().open(FakeEndpoint())
    it.process.from_strangers = left - written
    assert it.process.settle(adopted=left) == Snapshot(adopted=left, delivered=left)
