"""What the trial does step by step: pauses, probes, verdicts, the breaker, a newer configuration, the end."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from dataclasses import replace

import pytest

from kong_metering.config import Queue
from kong_metering.reasons import Dropped
from kong_metering.trial.decisions import Pause, Rules, Send, Take
from kong_metering.trial.outcome import Delivered, Failed, Outcome, Rejected
from kong_metering.trial.retrying import Condition
from kong_metering.trial.trial import REACH, Trial
from tests.unit.trial.world import (
    ALL_FAILURES,
    BAD,
    DELIVERED,
    DOWN,
    FORBIDDEN,
    HANGS,
    LIMITED,
    RESETS,
    RULES,
    TOO_MANY,
    UNAUTHORIZED,
    UNREACHABLE,
    Endpoint,
    World,
    choking,
    take_all,
)

# Whether the events have arrived is open then.
IN_DOUBT = (DOWN, HANGS, RESETS)


def pauses(world: World) -> list[float]:
    """Tell the pauses between requests, in steps of what a request takes."""
    return [round(b - a - world.takes, 6) for a, b in zip(world.sent_at, world.sent_at[1:], strict=False)]


class Script:
    """Gives these answers, then takes all."""

    def __init__(self, *answers: Outcome) -> None:
        self._answers = list(answers)

    def __call__(self, _: list[int]) -> Outcome:
        return self._answers.pop(0) if self._answers else DELIVERED


# -- in turn -----------------------------------------------------------------------------------------------------------


def test_the_rules_are_read_from_the_configuration() -> None:
    assert Rules.of(Queue(), batch_size=7, keeps=True) == Rules(7, 1, 0.01, 60, 60, 0, 60, keeps=True, asks_first=True)
    assert not Rules.of(Queue(), batch_size=7, keeps=False).asks_first
    assert not Rules.of(Queue(concurrency_limit=-1), batch_size=1, keeps=True).asks_first
    assert Rules.of(Queue(concurrency_limit=-1), batch_size=1, keeps=False).in_flight == 32


def test_events_are_taken_sent_and_settled_in_batches() -> None:
    trial: Trial[str] = Trial(RULES, 0.0)
    assert trial.next(0.0, 0) == Pause(None)
    assert trial.next(0.0, 3) == Take(3)
    trial.take(["a", "b", "c"], 0.0)
    decision = trial.next(0.0, 0)
    assert isinstance(decision, Send)
    assert decision.part.items == ["a", "b", "c"]
    assert trial.next(0.0, 5) == Pause(None)
    assert trial.unsettled() == ["a", "b", "c"]
    assert trial.answer(decision.part, Delivered(), 1.0).settled == ["a", "b", "c"]
    assert trial.unsettled() == []


def test_a_batch_is_no_larger_than_the_rules_say() -> None:
    world = World(batch_size=4)
    world.put(10)
    assert world.run().requests == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_with_many_in_flight_each_event_goes_alone_and_at_once() -> None:
    world = World(batch_size=1, in_flight=32)
    world.put(40)
    while world.step(world.now):
        pass
    assert world.requests == [[event] for event in range(32)]
    assert world.run().delivered == list(range(40))


# -- pauses ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failure", [DOWN, UNREACHABLE, FORBIDDEN, BAD])
def test_a_failing_event_is_sent_again_with_doubled_pauses(failure: Outcome) -> None:
    world = World(Script(*[failure] * 5), initial_retry_delay=1, max_retry_delay=6)
    world.put(1)
    assert world.run().delivered == [0]
    assert pauses(world) == [1, 2, 4, 6, 6]


def test_the_next_trouble_begins_with_the_shortest_pause_again() -> None:
    world = World(Script(*[UNREACHABLE] * 3, DELIVERED, *[DELIVERED] * 50, UNREACHABLE), batch_size=1)
    world.put(60)
    world.run()
    assert [pause for pause in pauses(world) if pause] == [0.01, 0.02, 0.04, 0.01]


@pytest.mark.parametrize(("asked", "pause"), [(None, 1.0), (0.5, 1.0), (7.0, 7.0), (1e9, 60.0)])
def test_the_endpoint_may_ask_for_a_longer_pause_up_to_the_limit(asked: float | None, pause: float) -> None:
    answer = Failed("later", "503", retry_after=asked)
    world = World(Script(answer), initial_retry_delay=1)
    world.put(1)
    world.run()
    assert pauses(world) == [pause]


def test_retry_after_is_honoured_where_requests_fail_at_random_too() -> None:
    answers: list[Outcome] = [UNREACHABLE, DELIVERED] * 20
    world = World(Script(*answers, Failed("later", "503", retry_after=30.0)), batch_size=1)
    world.put(30)
    world.run()
    assert max(pauses(world)) == 30


# -- while nothing gets through ----------------------------------------------------------------------------------------


def test_after_a_failed_batch_its_oldest_event_probes_alone_and_then_batches_go_again() -> None:
    world = World(Script(UNREACHABLE, UNREACHABLE), batch_size=10)
    world.put(30)
    world.run()
    assert [(request[0], len(request)) for request in world.requests] == [
        (0, 10),
        (0, 1),
        (0, 1),
        (1, 9),
        (10, 10),
        (20, 10),
    ]


@pytest.mark.parametrize("failure", IN_DOUBT)
@pytest.mark.parametrize(("batch", "in_flight"), [(100, 1), (1000, 1), (1, 32)])
def test_an_outage_puts_what_was_under_way_when_it_began_in_doubt(failure: Outcome, batch: int, in_flight: int) -> None:
    world = World(batch_size=batch, in_flight=in_flight)
    world.put(2000)
    world.run()
    world.endpoint = lambda _: failure
    world.put(5000)
    world.run(seconds=59)
    assert world.in_doubt == set(range(2000, 2000 + max(batch, in_flight)))
    world.run(seconds=3 * 86400)
    assert len(world.in_doubt) <= max(batch, in_flight) + 2


@pytest.mark.parametrize("failure", IN_DOUBT)
@pytest.mark.parametrize("batch", [2, 4, 10])
def test_an_outage_puts_one_event_in_doubt_besides_a_small_batch_that_was_under_way(
    failure: Outcome, batch: int
) -> None:
    world = World(batch_size=batch)
    world.put(500)
    world.run()
    world.endpoint = lambda _: failure
    world.put(5000)
    world.run(seconds=59)
    assert world.in_doubt == {*range(500, 500 + batch), 510}
    world.run(seconds=3 * 86400)
    assert len(world.in_doubt) == batch + 3


@pytest.mark.parametrize("failure", IN_DOUBT)
def test_an_outage_puts_one_event_in_doubt_besides_a_single_one_that_was_under_way(failure: Outcome) -> None:
    world = World(batch_size=1)
    world.put(500)
    world.run()
    world.endpoint = lambda _: failure
    world.put(5000)
    world.run(seconds=59)
    assert world.in_doubt == {500, 510}
    assert len(world.requests) > 500 + 15
    world.run(seconds=3 * 86400)
    assert world.in_doubt == {500, 510, 517, 524}


@pytest.mark.parametrize("failure", IN_DOUBT)
@pytest.mark.parametrize("batch", [1, 100])
def test_an_endpoint_that_has_taken_nothing_so_far_is_asked_with_single_events(failure: Outcome, batch: int) -> None:
    world = World(lambda _: failure, batch_size=batch, asks_first=True)
    world.put(5000)
    world.run(seconds=59)
    assert world.in_doubt == {0, 10}
    world.reconfigure()
    world.run(seconds=59)
    assert world.in_doubt == {0, 10}
    world.endpoint = take_all
    world.run()
    assert sorted(world.delivered) == list(range(5000))


def condition_of(world: World) -> str:
    return world.trial.condition.value


def test_an_endpoint_that_is_only_asked_so_far_is_not_said_to_fail() -> None:
    world = World(lambda _: DOWN, batch_size=10, asks_first=True)
    conditions = [world.trial.condition]
    world.put(5)
    world.run(seconds=30)
    conditions.append(world.trial.condition)
    world.reconfigure()
    conditions.append(world.trial.condition)
    assert conditions == [Condition.WORKS, Condition.NOTHING_GETS_THROUGH, Condition.WORKS]


def test_once_the_one_event_got_through_batches_go() -> None:
    world = World(batch_size=10, asks_first=True)
    world.put(25)
    world.run()
    assert [len(request) for request in world.requests] == [1, 9, 10, 5]


def test_a_failure_that_leaves_no_doubt_does_not_end_the_care_for_those_that_do() -> None:
    world = World(batch_size=1)
    world.endpoint = lambda _: FORBIDDEN if len(world.requests) % 3 else DOWN
    world.put(5000)
    world.run(seconds=59)
    assert len(world.in_doubt) <= 2


def test_the_oldest_event_is_tried_first_in_each_round() -> None:
    world = World(lambda _: DOWN, batch_size=11)
    world.put(100)
    world.run(seconds=59)
    probes = [request[0] for request in world.requests[1:]]
    assert probes[::2] == [0] * len(probes[::2])
    assert set(probes[1::2]) == {1, 2, 4, 8}
    world.run(seconds=600)
    probes = [request[0] for request in world.requests[1:]]
    assert probes[::2] == [0] * len(probes[::2])
    assert set(probes[1::2]) == {1, 2, 4, 8, 17}


def test_no_other_event_is_tried_where_none_can_be_the_reason() -> None:
    world = World(lambda _: UNREACHABLE, batch_size=10)
    world.put(100)
    world.run(seconds=3600)
    assert {tuple(request) for request in world.requests} == {tuple(range(10)), (0,)}


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("in_flight", [1, 32])
@pytest.mark.parametrize("failure", ALL_FAILURES)
def test_no_more_is_held_than_a_batch_and_the_reach(failure: Outcome, in_flight: int, *, keeps: bool) -> None:
    world = World(lambda _: failure, batch_size=1 if in_flight > 1 else 50, in_flight=in_flight, keeps=keeps)
    world.put(3000)
    world.run(seconds=100_000)
    assert world.most_held <= (50 if in_flight == 1 else 32) + REACH
    world.check_account()


def test_what_failed_is_said_with_its_kind_and_level() -> None:
    world = World(Script(UNREACHABLE, FORBIDDEN, BAD), batch_size=10)
    world.put(10)
    world.run()
    assert [(note.kind, note.level) for note in world.notes] == [
        ("failed:ConnectionRefusedError", logging.WARNING),
        ("failed:403", logging.ERROR),
        ("failed:refused", logging.WARNING),
    ]
    assert world.notes[0].text == "could not deliver 10 events, will try again: refused"


# -- whose fault -------------------------------------------------------------------------------------------------------


def naming(bad: set[int], *, first_only: bool = False) -> Script:
    class Naming(Script):
        def __call__(self, events: list[int]) -> Outcome:
            indexes = tuple(index for index, event in enumerate(events) if event in bad)
            return Rejected("bad", indexes[:1] if first_only else indexes) if indexes else DELIVERED

    return Naming()


@pytest.mark.parametrize("bad", [{0}, {5}, {9}, {1, 2, 7}, set(range(9))])
def test_events_that_the_endpoint_names_cost_a_request_for_the_rest_and_one_each(bad: set[int]) -> None:
    world = World(naming(bad), batch_size=10)
    world.put(10)
    world.run()
    assert sorted(world.refused) == sorted(bad)
    assert set(world.refused.values()) == {"bad"}
    assert sorted(map(len, world.requests)) == sorted([10, 10 - len(bad), *[1] * len(bad)])


def test_events_that_the_endpoint_names_one_by_one_cost_two_requests_each() -> None:
    world = World(naming({1, 4, 7}, first_only=True), batch_size=10)
    world.put(10)
    world.run()
    assert (sorted(world.refused), len(world.requests)) == ([1, 4, 7], 1 + 3 * 2)


def misnaming(bad: int, named: Callable[[int], int]) -> Endpoint:
    """Make an endpoint that refuses what has a bad event in it, and names another one's index for that."""

    def answer(events: list[int]) -> Outcome:
        return Rejected("bad", (named(events.index(bad)),)) if bad in events else DELIVERED

    return answer


