"""Fields and messages of `ProtoBuf:1`: the same to Google's library as to us, and never more than a protocol error."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kong_metering.host.errors import ProtocolError
from kong_metering.host.pb_codec import BOOLEAN, DOUBLE, INTEGER, TEXT, Field, Message, frame, read_varint, varint
from tests.support import protobuf

EVERYTHING: Message = Message(
    {
        "i": Field(1, INTEGER),
        "b": Field(2, BOOLEAN),
        "d": Field(3, DOUBLE),
        "t": Field(4, TEXT),
        "ts": Field(5, TEXT, repeated=True),
        "map": Field(6, TEXT, mapping=True),
        "m": Field(7, lambda: EVERYTHING),
        "ms": Field(8, lambda: EVERYTHING, repeated=True),
        "mm": Field(9, lambda: EVERYTHING, mapping=True),
        "far": Field(536_870_911, TEXT),
    }
)

texts = st.binary(max_size=20).map(protobuf.as_text)
integers = st.integers(-(2**63), 2**63 - 1)
everything = st.recursive(
    st.fixed_dictionaries(
        {},
        optional={
            "i": integers,
            "b": st.booleans(),
            "d": st.floats(allow_nan=False),
            "t": texts | st.text("a", min_size=120, max_size=140),
            "ts": st.lists(texts, min_size=1, max_size=3),
            "map": st.dictionaries(texts, texts, min_size=1, max_size=3),
            "far": texts,
        },
    ),
    lambda inner: st.fixed_dictionaries(
        {},
        optional={
            "m": inner,
            "ms": st.lists(inner, min_size=1, max_size=3),
            "mm": st.dictionaries(texts, inner, min_size=1, max_size=3),
        },
    ),
    max_leaves=6,
)


def to_library(values: dict[str, Any]) -> Any:
    """Make the library's message of the same values."""
    made = protobuf.message("Everything")
    for name, value in values.items():
        if name in ("i", "b", "d"):
            setattr(made, name, value)
        elif name in ("t", "far"):
            setattr(made, name, protobuf.as_bytes(value))
        elif name == "ts":
            made.ts.extend(map(protobuf.as_bytes, value))
        elif name == "map":
            for key, item in value.items():
                made.map.add(key=protobuf.as_bytes(key), value=protobuf.as_bytes(item))
        elif name == "m":
            made.m.CopyFrom(to_library(value))
        elif name == "ms":
            made.ms.extend(map(to_library, value))
        else:
            for key, item in value.items():
                made.mm.add(key=protobuf.as_bytes(key), value=to_library(item))
    return made


def without_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """Leave out what the library does not write: 0, false and empty text; there they are the same as nothing."""
    kept: dict[str, Any] = {}
    for name, value in values.items():
        if name == "m":
            kept[name] = without_defaults(value)
        elif name == "ms":
            kept[name] = [without_defaults(item) for item in value]
        elif name == "mm":
            kept[name] = {key: without_defaults(item) for key, item in value.items()}
        elif name in ("ts", "map") or value not in (0, False, "") or str(value) == "-0.0":
            kept[name] = value
    return kept


def none_for_empty(values: dict[str, Any]) -> dict[str, Any]:
    """Say None of an entry's value that the library did not write."""
    return {
        name: {key: item or None for key, item in value.items()}
        if name == "map"
        else none_for_empty(value)
        if name == "m"
        else [none_for_empty(item) for item in value]
        if name == "ms"
        else {key: none_for_empty(item) for key, item in value.items()}
        if name == "mm"
        else value
        for name, value in values.items()
    }


@given(everything)
def test_the_library_reads_what_we_write(values: dict[str, Any]) -> None:
    assert protobuf.parsed("Everything", EVERYTHING.encode(values)) == to_library(values)


@given(everything)
def test_we_read_what_the_library_writes(values: dict[str, Any]) -> None:
    read = EVERYTHING.decode(to_library(values).SerializeToString())
    assert none_for_empty(read) == none_for_empty(without_defaults(values))


@given(everything)
def test_we_read_what_we_write(values: dict[str, Any]) -> None:
    assert EVERYTHING.decode(EVERYTHING.encode(values)) == values


@given(everything, st.permutations(range(1, 10)))
def test_the_order_of_fields_means_nothing(values: dict[str, Any], order: list[int]) -> None:
    names = sorted(values, key=lambda name: order.index(EVERYTHING.fields[name].number % 10 or 1))
    assert EVERYTHING.decode(EVERYTHING.encode({name: values[name] for name in names})) == values


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_a_protocol_error(data: bytes) -> None:
    try:
        EVERYTHING.decode(data)
    except ProtocolError:
        return


@given(everything, st.data())
def test_a_damaged_message_is_a_message_or_a_protocol_error(values: dict[str, Any], data: st.DataObject) -> None:
    encoded = bytearray(EVERYTHING.encode({"i": 5, **values}))
    for place in data.draw(st.lists(st.integers(0, len(encoded) - 1), min_size=1, max_size=4)):
        encoded[place] = data.draw(st.integers(0, 255))
    try:
        EVERYTHING.decode(bytes(encoded))
    except ProtocolError:
        return


@given(everything, st.data())
def test_a_message_cut_off_within_a_field_is_a_protocol_error(values: dict[str, Any], data: st.DataObject) -> None:
    """Between two fields it is a shorter message, as to anybody."""
    encoded = EVERYTHING.encode(values)
    cut = data.draw(st.integers(0, len(encoded)))
    try:
        read: dict[str, Any] | None = EVERYTHING.decode(encoded[:cut])
    except ProtocolError:
        read = None
    assert (read is None) == (cut not in ends_of_fields(encoded))


