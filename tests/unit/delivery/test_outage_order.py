"""A total outage with server errors does not cost the order, and an event that is to blame still does not hold it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kong_metering.delivery.outcome import Delivered
from kong_metering.stats import Snapshot
from tests.support.waiting import wait_until
from tests.unit.delivery.fakes import DOWN, Choking, FakeEndpoint, SpooledQueue

if TYPE_CHECKING:
    from tests.unit.delivery.conftest import ProcessMaker, RigMaker


def numbered(count: int) -> list[bytes]:
    return [b"%05d" % number for number in range(count)]


@pytest.mark.parametrize("pauses", [1, 5, 6, 7, 20, 21, 60, 61, 200])
@pytest.mark.parametrize("batch", [1, 2, 10, 1000])
def test_events_leave_in_order_after_an_outage_with_server_errors(
    process: ProcessMaker, batch: int, pauses: int
) -> None:
    # It comes back while the queue pauses, as it mostly does.
    it = process().open(max_batch_size=batch, max_retry_delay=0.001)
    it.endpoint.decide = lambda _: Delivered() if it.pausing.pauses >= pauses else DOWN
    it.put_on_disk(*numbered(2000 if batch == 1000 else 100))
    it.process.settle()
    assert it.endpoint.delivered == sorted(it.endpoint.delivered)


@pytest.mark.parametrize("failures", [30, 31, 37, 44, 59])
def test_at_worst_one_try_is_overtaken_when_the_endpoint_comes_back_in_between(
    process: ProcessMaker, failures: int
) -> None:
    left = iter(range(failures))
    it = process().open(
        FakeEndpoint(lambda _: Delivered() if next(left, None) is None else DOWN),
        max_batch_size=10,
        max_retry_delay=0.001,
    )
    it.put_on_disk(*numbered(50))
    it.process.settle()
    first, *others = it.endpoint.requests[failures:]
    assert [event for request in others for event in request] == sorted(set(numbered(50)) - set(first))


def feed_until_dead(it: SpooledQueue, letters: int) -> None:
    """Let events come, to compare with, until so many are dead letters; then all others are delivered."""

    def is_done() -> bool:
        it.put(b"more")
        return it.process.account().dead_letters == {"rejected": letters}

    wait_until(is_done, "those to blame are found")
    assert it.process.settle().dead_letters == {"rejected": letters}


@pytest.mark.parametrize("poison", [b"00000", b"00003", b"00037"])
@pytest.mark.parametrize("batch", [1, 10, 100])
def test_an_event_that_makes_the_endpoint_fail_becomes_a_dead_letter_and_holds_nothing(
    process: ProcessMaker, batch: int, poison: bytes
) -> None:
    it = process().open(FakeEndpoint(Choking(poison)), max_batch_size=batch)
    it.put_on_disk(*numbered(100))
    wait_until(lambda: it.process.account().delivered >= 99, "it holds nothing")
    feed_until_dead(it, 1)
    assert sum(poison in request for request in it.endpoint.requests) >= 14


def test_an_outage_hides_no_event_that_is_to_blame_for_ever(process: ProcessMaker) -> None:
    it = process().open(FakeEndpoint(lambda _: DOWN), max_batch_size=10)
    it.put_on_disk(*numbered(50))
    wait_until(lambda: len(it.endpoint.requests) > 100, "a long outage")
    it.endpoint.decide = Choking(b"00000", b"00015")
    feed_until_dead(it, 2)


def test_an_open_breaker_does_not_keep_an_event_that_is_to_blame_in_front(process: ProcessMaker) -> None:
    it = process().open(FakeEndpoint(Choking(b"00000")), failure_threshold=1, breaker_cooldown=0.001, max_retry_time=-1)
    it.put_on_disk(*numbered(20))
    assert it.process.settle() == Snapshot(accepted=20, delivered=19, dead_letters={"rejected": 1})


@pytest.mark.parametrize("batch", [1, 10])
def test_in_memory_the_order_outlasts_an_outage_too(rig: RigMaker, batch: int) -> None:
    left = iter(range(40))
    it = rig(max_batch_size=batch, max_retry_time=1e9)
    it.endpoint.decide = lambda events: (
        Delivered() if next(left, None) is None and (it.endpoint.delivered or events[0] == b"00000") else DOWN
    )
    it.put(*numbered(50))
    it.settle()
    assert it.endpoint.delivered == numbered(50)