@pytest.mark.parametrize("batch", [2, 3, 10, 100])
@pytest.mark.parametrize("named", [lambda _: 0, lambda index: index + 1, lambda index: max(0, index - 1)])
def test_an_event_that_the_endpoint_names_falsely_is_delivered(named: Callable[[int], int], batch: int) -> None:
    world = World(batch_size=batch)
    world.put(500)
    world.run()
    world.endpoint = misnaming(533, named)
    world.put(500)
    world.run()
    assert set(world.refused) == {533}
    assert sorted(world.delivered) == [event for event in range(1000) if event != 533]


def test_an_event_that_is_named_for_what_the_endpoint_says_of_any_array_is_delivered() -> None:
    seen: list[int] = []

    def now_and_then(events: list[int]) -> Outcome:
        seen.append(len(events))
        return Rejected("bad", (1,)) if len(events) > 1 and len(seen) % 5 == 0 else DELIVERED

    world = World(now_and_then, batch_size=10)
    world.put(2000)
    world.run()
    assert world.refused == {}
    assert sorted(world.delivered) == list(range(2000))


def test_an_endpoint_that_takes_no_arrays_and_names_their_first_event_gets_all_of_them_one_by_one() -> None:
    world = World(lambda events: Rejected("no arrays", (0,)) if len(events) > 1 else DELIVERED, batch_size=10)
    world.put(300)
    world.run()
    assert world.refused == {}
    assert sorted(world.delivered) == list(range(300))


