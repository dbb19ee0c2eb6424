"""What works again is said once, with how long it did not, and how many events waited."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from kong_metering.outages import Outage, in_words
from tests.support.waiting import wait_until
from tests.unit.delivery.fakes import DOWN, Choking, FakeEndpoint, broken_disk, down, numbered, take_all

if TYPE_CHECKING:
    from tests.support.loglines import LogLines
    from tests.unit.delivery.conftest import ProcessMaker, RigMaker
    from tests.unit.delivery.fakes import SteeredClock

AGAIN = "the endpoint works again after"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (119, "119 s"), (720, "12 min"), (7200, "2 h"), (200_000, "2 days")]
)
def test_lengths_of_time(seconds: float, text: str) -> None:
    assert in_words(seconds) == text


def test_an_outage_lasts_from_its_first_failure_and_is_over_once() -> None:
    outage = Outage()
    assert outage.works(5.0) is None
    for now in (10.0, 20.0, 30.0):
        outage.fails(now)
    assert outage.works(40.0) == 30.0
    assert outage.works(50.0) is None


def test_the_end_of_an_outage_is_said_once_with_its_length_and_what_waited(rig: RigMaker, log: LogLines) -> None:
    it = rig(max_batch_size=10, max_retry_time=100_000, max_retry_delay=60, max_coalescing_delay=0)
    it.put(b"before")
    it.settle()
    it.let_pass(5000)
    it.endpoint.decide = lambda _: DOWN
    it.put(*numbered(100))
    it.let_pass(700)
    it.endpoint.decide = take_all
    assert it.settle().delivered == 101
    assert [(level, text) for level, text in log.lines if AGAIN in text] == [
        ("WARNING", f"queue metering: {AGAIN} 12 min; 100 events waited")
    ]
    it.put(b"after")
    it.settle()
    assert len(log.with_text(AGAIN)) == 1


def test_a_failure_that_passes_at_once_is_no_outage(rig: RigMaker, log: LogLines) -> None:
    it = rig(max_batch_size=10, initial_retry_delay=0.01, max_coalescing_delay=0)
    it.endpoint.script.extend([DOWN, DOWN])
    it.put(*numbered(10))
    assert it.settle().delivered == 10
    assert log.with_text(AGAIN) == []


def test_an_event_that_fails_while_others_get_through_is_no_outage(process: ProcessMaker, log: LogLines) -> None:
    it = process().open(FakeEndpoint(Choking(b"bad")), max_batch_size=10)
    it.put_on_disk(*numbered(5), b"bad", *numbered(5, first=5))
    wait_until(lambda: len(it.endpoint.delivered) == 10, "the others get through")
    it.let_pass(3600)
    for number in range(10, 200):
        it.put_on_disk(b"%d" % number)
    it.process.settle()
    assert log.with_text(AGAIN) == []


def test_a_disk_that_works_again_is_said_with_what_went_to_memory(
    process: ProcessMaker, steered: SteeredClock, log: LogLines
) -> None:
    it = process().open(down(), max_batch_size=5)
    it.put_on_disk(b"first")
    with broken_disk(errno.EROFS):
        it.put_on_disk(*numbered(1200))
        wait_until(lambda: it.backlog.is_refused, "the disk refuses")
        steered.advance(720)
    wait_until(lambda: log.with_text("events are written to disk again"), "it is said")
    (said,) = log.with_text("events are written to disk again")
    assert "after 12 min; 1,200 went to memory meanwhile" in said[1]
    it.endpoint.decide = take_all
    it.process.settle()
