"""When a batch leaves, is tried again, is taken apart; when the breaker opens. No queue, thread or network here."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime, formatdate
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kong_metering.config import Queue
from kong_metering.delivery import policy
from kong_metering.delivery.ingest import Failed, Rejected
from kong_metering.delivery.policy import Breaker, parse_retry_after

if TYPE_CHECKING:
    from tests.support.clock import FakeClock

NOW = 1_800_000_000.0
DEFAULTS = Queue()

seconds_allowed = st.floats(min_value=0.001, max_value=1_000_000)
counts_of_failures = st.integers(min_value=1, max_value=10**12)


# -- when a batch leaves -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "waiting", "oldest_age", "pause"),
    [
        ({"max_batch_size": 1, "max_coalescing_delay": 3600}, 1, 0.0, 0.0),
        ({"max_batch_size": 10, "max_coalescing_delay": 2}, 1, 0.0, 2.0),
        ({"max_batch_size": 10, "max_coalescing_delay": 2}, 9, 1.5, 0.5),
        ({"max_batch_size": 10, "max_coalescing_delay": 2}, 10, 0.0, 0.0),
        ({"max_batch_size": 10, "max_coalescing_delay": 2}, 11, 0.0, 0.0),
        ({"max_batch_size": 10, "max_coalescing_delay": 2}, 1, 2.0, 0.0),
        ({"max_batch_size": 10, "max_coalescing_delay": 2}, 1, 1e9, 0.0),
        ({"max_batch_size": 10, "max_coalescing_delay": 0}, 1, 0.0, 0.0),
        ({"max_batch_size": 1_000_000, "max_coalescing_delay": 3600, "max_entries": 1_000_000}, 1, 0.0, 3600.0),
        ({"max_batch_size": 10, "max_coalescing_delay": 2, "concurrency_limit": -1}, 1, 0.0, 0.0),
    ],
)
def test_a_batch_leaves_when_it_is_full_or_its_first_event_has_waited(
    changes: dict[str, float], waiting: int, oldest_age: float, pause: float
) -> None:
    assert policy.due_in(Queue.model_validate(changes), waiting, 0, oldest_age) == pause


@pytest.mark.parametrize(
    ("changes", "waiting", "waiting_bytes", "leaves"),
    [
        ({"max_entries": 10}, 7, 0, False),
        ({"max_entries": 10}, 8, 0, True),
        ({"max_entries": 1}, 1, 0, True),
        ({"max_bytes": 1000}, 2, 799, False),
        ({"max_bytes": 1000}, 2, 800, True),
        ({"max_bytes": None}, 2, 10**9, False),
    ],
)
def test_a_batch_does_not_wait_for_more_events_than_the_queue_may_hold(
    changes: dict[str, int], waiting: int, waiting_bytes: int, *, leaves: bool
) -> None:
    settings = Queue.model_validate({"max_batch_size": 1000, "max_coalescing_delay": 60} | changes)
    assert policy.due_in(settings, waiting, waiting_bytes, 0.0) == (0.0 if leaves else 60.0)


def test_unlimited_concurrency_sends_each_event_alone() -> None:
    assert policy.batch_size(Queue(max_batch_size=100)) == 100
    assert policy.batch_size(Queue(max_batch_size=100, concurrency_limit=-1)) == 1


@given(
    delay=st.floats(min_value=0, max_value=3600),
    age=st.floats(min_value=0, max_value=1e12),
    waiting=st.integers(min_value=1, max_value=2_000_000),
)
def test_a_batch_never_waits_longer_than_the_coalescing_delay(delay: float, age: float, waiting: int) -> None:
    settings = Queue(max_batch_size=1_000_000, max_coalescing_delay=delay)
    assert 0.0 <= policy.due_in(settings, waiting, 0, age) <= delay


# -- when a failed batch is tried again --------------------------------------------------------------------------------


def test_the_backoff_doubles_up_to_its_limit() -> None:
    settings = Queue(initial_retry_delay=0.5, max_retry_delay=3)
    assert [policy.retry_delay(settings, failures, None) for failures in range(1, 6)] == [0.5, 1.0, 2.0, 3.0, 3.0]


def test_an_initial_delay_over_the_limit_is_cut_to_it() -> None:
    assert policy.retry_delay(Queue(initial_retry_delay=100, max_retry_delay=2), 1, None) == 2.0


@given(initial=seconds_allowed, limit=seconds_allowed, failures=counts_of_failures)
def test_each_pause_is_twice_the_one_before_or_the_limit(initial: float, limit: float, failures: int) -> None:
    settings = Queue(initial_retry_delay=initial, max_retry_delay=limit)
    before, after = (policy.retry_delay(settings, count, None) for count in (failures, failures + 1))
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
    own = policy.retry_delay(settings, failures, None)
    assert policy.retry_delay(settings, failures, asked) == max(own, min(asked or 0.0, limit))


@pytest.mark.parametrize(
    ("limit", "trying_for", "gives_up"),
    [(60, 0.0, False), (60, 60.0, False), (60, 60.1, True), (0, 0.0, False), (0, 0.001, True), (-1, 0.0, True)],
)
def test_a_batch_is_given_up_once_it_was_tried_for_longer_than_its_time(
    limit: float, trying_for: float, *, gives_up: bool
) -> None:
    assert policy.gives_up(Queue(max_retry_time=limit), trying_for) is gives_up


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
    assert 0.01 <= policy.retry_delay(DEFAULTS, 1, asked) <= DEFAULTS.max_retry_delay


# -- taking a refused batch apart --------------------------------------------------------------------------------------


def send_in_parts(batch: list[int], answer: Callable[[list[int]], Rejected | None]) -> tuple[list[int], list[int], int]:
    """Do what the queue does with a batch: give the delivered, the dropped, and how many requests that took."""
    delivered: list[int] = []
    dropped: list[int] = []
    parts, requests = [batch], 0
    while parts:
        part = parts.pop(0)
        requests += 1
        rejected = answer(part)
        if rejected is None:
            delivered += part
            continue
        bad, rest = policy.isolate(part, rejected)
        dropped += bad
        parts[:0] = rest
    return delivered, dropped, requests


def refusing(bad: set[int], *, named: bool) -> Callable[[list[int]], Rejected | None]:
    def answer(part: list[int]) -> Rejected | None:
        indexes = tuple(index for index, item in enumerate(part) if item in bad)
        return Rejected("refused", indexes if named else ()) if indexes else None

    return answer


def test_one_bad_event_costs_at_most_two_requests_for_each_halving_of_its_batch() -> None:
    for size in [*range(1, 130), 243, 244, 500, 730, 1000, 1025]:
        most = 0
        for bad in range(size) if size < 130 else (0, 1, size // 3, size // 2, size - 2, size - 1):
            _, dropped, requests = send_in_parts(list(range(size)), refusing({bad}, named=False))
            assert dropped == [bad]
            most = max(most, requests - 1)
        assert most <= 2 * math.log2(size) + 1, f"{most} extra requests for one bad event among {size}"


@pytest.mark.parametrize("size", [2, 3, 10, 1000, 100_000])
def test_a_bad_event_that_the_endpoint_names_costs_one_request(size: int) -> None:
    for bad in (0, size // 2, size - 1):
        delivered, dropped, requests = send_in_parts(list(range(size)), refusing({bad}, named=True))
        assert (dropped, requests) == ([bad], 2)
        assert delivered == [item for item in range(size) if item != bad]


@given(data=st.data(), size=st.integers(min_value=1, max_value=200), named=st.booleans())
def test_good_events_are_delivered_in_order_and_exactly_the_bad_ones_dropped(
    data: st.DataObject, size: int, *, named: bool
) -> None:
    bad = data.draw(st.sets(st.integers(min_value=0, max_value=size - 1)))
    delivered, dropped, requests = send_in_parts(list(range(size)), refusing(bad, named=named))
    assert delivered == [item for item in range(size) if item not in bad]
    assert dropped == sorted(bad)
    assert requests <= 2 * size


@given(
    size=st.integers(min_value=1, max_value=50),
    bad=st.integers(min_value=0, max_value=49),
    indexes=st.lists(st.integers(min_value=0, max_value=10**7), max_size=5),
)
def test_indexes_that_are_no_event_of_the_batch_are_no_help_and_no_harm(
    size: int, bad: int, indexes: list[int]
) -> None:
    beyond = tuple(index + size for index in indexes)
    _, dropped, requests = send_in_parts(
        list(range(size)), lambda part: Rejected("refused", beyond) if bad in part else None
    )
    assert dropped == ([bad] if bad < size else [])
    assert requests <= 2 * size


def test_a_batch_that_is_too_large_is_cut_until_it_fits() -> None:
    sizes: list[int] = []

    def at_most_ten(part: list[int]) -> Rejected | None:
        sizes.append(len(part))
        return Rejected("413") if len(part) > 10 else None

    delivered, dropped, _ = send_in_parts(list(range(100)), at_most_ten)
    assert delivered == list(range(100))
    assert dropped == []
    assert len(sizes) <= 40


@given(batch=st.lists(st.integers(), min_size=2))
def test_cutting_a_batch_keeps_each_event_once_and_in_order(batch: list[int]) -> None:
    pieces = policy.cut_up(batch)
    assert len(pieces) > 1
    assert all(pieces)
    assert [item for piece in pieces for item in piece] == batch


@pytest.mark.parametrize(
    ("failed", "failures", "among_others", "suspicious"),
    [
        (Failed("503", "503", is_server_error=True), 5, False, False),
        (Failed("503", "503", is_server_error=True), 6, False, True),
        (Failed("503", "503", is_server_error=True), 1, True, False),
        (Failed("503", "503", is_server_error=True), 2, True, True),
        (Failed("refused", "ConnectionError"), 1000, True, False),
        (Failed("401", "401", is_misconfigured=True), 1000, True, False),
    ],
)
def test_only_repeated_server_errors_make_an_event_suspicious(
    failed: Failed, failures: int, *, among_others: bool, suspicious: bool
) -> None:
    assert policy.is_suspicious(failed, failures, among_others=among_others) is suspicious


# -- the circuit breaker -----------------------------------------------------------------------------------------------


THREE = Queue(failure_threshold=3, breaker_cooldown=30)


def opened(clock: FakeClock, settings: Queue = THREE) -> Breaker:
    breaker = Breaker()
    for _ in range(settings.failure_threshold):
        breaker.failed(settings, clock.monotonic())
    return breaker


def test_the_breaker_opens_after_that_many_failures_in_a_row(clock: FakeClock) -> None:
    breaker = Breaker()
    assert [breaker.failed(THREE, clock.monotonic()) for _ in range(4)] == [False, False, True, False]
    assert breaker.is_open
    assert breaker.sheds(THREE, clock.monotonic())


def test_a_success_in_between_begins_the_count_again(clock: FakeClock) -> None:
    breaker = Breaker()
    for _ in range(10):
        assert not breaker.failed(THREE, clock.monotonic())
        assert not breaker.failed(THREE, clock.monotonic())
        assert not breaker.succeeded()
    assert not breaker.is_open


def test_the_open_breaker_lets_one_probe_through_after_the_cooldown(clock: FakeClock) -> None:
    breaker = opened(clock)
    clock.advance(29.9)
    assert breaker.sheds(THREE, clock.monotonic())
    clock.advance(0.1)
    assert [breaker.sheds(THREE, clock.monotonic()) for _ in range(3)] == [False, True, True]


def test_a_probe_that_fails_begins_another_cooldown(clock: FakeClock) -> None:
    breaker = opened(clock)
    clock.advance(30)
    assert not breaker.sheds(THREE, clock.monotonic())
    clock.advance(10)
    assert not breaker.failed(THREE, clock.monotonic())
    clock.advance(29.9)
    assert breaker.sheds(THREE, clock.monotonic())
    clock.advance(0.1)
    assert not breaker.sheds(THREE, clock.monotonic())


def test_a_probe_that_succeeds_closes_the_breaker(clock: FakeClock) -> None:
    breaker = opened(clock)
    clock.advance(30)
    assert not breaker.sheds(THREE, clock.monotonic())
    assert breaker.succeeded()
    assert not breaker.is_open
    assert not any(breaker.sheds(THREE, clock.monotonic()) for _ in range(3))
    assert not breaker.succeeded()


def test_without_a_threshold_the_breaker_never_opens(clock: FakeClock) -> None:
    breaker = Breaker()
    assert not any(breaker.failed(DEFAULTS, clock.monotonic()) for _ in range(1000))
    assert not breaker.is_open
    assert not breaker.sheds(DEFAULTS, clock.monotonic())


def test_a_cooldown_of_zero_makes_every_batch_a_probe(clock: FakeClock) -> None:
    settings = Queue(failure_threshold=1, breaker_cooldown=0)
    breaker = opened(clock, settings)
    assert not any(breaker.sheds(settings, clock.monotonic()) for _ in range(3))
