"""Events go round in a ring, in order, and a dead process's memory gives those that it had not passed on."""

from __future__ import annotations

import threading
from collections import deque
from zlib import crc32

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kong_metering.errors import SpoolFormatError
from kong_metering.inbox.ring import HEADER_BYTES, Ring, read_header
from tests.support.waiting import wait_until
from tests.unit.inbox.helpers import fill, left_in, new_memory, unread

EVENTS = st.tuples(st.integers(0, (1 << 32) - 1), st.binary(max_size=150))
STEPS = st.lists(st.one_of(EVENTS, st.tuples(st.just("drain"), st.integers(1, 9), st.booleans())), max_size=80)


@given(steps=STEPS, capacity=st.sampled_from([256, 264, 512, 1000, 4096]))
def test_it_is_a_bounded_queue_and_so_is_what_a_death_leaves(steps: list[tuple[object, ...]], capacity: int) -> None:
    memory = new_memory(capacity)
    ring, model = Ring(memory), deque[tuple[int, bytes]]()
    for step in steps:
        if step[0] == "drain":
            _, limit, is_advanced = step
            assert isinstance(limit, int)
            drained = ring.drain(limit)
            assert drained.events == list(model)[:limit]
            if is_advanced:
                ring.advance(drained)
                for _ in drained.events:
                    model.popleft()
        else:
            queue, event = step
            assert isinstance(queue, int)
            assert isinstance(event, bytes)
            used = sum((len(event) + 31) // 8 * 8 for _, event in model)
            has_room = used + (len(event) + 31) // 8 * 8 <= capacity and len(event) <= capacity // 4
            assert ring.append(queue, event) is has_room
            if has_room:
                model.append((queue, event))
        assert ring.waiting == len(model)
        assert left_in(memory) == list(model)


@pytest.mark.parametrize("length", range(60))
def test_records_go_round_the_end_wherever_that_cuts_them(length: int) -> None:
    memory = new_memory(1000)
    ring = Ring(memory)
    for number in range(200):
        event = (b"%d:" % number).ljust(length + number % 7, b".")
        assert ring.append(number, event)
        assert left_in(memory) == [(number, event)]
        drained = ring.drain(10)
        assert drained.events == [(number, event)]
        ring.advance(drained)
        assert left_in(memory) == []


def test_an_event_larger_than_a_quarter_of_the_ring_is_refused_and_one_as_large_is_not() -> None:
    ring = Ring(new_memory(4096))
    assert not ring.append(1, bytes(1025))
    assert ring.append(1, bytes(1024))


def test_a_full_ring_refuses_and_has_room_again_after_an_advance() -> None:
    memory = new_memory(4096)
    ring = Ring(memory)
    count = fill(ring)
    assert len(left_in(memory)) == ring.waiting == count
    ring.advance(ring.drain(1))
    assert ring.append(2, b"y" * 100)
    assert left_in(memory)[-1] == (2, b"y" * 100)


def test_a_ring_that_is_closed_refuses() -> None:
    ring = Ring(new_memory(4096))
    ring.append(1, b"x")
    ring.close()
    assert not ring.append(1, b"")
    assert ring.drain(9).events == []


def test_many_threads_append_while_one_drains() -> None:
    memory = new_memory(8192)
    ring = Ring(memory)
    taken: list[tuple[int, bytes]] = []

    def append_all(queue: int) -> None:
        for number in range(3000):
            wait_until(lambda: ring.append(queue, b"%d" % number), "room in the ring")  # noqa: B023 - called at once

    threads = [threading.Thread(target=append_all, args=(queue,)) for queue in range(3)]
    for thread in threads:
        thread.start()
    while len(taken) < 9000:
        drained = ring.drain(100)
        taken += drained.events
        ring.advance(drained)
    for thread in threads:
        thread.join()
    for queue in range(3):
        assert [event for one, event in taken if one == queue] == [b"%d" % number for number in range(3000)]
    assert ring.waiting == 0


def test_no_flipped_bit_makes_an_event_that_was_not_appended() -> None:
    memory = new_memory(512)
    ring = Ring(memory)
    for number in range(9):
        ring.append(number, b"event %d" % number)
        if number < 4:
            ring.advance(ring.drain(1))
    appended = {(number, b"event %d" % number) for number in range(9)}
    good = memory[:]
    for offset in (*range(40), *range(64, 72), *range(HEADER_BYTES, len(good))):
        for bit in range(8):
            damaged = bytearray(good)
            damaged[offset] ^= 1 << bit
            try:
                found = unread(bytes(damaged))
            except SpoolFormatError:
                pytest.fail(f"bit {bit} of byte {offset} passes for another version")
            assert set(found) <= appended
            assert found == sorted(found)


@given(noise=st.binary(max_size=600), offset=st.integers(0, 600), length=st.integers(0, HEADER_BYTES + 600))
def test_noise_and_a_file_cut_short_give_events_that_were_appended_or_none(
    noise: bytes, offset: int, length: int
) -> None:
    memory = new_memory(512)
    ring = Ring(memory)
    events = [(number, b"event %d" % number) for number in range(9)]
    for number, event in events:
        ring.append(number, event)
    data = memory[:]
    at = HEADER_BYTES + offset
    noisy = (data[:at] + noise + data[at + len(noise) :])[:length]
    found = unread(noisy)
    assert found == events[: len(found)]


def test_bytes_that_look_like_a_record_of_another_ring_are_none() -> None:
    # What a client could send if it knew all but the seed: the record that would come next, inside of a payload.
    first, second = new_memory(4096), new_memory(4096)
    there, here = Ring(first), Ring(second)
    there.append(1, b"A" * 40)
    there.append(1, b"forged")
    forged = first[HEADER_BYTES + 64 : HEADER_BYTES + 96]
    here.append(1, b"A" * 40 + forged)
    here.advance(here.drain(1))
    data = bytearray(second[:])
    data[64:72] = (4096 + 64).to_bytes(8, "little")
    assert unread(bytes(data)) == []


def test_another_version_is_refused_with_what_to_do() -> None:
    memory = new_memory(4096)
    Ring(memory).append(1, b"x")
    data = bytearray(memory[:])
    data[8:12] = (2).to_bytes(4, "little")
    data[12:16] = crc32(data[:12]).to_bytes(4, "little")
    with pytest.raises(SpoolFormatError, match=r"version 2.*version 1"):
        read_header(bytes(data))
