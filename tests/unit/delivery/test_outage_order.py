"""An outage does not cost the order, and an event that is to blame still does not hold it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kong_metering.stats import Snapshot
from kong_metering.trial.outcome import Delivered
from tests.support.waiting import wait_until
from tests.unit.delivery.fakes import DOWN, Choking, FakeEndpoint, SpooledQueue, take_all

if TYPE_CHECKING:
    from tests.unit.delivery.conftest import ProcessMaker, RigMaker

DOWN_FOR_GOOD = 1e9


def numbered(count: int) -> list[bytes]:
    return [b"%05d" % number for number in range(count)]


@pytest.mark.parametrize("seconds", [0.0001, 0.1, 1.1, 10.1, 100.1, 3600.1])
@pytest.mark.parametrize("batch", [1, 2, 10, 1000])
def test_events_leave_in_order_after_an_outage_with_server_errors(rig: RigMaker, batch: int, seconds: float) -> None:
    # It comes back while the queue pauses, as it mostly does.
    it = rig(max_batch_size=batch, max_retry_time=DOWN_FOR_GOOD)
    up_at = it.clock.monotonic() + seconds
    it.endpoint.decide = lambda _: DOWN if it.clock.monotonic() < up_at else Delivered()
    events = numbered(2000 if batch == 1000 else 100)
    it.put(*events)
    it.settle()
    assert it.endpoint.delivered == events


@pytest.mark.parametrize("failures", [*range(1, 20), 30, 31, 37, 44, 59])
def test_at_worst_one_event_is_overtaken_by_others_when_the_endpoint_comes_back_in_between(
    rig: RigMaker, failures: int
) -> None:
    left = iter(range(failures))
    it = rig(max_batch_size=10, max_retry_time=DOWN_FOR_GOOD)
    it.endpoint.decide = lambda _: Delivered() if next(left, None) is None else DOWN
    it.put(*numbered(50))
    it.settle()
    first, *others = it.endpoint.requests[failures:]
    assert [event for request in others for event in request] == sorted(set(numbered(50)) - set(first))


@pytest.mark.parametrize("requests", [1, 5, 20, 61])
@pytest.mark.parametrize("batch", [1, 10, 100])
def test_an_outage_of_any_length_costs_a_spooled_queue_nothing(
    process: ProcessMaker, batch: int, requests: int
) -> None:
    it = process().open(FakeEndpoint(lambda _: DOWN), max_batch_size=batch)
    it.put_on_disk(*numbered(200))
    it.endpoint.wait_for_request(requests)
    it.endpoint.decide = take_all
    assert it.process.settle() == Snapshot(accepted=200, delivered=200)
    # It may come back between the tries of two single events.
    _, *others = it.endpoint.delivered
    assert others == sorted(others)


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
    assert poison not in it.endpoint.delivered


def test_an_outage_hides_no_event_that_is_to_blame_for_ever(process: ProcessMaker) -> None:
    it = process().open(FakeEndpoint(lambda _: DOWN), max_batch_size=10)
    it.put_on_disk(*numbered(50))
    it.endpoint.wait_for_request(100)
    it.endpoint.decide = Choking(b"00000", b"00015")
    feed_until_dead(it, 2)


def test_an_open_breaker_does_not_keep_an_event_that_is_to_blame_in_front(process: ProcessMaker) -> None:
    it = process().open(FakeEndpoint(Choking(b"00000")), failure_threshold=1, breaker_cooldown=0.001, max_retry_time=-1)
    it.put_on_disk(*numbered(100))
    wait_until(lambda: it.process.account().delivered >= 99, "it holds nothing")
    feed_until_dead(it, 1)
