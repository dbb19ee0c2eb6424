"""Query strings and paths, decoded and encoded as OpenResty and Kong do it."""

from __future__ import annotations

import re
from typing import TypeAlias

QueryItem: TypeAlias = "bytes | bool"
QueryValue: TypeAlias = "bytes | bool | list[bytes | bool]"
Query: TypeAlias = "dict[bytes, QueryValue]"

DEFAULT_LIMIT = 100  # how many arguments Kong looks at unless it is asked for more

_PERCENT = re.compile(rb"%([0-9A-Fa-f]{2})")
_RESERVED = frozenset(b"!*'();:@&=+$,/?%#[]")
_UNSAFE_IN_PATH = re.compile(rb"[^!#$&'()*+,/:;=?@\[\]A-Za-z0-9\-_.~%]")
_UNSAFE_IN_ARG = re.compile(rb"[^A-Za-z0-9\-_.~!*'()]")


def unescape_arg(text: bytes) -> bytes:
    """Return a decoded query component: a plus is a space, a broken percent sequence stays."""
    return _PERCENT.sub(lambda match: bytes([int(match[1], 16)]), text.replace(b"+", b" "))


def decode_args(raw: bytes, limit: int = DEFAULT_LIMIT) -> Query:
    """Return the arguments of a raw query: a flag is True, a repeated name has a list, in order.

    An argument without a name is skipped; only the first `limit` arguments count.
    """
    query: Query = {}
    counted = 0
    for part in raw.split(b"&"):
        name, equals, value = part.partition(b"=")
        if not name:
            continue
        counted += 1
        if counted > limit:
            break
        _append(query, unescape_arg(name), unescape_arg(value) if equals else True)
    return query


def _append(query: Query, name: bytes, value: QueryItem) -> None:
    known = query.get(name)
    if known is None:
        query[name] = value
    elif isinstance(known, list):
        known.append(value)
    else:
        query[name] = [known, value]


def encode_args(query: Query) -> bytes:
    """Return a raw query with the names in order, as Kong writes it after a plugin changed the arguments."""
    parts = []
    for name in sorted(query):
        value = query[name]
        for single in value if isinstance(value, list) else [value]:
            key = _escape_arg(name)
            parts.append(key if isinstance(single, bool) else key + b"=" + _escape_arg(single))
    return b"&".join(parts)


def _escape_arg(text: bytes) -> bytes:
    return _UNSAFE_IN_ARG.sub(_percent, text)


def without_arg(raw: bytes, name: bytes) -> bytes:
    """Return a raw query without the arguments of that name; the others keep their bytes."""
    parts = raw.split(b"&")
    return b"&".join(part for part in parts if unescape_arg(part.partition(b"=")[0]) != name)


def normalize_path(path: bytes) -> bytes:
    """Return the path that Kong matches routes with: dots resolved, slashes merged, letters decoded."""
    decoded = _PERCENT.sub(_decode_unreserved, path)
    output: list[bytes] = []
    segments = re.sub(rb"/{2,}", b"/", decoded).split(b"/")[1:]
    for i, segment in enumerate(segments):
        if segment == b"..":
            output = output[:-1]
        elif segment != b".":
            output.append(segment)
            continue
        if i == len(segments) - 1:
            output.append(b"")
    return b"/" + b"/".join(output)


def _decode_unreserved(match: re.Match[bytes]) -> bytes:
    byte = int(match[1], 16)
    return match[0].upper() if byte in _RESERVED else bytes([byte])


def escape_path(path: bytes) -> bytes:
    """Return a path that is safe to send to a service."""
    return _UNSAFE_IN_PATH.sub(_percent, path)


def _percent(match: re.Match[bytes]) -> bytes:
    return b"%%%02X" % match[0][0]
