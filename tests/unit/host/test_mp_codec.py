"""Bytes to requests and back, for any bytes and any cuts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kong_metering.host.errors import ProtocolError
from kong_metering.host.mp_codec import MAX_FRAME_BYTES, AnswerWriter, FrameReader, Request
from tests.support.rpc import pack

CHUNK = 64 * 1024

# Strings as Kong has them: any bytes, which are surrogate escapes in Python.
texts = st.binary(max_size=40).map(lambda raw: raw.decode("utf-8", "surrogateescape"))
numbers = st.integers(-(2**63), 2**64 - 1)
arguments = st.recursive(
    st.none() | st.booleans() | numbers | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts | numbers, inner, max_size=4),
    max_leaves=12,
)
requests = st.tuples(st.integers(0, 2**53), texts, arguments)


def encoded(request: Request) -> bytes:
    request_id, method, argument = request
    return pack([0, request_id, method, [argument]])


def read(*chunks: bytes) -> list[Request]:
    return _feed(FrameReader(), chunks)


def _feed(reader: FrameReader, chunks: Sequence[bytes]) -> list[Request]:
    return [request for chunk in chunks for request in reader.feed(chunk)]


def in_chunks(data: bytes, size: int = CHUNK) -> list[bytes]:
    return [data[start : start + size] for start in range(0, len(data), size)]


@given(st.lists(requests, max_size=5), st.data())
def test_requests_are_the_same_however_their_bytes_are_cut(sent: Sequence[Request], data: st.DataObject) -> None:
    stream = b"".join(map(encoded, sent))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=10)))
    chunks = [stream[start:end] for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    assert read(*chunks) == list(sent)


@given(requests)
def test_a_request_comes_out_with_its_last_byte_and_not_before(request: Request) -> None:
    frame = encoded(request)
    reader = FrameReader()
    for index in range(len(frame) - 1):
        assert list(reader.feed(frame[index : index + 1])) == []
    assert list(reader.feed(frame[-1:])) == [request]


@given(st.lists(st.binary(max_size=200), max_size=5))
def test_any_bytes_give_requests_or_a_protocol_error(chunks: Sequence[bytes]) -> None:
    try:
        found = read(*chunks)
    except ProtocolError:
        return
    assert all(len(request) == 3 for request in found)


@given(requests, st.data())
def test_a_damaged_frame_gives_requests_or_a_protocol_error(request: Request, data: st.DataObject) -> None:
    frame = bytearray(encoded(request))
    for place in data.draw(st.lists(st.integers(0, len(frame) - 1), min_size=1, max_size=4)):
        frame[place] = data.draw(st.integers(0, 255))
    try:
        read(bytes(frame), encoded(request))
    except ProtocolError:
        return


@pytest.mark.parametrize(
    "message",
    [
        [2, "serverPid", 17],
        [1, 7, None, {"Data": "ret"}],
        [0, 7, "plugin.Step"],
        [0, 7, "plugin.Step", [], []],
        [0, "7", "plugin.Step", []],
        [0, True, "plugin.Step", []],
        [0, 7.0, "plugin.Step", []],
        [0, None, "plugin.Step", []],
        [0, 7, None, []],
        [0, 7, 8, []],
        [0, 7, "plugin.Step", {}],
        [0, 7, "plugin.Step", None],
        {"0": 0},
        [],
        7,
        None,
        "GET / HTTP/1.1",
        b"\x00",
    ],
    ids=repr,
)
def test_a_message_that_is_no_request_is_a_protocol_error(message: object) -> None:
    with pytest.raises(ProtocolError):
        read(msgpack.packb(message))


@pytest.mark.parametrize(
    "raw",
    [
        b"\xc1",
        b"\x94\x00\x01\xa1x\x91\xc1",
        b"\x94\x00\x01\xa1x\x91\x81\x90\x01",
        b"\x94\x00\x01\xa1x\x91\x81\x80\x01",
        b"\x94\x00\x01\xa1x\x91\xd6\xff",
        b"\x94\x00\x01\xa1x\x91\xc7\x0c\xff" + b"\xff" * 12,
    ],
    ids=["unused type", "unused type inside", "an array as key", "a map as key", "cut timestamp", "bad timestamp"],
)
def test_what_no_kong_encodes_costs_a_protocol_error_at_most(raw: bytes) -> None:
    try:
        read(raw, b"")
    except ProtocolError:
        return
    assert raw.endswith(b"\xd6\xff"), "this one is only waiting for more"


def test_extension_types_are_read_as_an_argument_that_nothing_takes() -> None:
    (request,) = read(b"\x94\x00\x01\xa1x\x91\xd4\x07\x00")
    assert not isinstance(request[2], (dict, list, int, str))


def test_a_request_without_arguments_has_none() -> None:
    assert read(pack([0, 1, "plugin.GetStatus", []])) == [(1, "plugin.GetStatus", None)]


def test_binary_is_read_as_bytes() -> None:
    """Kong sends raw bodies so."""
    (request,) = read(msgpack.packb([0, 1, "plugin.Step", [{"Data": b"\xff\x00"}]]))
    assert request[2] == {"Data": b"\xff\x00"}


@pytest.mark.parametrize("parts", [1, 40])
def test_a_frame_of_16_mib_is_read_and_a_larger_one_is_a_protocol_error(parts: int) -> None:
    text = "x" * (MAX_FRAME_BYTES // parts - 1024)
    (request,) = read(*in_chunks(pack([0, 1, "plugin.Step", [[text] * parts]])))
    assert request[2] == [text] * parts
    text = "x" * (MAX_FRAME_BYTES // parts + CHUNK)
    with pytest.raises(ProtocolError):
        read(*in_chunks(pack([0, 1, "plugin.Step", [[text] * parts]])))


def test_frames_that_are_large_together_are_all_read() -> None:
    frame = pack([0, 1, "plugin.Step", ["x" * (MAX_FRAME_BYTES // 3)]])
    assert len(read(*in_chunks(frame * 7))) == 7


@pytest.mark.parametrize("header", [b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff"], ids=["array", "map"])
def test_a_header_that_announces_four_billion_members_is_a_protocol_error_at_once(header: bytes) -> None:
    with pytest.raises(ProtocolError):
        read(b"\x94\x00\x01\xa1x\x91" + header)


@pytest.mark.parametrize("header", [b"\xdb\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff"], ids=["string", "binary"])
def test_a_header_that_announces_four_gigabytes_is_a_protocol_error_after_16_mib(header: bytes) -> None:
    reader = FrameReader()
    list(reader.feed(b"\x94\x00\x01\xa1x\x91" + header))
    with pytest.raises(ProtocolError):
        _feed(reader, [b"x" * CHUNK] * (MAX_FRAME_BYTES // CHUNK + 1))


@pytest.mark.parametrize("opening", [b"\x91", b"\x81\x01"], ids=["arrays", "maps"])
@pytest.mark.parametrize("end", [b"\xc0", b""], ids=["whole", "cut"])
def test_a_frame_that_is_too_deep_is_a_protocol_error(opening: bytes, end: bytes) -> None:
    with pytest.raises(ProtocolError):
        read(b"\x94\x00\x01\xa1x\x91" + opening * 100_000 + end)


answer_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)


@given(st.integers(0, 2**53), answer_values)
def test_an_answer_says_what_was_answered_bytes_included(number: int, result: object) -> None:
    packed = AnswerWriter().result(number, result)
    assert decoded(packed) == [1, number, None, result]


@given(st.integers(0, 2**53), texts)
def test_an_error_is_said_in_the_place_of_the_result(number: int, error: str) -> None:
    assert decoded(AnswerWriter().error(number, error)) == [1, number, error, None]


def decoded(packed: bytes) -> Any:
    return msgpack.unpackb(packed, unicode_errors="surrogateescape", strict_map_key=False)


def endless_list() -> list[object]:
    endless: list[object] = []
    endless.append(endless)
    return endless


@pytest.mark.parametrize(
    "result", [object(), {1, 2}, 2**70, "\ud800", endless_list()], ids=["object", "set", "too large", "text", "endless"]
)
def test_what_messagepack_cannot_say_is_an_error_and_does_not_spoil_the_next_answer(result: object) -> None:
    writer = AnswerWriter()
    with pytest.raises((TypeError, ValueError, OverflowError)):
        writer.result(1, {"Data": ["before", result]})
    assert decoded(writer.result(2, "next")) == [1, 2, None, "next"]
