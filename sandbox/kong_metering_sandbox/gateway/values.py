"""Values as Lua has them, and their JSON as lua-cjson writes it.

What a client sent is bytes from end to end and need not be UTF-8, so a string here is `bytes` (or `str`,
where it comes from the configuration). nil is None, a table is a dict or a list.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Mapping

Value: TypeAlias = Any  # a Lua value: what it is gets known at run time only
Table: TypeAlias = dict[str, Value]  # a record with names that the configuration gives

_ESCAPED = re.compile(rb'[\x00-\x1f"\\\x7f]')
_SHORT = {
    b"\b": b"\\b",
    b"\t": b"\\t",
    b"\n": b"\\n",
    b"\f": b"\\f",
    b"\r": b"\\r",
    b'"': b'\\"',
    b"\\": b"\\\\",
}


class MultiMap(dict[bytes, list[Any]]):
    """Headers or query arguments on their way to a plugin: every value is a list, and an empty map stays a map."""


def as_bytes(text: bytes | str) -> bytes:
    """Return the bytes of a string, whichever of the two kinds it is."""
    return text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")


def as_text(text: bytes | str) -> str:
    """Return text for a log line or a message; bytes that are not UTF-8 show as replacement characters."""
    return text if isinstance(text, str) else text.decode("utf-8", "replace")


def format_number(number: float) -> str:
    """Return a number as Kong's JSON shows it: 16 significant digits, no trailing zeros, 1.6e-05."""
    return f"{number:.16g}"


def encode_json(value: Value) -> bytes:
    """Return JSON as lua-cjson writes it: bytes that are not UTF-8 are left as they are, DEL is escaped.

    Raises:
        TypeError: the value holds something that JSON cannot show.

    """
    if value is None:
        return b"null"
    if isinstance(value, bool):
        return b"true" if value else b"false"
    if isinstance(value, (bytes, str)):
        return _quote(as_bytes(value))
    if isinstance(value, (int, float)):
        return format_number(value).encode()
    if isinstance(value, dict):
        return _encode_object(value)
    if isinstance(value, (list, tuple)):
        return b"[" + b",".join(map(encode_json, value)) + b"]"
    raise TypeError(f"no JSON for {type(value).__name__}")


def _encode_object(table: Mapping[Value, Value]) -> bytes:
    members = (_quote(_key(key)) + b":" + encode_json(member) for key, member in table.items())
    return b"{" + b",".join(members) + b"}"


def _key(key: Value) -> bytes:
    return as_bytes(key) if isinstance(key, (bytes, str)) else format_number(key).encode()


def _quote(text: bytes) -> bytes:
    return b'"' + _ESCAPED.sub(_escape, text) + b'"'


def _escape(match: re.Match[bytes]) -> bytes:
    char = match.group()
    return _SHORT.get(char) or b"\\u%04x" % char[0]


def from_wire(value: Value) -> Value:
    """Return what a decoded MessagePack value becomes in Lua: members that are nil do not exist."""
    if isinstance(value, dict):
        return _as_table({key: from_wire(member) for key, member in value.items() if member is not None})
    if isinstance(value, (list, tuple)):
        return _as_table({i: from_wire(member) for i, member in enumerate(value, 1) if member is not None})
    return value


def _as_table(table: dict[Value, Value]) -> Value:
    if table and set(table) == set(range(1, len(table) + 1)):
        return [table[i] for i in range(1, len(table) + 1)]
    return table


def to_wire(value: Value) -> Value:
    """Return what Kong hands to its MessagePack encoder: an empty table goes as an empty array."""
    if isinstance(value, MultiMap):
        return dict(value)
    if isinstance(value, dict):
        return {key: to_wire(member) for key, member in value.items()} or []
    if isinstance(value, (list, tuple)):
        return [to_wire(member) for member in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def without_nulls(value: Value) -> Value:
    """Return a copy in which members that are null are absent, at every depth, as plugins get entities."""
    if isinstance(value, dict):
        return {key: without_nulls(member) for key, member in value.items() if member is not None}
    if isinstance(value, list):
        return [without_nulls(member) for member in value]
    return value
