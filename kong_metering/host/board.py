"""What the servers of one plugin server tell each other and their supervisor: a page of memory that they share.

Contract: made before the first server is started; each server has a slot, which only the process that has claimed it
writes, and everybody may read. Nobody waits for anybody, and a process may die at any moment.
"""

from __future__ import annotations

import mmap
import os
import struct
import zlib
from enum import IntEnum

_PID, _BEAT, _STATE = 0, 8, 16
_TEXT = 24
_HEAD = struct.Struct("<II")  # length and checksum of the text
_WORD = struct.Struct("<q")
# Pages that are not written take no memory.
_SLOT_BYTES = 1024 * 1024
_MAX_TEXT_BYTES = _SLOT_BYTES - _TEXT - _HEAD.size


class State(IntEnum):
    """What a server does."""

    STARTING = 0
    SERVING = 1
    # It has handed over, and serves no more.
    PARTED = 2
    ENDING = 3


class Slot:
    """What one server tells."""

    def __init__(self, memory: mmap.mmap, offset: int) -> None:
        self._memory = memory
        self._offset = offset

    def clear(self) -> None:
        """Forget the process that had it, which writes no more from now on."""
        for word in (_PID, _BEAT, _STATE):
            self._put(word, 0)
        self._memory[self._offset + _TEXT : self._offset + _TEXT + _HEAD.size] = _HEAD.pack(0, 0)

    def claim(self) -> None:
        """Make it this process's."""
        self._put(_PID, os.getpid())

    @property
    def pid(self) -> int:
        """The process that has it; 0 when none has."""
        return self._get(_PID)

    @property
    def beats(self) -> int:
        """How often the server's loop has come round."""
        return self._get(_BEAT)

    def beat(self) -> None:
        """Tell that the loop comes round."""
        if self._is_own:
            self._put(_BEAT, self.beats + 1)

    @property
    def state(self) -> State:
        """What the server does."""
        return State(self._get(_STATE))

    def tell(self, state: State) -> None:
        """Tell what the server does from now on."""
        if self._is_own:
            self._put(_STATE, state)

    def publish(self, text: bytes) -> bool:
        """Show a text to the others, instead of the one before; False if it is too large."""
        if len(text) > _MAX_TEXT_BYTES:
            return False
        if self._is_own:
            begin = self._offset + _TEXT + _HEAD.size
            self._memory[begin : begin + len(text)] = text
            self._memory[begin - _HEAD.size : begin] = _HEAD.pack(len(text), zlib.crc32(text))
        return True

    def read(self) -> bytes | None:
        """Give the text; None when there is none, or it is just being written."""
        begin = self._offset + _TEXT + _HEAD.size
        length, checksum = _HEAD.unpack(self._memory[begin - _HEAD.size : begin])
        text = self._memory[begin : begin + min(length, _MAX_TEXT_BYTES)]
        return text if length and zlib.crc32(text) == checksum else None

    @property
    def _is_own(self) -> bool:
        return self.pid == os.getpid()

    def _get(self, word: int) -> int:
        value: int = _WORD.unpack_from(self._memory, self._offset + word)[0]
        return value

    def _put(self, word: int, value: int) -> None:
        _WORD.pack_into(self._memory, self._offset + word, value)


class Board:
    """The slots of all servers."""

    def __init__(self, servers: int) -> None:
        memory = mmap.mmap(-1, servers * _SLOT_BYTES)
        self.slots = tuple(Slot(memory, index * _SLOT_BYTES) for index in range(servers))
