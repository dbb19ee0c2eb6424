"""Bytes to messages and back: the frames and messages of Kong's plugin-server protocol `ProtoBuf:1`. No sockets here.

A frame is four bytes of length, least significant first, and that many bytes. What is in it depends on where it stands:
a call of Kong's, the name of a PDK function, its argument, the answer to it, or what a call returns
(`kong/runloop/plugin_servers/rpc/pb_rpc.lua`). Messages are described by `Message`, a table of their fields; which
messages there are, and which PDK function takes and gives which, is in `pb_messages.py`.

Strings are whatever bytes a client sent: those that are not UTF-8 become Python's surrogate escapes on the way in, and
the same bytes again on the way out. A library would refuse them.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from kong_metering.host.errors import ProtocolError

MAX_FRAME_BYTES = 16 * 1024 * 1024
LENGTH = struct.Struct("<I")
_DOUBLE = struct.Struct("<d")
_BYTES = "surrogateescape"
_VARINT, _EIGHT_BYTES, _DELIMITED, _FOUR_BYTES = 0, 1, 2, 5
_MAX_DEPTH = 64  # messages within one another
_MAX_VARINT_BYTES = 10
_MORE = 0x80  # in each byte of an integer but its last
_SIGN = 1 << 63
_WORD = 1 << 64


def frame(message: bytes) -> bytes:
    """Return the frame around a message."""
    return LENGTH.pack(len(message)) + message


def varint(value: int) -> bytes:
    """Return an integer in the form that fields and lengths have; a negative one takes ten bytes."""
    value &= _WORD - 1
    encoded = bytearray()
    while value >= _MORE:
        encoded.append(value & (_MORE - 1) | _MORE)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def read_varint(data: bytes, position: int) -> tuple[int, int]:
    """Return the integer that begins at `position`, and where it ends. Raises `ProtocolError`."""
    value = shift = 0
    for at in range(position, min(position + _MAX_VARINT_BYTES, len(data))):
        byte = data[at]
        value |= (byte & (_MORE - 1)) << shift
        if byte < _MORE:
            return value, at + 1
        shift += 7
    raise ProtocolError("an integer that does not end")


@dataclass(frozen=True)
class Kind:
    """How a value stands in a message: its wire type, and the ways in and out."""

    wire_type: int
    encode: Callable[[Any], bytes]
    decode: Callable[[Any], Any]


def _sixty_four_bits(value: Any) -> bytes:
    number = int(value)
    if not -_SIGN <= number < _SIGN:
        raise OverflowError("an integer of more than 64 bits")
    return varint(number)


def _signed(value: int) -> int:
    value &= _WORD - 1
    return value - _WORD if value & _SIGN else value


def _as_bytes(value: object) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode("utf-8", _BYTES)


INTEGER = Kind(_VARINT, _sixty_four_bits, _signed)
BOOLEAN = Kind(_VARINT, lambda value: b"\x01" if value else b"\x00", bool)
DOUBLE = Kind(_EIGHT_BYTES, lambda value: _DOUBLE.pack(float(value)), lambda raw: _DOUBLE.unpack(raw)[0])
TEXT = Kind(_DELIMITED, _as_bytes, lambda raw: raw.decode("utf-8", _BYTES))


@dataclass(frozen=True)
class Field:
    """A field of a message: its number, and its kind or the message in it.

    `repeated`: it has a list of values. `mapping`: it has a dictionary from text to values.
    """

    number: int
    kind: Kind | Callable[[], Message]
    repeated: bool = False
    mapping: bool = False


@dataclass(frozen=True)
class Message:
    """A message: its fields by name; a message is a dictionary of those that are there."""

    fields: Mapping[str, Field]
    _by_number: dict[int, tuple[str, Field]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_number", {one.number: (name, one) for name, one in self.fields.items()})

    def encode(self, values: Mapping[str, Any]) -> bytes:
        """Return the bytes of a message; a member that is None, or that the message does not have, is left out.

        Raises TypeError, ValueError, OverflowError or AttributeError for values that do not fit their fields.
        """
        parts = [
            _encoded_field(self.fields[name], value)
            for name, value in values.items()
            if value is not None and name in self.fields
        ]
        return b"".join(parts)

    def decode(self, data: bytes, depth: int = 0) -> dict[str, Any]:
        """Return the fields that these bytes have; those that are not known are passed over. Raises `ProtocolError`."""
        if depth > _MAX_DEPTH:
            raise ProtocolError("messages too deep within one another")
        values: dict[str, Any] = {}
        for number, wire_type, raw in _raw_fields(data):
            name, one = self._by_number.get(number, ("", None))
            if one is not None:
                _take(values, name, (one, wire_type, raw), depth)
        return values


def _encoded_field(one: Field, value: Any) -> bytes:
    if one.mapping:
        return b"".join(
            _tagged(one.number, _DELIMITED, _tagged(1, _DELIMITED, _as_bytes(key)) + _encoded(2, one.kind, item))
            for key, item in value.items()
        )
    if one.repeated:
        return b"".join(_encoded(one.number, one.kind, item) for item in value)
    return _encoded(one.number, one.kind, value)


def _encoded(number: int, kind: Kind | Callable[[], Message], value: Any) -> bytes:
    if isinstance(kind, Kind):
        return _tagged(number, kind.wire_type, kind.encode(value))
    return _tagged(number, _DELIMITED, kind().encode(value))


def _tagged(number: int, wire_type: int, content: bytes) -> bytes:
    length = varint(len(content)) if wire_type == _DELIMITED else b""
    return varint(number << 3 | wire_type) + length + content


def _raw_fields(data: bytes) -> Iterator[tuple[int, int, Any]]:
    position, size = 0, len(data)
    while position < size:
        tag, position = read_varint(data, position)
        wire_type = tag & 7
        if wire_type == _VARINT:
            value, position = read_varint(data, position)
            yield tag >> 3, wire_type, value
            continue
        if wire_type == _DELIMITED:
            length, position = read_varint(data, position)
        elif wire_type in (_EIGHT_BYTES, _FOUR_BYTES):
            length = 8 if wire_type == _EIGHT_BYTES else 4
        else:
            raise ProtocolError(f"a field of wire type {wire_type}")
        if length > size - position:
            raise ProtocolError("a field that does not end")
        yield tag >> 3, wire_type, data[position : position + length]
        position += length


def _take(values: dict[str, Any], name: str, found: tuple[Field, int, Any], depth: int) -> None:
    """Put a field's value in its place; one of another wire type than expected is passed over."""
    one, wire_type, raw = found
    if one.mapping:
        if wire_type == _DELIMITED:
            key, value = _entry(one, raw, depth)
            values.setdefault(name, {})[key] = value
        return
    if wire_type != _wire_type(one):
        return
    value = _decoded(one, raw, depth)
    if one.repeated:
        values.setdefault(name, []).append(value)
    else:
        values[name] = value


def _wire_type(one: Field) -> int:
    return one.kind.wire_type if isinstance(one.kind, Kind) else _DELIMITED


def _decoded(one: Field, raw: Any, depth: int) -> Any:
    return one.kind.decode(raw) if isinstance(one.kind, Kind) else one.kind().decode(raw, depth + 1)


def _entry(one: Field, raw: bytes, depth: int) -> tuple[str, Any]:
    key = ""
    value: Any = None if isinstance(one.kind, Kind) else {}
    for number, wire_type, content in _raw_fields(raw):
        if number == 1 and wire_type == _DELIMITED:
            key = TEXT.decode(content)
        elif number == 2 and wire_type == _wire_type(one):  # noqa: PLR2004 - an entry is its key, 1, and its value, 2
            value = _decoded(one, content, depth)
    return key, value
