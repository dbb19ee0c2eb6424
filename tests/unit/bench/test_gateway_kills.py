"""What kills cost, on made-up exchanges."""

from __future__ import annotations

from collections import Counter

import pytest
from gateway_client import Exchange
from gateway_kills import Kill, count_toll, remarks, tolls

KILLS = [Kill(10.0, 10.005), Kill(20.0, 20.005)]
FINE = Exchange("fine", 5.000, 5.001, 200)


def test_nothing_is_lost_when_all_are_answered_and_billed() -> None:
    toll = count_toll([FINE], {"fine"}, KILLS)
    assert (toll.statuses, toll.kills, toll.in_flight) == (Counter({200: 1}), 2, 0)
    assert (toll.failed_beside, toll.unbilled_beside) == (0, 0)


def test_a_request_under_way_at_a_kill_may_fail_or_go_unbilled() -> None:
    failed, unbilled = Exchange("failed", 9.99, 10.01, 500), Exchange("unbilled", 19.99, 20.01, 200)
    toll = count_toll([FINE, failed, unbilled], {"fine"}, KILLS)
    assert (toll.in_flight, toll.failed_in_flight, toll.unbilled_in_flight) == (2, 1, 1)
    assert (toll.failed_beside, toll.unbilled_beside, toll.failed_apart, toll.unbilled_apart) == (0, 0, (), ())


def test_one_sent_after_a_kill_may_not_fail() -> None:
    toll = count_toll([FINE, Exchange("late", 10.255, 10.26, 500)], {"fine"}, KILLS)
    assert (toll.failed_in_flight, toll.failed_beside) == (0, 1)
    assert toll.failed_apart == pytest.approx([250.0])


def test_one_sent_to_a_process_that_is_still_ending_was_under_way() -> None:
    toll = count_toll([Exchange("ending", 10.003, 10.01, 500)], set(), KILLS)
    assert (toll.failed_in_flight, toll.failed_beside) == (1, 0)


def test_one_without_an_answer_has_failed() -> None:
    assert count_toll([Exchange("gone", 15.0, 15.1, 0)], set(), KILLS).failed_beside == 1


def test_one_answered_just_before_a_kill_may_go_unbilled() -> None:
    just = Exchange("just", 9.98, 9.992, 200)
    toll = count_toll([just], set(), KILLS)
    assert (toll.unbilled_in_flight, toll.unbilled_in_grace, toll.unbilled_beside) == (0, 1, 0)
    assert toll.unbilled_apart == pytest.approx([-8.0])


def test_one_answered_long_before_or_after_all_kills_may_not() -> None:
    toll = count_toll([FINE, Exchange("after", 21.0, 21.1, 200)], set(), KILLS)
    assert toll.unbilled_beside == 2
    assert toll.unbilled_apart == pytest.approx([-4_999.0, 995.0])


def test_what_was_wanted_can_be_missed() -> None:
    found = {
        "protobuf": count_toll([FINE, Exchange("late", 10.255, 10.26, 500)], {"fine"}, KILLS),
        "msgpack": count_toll([FINE, Exchange("failed", 9.9, 10.1, 500)], {"fine"}, KILLS),
    }
    said = remarks(found)
    assert ["MISSED" in line for line in said] == [True, False, True]
    assert "1 others failed that were sent up to 250.0 ms after one" in said[0]
    assert [row[0] for row in tolls(found).rows] == ["protobuf", "msgpack"]


def test_what_was_wanted_can_be_met() -> None:
    found = {name: count_toll([FINE], {"fine"}, KILLS) for name in ("protobuf", "msgpack")}
    assert all("met" in line for line in remarks(found))