def ends_of_fields(encoded: bytes) -> set[int]:
    ends, position = {0}, 0
    while position < len(encoded):
        tag, position = read_varint(encoded, position)
        length = {0: 0, 1: 8}.get(tag & 7)
        if length is None:
            length, position = read_varint(encoded, position)
        elif length == 0:
            _, position = read_varint(encoded, position)
        position += length
        ends.add(position)
    return ends


@pytest.mark.parametrize(
    ("values", "encoded"),
    [
        ({}, b""),
        ({"i": 1}, b"\x08\x01"),
        ({"i": 300}, b"\x08\xac\x02"),
        ({"i": -1}, b"\x08\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"),
        ({"b": True}, b"\x10\x01"),
        ({"b": False}, b"\x10\x00"),
        ({"d": 1.0}, b"\x19\x00\x00\x00\x00\x00\x00\xf0\x3f"),
        ({"t": "acme"}, b"\x22\x04acme"),
        ({"t": b"acme"}, b"\x22\x04acme"),
        ({"t": 7}, b"\x22\x017"),
        ({"t": "caf\udce9"}, b"\x22\x04caf\xe9"),
        ({"ts": ["a", "b"]}, b"\x2a\x01a\x2a\x01b"),
        ({"map": {"k": "v"}}, b"\x32\x06\x0a\x01k\x12\x01v"),
        ({"m": {"i": 1}}, b"\x3a\x02\x08\x01"),
        ({"far": "x"}, b"\xfa\xff\xff\xff\x0f\x01x"),
        ({"i": None, "unknown": 5}, b""),
    ],
    ids=repr,
)
def test_the_bytes_of_a_message(values: dict[str, Any], encoded: bytes) -> None:
    assert EVERYTHING.encode(values) == encoded


@pytest.mark.parametrize(
    "encoded",
    [
        b"\x08",
        b"\x08\x80",
        b"\x08" + b"\xff" * 10 + b"\x01",
        b"\x80",
        b"\x22",
        b"\x22\x05acme",
        b"\x22\xff\xff\xff\xff\x0facme",
        b"\x19\x00\x00\x00",
        b"\x1d\x00\x00",
        b"\x0b\x0c",
        b"\x0e\x00",
        b"\x0f\x00",
        b"\x32\x02\x0a\x05",
        b"\x3a\x01\x08",
    ],
    ids=bytes.hex,
)
def test_what_is_no_message_is_a_protocol_error(encoded: bytes) -> None:
    with pytest.raises(ProtocolError):
        EVERYTHING.decode(encoded)


@pytest.mark.parametrize(
    "encoded",
    [
        b"\x0d\x00\x00\x00\x00",
        b"\x09\x00\x00\x00\x00\x00\x00\x00\x00",
        b"\x0a\x01x",
        b"\x20\x07",
        b"\x28\x07",
        b"\x30\x07",
        b"\x38\x07",
        b"\x52\x01x",
    ],
    ids=bytes.hex,
)
def test_a_field_that_is_unknown_or_of_another_type_is_passed_over(encoded: bytes) -> None:
    assert EVERYTHING.decode(encoded + b"\x10\x01") == {"b": True}


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (b"", {"map": {"": None}}),
        (b"\x0a\x01k", {"map": {"k": None}}),
        (b"\x12\x01v", {"map": {"": "v"}}),
        (b"\x12\x01v\x0a\x01k", {"map": {"k": "v"}}),
        (b"\x10\x07\x08\x07", {"map": {"": None}}),
        (b"\x1a\x01x", {"map": {"": None}}),
    ],
    ids=repr,
)
def test_an_entry_of_a_map_may_lack_anything(entry: bytes, expected: dict[str, Any]) -> None:
    assert EVERYTHING.decode(b"\x32" + bytes([len(entry)]) + entry) == expected


def test_messages_too_deep_within_one_another_are_a_protocol_error() -> None:
    def nested(depth: int) -> bytes:
        encoded = b""
        for _ in range(depth):
            encoded = b"\x3a" + varint(len(encoded)) + encoded
        return encoded

    assert EVERYTHING.decode(nested(64))
    with pytest.raises(ProtocolError):
        EVERYTHING.decode(nested(65))
    with pytest.raises(ProtocolError):
        EVERYTHING.decode(nested(10_000))


@pytest.mark.parametrize(
    "values",
    [
        {"i": "seven"},
        {"i": None, "d": "seven"},
        {"i": math.nan},
        {"i": math.inf},
        {"i": 2**63},
        {"i": -(2**63) - 1},
        {"d": 10**400},
        {"t": "\ud800"},
        {"ts": 7},
        {"map": [1]},
        {"m": 7},
    ],
    ids=repr,
)
def test_what_does_not_fit_its_field_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError, OverflowError, AttributeError)):
        EVERYTHING.encode(values)


@given(integers, st.binary(max_size=3))
def test_an_integer_is_read_where_it_stands(value: int, around: bytes) -> None:
    encoded = varint(value)
    assert len(encoded) <= 10
    assert read_varint(around + encoded + around, len(around)) == (value % 2**64, len(around) + len(encoded))


@pytest.mark.parametrize(("value", "size"), [(0, 1), (127, 1), (128, 2), (2**31, 5), (2**63 - 1, 9), (-1, 10)])
def test_an_integer_takes_as_many_bytes_as_it_needs(value: int, size: int) -> None:
    assert len(varint(value)) == size


def test_a_frame_is_its_length_least_significant_byte_first_and_the_message() -> None:
    assert frame(b"") == b"\x00\x00\x00\x00"
    assert frame(b"acme") == b"\x04\x00\x00\x00acme"
    assert frame(b"x" * 0x01_02_03)[:4] == b"\x03\x02\x01\x00"
