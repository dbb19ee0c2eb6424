"""When a batch leaves, and how large it is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kong_metering.config import Queue
from kong_metering.delivery import batching
from kong_metering.delivery.batching import MAX_EVENT_BYTES, Thresholds


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