def test_the_endpoints_word_is_not_believed_before_the_rest_got_through() -> None:
    world = World(lambda _: Rejected("all are bad", (0,)), batch_size=10)
    world.put(100)
    world.run(seconds=3600)
    assert world.refused == {}
    world.endpoint = take_all
    world.run()
    assert world.delivered == list(range(100))


def test_indexes_that_are_no_event_of_the_batch_are_no_help_and_no_harm() -> None:
    world = World(choking({3}, Rejected("bad", (10, 11, 10**7))), batch_size=10)
    world.put(200)
    world.run()
    assert set(world.refused) == {3}


@pytest.mark.parametrize("failure", [DOWN, FORBIDDEN, BAD])
def test_an_event_is_refused_with_the_endpoints_last_words(failure: Failed | Rejected) -> None:
    world = World(choking({33}, failure), batch_size=10)
    world.put(300)
    world.run()
    assert world.refused == {33: failure.reason}


def test_failures_that_no_event_can_be_the_reason_for_blame_none() -> None:
    world = World(choking({33}, UNREACHABLE), batch_size=1)
    world.put(300)
    world.run(seconds=3600)
    assert world.refused == {}
    assert world.delivered == list(range(33))


@pytest.mark.parametrize("failure", [UNAUTHORIZED, LIMITED, TOO_MANY])
def test_a_refused_sender_gets_no_more_requests_for_it_and_the_oldest_event_goes_first(failure: Outcome) -> None:
    world = World(lambda _: failure, batch_size=1, initial_retry_delay=1, max_retry_delay=8)
    world.put(100)
    world.run(until=lambda: len(world.requests) == 9)
    assert [request[0] for request in world.requests] == [0, 0, 1, 0, 2, 0, 4, 0, 8]
    first = 5 if failure is TOO_MANY else 1
    assert pauses(world) == [max(first, pause) for pause in (1, 2, 4, 8, 8, 8, 8, 8)]


