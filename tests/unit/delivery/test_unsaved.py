"""Marks and positions that the disk does not take: nothing is sent that nobody would know of after a crash."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import pytest

from kong_metering.backlog.burials import MAX_PENDING
from kong_metering.config import parse_config, parse_entity
from kong_metering.delivery.registry import Delivery
from kong_metering.eventlog.position import PositionFile
from kong_metering.spool.deadletters import DEAD_LETTERS
from kong_metering.spool.identity import QueueIdentity
from kong_metering.stats import Snapshot
from kong_metering.trial.outcome import Delivered
from tests.support.waiting import wait_until
from tests.unit.delivery.fakes import (
    DOWN,
    FakeEndpoint,
    broken_disk,
    crashed,
    down,
    letters,
    numbered,
    on_disk,
    take_all,
)

if TYPE_CHECKING:
    from kong_metering.eventlog.format import Position
    from tests.support.loglines import LogLines
    from tests.unit.delivery.conftest import ProcessMaker

HELD = "events on disk are not sent, until it can be noted there that they were"


@contextlib.contextmanager
def unsaved(error: int) -> Iterator[None]:
    """Let no position be saved."""
    broken = OSError(error, os.strerror(error))
    with mock.patch("kong_metering.eventlog.position.PositionFile.save", side_effect=broken):
        yield


@pytest.mark.parametrize("error", [errno.EROFS, errno.EIO, errno.EACCES])
@pytest.mark.parametrize("batch", [1, 5])
def test_what_cannot_be_noted_waits_until_it_can_be(
    process: ProcessMaker, log: LogLines, error: int, batch: int
) -> None:
    it = process().open(max_batch_size=batch)
    it.put_on_disk(b"first")
    it.process.settle()
    with unsaved(error):
        it.put_on_disk(*numbered(20))
        wait_until(lambda: it.backlog.held_back == 20, "they are held back")
        it.process.wait_for_a_round()
        it.process.wait_for_rest()
        assert it.endpoint.requests == [[b"first"]]
    assert it.process.settle() == Snapshot(accepted=21, delivered=21)
    assert it.endpoint.delivered == [b"first", *numbered(20)]
    assert len(log.with_text(HELD)) == 1
    assert it.backlog.held_back == 0


def test_on_a_read_only_disk_for_longer_than_the_window_nothing_is_sent_twice_or_lost(
    process: ProcessMaker, root: Path
) -> None:
    it = process(dedupe_window=100.0).open(
        down(), max_batch_size=10, initial_retry_delay=1000, max_retry_delay=1000, max_retry_time=-1
    )
    it.put_on_disk(*numbered(200))
    it.endpoint.wait_for_request()
    it.process.wait_for_rest()
    with broken_disk(errno.EROFS):
        it.endpoint.decide = take_all
        it.reconfigure()
        it.put(*numbered(50, first=200))
        wait_until(lambda: len(it.endpoint.delivered) == 50, "what is in memory is sent")
        left, sent = crashed(root), it.endpoint.delivered
        it.let_pass(200)
    following = process(left, dedupe_window=100.0).open(max_batch_size=10)
    assert following.process.settle(adopted=200) == Snapshot(adopted=200, delivered=200)
    it.process.settle()
    # One process was killed before the repair, and has a successor; the other one went on.
    for delivered in ([*sent, *following.endpoint.delivered], it.endpoint.delivered):
        assert sorted(delivered) == sorted(numbered(250))
    assert letters(root) == letters(left) == []


def test_the_age_of_what_waits_is_told_while_nothing_of_it_may_be_sent(process: ProcessMaker) -> None:
    before = process().open(down())
    before.put_on_disk(*numbered(20))
    before.process.close()
    before.process.clock.advance(100)
    with unsaved(errno.EROFS):
        it = process().open(max_batch_size=5)
        wait_until(lambda: it.backlog.held_back == 20, "they are held back")
        it.process.wait_for_rest()
        assert 100 <= it.queue.told()["oldest_seconds"] < 200


def test_what_was_noted_before_is_tried_again_meanwhile(process: ProcessMaker) -> None:
    it = process().open(max_batch_size=5)
    it.put_on_disk(b"before")
    it.process.settle()  # it works, and a batch goes out whole
    it.endpoint.decide = lambda _: DOWN
    it.put_on_disk(*numbered(5))
    it.endpoint.wait_for_request(2)
    with unsaved(errno.EIO):
        it.endpoint.decide = lambda events: Delivered() if set(events) <= set(numbered(5)) else DOWN
        it.put_on_disk(b"new")
        wait_until(lambda: sorted(it.endpoint.delivered) == [*numbered(5), b"before"], "they get through")
        wait_until(lambda: it.backlog.held_back == 1, "the new one is held back")
    it.endpoint.decide = take_all
    assert it.process.settle() == Snapshot(accepted=7, delivered=7)


def test_what_is_held_back_goes_out_though_an_answer_was_noted_before_anybody_looked_at_the_disk(
    process: ProcessMaker,
) -> None:
    it = process(round_seconds=3600).open(concurrency_limit=-1)
    it.endpoint.hold()
    it.put_on_disk(b"on its way")
    it.endpoint.wait_for_request()
    with unsaved(errno.EIO):
        it.put_on_disk(b"new")
        wait_until(lambda: it.backlog.held_back == 2, "the new one is held back, behind that")
        it.process.wait_for_rest(at_work=1)
    it.endpoint.let_go()
    wait_until(lambda: it.endpoint.delivered == [b"on its way"], "what was on its way is answered")
    it.process.wait_for_rest()
    it.queue.try_now()
    assert it.process.settle() == Snapshot(accepted=2, delivered=2)


def test_what_is_held_back_while_the_disk_is_asked_again_goes_out(process: ProcessMaker) -> None:
    it = process(round_seconds=3600).open()
    it.put_on_disk(b"first")
    it.process.settle()
    it.process.wait_for_rest()
    save, saving, goes_on = PositionFile.save, threading.Event(), threading.Event()

    def refuse_one(file: PositionFile, position: Position) -> None:
        if not saving.is_set():
            saving.set()
            goes_on.wait(20)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        save(file, position)

    with mock.patch.object(PositionFile, "save", refuse_one):
        it.put(b"second")
        assert saving.wait(20)
        asking = threading.Thread(target=it.backlog.try_again)
        asking.start()
        asking.join(0.2)  # it waits for the one who is being refused
        goes_on.set()
        asking.join()
    it.process.wait_for_rest()
    it.backlog.try_again()
    assert it.process.settle() == Snapshot(accepted=2, delivered=2)


def test_events_are_read_again_once_there_are_no_longer_too_many_dead_letters_to_write(
    process: ProcessMaker, root: Path
) -> None:
    before = process().open(down())
    before.put_on_disk(*numbered(MAX_PENDING + 100))
    before.process.close()
    for position in root.glob("proc-*/*/position"):
        position.unlink()  # nobody knows any more what was sent, and when
    before.process.clock.advance(200)
    (root / DEAD_LETTERS).touch()
    it = process(dedupe_window=100.0).open(max_batch_size=100)
    wait_until(lambda: it.backlog.letters_pending >= MAX_PENDING, "as many wait as may")
    it.process.wait_for_rest()
    (root / DEAD_LETTERS).unlink()
    account = it.process.settle(adopted=MAX_PENDING + 100)
    assert account.dead_letters == {"ambiguous": MAX_PENDING + 100}


def test_a_full_disk_has_half_of_the_window_to_get_room(process: ProcessMaker, log: LogLines) -> None:
    it = process(dedupe_window=1000.0).open()
    it.put_on_disk(b"first")
    it.process.settle()
    with unsaved(errno.ENOSPC):
        it.put_on_disk(b"second")
        assert it.process.settle().delivered == 2
        it.let_pass(490)
        it.put_on_disk(b"third")
        assert it.process.settle().delivered == 3
        it.let_pass(20)
        it.put_on_disk(b"fourth")
        wait_until(lambda: it.backlog.held_back == 1, "it is held back")
    it.process.settle()
    assert it.endpoint.delivered == [b"first", b"second", b"third", b"fourth"]
    assert log.with_text("what is delivered cannot be written down")
    assert len(log.with_text("1 event on disk is not sent, until it can be noted there that it was")) == 1


def test_what_is_held_back_is_neither_lost_nor_doubled_when_memory_is_written_behind_it(
    process: ProcessMaker, root: Path
) -> None:
    it = process().open(max_batch_size=5)
    it.put_on_disk(b"first")
    it.process.settle()
    with unsaved(errno.EIO):
        it.put_on_disk(*numbered(20))
        wait_until(lambda: it.backlog.held_back == 20, "they are held back")
        it.endpoint.hold()
        with broken_disk(errno.EROFS):
            it.put(*numbered(20, first=20))
            it.endpoint.wait_for_request(2)
        wait_until(lambda: len(on_disk(root)) >= 40, "all are on disk")
        it.endpoint.let_go()
    assert it.process.settle() == Snapshot(accepted=41, delivered=41)
    assert sorted(it.endpoint.delivered) == sorted([b"first", *numbered(40)])


def test_what_is_answered_while_the_disk_is_read_only_does_not_go_out_again_once_that_is_over(
    process: ProcessMaker,
) -> None:
    before = process().open(down())
    before.put_on_disk(b"event")
    before.process.close()
    it = process().open()
    it.endpoint.hold()
    it.endpoint.wait_for_request()
    with broken_disk(errno.EROFS):
        it.endpoint.let_go()
        assert it.process.settle(adopted=1).delivered == 1
        # Nothing waits in the log any more, which can neither be written to nor be removed.
        it.process.wait_for_a_round()
        it.process.wait_for_a_round()
    it.process.wait_for_a_round()
    it.process.close()
    following = process().open()
    following.process.wait_for_a_round()
    assert following.process.close() == Snapshot()


def test_a_queue_that_nobody_uses_ends_when_it_is_written_down_what_was_delivered(process: ProcessMaker) -> None:
    it = process()
    delivery = Delivery(
        clock=it.clock, stats=it.stats, couriers=it.couriers, connections=it.network.connections, spooler=it.spooler
    )
    endpoint = FakeEndpoint()
    url = it.network.endpoint(endpoint).url
    config = {"ingest_endpoint": url, "api_token": "token", "queue": {"max_coalescing_delay": 0}}
    queue = delivery.open(parse_entity({"__plugin_id": "one"}), parse_config(config))
    endpoint.hold()
    queue.put(b"event")
    endpoint.wait_for_request()
    with broken_disk(errno.EROFS):
        endpoint.let_go()
        it.settle()
        it.wait_for_rest()
        delivery.release(queue)
        it.wait_for_a_round()
    it.wait_for_a_round()
    delivery.sweep()
    assert delivery.waiting() == {}
    it.wait_for_a_round()
    it.close()
    other = process()
    following = other.open(identity=QueueIdentity("one", "one", url))
    other.wait_for_a_round()
    assert (other.close(), following.endpoint.requests) == (Snapshot(), [])


def test_what_is_held_back_at_the_end_is_left_for_the_next_process(process: ProcessMaker) -> None:
    it = process().open(max_batch_size=5)
    it.put_on_disk(b"first")
    it.process.settle()
    with unsaved(errno.EIO):
        it.put_on_disk(*numbered(20))
        wait_until(lambda: it.backlog.held_back == 20, "they are held back")
        assert it.process.close(20) == Snapshot(accepted=21, delivered=1, left=20)
    following = process().open()
    assert following.process.settle(adopted=20) == Snapshot(adopted=20, delivered=20)
    assert following.endpoint.delivered == numbered(20)
