"""The soak's plans: every kind of fault, one at a time in each lane, and calm while the disk is full."""

from __future__ import annotations

import itertools

import pytest

from kong_metering_soak.schedule import (
    CALM_KINDS,
    ENDPOINT_KINDS,
    GATEWAY_KINDS,
    SHORTEST_SECONDS,
    Kind,
    Planned,
    kinds_of,
    make_plan,
)

SEEDS = range(50)
LENGTHS = (SHORTEST_SECONDS, 90.0, 333.0, 1800.0)


@pytest.mark.parametrize("seconds", LENGTHS)
def test_every_kind_of_fault_happens_and_ends_in_time(seconds: float) -> None:
    for seed in SEEDS:
        plan = make_plan(seconds, seed)
        assert {fault.kind for fault in plan.endpoint} == set(ENDPOINT_KINDS)
        assert {fault.kind for fault in plan.gateway} == set(GATEWAY_KINDS) & set(kinds_of(seconds))
        assert all(0 < fault.start < fault.end < seconds for fault in (*plan.endpoint, *plan.gateway))


@pytest.mark.parametrize("seconds", LENGTHS)
def test_in_a_lane_one_fault_follows_the_other_after_a_rest(seconds: float) -> None:
    for seed in SEEDS:
        plan = make_plan(seconds, seed)
        for lane in (plan.endpoint, plan.gateway):
            assert all(next_one.start - fault.end > 0.5 for fault, next_one in itertools.pairwise(lane))


def overlap(one: Planned, other: Planned) -> bool:
    return one.start < other.end and other.start < one.end


def test_the_endpoint_has_no_fault_of_its_own_while_the_disk_or_a_starts_clock_is_in_trouble() -> None:
    for seed, seconds in itertools.product(SEEDS, LENGTHS):
        plan = make_plan(seconds, seed)
        calm = [fault for fault in plan.gateway if fault.kind in CALM_KINDS]
        assert not any(overlap(one, other) for one in calm for other in plan.endpoint)


def test_a_seed_repeats_its_plan() -> None:
    assert make_plan(90, 7) == make_plan(90, 7) != make_plan(90, 8)


def test_a_long_soak_has_long_outages() -> None:
    assert max(fault.seconds for fault in make_plan(1800, 1).endpoint) > 40


def test_half_an_hour_has_every_kind_of_fault() -> None:
    assert set(kinds_of(1800)) == set(Kind)


def test_a_soak_without_room_for_all_faults_is_refused() -> None:
    with pytest.raises(ValueError, match="no room"):
        make_plan(SHORTEST_SECONDS - 1, 1)