def test_retry_after_holds_for_an_event_under_suspicion_while_others_go_on() -> None:
    world = World(choking({33}, TOO_MANY), batch_size=1, takes=0.5)
    world.put(2000)
    world.run()
    assert set(world.refused) == {33}
    tries = [at for request, at in zip(world.requests, world.sent_at, strict=True) if request == [33]]
    assert min(b - a for a, b in itertools.pairwise(tries)) >= 5
    assert world.now - 1000 <= 2000 * 0.5 + len(tries) * 0.5 + 3 * 5 + 5


def test_an_event_with_no_others_to_compare_it_with_is_tried_on_and_refused_once_others_come() -> None:
    world = World(choking({2}, FORBIDDEN), batch_size=10)
    world.put(3)
    world.run(seconds=3600)
    assert (world.delivered, world.refused) == ([0, 1], {})
    for _ in range(20):
        world.put(1)
        world.run(seconds=60)
    assert set(world.refused) == {2}
    assert world.delivered == [0, 1, *range(3, 23)]


def test_a_batch_that_is_too_large_is_cut_until_it_fits() -> None:
    world = World(lambda events: BAD if len(events) > 10 else DELIVERED, batch_size=100)
    world.put(300)
    world.run()
    assert world.delivered == list(range(300))
    assert world.refused == {}
    assert len(world.requests) <= 3 * 40 + 5


