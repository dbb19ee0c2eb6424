"""What is counted and timed for those who watch."""

from __future__ import annotations

import pytest

from kong_metering.config import Entity
from kong_metering.measures import BOUNDS, MOST_PLUGINS, Histogram, Requests
from kong_metering.reasons import Skipped
from tests.support.clock import FakeClock


@pytest.mark.parametrize(
    ("seconds", "bound"),
    [(0.0, str(BOUNDS[0])), (BOUNDS[0], str(BOUNDS[0])), (0.0002, "0.00025"), (31.0, "+Inf")],
)
def test_a_time_is_counted_under_the_lowest_bound_that_it_does_not_exceed(seconds: float, bound: str) -> None:
    histogram = Histogram()
    histogram.observe(seconds)
    told = histogram.told()
    assert {name: count for name, count in told["counts"].items() if count} == {bound: 1}
    assert told["sum"] == seconds


def test_requests_are_counted_by_plugin_entity_and_outcome() -> None:
    clock = FakeClock()
    requests = Requests(clock)
    one = requests.of(Entity("1", "one"))
    one.meter(1, 2)
    one.meter(1, 0)
    clock.advance(5)
    one.skip(Skipped.NO_SUBJECT)
    requests.of(Entity("3", "three"))
    requests.of(Entity("2", "two")).skip(Skipped.ERROR)
    assert requests.of(Entity("1", "one")) is one
    assert requests.told() == {
        "1": {
            "name": "one",
            "requests": {"metered": 2, "no_subject": 1},
            "last_request_at": clock.wall(),
            "events": {"kong.api_request": 2, "kong.llm_request": 2},
        },
        "2": {"name": "two", "requests": {"error": 1}, "last_request_at": clock.wall(), "events": {}},
        "3": {"name": "three", "requests": {}, "last_request_at": None, "events": {}},
    }


def test_no_more_plugin_entities_are_kept_than_have_room() -> None:
    requests = Requests(FakeClock())
    for number in range(MOST_PLUGINS + 1):
        requests.of(Entity(str(number), "one of many"))
    told = requests.told()
    assert len(told) == MOST_PLUGINS
    assert "0" not in told
    assert str(MOST_PLUGINS) in told
