"""What access phases captured, in a memory file that outlives the process: for the next one, should this one be killed.

    8192 slots of 192 bytes, then 64 slots of 8192 bytes; each is
    1 while in use, else 0, u8 | 3 zero bytes | length of the text u32, little-endian | the text

The text is JSON, the id of the request and its headers. The first byte is written last, so that a slot in use is whole
whenever the process is killed.

Contract: one process writes, from the thread that runs phases; the file is read once that process is dead, and every
byte is checked. All of the space, 2 MiB, is taken at once, so that writing cannot fail. A small slot holds the usual
request with a header or three; more requests under way, or a text over 8,184 bytes, find none and are not in here.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from collections.abc import Iterator, Mapping
from typing import NamedTuple, TypeAlias

import msgspec

# The headers by name, and which were asked for (`request.ASKED`).
Headers: TypeAlias = "Mapping[str, str | list[str]]"

_HEAD = struct.Struct("<B3xI")


class _Kind(NamedTuple):
    """Slots of one size in bytes: where the first one begins, and the number of them."""

    begin: int
    size: int
    number: int

    @property
    def end(self) -> int:
        return self.begin + self.size * self.number

    def slots(self) -> range:
        """Return where each begins."""
        return range(self.begin, self.end, self.size)


_SMALL = _Kind(0, 192, 8192)
_LARGE = _Kind(_SMALL.end, 8192, 64)
_BYTES = _LARGE.end
_encode = msgspec.json.Encoder().encode


class CaptureMemory:
    """The slots of a living process."""

    def __init__(self, descriptor: int) -> None:
        """Begin with all slots free, in an empty memory file. Raises `OSError` when there is no room for them."""
        os.posix_fallocate(descriptor, 0, _BYTES)
        self._memory = mmap.mmap(descriptor, _BYTES)
        # The first ones are used again and again, and stay in the processor's cache.
        self._small, self._large = list(reversed(_SMALL.slots())), list(reversed(_LARGE.slots()))

    def put(self, request_id: str, headers: Headers) -> int | None:
        """Write down what was captured of a request, and return its slot; None where none of its size is free."""
        try:
            text = _encode((request_id, headers))
        except UnicodeEncodeError:
            # The standard library's JSON holds bytes that are not UTF-8 as well.
            text = json.dumps((request_id, headers)).encode("ascii")
        size = _HEAD.size + len(text)
        free = self._small if size <= _SMALL.size else self._large
        if not free or size > _LARGE.size:
            return None
        slot = free.pop()
        self._memory[slot : slot + size] = _HEAD.pack(0, len(text)) + text
        self._memory[slot] = 1
        return slot

    def clear(self, slot: int) -> None:
        """Forget what is in a slot."""
        self._memory[slot] = 0
        (self._small if slot < _SMALL.end else self._large).append(slot)


def left_in(descriptor: int) -> Iterator[tuple[str, dict[str, str | list[str]]]]:
    """Give what a dead process had captured of requests, with their ids; what is damaged is passed over."""
    data = os.pread(descriptor, _BYTES, 0).ljust(_BYTES, b"\0")
    for slot in (*_SMALL.slots(), *_LARGE.slots()):
        is_in_use, length = _HEAD.unpack_from(data, slot)
        if is_in_use:
            try:
                text = data[slot + _HEAD.size : slot + _HEAD.size + length]
                yield msgspec.convert(json.loads(text), tuple[str, dict[str, str | list[str]]])
            except ValueError:
                continue