# -- what is given up, and the breaker ---------------------------------------------------------------------------------


def test_without_a_spool_a_batch_is_given_up_after_its_time_and_others_go_on() -> None:
    world = World(lambda events: UNREACHABLE if events[0] < 2 else DELIVERED, batch_size=2, keeps=False)
    world.put(6)
    world.run()
    assert world.given_up == dict.fromkeys([0, 1], Dropped.RETRY_TIME_EXCEEDED)
    assert world.words == ["2 events were lost, max_retry_time is exceeded: refused"]
    assert world.delivered == [2, 3, 4, 5]
    assert len([request for request in world.requests if request[0] == 0]) == 14


def test_a_retry_time_of_minus_one_means_a_single_try() -> None:
    world = World(lambda _: DOWN, batch_size=2, keeps=False, max_retry_time=-1)
    world.put(6)
    world.run()
    assert world.requests == [[0, 1], [2, 3], [4, 5]]


def test_without_a_spool_a_refused_event_is_refused_even_with_a_single_try() -> None:
    world = World(choking({2}, BAD), batch_size=4, keeps=False, max_retry_time=-1)
    world.put(8)
    world.run()
    assert (sorted(world.delivered), sorted([*world.refused, *world.given_up])) == ([0, 1, 3, 4, 5, 6, 7], [2])


def test_with_a_spool_nothing_is_given_up_but_it_is_said() -> None:
    world = World(lambda _: DOWN, batch_size=2)
    world.put(6)
    world.run(seconds=600)
    assert world.given_up == {}
    assert world.texts("kept")[0] == "max_retry_time is exceeded, events are kept until it works again: answered 503"
    assert 3 <= len(world.texts("kept")) <= 10


def test_the_breaker_sheds_events_after_so_many_failed_batches() -> None:
    world = World(lambda _: UNREACHABLE, batch_size=1, keeps=False, max_retry_time=-1, failure_threshold=3)
    world.put(10)
    world.run()
    reasons = list(world.given_up.values())
    assert (reasons.count(Dropped.RETRY_TIME_EXCEEDED), reasons.count(Dropped.BREAKER_OPEN)) == (3, 7)
    assert len(world.requests) == 3
    assert len(world.texts("breaker opened")) == 1


def test_the_breaker_probes_with_one_batch_after_the_cooldown_and_closes_when_it_gets_through() -> None:
    world = World(lambda _: UNREACHABLE, batch_size=2, keeps=False, max_retry_time=-1, failure_threshold=1)
    world.put(2)
    world.run()
    world.now += 60
    world.put(4)
    world.run()
    assert world.requests == [[0, 1], [2, 3]]
    assert world.given_up[2] is world.given_up[5] is Dropped.BREAKER_OPEN
    world.now += 60
    world.endpoint = take_all
    world.put(4)
    world.run()
    assert world.delivered == [6, 7, 8, 9]
    assert len(world.texts("breaker closed")) == 1


def test_only_one_of_many_in_flight_is_the_probe() -> None:
    world = World(
        lambda _: UNREACHABLE, batch_size=1, in_flight=32, keeps=False, max_retry_time=-1, failure_threshold=1
    )
    world.put(1)
    world.run()
    world.now += 60
    world.put(10)
    world.run()
    assert world.requests == [[0], [1]]


def test_with_a_spool_an_open_breaker_makes_probes_rare_and_drops_nothing() -> None:
    world = World(lambda _: UNREACHABLE, batch_size=2, max_retry_time=-1, failure_threshold=1, breaker_cooldown=500)
    world.put(10)
    world.run(seconds=5000)
    assert len(world.requests) == 10
    world.endpoint = take_all
    world.run()
    assert world.delivered == list(range(10))
    assert [note.kind for note in world.notes if "breaker" in note.kind] == ["breaker opened", "breaker closed"]


def test_an_open_breaker_does_not_keep_an_event_that_is_to_blame_in_front() -> None:
    world = World(choking({0}, FORBIDDEN), batch_size=1, max_retry_time=-1, failure_threshold=1, breaker_cooldown=5)
    world.put(50)
    world.run(seconds=3600)
    assert set(world.refused) == {0}
    assert len(world.delivered) == 49


