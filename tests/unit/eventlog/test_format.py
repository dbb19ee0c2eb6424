"""The bytes on disk: what is written is read, and nothing else is ever taken for an event."""

from __future__ import annotations

import struct
from zlib import crc32

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kong_metering.errors import SpoolFormatError
from kong_metering.eventlog import format as on_disk
from kong_metering.eventlog.format import Mark, Position
from tests.unit.eventlog.helpers import NOW, payloads

HEADER = on_disk.RECORD_HEADER_BYTES
NO_LIMIT = 1 << 60


@given(st.lists(st.binary(max_size=200)), st.integers(1, 1 << 60), st.integers(0, (1 << 48) - 1))
def test_records_are_read_as_they_were_written(events: list[bytes], first: int, time_ms: int) -> None:
    data = on_disk.encode_records(events, first, time_ms)
    found, end = on_disk.parse_events(data, 0, first, len(events), NO_LIMIT)
    assert found == [(first + index, time_ms, event) for index, event in enumerate(events)]
    assert end == len(data)


def test_the_record_is_laid_out_as_documented() -> None:
    body = struct.pack("<QQB", 7, NOW, 1) + b"event"
    assert on_disk.encode_records([b"event"], 7, NOW) == struct.pack("<II", 5, crc32(body)) + body


@pytest.mark.parametrize(("time_ms", "stored"), [(-1, 0), (1 << 60, (1 << 48) - 1)])
def test_a_senseless_time_does_not_keep_an_event_out(time_ms: int, stored: int) -> None:
    data = on_disk.encode_records([b"event"], 1, time_ms)
    assert on_disk.parse_events(data, 0, 1, 1, NO_LIMIT)[0] == [(1, stored, b"event")]


@given(st.data())
def test_a_flipped_bit_costs_one_event_at_most(data: st.DataObject) -> None:
    first = data.draw(st.sampled_from([1, 250, (1 << 24) - 3, (1 << 32) - 2]))
    events = payloads(1, 6)
    good = on_disk.encode_records(events, first, NOW)
    bit = data.draw(st.integers(0, len(good) * 8 - 1))
    bad = flipped(good, bit)
    found = []
    offset, sequence = 0, first
    while record := on_disk.next_record(bad, offset, sequence, first + len(events)):
        found.append((record.sequence, record.payload))
        offset, sequence = record.end, record.sequence + 1
    whole = list(enumerate(events, first))
    assert [event for event in whole if event not in found] in [[event] for event in whole]
    assert [event for event in found if event not in whole] == []


@given(st.binary(max_size=2000), st.integers(1, 1 << 60))
@example(bytes(4000), 1)
@example(b"\xff" * 4000, 1)
def test_garbage_is_no_record(garbage: bytes, sequence: int) -> None:
    assert on_disk.next_record(garbage, 0, sequence, 1 << 63) is None


def test_records_are_found_behind_garbage_however_long() -> None:
    records = on_disk.encode_records(payloads(5, 3), 5, NOW)
    for garbage in (bytes(500_000), b"\1" * 500_001, b"{}" * 250_000):
        found = on_disk.next_record(garbage + records, 0, 1, 100)
        assert found
        assert (found.sequence, found.start) == (5, len(garbage))


def test_a_record_from_elsewhere_is_not_taken() -> None:
    """A good record whose number cannot be here, of an append that failed for one."""
    records = on_disk.encode_records(payloads(5, 3), 5, NOW)
    assert on_disk.next_record(records, 0, 8, 100) is None
    assert on_disk.next_record(records, 0, 1, 5) is None


def test_a_record_inside_an_event_is_not_taken_for_one_when_that_event_is_damaged() -> None:
    inner = on_disk.encode_records([b"forged"], 2, NOW)
    data = on_disk.encode_records([inner + b"!", b"second"], 1, NOW)
    bad = flipped(data, (HEADER + len(inner)) * 8)
    found = on_disk.next_record(bad, 0, 1, 10)
    assert found
    assert found.payload == b"second"


