"""When a batch leaves, and how large it is."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kong_metering.config import Queue
from kong_metering.trial import batching
from kong_metering.trial.batching import MAX_EVENT_BYTES, Thresholds


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
    assert batching.due_in(Queue.model_validate(changes), waiting, 0, oldest_age) == pause


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
    assert batching.due_in(settings, waiting, waiting_bytes, 0.0) == (0.0 if leaves else 60.0)


@pytest.mark.parametrize(
    ("changes", "adaptive_batch", "waiting", "since_last", "pause"),
    [
        ({}, 100, 1, math.inf, 0.0),
        ({}, 100, 1, 0.05, 0.0),
        ({}, 100, 1, 0.02, 0.03),
        ({}, 100, 99, 0.02, 0.03),
        ({}, 100, 100, 0.02, 0.0),
        ({}, 100, 250, 0.0, 0.0),
        ({}, 100, 1, 0.05 - 1e-9, 0.0),
        ({"max_coalescing_delay": 3600}, 100, 1, 0.0, 0.05),
        ({"max_entries": 10}, 100, 8, 0.0, 0.0),
        ({}, 1, 1, 0.0, 0.0),
        ({"concurrency_limit": -1}, 100, 1, 0.0, 0.0),
        ({"max_batch_size": 2, "max_coalescing_delay": 2}, 100, 1, 1e9, 2.0),
    ],
)
def test_with_a_batch_size_of_one_what_comes_soon_after_a_request_waits_for_others_a_moment(
    changes: dict[str, float], adaptive_batch: int, waiting: int, since_last: float, pause: float
) -> None:
    settings = Queue.model_validate({"max_batch_size": 1} | changes)
    due_in = batching.due_in(settings, waiting, 0, 0.0, adaptive_batch=adaptive_batch, since_last=since_last)
    assert due_in == pytest.approx(pause)


def test_what_has_waited_a_moment_goes_though_others_are_sent_again_all_the_time() -> None:
    """Or nothing would reach behind events that are to blame, where those are tried every few milliseconds."""
    settings = Queue(max_batch_size=1)
    ages = {0.0: 0.05, 0.03: 0.02, 0.05: 0.0, 3600.0: 0.0, math.inf: 0.0}
    for age, pause in ages.items():
        due_in = batching.due_in(settings, 60, 0, age, adaptive_batch=100, since_last=0.0)
        assert due_in == pytest.approx(pause)


@pytest.mark.parametrize(
    ("changes", "adaptive_batch", "size"),
    [
        ({"max_batch_size": 1}, 100, 100),
        ({"max_batch_size": 1}, 1, 1),
        ({"max_batch_size": 2}, 100, 2),
        ({"max_batch_size": 1000}, 100, 1000),
        ({"max_batch_size": 1, "concurrency_limit": -1}, 100, 1),
    ],
)
def test_adaptive_batches_are_for_a_batch_size_of_one(changes: dict[str, int], adaptive_batch: int, size: int) -> None:
    settings = Queue.model_validate(changes)
    assert batching.batch_size(settings, adaptive_batch) == size
    assert batching.thresholds(settings, adaptive_batch).wakes_at == size


def test_unlimited_concurrency_sends_each_event_alone() -> None:
    assert batching.batch_size(Queue(max_batch_size=100)) == 100
    assert batching.batch_size(Queue(max_batch_size=100, concurrency_limit=-1)) == 1


@given(
    delay=st.floats(min_value=0, max_value=3600),
    age=st.floats(min_value=0, max_value=1e12),
    waiting=st.integers(min_value=1, max_value=2_000_000),
)
def test_a_batch_never_waits_longer_than_the_coalescing_delay(delay: float, age: float, waiting: int) -> None:
    settings = Queue(max_batch_size=1_000_000, max_coalescing_delay=delay)
    assert 0.0 <= batching.due_in(settings, waiting, 0, age) <= delay


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"max_batch_size": 10, "max_entries": 100}, Thresholds(MAX_EVENT_BYTES, 80, 10)),
        ({"max_batch_size": 1000, "max_entries": 100}, Thresholds(MAX_EVENT_BYTES, 80, 80)),
        ({"max_batch_size": 10, "max_bytes": 1000}, Thresholds(1000, 0, 0)),
        ({"max_batch_size": 10, "max_bytes": 10**9}, Thresholds(MAX_EVENT_BYTES, 0, 0)),
        ({"max_batch_size": 10, "concurrency_limit": -1}, Thresholds(MAX_EVENT_BYTES, 8000, 1)),
    ],
)
def test_an_event_needs_a_closer_look_only_beyond_the_thresholds(changes: dict[str, int], expected: Thresholds) -> None:
    assert batching.thresholds(Queue.model_validate(changes)) == expected


@pytest.mark.parametrize(
    ("changes", "adaptive_batch", "size"),
    [
        ({}, 100, 7),
        ({"max_batch_size": 1}, 100, 100),
        ({"max_batch_size": 1}, 1, 1),
        ({"concurrency_limit": -1}, 100, 1),
    ],
)
def test_a_request_has_so_many_events_at_most(changes: dict[str, int], adaptive_batch: int, size: int) -> None:
    settings = Queue.model_validate({"max_batch_size": 7} | changes)
    assert batching.batch_size(settings, adaptive_batch) == size