# -- a newer configuration ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failure", ALL_FAILURES)
def test_a_newer_configuration_ends_a_pause_and_closes_the_breaker(failure: Outcome) -> None:
    world = World(lambda _: failure, failure_threshold=1, max_retry_time=-1, breaker_cooldown=10_000)
    world.put(1000)
    world.run(seconds=60_000)
    world.endpoint = take_all
    world.reconfigure()
    changed_at, before = world.now, len(world.requests)
    world.run()
    assert world.sent_at[before] == changed_at
    assert world.delivered == list(range(1000))


def test_what_fails_that_was_sent_under_the_old_configuration_counts_for_nothing() -> None:
    trial: Trial[int] = Trial(RULES, 0.0)
    trial.take([1, 2, 3], 0.0)
    decision = trial.next(0.0, 0)
    assert isinstance(decision, Send)
    trial.reconfigure(RULES, 1.0)
    answered = trial.answer(decision.part, UNREACHABLE, 2.0)
    assert (answered.notes, answered.given_up, answered.refused) == ([], [], [])
    again = trial.next(2.0, 0)
    assert isinstance(again, Send)
    assert again.part.items == [1, 2, 3]


def test_a_smaller_batch_size_holds_for_what_is_in_hand() -> None:
    world = World(lambda _: UNREACHABLE, batch_size=10)
    world.put(10)
    world.run(seconds=1)
    world.endpoint = take_all
    world.reconfigure(batch_size=3)
    world.run()
    assert world.delivered == list(range(10))


# -- the end, and what goes meanwhile ----------------------------------------------------------------------------------


def test_closing_ends_a_pause_and_sends_each_batch_once() -> None:
    world = World(lambda _: DOWN, batch_size=2, keeps=False, max_retry_time=1e9)
    world.put(6)
    world.run(seconds=5)
    before = len(world.requests)
    world.trial.close()
    world.run()
    assert world.requests[before:] == [[0, 1], [2], [3, 4], [5]]  # 2 was in hand, the others in the queue
    assert world.given_up == dict.fromkeys(range(6), Dropped.PROCESS_ENDED)


def test_closing_with_a_spool_leaves_the_rest_after_the_first_failure_in_order() -> None:
    world = World(choking({2}), batch_size=2)
    world.put(8)
    world.trial.close()
    world.run()
    assert world.requests == [[0, 1], [2, 3]]
    assert world.trial.unsettled() == [2, 3]
    assert world.trial.next(world.now, len(world.queue)) == Pause(None)


def test_closing_goes_on_behind_an_event_that_the_endpoint_refuses() -> None:
    world = World(choking({2}, BAD), batch_size=4)
    world.put(8)
    world.trial.close()
    world.run()
    assert world.delivered == [0, 1, 3, 4, 5, 6, 7]
    assert world.trial.unsettled() == [2]


def test_a_request_that_is_out_when_it_closes_was_its_part_s_last_try() -> None:
    trial: Trial[int] = Trial(RULES, 0.0)
    trial.take([1, 2], 0.0)
    decision = trial.next(0.0, 0)
    assert isinstance(decision, Send)
    trial.close()
    trial.answer(decision.part, DOWN, 1.0)
    assert trial.next(1.0, 5) == Pause(None)
    assert trial.unsettled() == [1, 2]


def test_events_that_are_not_to_be_sent_any_more_are_let_go() -> None:
    trial: Trial[str] = Trial(RULES, 0.0)
    trial.take(["a", "b", "c"], 0.0)
    decision = trial.next(0.0, 0)
    assert isinstance(decision, Send)
    assert trial.withdraw(decision.part, [decision.part.items[1]])
    assert trial.unsettled() == ["a", "c"]
    assert trial.answer(decision.part, Delivered(), 1.0).settled == ["a", "c"]


def test_an_event_that_is_let_go_does_not_free_what_the_endpoint_named_beside_it() -> None:
    trial: Trial[str] = Trial(replace(RULES, in_flight=2, asks_first=False), 0.0)
    trial.take(["first"], 0.0)
    decision = trial.next(0.0, 0)
    assert isinstance(decision, Send)
    trial.answer(decision.part, DELIVERED, 0.5)
    trial.take(["a", "named", "b", "c"], 1.0)
    decision = trial.next(1.0, 0)
    assert isinstance(decision, Send)
    trial.answer(decision.part, Rejected("bad", (1,)), 1.0)
    rest = trial.next(1.0, 0)
    assert isinstance(rest, Send)
    assert trial.withdraw(rest.part, ["a"])
    assert trial.next(1.0, 0) == Pause(None), "whether the others get through is not known yet"


