"""Figures, ratios and verdicts on made-up samples: a verdict must be able to say no."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from gateway_samples import TARGETS, Sample, ratio, ratio_of_added

NOTHING = Sample(per_second=10_000, kong_us=20, plugin_us=0, p50_us=300, p99_us=900, p50_alone_us=100, p99_alone_us=200)
HTTP_LOG = Sample(
    per_second=3_000, kong_us=60, plugin_us=0, p50_us=500, p99_us=1500, p50_alone_us=110, p99_alone_us=300
)
GO = Sample(per_second=1_000, kong_us=200, plugin_us=200, p50_us=4000, p99_us=9000, p50_alone_us=300, p99_alone_us=1000)
PDK = Sample(
    per_second=500, kong_us=300, plugin_us=500, p50_us=8000, p99_us=20_000, p50_alone_us=700, p99_alone_us=4000
)
OURS = Sample(
    per_second=1_700, kong_us=140, plugin_us=100, p50_us=2000, p99_us=8000, p50_alone_us=200, p99_alone_us=1000
)
OTHERS = {"nothing": [NOTHING], "http-log-100": [HTTP_LOG], "go": [GO], "kong-pdk": [PDK]}


def per_second(*values: float) -> list[Sample]:
    return [Sample(value, 1, 1, 1, 1, 1, 1) for value in values]


def verdicts(ours: Sequence[Sample]) -> list[str]:
    return [target.verdict(ours, OTHERS) for target in TARGETS]


def test_a_ratio_is_the_median_of_the_rounds_own() -> None:
    assert ratio(per_second(10, 100, 1), per_second(10, 50, 4), lambda one: one.per_second) == 1.0


def test_what_is_added_is_compared_within_each_round() -> None:
    ones, others, nothing = per_second(3, 30, 7), per_second(5, 50, 9), per_second(1, 10, 5)
    assert ratio_of_added(ones, others, nothing, lambda one: one.per_second) == 0.5


def test_adding_to_what_another_one_adds_nothing_to_is_infinitely_more() -> None:
    assert ratio_of_added([GO], [NOTHING], [NOTHING], lambda one: one.p50_us) == math.inf


def test_every_target_is_met_at_its_limit() -> None:
    shown = ["1.70 met", "0.57 met", "0.60 met", "0.20 met", "0.50 met", "1.00 met"]
    assert verdicts([OURS]) == shown


@pytest.mark.parametrize("number", range(len(TARGETS)), ids=[target.what for target in TARGETS])
def test_every_target_can_be_missed(number: int) -> None:
    slow = Sample(1_000, 200, 110, 4000, 9000, p50_alone_us=201, p99_alone_us=1010)
    assert verdicts([slow])[number].endswith("MISSED")


def test_what_was_not_measured_has_no_verdict() -> None:
    without_go = {name: samples for name, samples in OTHERS.items() if name != "go"}
    assert [bool(target.verdict([OURS], without_go)) for target in TARGETS] == [False, True, False, True, False, False]
