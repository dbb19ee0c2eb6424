"""Cutting parts, and the line in which they stand."""

from __future__ import annotations

import itertools
import math

from hypothesis import given
from hypothesis import strategies as st

from kong_metering.trial.parts import Line, Part, in_order, thirds


def part(*events: int, may_have_arrived: bool = False) -> Part[int]:
    return Part(list(events), list(events), batch=1, may_have_arrived=may_have_arrived)


def contents(line: Line[int]) -> list[list[int]]:
    return [list(each.items) for each in line]


@given(size=st.integers(min_value=2, max_value=100_000))
def test_thirds_keep_each_event_once_and_in_order_and_none_is_much_larger(size: int) -> None:
    pieces = Part(list(range(size)), range(size), batch=1).pieces(*thirds(size))
    assert [item for piece in pieces for item in piece.items] == list(range(size))
    assert 2 <= len(pieces) <= 3
    assert max(len(piece.items) for piece in pieces) - min(len(piece.items) for piece in pieces) <= 1


def test_going_through_thirds_finds_one_among_n_in_three_requests_for_each_factor_of_three() -> None:
    for size in (2, 3, 4, 5, 10, 100, 1000, 6561):
        for bad in {0, size // 2, size - 1}:
            requests, events = 0, list(range(size))
            while len(events) > 1:
                edges = [0, *thirds(len(events)), len(events)]
                pieces = [events[a:b] for a, b in itertools.pairwise(edges)]
                requests += len(pieces)
                events = next(piece for piece in pieces if bad in piece)
            assert requests <= 3 * math.ceil(math.log(size, 3) - 1e-9)


@given(st.lists(st.integers(min_value=0, max_value=50), min_size=1, unique=True))
def test_parts_stand_in_the_order_of_their_events_however_they_come(events: list[int]) -> None:
    line: Line[int] = Line()
    for event in events:
        line.add(part(event))
    assert contents(line) == [[event] for event in sorted(events)]
    assert line.events == len(events)


@given(
    cuts=st.sets(st.integers(min_value=1, max_value=29)),
    size=st.integers(min_value=1, max_value=40),
    keep_front=st.booleans(),
    data=st.data(),
)
def test_joining_makes_larger_parts_of_neighbours_and_loses_nothing(
    cuts: set[int], size: int, data: st.DataObject, *, keep_front: bool
) -> None:
    line: Line[int] = Line()
    for piece in part(*range(30)).pieces(*sorted(cuts)):
        piece.may_have_arrived = data.draw(st.booleans())
        line.add(piece)
    before = contents(line)
    doubts = {item: each.may_have_arrived for each in line for item in each.items}
    line.join(size, keep_front=keep_front)
    assert [item for items in contents(line) for item in items] == list(range(30))
    assert all(all(doubts[item] for item in each.items) == each.may_have_arrived for each in line)
    assert not keep_front or contents(line)[0] == before[0]
    sizes = [len(items) for items in contents(line)[1 if keep_front else 0 :]]
    assert all(count == size for count in sizes[:-1])
    assert all(0 < count <= size for count in sizes[-1:])
    assert line.events == 30


def test_a_depth_is_found_in_its_part() -> None:
    line: Line[int] = Line()
    line.add(part(0, 1, 2), part(3), part(4, 5))
    assert [(line.at(depth)[0].items, line.at(depth)[1]) for depth in (0, 2, 3, 5)] == [
        ([0, 1, 2], 0),
        ([0, 1, 2], 2),
        ([3], 0),
        ([4, 5], 1),
    ]


def test_events_of_parts_that_overlap_are_told_in_their_order() -> None:
    assert in_order([part(2, 5), part(1, 3), part(4)]) == [1, 2, 3, 4, 5]