def test_a_part_of_which_nothing_is_left_is_not_answered() -> None:
    trial: Trial[str] = Trial(RULES, 0.0)
    trial.take(["a", "b"], 0.0)
    decision = trial.next(0.0, 0)
    assert isinstance(decision, Send)
    assert not trial.withdraw(decision.part, decision.part.items)
    assert trial.unsettled() == []
    assert trial.next(0.0, 1) == Take(1)


@pytest.mark.parametrize("in_flight", [1, 32])
@pytest.mark.parametrize("failure", [BAD, DOWN, UNAUTHORIZED])
def test_what_comes_back_without_an_answer_is_sent_again_and_judged_as_before(failure: Outcome, in_flight: int) -> None:
    stumbles = itertools.cycle([False, True, False, False, True, True, False])
    world = World(
        choking({30, 31, 200}, failure),
        stumbles=lambda: next(stumbles),
        batch_size=20 if in_flight == 1 else 1,
        in_flight=in_flight,
    )
    world.put(300)
    world.run(until=lambda: len(world.delivered) > 40)
    world.reconfigure(max_retry_delay=30.0)
    world.put(2000)
    world.run(until=lambda: not world.queue)
    while not world.is_done and world.put_so_far < 20_000:
        world.put(20)  # what is under suspicion is compared with others
        world.run(until=lambda: not world.queue)
    world.run(seconds=10)
    world.check_account()
    assert set(world.refused) == {30, 31, 200}
    assert world.is_done


def test_a_part_of_which_nothing_is_left_does_not_come_back() -> None:
    trial: Trial[str] = Trial(RULES, 0.0)
    trial.take(["a"], 0.0)
    decision = trial.next(0.0, 0)
    assert isinstance(decision, Send)
    trial.withdraw(decision.part, decision.part.items)
    trial.recall(decision.part)
    assert trial.unsettled() == []
    assert trial.next(0.0, 0) == Pause(None)


# -- order, pauses and witnesses of the search -------------------------------------------------------------------------


def test_the_oldest_event_is_tried_alone_again_once_another_one_got_through() -> None:
    world = World(choking({0}, FORBIDDEN), batch_size=10)
    world.put(10)
    world.run(until=lambda: len(world.requests) == 4)
    assert world.requests == [list(range(10)), [0], [1], [0]]


def test_many_in_flight_that_fail_at_once_make_one_pause() -> None:
    world = World(lambda _: UNREACHABLE, batch_size=1, in_flight=32, initial_retry_delay=1)
    world.put(100)
    world.run(until=lambda: len(world.requests) == 35)
    assert [round(b - a) for a, b in zip(world.sent_at[31:], world.sent_at[32:], strict=False)] == [1, 2, 4]


def test_few_others_are_spent_sparingly_as_witnesses() -> None:
    world = World(choking({37}, FORBIDDEN), batch_size=100)
    world.put(100)
    world.run()
    assert set(world.refused) == {37}


# -- where nothing else will come


@pytest.mark.parametrize("failure", [DOWN, RESETS, FORBIDDEN, BAD])
@pytest.mark.parametrize("bad", [0, 5, 9])
def test_where_nothing_else_comes_the_last_one_is_judged_by_those_before(bad: int, failure: Outcome) -> None:
    world = World(choking({bad}, failure), batch_size=10, expects_more=False)
    world.put(10)
    world.run(seconds=3600)
    assert (list(world.refused), len(world.delivered)) == ([bad], 9)
    assert len(world.requests) < 30


@pytest.mark.parametrize("failure", ALL_FAILURES)
def test_where_nothing_else_comes_an_outage_blames_nobody_all_the_same(failure: Outcome) -> None:
    world = World(batch_size=10, expects_more=False)
    world.endpoint = lambda _: DELIVERED if len(world.requests) <= 5 else failure
    world.put(60)
    world.run(seconds=24 * 3600)
    assert (len(world.delivered), world.refused) == (50, {})
