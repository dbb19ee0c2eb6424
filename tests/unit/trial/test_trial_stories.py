"""Whole stories in a simulated world: outages, wrong configurations, bad events, endpoints that fail at random."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kong_metering.trial.outcome import Rejected
from tests.unit.trial.world import (
    ABOUT_AN_EVENT,
    ALL_FAILURES,
    BAD,
    DELIVERED,
    DOWN,
    FORBIDDEN,
    HANGS,
    LIMITED,
    RESETS,
    TOO_MANY,
    UNAUTHORIZED,
    Endpoint,
    World,
    choking,
    take_all,
)

if TYPE_CHECKING:
    from kong_metering.trial.outcome import Failure, Outcome


def at_random(share: float, seed: int, failure: Outcome = DOWN, bad: frozenset[int] = frozenset()) -> Endpoint:
    """Make an endpoint that fails that share of requests, and all with a bad event."""
    chance = random.Random(seed)  # noqa: S311
    return lambda events: failure if chance.random() < share or not bad.isdisjoint(events) else DELIVERED


# -- nothing gets through ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "in_flight"), [(1, 1), (100, 1), (1, 32)])
@pytest.mark.parametrize("failure", ALL_FAILURES)
def test_a_total_outage_costs_nothing_and_no_order_whatever_form_it_has(
    failure: Outcome, batch: int, in_flight: int
) -> None:
    world = World(batch_size=batch, in_flight=in_flight)
    world.put(500)
    world.run()
    world.endpoint = lambda _: failure
    world.put(1000)
    world.run(seconds=3600)
    assert world.refused == {}
    world.endpoint = take_all
    before = len(world.requests)
    world.run()
    assert world.delivered == list(range(1500))
    assert len(world.requests) - before <= 1000 / batch + 3


@pytest.mark.parametrize("batch", [1, 100])
@pytest.mark.parametrize("failure", ALL_FAILURES)
def test_at_most_one_event_is_overtaken_when_it_works_again_in_between(failure: Outcome, batch: int) -> None:
    for requests in (1, 2, 3, 4, 7, 16, 39):
        world = World(lambda _: failure, batch_size=batch)
        world.put(300)
        world.run(until=lambda requests=requests, world=world: len(world.requests) >= requests)  # type: ignore[misc]
        world.endpoint = take_all
        world.run()
        assert sorted(world.delivered) == list(range(300))
        early = [event for place, event in enumerate(world.delivered) if event > place]
        assert len(early) <= 1


@pytest.mark.parametrize("batch", [1, 100])
@pytest.mark.parametrize("failure", [BAD, FORBIDDEN, RESETS])
def test_a_wrong_url_costs_nothing_until_it_is_corrected(failure: Outcome, batch: int) -> None:
    # http:// on a TLS port or a wrong path: 400, 403 or a reset for everything, from the first request on.
    world = World(lambda _: failure, batch_size=batch)
    world.put(1000)
    world.run(seconds=86400)
    assert world.refused == {}
    world.endpoint = take_all
    world.reconfigure()
    world.run()
    assert world.delivered == list(range(1000))


@pytest.mark.parametrize("batch", [1, 10])
@pytest.mark.parametrize("failure", [BAD, DOWN, FORBIDDEN])
def test_ten_different_events_in_a_row_that_are_refused_after_it_worked_come_back(failure: Outcome, batch: int) -> None:
    world = World(batch_size=batch)
    world.put(500)
    world.run()
    world.endpoint = lambda _: failure
    world.put(200)
    world.run(seconds=7200)
    tried = {request[0] for request in world.requests if request[0] >= 500}
    assert len(tried) >= (3 if failure is DOWN else 8)  # few are put in doubt
    assert world.refused == {}
    world.endpoint = take_all
    world.run()
    assert world.delivered == list(range(700))


# -- others get through ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2, 10, 100, 1000])
@pytest.mark.parametrize("bad", [0, 1, 37, 99, 100, 200])
@pytest.mark.parametrize("failure", [failure for failure in ABOUT_AN_EVENT if failure is not TOO_MANY])
def test_the_one_event_that_a_firewall_takes_offence_at_is_refused_and_no_other(
    failure: Failure, bad: int, batch: int
) -> None:
    world = World(choking({bad}, failure), batch_size=batch)
    world.put(300)
    world.run()
    assert set(world.refused) == {bad}
    # Where it is open whether the bad one arrived, the other one that is tried meanwhile is ten behind it.
    assert set(world.late) <= set(range(bad + 1, bad + 10) if failure.may_have_arrived else ())
    search = 3 * math.ceil(math.log(min(batch, 300), 3) - 1e-9) if batch > 1 else 0
    witnesses = 25
    assert len(world.requests) <= 300 / batch + search + witnesses


@pytest.mark.parametrize("batch", [1, 10, 100])
def test_an_event_that_is_answered_with_a_pause_each_time_is_refused_and_no_other(batch: int) -> None:
    world = World(choking({37}, TOO_MANY), batch_size=batch)
    while not world.refused and world.put_so_far < 10_000:
        world.put(10)
        world.run(seconds=1)
    world.run(seconds=60)
    assert set(world.refused) == {37}
    assert world.is_done
    assert world.now - 1000 <= 500


@pytest.mark.parametrize("failure", [FORBIDDEN, RESETS, DOWN, BAD])
def test_three_bad_events_among_a_thousand_are_refused_and_no_other(failure: Outcome) -> None:
    world = World(choking({3, 500, 501}, failure), batch_size=1000)
    world.put(1000)
    world.run()
    assert set(world.refused) == {3, 500, 501}
    assert len(world.late) <= 1
    assert len(world.requests) <= 3 * (3 * 7) + 30


@pytest.mark.parametrize("batch", [1, 100])
@pytest.mark.parametrize("failure", [FORBIDDEN, BAD])
def test_many_bad_events_in_a_row_do_not_hold_the_others(failure: Outcome, batch: int) -> None:
    world = World(choking(range(100, 150), failure), batch_size=batch)
    world.put(2000)
    world.run(seconds=3600)
    assert set(world.refused) == set(range(100, 150))
    assert len(world.delivered) == 1950


@pytest.mark.parametrize("failure", [FORBIDDEN, BAD, DOWN])
def test_one_bad_event_in_ten_is_found_each_time(failure: Outcome) -> None:
    bad = set(range(0, 3000, 10))
    world = World(choking(bad, failure), batch_size=1)
    world.put(3000)
    world.run(seconds=86400, until=lambda: len(world.refused) > 250)
    assert set(world.refused) <= bad
    assert len(world.refused) > 250


@pytest.mark.parametrize("batch", [1, 100])
def test_a_bad_event_is_found_where_good_ones_fail_half_of_the_time(batch: int) -> None:
    world = World(at_random(0.5, 1, bad=frozenset({50})), batch_size=batch)
    world.put(300 * batch)
    world.run(until=lambda: bool(world.refused))
    assert set(world.refused) == {50}


# -- failing at random -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "seed"), [(10, 1), (100, 1), (100, 2), (100, 3)])
@pytest.mark.parametrize("share", [0.3, 0.7, 0.9, 0.95])
def test_an_endpoint_that_fails_at_random_gets_no_good_event_blamed_and_costs_what_it_must(
    share: float, batch: int, seed: int
) -> None:
    world = World(at_random(share, seed), batch_size=batch)
    world.put(10_000)
    world.run()
    assert world.refused == {}
    assert len(world.delivered) == 10_000
    assert len(world.requests) <= 10_000 / batch / (1 - share) * 1.25 + 12 / (1 - share)
    assert len(world.late) <= 200


@pytest.mark.parametrize("share", [0.7, 0.9])
def test_single_events_are_not_blamed_either_and_pauses_stay_short(share: float) -> None:
    world = World(at_random(share, 1), batch_size=1)
    world.put(1000)
    world.run()
    assert world.refused == {}
    needed = 1000 / (1 - share)
    assert len(world.requests) <= needed * 1.2
    assert world.now - 1000 <= needed * (0.01 + world.takes) * 1.3
    assert len(world.late) <= 60


@pytest.mark.parametrize("share", [0.3, 0.7, 0.9])
def test_many_in_flight_are_not_slowed_down_by_failures_at_random(share: float) -> None:
    world = World(at_random(share, 1), batch_size=1, in_flight=32, takes=0.05)
    world.put(500)
    world.run()  # now it knows the share
    began_at = world.now
    world.put(1500)
    world.run()
    assert world.refused == {}
    assert world.now - began_at <= 1500 / (1 - share) * 0.05 / 32 * 1.25 + 10


def test_a_limit_that_lets_one_request_through_each_second_gets_nothing_blamed() -> None:
    world = World(batch_size=1)
    last = [0.0]

    def limited(_: list[int]) -> Outcome:
        if world.now - last[0] < 1:
            return DOWN
        last[0] = world.now
        return DELIVERED

    world.endpoint = limited
    world.put(100)
    world.run()
    assert world.refused == {}
    assert world.now - 1000 <= 100 * 2 + 60


class Window:
    """Lets so many requests through in each period, and answers 429 to the others."""

    def __init__(self, world: World, requests: int, seconds: float, *, says_when: bool) -> None:
        self._world, self._requests, self._seconds, self._says_when = world, requests, seconds, says_when
        self._began = -math.inf
        self._left = 0

    def __call__(self, _: list[int]) -> Outcome:
        now = self._world.now
        if now - self._began >= self._seconds:
            self._began, self._left = now, self._requests
        if self._left == 0:
            wait = self._began + self._seconds - now
            return replace(LIMITED, retry_after=math.ceil(wait)) if self._says_when else LIMITED
        self._left -= 1
        return DELIVERED


class Bucket:
    """Lets a request through for each token; they drip in at a rate, up to a size."""

    def __init__(self, world: World, rate: float, size: float, *, says_when: bool) -> None:
        self._world, self._rate, self._size, self._says_when = world, rate, size, says_when
        self._tokens, self._at = size, world.now

    def __call__(self, _: list[int]) -> Outcome:
        now = self._world.now
        self._tokens = min(self._size, self._tokens + (now - self._at) * self._rate)
        self._at = now
        if self._tokens < 1:
            wait = (1 - self._tokens) / self._rate
            return replace(LIMITED, retry_after=math.ceil(wait)) if self._says_when else LIMITED
        self._tokens -= 1
        return DELIVERED


@pytest.mark.parametrize(("batch", "in_flight"), [(1, 1), (10, 1), (1, 32)])
@pytest.mark.parametrize("says_when", [True, False])
@pytest.mark.parametrize(("requests", "seconds"), [(1, 1), (1, 10), (5, 1), (20, 60), (100, 7)])
def test_a_limit_of_so_many_requests_in_a_while_gets_nothing_blamed(
    requests: int, seconds: float, batch: int, in_flight: int, *, says_when: bool
) -> None:
    world = World(batch_size=batch, in_flight=in_flight)
    world.endpoint = Window(world, requests, seconds, says_when=says_when)
    world.put(100 * batch)
    world.run(until=lambda: len(world.requests) > 5000)
    assert world.refused == {}
    assert len(world.delivered) > 3


@pytest.mark.parametrize(("batch", "in_flight"), [(1, 1), (10, 1), (1, 32)])
@pytest.mark.parametrize("says_when", [True, False])
@pytest.mark.parametrize(("rate", "size"), [(1, 1), (1, 10), (10, 3), (100, 50), (0.1, 5)])
def test_a_limit_by_tokens_gets_nothing_blamed(
    rate: float, size: float, batch: int, in_flight: int, *, says_when: bool
) -> None:
    world = World(batch_size=batch, in_flight=in_flight)
    world.endpoint = Bucket(world, rate, size, says_when=says_when)
    world.put(100 * batch)
    world.run(until=lambda: len(world.requests) > 5000)
    assert world.refused == {}
    assert len(world.delivered) > 3


@pytest.mark.parametrize("batch", [1, 10])
@pytest.mark.parametrize("failure", [UNAUTHORIZED, FORBIDDEN, TOO_MANY])
def test_a_token_that_some_of_the_servers_refuse_gets_nothing_blamed(failure: Outcome, batch: int) -> None:
    world = World(at_random(0.5, 1, failure), batch_size=batch)
    world.put(2000)
    world.run()
    assert world.refused == {}
    assert world.is_done


@pytest.mark.parametrize("failure", [RESETS, HANGS, DOWN])
@pytest.mark.parametrize("batch", [1, 100])
def test_bad_events_in_a_row_that_leave_doubt_hold_the_others_for_a_while_at_most(failure: Outcome, batch: int) -> None:
    world = World(choking(range(100, 110), failure), batch_size=batch)
    world.put(2000)
    world.run(until=lambda: len(world.delivered) > 500)
    assert world.now - 1000 <= 180
    world.run(seconds=3600)
    assert set(world.refused) == set(range(100, 110))
    assert len(world.delivered) == 1990


@pytest.mark.parametrize("failure", [RESETS, HANGS, DOWN])
@pytest.mark.parametrize("batch", [2, 3, 4, 10])
@pytest.mark.parametrize("bad", [2, 4, 10])
def test_bad_events_that_fill_small_batches_hold_the_others_no_longer_than_single_ones(
    failure: Outcome, batch: int, bad: int
) -> None:
    world = World(choking(range(100, 100 + bad), failure), batch_size=batch)
    world.put(2000)
    world.run(until=lambda: 100 + bad in world.delivered)
    assert world.now - 1000 <= 10
    world.run(seconds=60)
    assert set(world.refused) == set(range(100, 100 + bad))
    assert len(world.delivered) == 2000 - bad


@pytest.mark.parametrize("failure", ABOUT_AN_EVENT)
@pytest.mark.parametrize("batch", [1, 10, 100])
def test_exactly_ten_refused_in_a_row_after_it_worked_come_back(failure: Outcome, batch: int) -> None:
    world = World(batch_size=batch)
    world.put(500)
    world.run()
    world.endpoint = choking(range(500, 510), failure)
    world.put(10)
    world.run(seconds=7200)
    assert world.refused == {}
    world.endpoint = take_all
    world.put(50)
    world.run()
    assert sorted(world.delivered) == list(range(560))
    assert len([event for place, event in enumerate(world.delivered) if event > place]) <= 1


@pytest.mark.parametrize("batch", [2, 10, 100])
def test_an_endpoint_that_worked_and_now_names_each_event_it_gets_is_not_believed(batch: int) -> None:
    world = World(batch_size=batch)
    world.put(500)
    world.run()
    world.endpoint = lambda events: Rejected("bad", (len(events) - 1,))
    world.put(300)
    world.run(seconds=86400)
    assert world.refused == {}
    world.endpoint = take_all
    world.run()
    assert world.delivered == list(range(800))


@pytest.mark.parametrize("batch", [1, 10])
def test_an_endpoint_that_comes_and_goes_gets_nothing_blamed(batch: int) -> None:
    world = World(batch_size=batch, takes=0.05)
    world.endpoint = lambda _: DELIVERED if int(world.now / 7) % 2 else DOWN
    world.put(3000)
    world.run()
    assert world.refused == {}
    assert world.late == []


# -- everything mixed --------------------------------------------------------------------------------------------------


@st.composite
def histories(draw: st.DrawFn) -> list[tuple[str, object]]:
    """Draw what happens one after the other."""
    kinds = st.one_of(
        st.tuples(st.just("put"), st.integers(min_value=1, max_value=60)),
        st.tuples(st.just("all fail"), st.sampled_from(ALL_FAILURES)),
        st.tuples(st.just("works"), st.none()),
        st.tuples(st.just("random"), st.sampled_from([0.3, 0.7])),
        st.tuples(st.just("time"), st.sampled_from([0.01, 1.0, 100.0, 5000.0])),
        st.tuples(st.just("reconfigure"), st.integers(min_value=1, max_value=20)),
    )
    return [("put", 30), *draw(st.lists(kinds, max_size=15))]


def happens(world: World, kind: str, value: Any, poison: Endpoint, bad: frozenset[int]) -> None:
    match kind, value:
        case "put", int(count):
            world.put(count)
        case "all fail", _:
            world.endpoint = lambda _: value
        case "works", _:
            world.endpoint = poison
        case "random", float(share):
            world.endpoint = at_random(share, 1, bad=bad)
        case "time", float(seconds):
            world.run(seconds=seconds)
        case "reconfigure", int(size):
            world.reconfigure(batch_size=size if world.rules.in_flight == 1 else 1)


@settings(max_examples=60, deadline=None)
@given(
    history=histories(),
    bad=st.frozensets(st.integers(min_value=0, max_value=200), max_size=4),
    failure=st.sampled_from(ALL_FAILURES),
    in_flight=st.sampled_from([1, 32]),
    threshold=st.sampled_from([0, 2]),
    keeps=st.booleans(),
    closes=st.booleans(),
)
def test_each_event_ends_once_and_only_bad_ones_are_refused(  # noqa: PLR0913 - that much can vary
    history: list[tuple[str, object]],
    bad: frozenset[int],
    failure: Failure,
    in_flight: int,
    threshold: int,
    *,
    keeps: bool,
    closes: bool,
) -> None:
    poison = choking(bad, failure)
    batch = 10 if in_flight == 1 else 1
    world = World(poison, batch_size=batch, in_flight=in_flight, keeps=keeps, failure_threshold=threshold)
    for kind, value in history:
        refused_before = len(world.refused)
        happens(world, kind, value, poison, bad)
        world.run(seconds=10)
        world.check_account()
        assert kind != "all fail" or len(world.refused) == refused_before
    world.endpoint = poison
    if closes:
        world.trial.close()
    world.run(seconds=100_000)
    world.check_account()
    assert set(world.refused) <= bad
    if keeps:
        assert not world.given_up
    if keeps and not closes and failure.was_seen:
        assert {*world.trial.unsettled(), *world.queue} <= bad
