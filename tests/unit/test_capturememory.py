"""What access phases captured outlives the process that captured it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kong_metering.captured import CapturedHeaders
from kong_metering.capturememory import CaptureMemory, left_in
from tests.support.clock import FakeClock

ACME = {":asked": "x-tenant-id", "x-tenant-id": "acme"}
SLOTS = 4096 + 1024 + 64


@pytest.fixture
def descriptor() -> Iterator[int]:
    descriptor = os.memfd_create("test")
    yield descriptor
    os.close(descriptor)


def keeping_in(descriptor: int, clock: FakeClock, max_bytes: int = 32 << 20) -> CapturedHeaders:
    captured = CapturedHeaders(clock, max_bytes)
    captured.mirror_to(CaptureMemory(descriptor))
    return captured


TEXTS = st.text(st.characters(codec=None), max_size=60)


@given(headers=st.dictionaries(TEXTS, TEXTS | st.lists(TEXTS, max_size=2), max_size=4), request_id=TEXTS)
def test_any_headers_are_left_as_they_were(headers: dict[str, Any], request_id: str) -> None:
    descriptor = os.memfd_create("test")
    try:
        CaptureMemory(descriptor).put(request_id, headers)
        assert list(left_in(descriptor)) == [(request_id, headers)]
    finally:
        os.close(descriptor)


@given(steps=st.lists(st.tuples(st.booleans(), st.integers(0, 9)), max_size=60))
def test_what_is_left_is_what_was_kept_and_not_taken(steps: list[tuple[bool, int]]) -> None:
    clock, descriptor = FakeClock(), os.memfd_create("test")
    expected: dict[str, dict[str, str]] = {}
    try:
        captured = keeping_in(descriptor, clock)
        for is_kept, number in steps:
            headers = {"x-tenant-id": "x" * number * 40}
            if not is_kept:
                assert captured.take(str(number)) == expected.pop(str(number), None)
            else:
                captured.keep(str(number), headers)
                expected[str(number)] = headers
        assert dict(left_in(descriptor)) == expected
    finally:
        os.close(descriptor)


def test_the_next_process_goes_on_with_it_and_so_does_the_one_after(clock: FakeClock) -> None:
    descriptors = [os.memfd_create("test") for _ in range(3)]
    for before, now in zip([None, *descriptors], descriptors, strict=False):
        captured = keeping_in(now, clock)
        if before is not None:
            captured.recover(left_in(before))
        captured.keep(str(now), ACME)
    assert captured.are_identified
    assert [captured.take(str(each)) for each in descriptors] == [ACME] * 3
    assert list(left_in(descriptors[-1])) == []


def test_what_was_handed_over_as_well_is_kept_once(descriptor: int, clock: FakeClock) -> None:
    first = CapturedHeaders(clock)
    first.keep("a", ACME)
    captured = keeping_in(descriptor, clock)
    captured.unpack(first.pack())
    captured.recover([("a", ACME)])
    assert captured.take("a") == ACME
    assert list(left_in(descriptor)) == []


def test_of_more_requests_than_slots_the_newest_are_left(descriptor: int, clock: FakeClock) -> None:
    captured = keeping_in(descriptor, clock)
    for number in range(SLOTS + 100):
        captured.keep(str(number), ACME)
    left = dict(left_in(descriptor))
    assert sorted(map(int, left)) == list(range(100, SLOTS + 100))
    assert [captured.take(str(number)) for number in (0, 99, SLOTS)] == [ACME] * 3
    captured.keep("one more", ACME)
    assert "one more" in dict(left_in(descriptor))


def test_longer_texts_find_as_many_slots_as_there_are_of_their_size(descriptor: int, clock: FakeClock) -> None:
    captured = keeping_in(descriptor, clock)
    for number in range(SLOTS):
        captured.keep(str(number), {**ACME, "user-agent": "Mozilla/5.0 " + "x" * 300})
    assert len(list(left_in(descriptor))) == 1024 + 64


@pytest.mark.parametrize("length", [500, 5000, 20_000])
def test_no_client_takes_the_others_slots_with_long_headers(descriptor: int, clock: FakeClock, length: int) -> None:
    captured = keeping_in(descriptor, clock)
    for number in range(100):
        captured.keep(f"other {number}", ACME)
    for number in range(600):
        captured.keep(str(number), {"x": "y" * length})
    assert sum(each.startswith("other ") for each in dict(left_in(descriptor))) == 100


def test_a_process_that_ends_in_order_leaves_nothing(descriptor: int, clock: FakeClock) -> None:
    captured = keeping_in(descriptor, clock)
    captured.keep("a", ACME)
    captured.leave_nothing()
    assert os.fstat(descriptor).st_size == 0
    captured.keep("b", ACME)
    assert captured.take("a") == captured.take("b") == ACME


@pytest.mark.parametrize(
    ("length", "is_left"), [(100, True), (5000, True), (8150, True), (8192, False), (100_000, False)]
)
def test_long_values_have_slots_too(descriptor: int, clock: FakeClock, length: int, *, is_left: bool) -> None:
    captured = keeping_in(descriptor, clock)
    captured.keep("a", {"x": "y" * length})
    assert dict(left_in(descriptor)) == ({"a": {"x": "y" * length}} if is_left else {})
    assert captured.take("a") == {"x": "y" * length}


def test_what_is_let_go_of_for_want_of_room_is_not_left(descriptor: int, clock: FakeClock) -> None:
    captured = keeping_in(descriptor, clock, max_bytes=4000)
    for number in range(100):
        captured.keep(str(number), ACME)
    assert len(list(left_in(descriptor))) == len(captured) < 20


def test_where_there_is_no_room_that_is_raised(descriptor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, offset: int, length: int) -> None:
        os.ftruncate(descriptor, offset + length // 2)
        raise OSError("full")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(OSError, match="full"):
        CaptureMemory(descriptor)
    assert os.fstat(descriptor).st_size == 0


@given(data=st.binary(max_size=400))
def test_nothing_of_what_is_read_is_believed(data: bytes) -> None:
    descriptor = os.memfd_create("test")
    try:
        os.write(descriptor, data)
        list(left_in(descriptor))
    finally:
        os.close(descriptor)


def test_garbage_in_one_slot_does_not_cost_the_others(descriptor: int, clock: FakeClock) -> None:
    captured = keeping_in(descriptor, clock)
    for number in range(3):
        captured.keep(str(number), ACME)
    os.pwrite(descriptor, b"\xff" * 100, 256 + 8)
    assert dict(left_in(descriptor)) == {"0": ACME, "2": ACME}


@pytest.mark.slow
def test_whatever_is_left_by_a_process_killed_at_any_moment_is_whole(clock: FakeClock) -> None:
    for _ in range(30):
        descriptor = os.memfd_create("test")
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            captured, number = keeping_in(descriptor, clock), 0
            while True:
                captured.keep(f"{number:032x}", {"x": f"{number:x}" * (number % 300)})
                captured.take(f"{number - 3:032x}")
                number += 1
                if number == 100:
                    os.write(writer, b"x")
        os.read(reader, 1)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        left = dict(left_in(descriptor))
        numbers = sorted(int(request_id, 16) for request_id in left)
        assert 3 <= len(left) <= 4
        assert numbers == list(range(numbers[0], numbers[0] + len(left)))
        assert left == {f"{number:032x}": {"x": f"{number:x}" * (number % 300)} for number in numbers}
        for each in (reader, writer, descriptor):
            os.close(each)