def test_limits_end_the_reading_before_they_are_exceeded() -> None:
    data = on_disk.encode_records([b"x" * 10] * 10, 1, NOW)
    assert len(on_disk.parse_events(data, 0, 1, 3, NO_LIMIT)[0]) == 3
    assert len(on_disk.parse_events(data, 0, 1, 10, 49)[0]) == 4


def test_a_removed_record_keeps_its_place_and_is_no_event() -> None:
    data = on_disk.encode_records(payloads(1, 3), 1, NOW)
    second = on_disk.next_record(data, 0, 2, 3)
    assert second
    header = on_disk.removed_header(second)
    changed = data[: second.start] + header + data[second.start + len(header) :]
    found = on_disk.record_at(changed, second.start)
    assert found == second._replace(kind=on_disk.REMOVED)
    assert len(on_disk.parse_events(changed, 0, 1, 3, NO_LIMIT)[0]) == 1


def test_a_segment_header_is_known_again_and_damage_to_it_is_seen() -> None:
    header = on_disk.segment_header(77)
    assert len(header) == on_disk.SEGMENT_HEADER_BYTES
    assert on_disk.is_segment_header(header + b"more", 77)
    assert not on_disk.is_segment_header(header, 78)
    for bit in range(len(header) * 8):
        assert not on_disk.is_segment_header(flipped(header, bit), 77)


@pytest.mark.parametrize("version", [0, 2, 1 << 31])
def test_another_version_of_the_format_is_refused_with_a_clear_error(version: int) -> None:
    with pytest.raises(SpoolFormatError, match=f"format version {version}, and this is version 1"):
        on_disk.is_segment_header(of_version(on_disk.segment_header(1), version), 1)
    with pytest.raises(SpoolFormatError, match="update this one"):
        on_disk.decode_position(of_version(on_disk.encode_slot(Position(), 1), version))


def test_segment_names_sort_as_their_numbers_do_and_other_files_are_none() -> None:
    assert on_disk.segment_first(on_disk.segment_name(123)) == 123
    assert on_disk.segment_name(9) < on_disk.segment_name(10)
    for name in ("position", "1.seg", "00000000000000000001.seg.new", "0000000000000000000x.seg"):
        assert on_disk.segment_first(name) is None


marks = st.lists(st.builds(Mark, *[st.integers(0, (1 << 64) - 1)] * 3), max_size=on_disk.MAX_MARKS).map(tuple)


@given(st.builds(Position, st.integers(0, (1 << 64) - 1), marks), st.integers(0, 1000))
def test_a_position_is_read_as_it_was_written(position: Position, turn: int) -> None:
    slot = on_disk.encode_slot(position, turn)
    assert len(slot) == on_disk.SLOT_BYTES
    data = bytes(on_disk.slot_offset(turn)) + slot
    assert on_disk.decode_position(data) == (position, turn)


def test_the_newer_of_the_two_slots_counts_and_a_torn_write_leaves_the_other() -> None:
    older = on_disk.encode_slot(Position(5), 4)
    newer = on_disk.encode_slot(Position(9, (Mark(10, 12, NOW),)), 5)
    assert on_disk.decode_position(older + newer) == (Position(9, (Mark(10, 12, NOW),)), 5)
    used = len(newer.rstrip(b"\0"))
    for written in range(used):
        assert on_disk.decode_position(older + newer[:written] + bytes(4096 - written)) == (Position(5), 4)
    for bit in range(used * 8):
        assert on_disk.decode_position(older + flipped(newer, bit)) == (Position(5), 4)


@pytest.mark.parametrize("data", [b"", b"\0", bytes(8192), b"\xff" * 8192, b"KMPOSIT\n"])
def test_what_is_no_position_is_none(data: bytes) -> None:
    assert on_disk.decode_position(data) is None


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def of_version(data: bytes, version: int) -> bytes:
    start = data[:8] + version.to_bytes(4, "little")
    return start + crc32(start).to_bytes(4, "little") + data[16:]
