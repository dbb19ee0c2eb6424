"""The sequential test: whose failures are a matter of chance."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kong_metering.trial.blame import BLAME_CHANCE, Evidence, Seen, Suspicion, chance_of_run


def suspect(failures: int, refusals: int = 0) -> Suspicion:
    suspicion = Suspicion(Seen(), 0)
    for number in range(failures):
        suspicion.count(is_refusal=number < refusals, passes=number, words="no")
    return suspicion


def evidence_of(*runs: int, refused: bool = False) -> Evidence:
    """Give what requests have shown that got through after so many failures each."""
    evidence = Evidence()
    for place, failures in enumerate(runs):
        evidence.passed([place], failures, failures if refused else 0)
    return evidence


def tries_to_blame(evidence: Evidence) -> int:
    return next(tries for tries in range(1, 10_000) if evidence.blames(suspect(tries)))


@pytest.mark.parametrize(
    ("run", "passes", "failures", "chance"),
    [(0, 5, 5, 1.0), (1, 0, 0, 1 / 2), (1, 1, 0, 1 / 3), (2, 1, 0, 1 / 6), (1, 3, 1, 1 / 3), (2, 2, 1, 1 / 5)],
)
def test_the_chance_of_a_run_is_that_of_laplaces_rule(run: int, passes: int, failures: int, chance: float) -> None:
    assert chance_of_run(run, passes, failures) == pytest.approx(chance)


@given(
    run=st.integers(min_value=1, max_value=500),
    passes=st.integers(min_value=0, max_value=2000),
    failures=st.integers(min_value=0, max_value=2000),
)
def test_more_failures_of_its_own_make_it_less_likely_and_more_of_others_more(
    run: int, passes: int, failures: int
) -> None:
    chance = chance_of_run(run, passes, failures)
    assert chance_of_run(run + 1, passes, failures) <= chance * (1 + 1e-9)
    assert chance_of_run(run, passes, failures + 1) >= chance * (1 - 1e-9)
    assert chance_of_run(run, passes + 1, failures) <= chance * (1 + 1e-9)


@pytest.mark.parametrize(("passes", "tries"), [(1, 1413), (3, 68), (10, 12), (20, 7), (100, 4), (1000, 3), (10_000, 2)])
def test_few_witnesses_make_a_cautious_test(passes: int, tries: int) -> None:
    assert tries_to_blame(evidence_of(*[0] * passes)) == pytest.approx(tries, abs=1)


@pytest.mark.parametrize("run", [1, 2, 3, 9, 19])
def test_it_takes_as_many_tries_as_a_good_event_fails_once_in_a_million_times(run: int) -> None:
    least = math.log(1e-6) / math.log(run / (run + 1))
    assert least <= tries_to_blame(evidence_of(*[run] * 1000)) <= least * 1.3


@pytest.mark.parametrize("share", [0.3, 0.7, 0.9])
def test_good_events_are_not_blamed_where_requests_fail_at_random(share: float) -> None:
    chance = random.Random(7)  # noqa: S311
    evidence, longest = Evidence(), 0
    for place in range(20_000):
        run = 0
        while chance.random() < share:
            run += 1
        longest = max(longest, run)
        if place > 10:
            assert not evidence.blames(suspect(run)), (place, run)
        evidence.passed([place], run, 0)
    assert longest > 5


def test_without_witnesses_nothing_is_blamed() -> None:
    assert not Evidence().blames(suspect(900))
    assert not Evidence().blames(suspect(2, 2))


@pytest.mark.parametrize(("passes", "refusals"), [(100, 2), (12, 2), (11, 3), (6, 3), (5, 4), (4, 4), (3, 5)])
def test_a_clear_refusal_needs_a_confirmation_or_a_few_more_with_few_witnesses(passes: int, refusals: int) -> None:
    evidence = evidence_of(*[0] * passes)
    assert not evidence.blames(suspect(refusals - 1, refusals - 1))
    assert evidence.blames(suspect(refusals, refusals))


def test_a_refusal_is_not_clear_where_others_are_refused_and_delivered_after_all() -> None:
    evidence = evidence_of(*[0, 2] * 20, refused=True)
    assert not evidence.blames(suspect(6, 6))


def test_a_refusal_among_other_failures_is_not_clear() -> None:
    assert not evidence_of(*[0] * 20).blames(suspect(4, 2))


def test_failures_of_a_part_that_was_cut_up_count_once_all_of_it_is_delivered() -> None:
    evidence = Evidence()
    evidence.shelve([1, 2, 3], 4, 1)
    evidence.passed([1, 2], 0, 0)
    assert evidence.seen == Seen(1, 0, 0)
    evidence.passed([3], 1, 0)
    assert evidence.seen == Seen(2, 5, 1)


def test_failures_of_a_part_with_an_event_to_blame_count_for_nothing() -> None:
    evidence = Evidence()
    evidence.shelve([1, 2, 3], 4, 0)
    evidence.forget([2])
    evidence.passed([1, 3], 0, 0)
    assert evidence.seen == Seen(1, 0, 0)


def test_only_what_happened_since_its_first_failure_is_compared() -> None:
    evidence = evidence_of(*[0] * 10_000)
    suspicion = Suspicion(evidence.seen, evidence.passes, failures=10)
    assert not evidence.blames(suspicion)


@pytest.mark.parametrize("share", [0.5, 0.9, 0.95])
def test_the_share_of_failures_is_measured(share: float) -> None:
    chance = random.Random(3)  # noqa: S311
    runs = []
    for _ in range(2000):
        run = 0
        while chance.random() < share:
            run += 1
        runs.append(run)
    assert evidence_of(*runs).failure_share == pytest.approx(share, abs=0.06)


def test_an_outage_counts_as_one_failure_however_long_it_was() -> None:
    evidence = evidence_of(*[0] * 50, 100_000)
    assert evidence.failure_share < 0.05
    assert not evidence.is_plausible(2)


def test_nothing_is_plausible_before_anything_was_seen() -> None:
    assert not Evidence().is_plausible(1)
    assert not evidence_of(*[0] * 50).is_plausible(1)


def test_tries_of_a_suspect_spread_over_the_whole_time_between_two_successes() -> None:
    # A limit on the endpoint's side lets every 100th request through: the one whose turn comes just then.
    evidence = evidence_of(*[99] * 500)
    waits = [evidence.next_wait(Suspicion(Seen(), 0, failures=number)) for number in range(1, 400)]
    hits = {wait * 10 // max(waits) for wait in waits}
    assert max(waits) > 150
    assert hits >= set(range(10))


def test_where_nothing_else_fails_a_suspect_waits_for_no_more_than_one_success() -> None:
    evidence = evidence_of(*[0] * 50)
    assert {evidence.next_wait(Suspicion(Seen(), 0, failures=number)) for number in range(100)} == {0}
    suspicion = Suspicion(Seen(), passes=7)
    assert [suspicion.may_go(7, 0.0), suspicion.may_go(8, 0.0)] == [False, True]


def test_a_good_event_is_blamed_with_a_chance_under_one_in_a_million() -> None:
    assert BLAME_CHANCE <= 1e-6


def test_the_trouble_of_many_that_one_request_ends_counts_once() -> None:
    evidence = Evidence()
    for place in range(100):
        evidence.shelve([place], 50, 0)
    evidence.passed(range(100), 0, 0)
    assert evidence.failure_share == pytest.approx(0.5)
    assert evidence.seen == Seen(passes=1, failures=5000)


def test_a_share_of_failures_is_less_than_one() -> None:
    evidence = Evidence()
    for place in range(1000):
        evidence.shelve([place], 1, 0)
        evidence.passed([place], 1, 0)
    assert 0.99 < evidence.failure_share < 1.0
    assert evidence.is_plausible(1000)


def test_no_endpoint_is_taken_for_one_that_always_fails() -> None:
    """A bad event would be tried for ever, and hold all others."""
    evidence = Evidence()
    for place in range(2):
        evidence.passed([place], failures=1, refusals=0)
        evidence.shelve([10 + place, 20 + place], failures=1, refusals=0)
        evidence.passed([10 + place], failures=0, refusals=0)
        evidence.passed([20 + place], failures=1, refusals=0)
    evidence.shelve([30], failures=3, refusals=0)
    evidence.passed([30], failures=3, refusals=0)
    assert evidence.failure_share < 1
    assert not evidence.is_plausible(1000)
