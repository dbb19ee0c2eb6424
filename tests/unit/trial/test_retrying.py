"""Pauses between tries, Retry-After, and the circuit breaker."""

from __future__ import annotations

import math
from email.utils import formatdate
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kong_metering.config import Queue
from kong_metering.ingest.answer import parse_retry_after
from kong_metering.trial import retrying
from kong_metering.trial.decisions import Rules
from kong_metering.trial.retrying import Breaker

if TYPE_CHECKING:
    from tests.support.clock import FakeClock

NOW = 1_800_000_000.0


def rules(**settings: Any) -> Rules:
    return Rules.of(Queue(**settings), batch_size=1, keeps=False)


DEFAULTS = rules()

seconds_allowed = st.floats(min_value=0.001, max_value=1_000_000)
counts_of_failures = st.integers(min_value=1, max_value=10**12)

# -- when a failed batch is tried again --------------------------------------------------------------------------------


def test_the_backoff_doubles_up_to_its_limit() -> None:
    settings = rules(initial_retry_delay=0.5, max_retry_delay=3)
    assert [retrying.retry_delay(settings, failures, None) for failures in range(1, 6)] == [0.5, 1.0, 2.0, 3.0, 3.0]


def test_an_initial_delay_over_the_limit_is_cut_to_it() -> None:
    assert retrying.retry_delay(rules(initial_retry_delay=100, max_retry_delay=2), 1, None) == 2.0


@given(initial=seconds_allowed, limit=seconds_allowed, failures=counts_of_failures)
def test_each_pause_is_twice_the_one_before_or_the_limit(initial: float, limit: float, failures: int) -> None:
    settings = rules(initial_retry_delay=initial, max_retry_delay=limit)
    before, after = (retrying.retry_delay(settings, count, None) for count in (failures, failures + 1))
    assert 0.0 < before <= after <= limit
    assert after == min(limit, 2 * before)


@given(
    initial=seconds_allowed,
    limit=seconds_allowed,
    failures=counts_of_failures,
    asked=st.floats(min_value=0, allow_nan=False) | st.none(),
)
def test_what_the_endpoint_asks_for_never_shortens_a_backoff_and_is_capped(
    initial: float, limit: float, failures: int, asked: float | None
) -> None:
    settings = rules(initial_retry_delay=initial, max_retry_delay=limit)
    own = retrying.retry_delay(settings, failures, None)
    assert retrying.retry_delay(settings, failures, asked) == max(own, min(asked or 0.0, limit))


@pytest.mark.parametrize(
    ("limit", "trying_for", "gives_up"),
    [(60, 0.0, False), (60, 60.0, False), (60, 60.1, True), (0, 0.0, False), (0, 0.001, True), (-1, 0.0, True)],
)
def test_a_batch_is_given_up_once_it_was_tried_for_longer_than_its_time(
    limit: float, trying_for: float, *, gives_up: bool
) -> None:
    assert retrying.gives_up(rules(max_retry_time=limit), trying_for) is gives_up


@pytest.mark.parametrize("jump", [-1e9, 1e9])
def test_a_wall_clock_that_jumps_cannot_make_a_pause_longer_than_its_limit(jump: float) -> None:
    asked = parse_retry_after(formatdate(NOW + 5, usegmt=True), NOW + jump)
    assert 0.01 <= retrying.retry_delay(DEFAULTS, 1, asked) <= DEFAULTS.max_retry_delay


# -- the circuit breaker -----------------------------------------------------------------------------------------------


THREE = rules(failure_threshold=3, breaker_cooldown=30)


def opened(clock: FakeClock) -> Breaker:
    breaker = Breaker()
    for _ in range(3):
        breaker.failed(THREE, clock.monotonic())
    return breaker


def seconds_to_probe(breaker: Breaker, clock: FakeClock) -> float:
    return breaker.probe_at(THREE) - clock.monotonic()


def test_the_breaker_opens_after_that_many_failures_in_a_row(clock: FakeClock) -> None:
    breaker = Breaker()
    assert [breaker.failed(THREE, clock.monotonic()) for _ in range(4)] == [False, False, True, False]
    assert breaker.is_open


def test_a_success_in_between_begins_the_count_again(clock: FakeClock) -> None:
    breaker = Breaker()
    for _ in range(10):
        assert not breaker.failed(THREE, clock.monotonic())
        assert not breaker.failed(THREE, clock.monotonic())
        assert not breaker.succeeded()
    assert not breaker.is_open


def test_the_open_breaker_lets_one_probe_through_after_the_cooldown(clock: FakeClock) -> None:
    breaker = opened(clock)
    assert seconds_to_probe(breaker, clock) == 30
    clock.advance(30)
    assert seconds_to_probe(breaker, clock) == 0
    breaker.probe(clock.monotonic())
    assert seconds_to_probe(breaker, clock) == 30


def test_a_probe_that_fails_begins_another_cooldown(clock: FakeClock) -> None:
    breaker = opened(clock)
    clock.advance(30)
    breaker.probe(clock.monotonic())
    clock.advance(10)
    assert not breaker.failed(THREE, clock.monotonic())
    assert seconds_to_probe(breaker, clock) == 30


def test_a_probe_that_succeeds_closes_the_breaker(clock: FakeClock) -> None:
    breaker = opened(clock)
    clock.advance(30)
    breaker.probe(clock.monotonic())
    assert breaker.succeeded()
    assert not breaker.is_open
    assert breaker.probe_at(THREE) == -math.inf
    assert not breaker.succeeded()


def test_a_probe_of_a_closed_breaker_changes_nothing(clock: FakeClock) -> None:
    breaker = Breaker()
    breaker.probe(clock.monotonic())
    assert not breaker.is_open


def test_without_a_threshold_the_breaker_never_opens(clock: FakeClock) -> None:
    breaker = Breaker()
    assert not any(breaker.failed(DEFAULTS, clock.monotonic()) for _ in range(1000))
    assert not breaker.is_open


def test_a_cooldown_of_zero_makes_every_batch_a_probe(clock: FakeClock) -> None:
    settings = rules(failure_threshold=1, breaker_cooldown=0)
    breaker = Breaker()
    assert breaker.failed(settings, clock.monotonic())
    for _ in range(3):
        assert breaker.probe_at(settings) <= clock.monotonic()
        breaker.probe(clock.monotonic())
    assert breaker.is_open
