"""Which protocol a connection speaks, by its first four bytes: for every beginning that either of them can have."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kong_metering.host.conversation import FIRST_BYTES, Conversation, Conversations
from kong_metering.host.mp_rpc import MPConversation
from kong_metering.host.pb_rpc import PBConversation
from tests.support.clock import FakeClock
from tests.support.protobuf import message
from tests.support.rpc import request_frame
from tests.unit.host.hosting import Host

# A message of more than this would be mistaken for MsgPack:1, if it has one of 48 lengths; a call has some hundred.
TOLD_UP_TO = 13_000_000
INTEGERS = {
    "B": b"\xcc",
    "H": b"\xcd",
    "I": b"\xce",
    "Q": b"\xcf",
    "b": b"\xd0",
    "h": b"\xd1",
    "i": b"\xd2",
    "q": b"\xd3",
}
NAMES = [b"\xa1x", b"\xbf" + b"x" * 31, b"\xd9\x01x", b"\xda\x00\x01x", b"\xdb\x00\x00\x00\x01x", b"\xc4\x01x"]


def begun(first: bytes) -> type[Conversation]:
    host = Host(lambda _: None, FakeClock())
    return type(Conversations(host.dispatcher).begin(first[:FIRST_BYTES], {}))


def integers(number: int) -> list[bytes]:
    """Give every form that MessagePack has for an integer, the longer ones too."""
    forms = [bytes([number])] if number < 128 else []
    for size, mark in INTEGERS.items():
        try:
            forms.append(mark + struct.pack(f">{size}", number))
        except struct.error:
            continue
    return forms


@given(st.integers(0, 2**53), st.sampled_from(NAMES))
def test_a_request_of_msgpack_is_told_whatever_its_id_is(number: int, name: bytes) -> None:
    for form in integers(number):
        assert begun(b"\x94\x00" + form + name) is MPConversation


@pytest.mark.parametrize("number", [*range(300), 65_535, 65_536, 2**32 - 1, 2**32, 2**53])
def test_a_request_as_kong_encodes_it_is_told(number: int) -> None:
    assert begun(request_frame(number, "HandleEvent", {"InstanceId": 1, "EventName": "log"}).data) is MPConversation


@given(st.integers(0, TOLD_UP_TO))
def test_a_call_of_protobuf_is_told_whatever_its_length_is(length: int) -> None:
    assert begun(length.to_bytes(4, "little")) is PBConversation


def test_a_call_of_protobuf_is_told_also_where_its_length_looks_like_msgpack() -> None:
    for length in range(0x94, TOLD_UP_TO, 0x1_0000):
        assert length.to_bytes(4, "little")[:2] == b"\x94\x00"
        assert begun(length.to_bytes(4, "little")) is PBConversation


@pytest.mark.parametrize("padding", [0x94, 0x94 - 30, 0x1_0094, 0x7F_0094])
def test_calls_of_such_lengths_are_served(padding: int) -> None:
    host = Host(lambda _: None, FakeClock())
    conversations = Conversations(host.dispatcher)
    name = b"x" * padding
    call = message("Call", sequence=5, get_plugin_names={}).SerializeToString() + b"\xa2\x06" + _length(name) + name
    data = len(call).to_bytes(4, "little") + call
    conversation = conversations.begin(data[:FIRST_BYTES], {})
    assert b"hosted" in conversation.receive(data)


def _length(text: bytes) -> bytes:
    length, encoded = len(text), b""
    while length > 127:
        encoded += bytes([length & 127 | 128])
        length >>= 7
    return encoded + bytes([length])


def test_what_is_neither_is_taken_for_protobuf_which_refuses_it() -> None:
    for first in (b"GET ", b"\x16\x03\x01\x02", b"\xc1\xc1\xc1\xc1", b"\xff\xff\xff\xff", b"\x93\x01\x02\x03"):
        assert begun(first) is PBConversation
