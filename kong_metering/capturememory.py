"""What access phases captured, in a memory file that outlives the process: for the next one, should this one be killed.

    4096 slots of 256 bytes, 1024 of 1 KiB, then 64 of 8 KiB; each is
    1 while in use, else 0, u8 | 3 zero bytes | length of the text u32, little-endian | the text

The text is JSON, the id of the request and its headers. The first byte is written last, so that a slot in use is whole
whenever the process is killed.

Contract: one process writes, from the thread that runs phases; the file is read once that process is dead, and every
byte is checked. All of the space, 2.5 MiB, is taken at once, so that writing cannot fail. A small slot holds the usual
request with a header or three. A text takes the smallest free slot that it fits, else that of the oldest of its size:
no client can take those of another size with long headers. One over 8,184 bytes fits none.
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


_SMALL = _Kind(0, 256, 4096)
_MIDDLE = _Kind(_SMALL.end, 1024, 1024)
_LARGE = _Kind(_MIDDLE.end, 8192, 64)
_KINDS = (_SMALL, _MIDDLE, _LARGE)
_BYTES = _LARGE.end
_encode = msgspec.json.Encoder().encode


class _Slots:
    """The slots of one size: those that are free, and those in use, by the id of the request, the oldest first."""

    def __init__(self, kind: _Kind) -> None:
        self.size = kind.size
        # The first ones are used again and again, and stay in the processor's cache.
        self.free = list(reversed(kind.slots()))
        self.used: dict[str, int] = {}


class CaptureMemory:
    """The slots of a living process."""

    def __init__(self, descriptor: int) -> None:
        """Begin with all slots free, in an empty memory file. Raises `OSError` when there is no room for them."""
        self._descriptor = descriptor
        try:
            os.posix_fallocate(descriptor, 0, _BYTES)
            self._memory = mmap.mmap(descriptor, _BYTES)
        except OSError:
            os.ftruncate(descriptor, 0)
            raise
        self._slots = [_Slots(kind) for kind in _KINDS]

    def put(self, request_id: str, headers: Headers) -> None:
        """Write down what was captured of a request, which has nothing here yet."""
        try:
            text = _encode((request_id, headers))
        except UnicodeEncodeError:
            # The standard library's JSON holds bytes that are not UTF-8 as well.
            text = json.dumps((request_id, headers)).encode("ascii")
        size = _HEAD.size + len(text)
        smallest = None
        for slots in self._slots:
            if size <= slots.size:
                if slots.free:
                    self._write(slots, slots.free.pop(), request_id, text)
                    return
                smallest = smallest or slots
        if smallest is not None:
            # The oldest of that size makes room: its log phase may never come, and that of a new one comes soon.
            self._write(smallest, smallest.used.pop(next(iter(smallest.used))), request_id, text)

    def forget(self, request_id: str) -> None:
        """Free the slot of a request, if it has one."""
        for slots in self._slots:
            slot = slots.used.pop(request_id, None)
            if slot is not None:
                self._memory[slot] = 0
                slots.free.append(slot)
                return

    def close(self) -> None:
        """Leave nothing to the next process. Nothing may be put or forgotten any more."""
        self._memory.close()
        os.ftruncate(self._descriptor, 0)

    def _write(self, slots: _Slots, slot: int, request_id: str, text: bytes) -> None:
        self._memory[slot] = 0
        self._memory[slot : slot + _HEAD.size + len(text)] = _HEAD.pack(0, len(text)) + text
        self._memory[slot] = 1
        slots.used[request_id] = slot


def left_in(descriptor: int) -> Iterator[tuple[str, dict[str, str | list[str]]]]:
    """Give what a dead process had captured of requests, with their ids; what is damaged is passed over."""
    data = os.pread(descriptor, _BYTES, 0).ljust(_BYTES, b"\0")
    for slot in (slot for kind in _KINDS for slot in kind.slots()):
        is_in_use, length = _HEAD.unpack_from(data, slot)
        if is_in_use:
            try:
                text = data[slot + _HEAD.size : slot + _HEAD.size + length]
                yield msgspec.convert(json.loads(text), tuple[str, dict[str, str | list[str]]])
            except (ValueError, RecursionError):
                continue
