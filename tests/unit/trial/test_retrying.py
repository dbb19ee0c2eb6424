"""Pauses between tries, Retry-After, and the circuit breaker."""

from __future__ import annotations

import math
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime, formatdate
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kong_metering.config import Queue
from kong_metering.trial import retrying
from kong_metering.trial.retrying import Breaker, parse_retry_after

if TYPE_CHECKING:
    from tests.support.clock import FakeClock

NOW = 1_800_000_000.0
DEFAULTS = Queue()

seconds_allowed = st.floats(min_value=0.001, max_value=1_000_000)
counts_of_failures = st.integers(min_value=1, max_value=10**12)

# -- when a failed batch is tried again --------------------------------------------------------------------------------


def test_the_backoff_doubles_up_to_its_limit() -> None:
    settings = Queue(initial_retry_delay=0.5, max_retry_delay=3)
    assert [retrying.retry_delay(settings, failures, None) for failures in range(1, 6)] == [0.5, 1.0, 2.0, 3.0, 3.0]


def test_an_initial_delay_over_the_limit_is_cut_to_it() -> None:
    assert retrying.retry_delay(Queue(initial_retry_delay=100, max_retry_delay=2), 1, None) == 2.0


@given(initial=seconds_allowed, limit=seconds_allowed, failures=counts_of_failures)
def test_each_pause_is_twice_the_one_before_or_the_limit(initial: float, limit: float, failures: int) -> None:
    settings = Queue(initial_retry_delay=initial, max_retry_delay=limit)
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
    settings = Queue(initial_retry_delay=initial, max_retry_delay=limit)
    own = retrying.retry_delay(settings, failures, None)
    assert retrying.retry_delay(settings, failures, asked) == max(own, min(asked or 0.0, limit))


@pytest.mark.parametrize(
    ("limit", "trying_for", "gives_up"),
    [(60, 0.0, False), (60, 60.0, False), (60, 60.1, True), (0, 0.0, False), (0, 0.001, True), (-1, 0.0, True)],
)
def test_a_batch_is_given_up_once_it_was_tried_for_longer_than_its_time(
    limit: float, trying_for: float, *, gives_up: bool
) -> None:
    assert retrying.gives_up(Queue(max_retry_time=limit), trying_for) is gives_up


# -- Retry-After -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None),
        ("0", 0.0),
        ("120", 120.0),
        (" 7 ", 7.0),
        ("1.5", 1.5),
        ("-5", 0.0),
        ("9" * 400, None),
        ("1e300", 1e300),
        ("inf", None),
        ("nan", None),
        ("", None),
        ("  ", None),
        ("soon", None),
        ("12 parsecs", None),
        ("\N{ARABIC-INDIC DIGIT FIVE} minutes", None),
        (formatdate(NOW + 90, usegmt=True), 90.0),
        (formatdate(NOW + 90, localtime=False), 90.0),
        (formatdate(NOW - 90, usegmt=True), 0.0),
        (formatdate(NOW, usegmt=True), 0.0),
        ("Fri, 15 Jan 2027 09:01:30 +0100", 90.0),
        ("Fri, 15 Jan 2027 08:01:30", 90.0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 251602300799.0),
        ("Mon, 01 Jan 0001 00:00:00 GMT", 0.0),
        ("Mon, 01 Jan 0001 00:00:00 +2359", 0.0),
        ("Fri, 31 Dec 9999 23:59:59 -2359", 251602300799.0 + 86340),
        ("Fri, 99 Foo 2027 99:99:99 GMT", None),
        ("Fri, 15 Jan 99999999999999999999 08:01:30 GMT", None),
        ("Fri, 15 Jan 2027 08:01:30 +99999999999999999999", None),
    ],
)
def test_retry_after_is_read_as_seconds_or_as_a_date(header: str | None, seconds: float | None) -> None:
    assert parse_retry_after(header, NOW) == seconds


@given(header=st.text(max_size=60) | st.from_regex(r"[A-Z][a-z]{2}, [0-9 ]{1,4} [A-Za-z]{3} [0-9]{0,6} [0-9:+ A-Z-]*"))
def test_whatever_stands_in_retry_after_is_seconds_or_nothing(header: str) -> None:
    seconds = parse_retry_after(header, NOW)
    assert seconds is None or (seconds >= 0 and math.isfinite(seconds))


@given(
    moment=st.integers(min_value=0, max_value=200_000_000_000),
    offset=st.integers(min_value=-1439, max_value=1439),
    now=st.integers(min_value=-(10**11), max_value=10**12),
)
def test_a_date_is_as_far_away_as_the_wall_clock_says(moment: int, offset: int, now: int) -> None:
    zone = timezone(timedelta(minutes=offset))
    header = format_datetime(datetime.fromtimestamp(moment, zone))
    assert parse_retry_after(header, now) == max(0, moment - now)


@pytest.mark.parametrize("jump", [-1e9, 1e9])
def test_a_wall_clock_that_jumps_cannot_make_a_pause_longer_than_its_limit(jump: float) -> None:
    asked = parse_retry_after(formatdate(NOW + 5, usegmt=True), NOW + jump)
    assert 0.01 <= retrying.retry_delay(DEFAULTS, 1, asked) <= DEFAULTS.max_retry_delay


# -- the circuit breaker -----------------------------------------------------------------------------------------------


THREE = Queue(failure_threshold=3, breaker_cooldown=30)


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
    settings = Queue(failure_threshold=1, breaker_cooldown=0)
    breaker = Breaker()
    assert breaker.failed(settings, clock.monotonic())
    for _ in range(3):
        assert breaker.probe_at(settings) <= clock.monotonic()
        breaker.probe(clock.monotonic())
    assert breaker.is_open
