"""What access phases captured, in memory that outlives the process: for the next one, should this one be killed.

    8192 slots of 192 bytes, then 64 slots of 8192 bytes; each is
    1 while somebody wants it, else 0, u8 | 3 zero bytes | length of the text u32, little-endian | the text

The text is JSON, the id of the request and its headers. The first byte is written last, so that a slot that is 1 is
whole whenever the process is killed.

Contract: one process writes, from the thread that runs phases; it is read when that is dead, and nothing of it is
believed. All of the space is taken at once, so that writing cannot fail. What finds no slot is not kept here: more
requests under way than slots, or a text that is too long.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from collections.abc import Iterator, Mapping
from typing import TypeAlias

import msgspec

# The headers by name, and which were asked for (`request.ASKED`).
Headers: TypeAlias = "Mapping[str, str | list[str]]"

_HEAD = struct.Struct("<B3xI")
# The size of a slot, and how many there are.
_KINDS = ((192, 8192), (8192, 64))
_BYTES = sum(size * count for size, count in _KINDS)
_encode = msgspec.json.Encoder().encode


class CaptureMemory:
    """The slots of a living process."""

    def __init__(self, descriptor: int) -> None:
        """Begin with empty slots in an empty file of memory. Raises `OSError` when there is no room for them."""
        os.posix_fallocate(descriptor, 0, _BYTES)
        self._memory = mmap.mmap(descriptor, _BYTES)
        self._small, self._large = _places()

    def put(self, request_id: str, headers: Headers) -> int | None:
        """Write down what was captured of a request, and return where; None when it finds no slot."""
        try:
            text = _encode((request_id, headers))
        except UnicodeEncodeError:
            # The standard library's JSON holds bytes that are not UTF-8 as well.
            text = json.dumps((request_id, headers)).encode("ascii")
        size = _HEAD.size + len(text)
        free = self._small if size <= _KINDS[0][0] else self._large
        if not free or size > _KINDS[1][0]:
            return None
        place = free.pop()
        self._memory[place : place + size] = _HEAD.pack(0, len(text)) + text
        self._memory[place] = 1
        return place

    def clear(self, place: int) -> None:
        """Forget what is there."""
        self._memory[place] = 0
        (self._small if place < _KINDS[0][0] * _KINDS[0][1] else self._large).append(place)


def left_in(descriptor: int) -> Iterator[tuple[str, dict[str, str | list[str]]]]:
    """Give what a dead process had captured of requests, with their ids; what is damaged is passed over."""
    data = os.pread(descriptor, _BYTES, 0)
    for place in (place for places in _places() for place in places):
        if len(data) < place + _HEAD.size:
            continue
        is_wanted, length = _HEAD.unpack_from(data, place)
        text = data[place + _HEAD.size : place + _HEAD.size + length]
        if is_wanted:
            try:
                yield msgspec.convert(json.loads(text), tuple[str, dict[str, str | list[str]]])
            except (ValueError, msgspec.ValidationError):
                continue


def _places() -> tuple[list[int], list[int]]:
    """Return where the slots of each kind begin, the first one last."""
    small, large = (list(range(0, size * count, size)) for size, count in _KINDS)
    return small[::-1], [_KINDS[0][0] * _KINDS[0][1] + place for place in large[::-1]]
