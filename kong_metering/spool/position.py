"""The file that remembers how far a log is done.

Contract: one thread at a time. The file's space is taken when it is made, so that it can be written on a full disk. A
write that is cut short leaves the position of the write before; a file that cannot be made is tried again at each save.
One that the disk does not give any more counts as lost, and is made anew; so is one that takes no write.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING

from kong_metering.spool import files
from kong_metering.spool.format import POSITION_BYTES, Position, decode_position, encode_slot, slot_offset

if TYPE_CHECKING:
    from kong_metering.spool.patience import Patience


# What says nothing about this file in particular.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class PositionFile:
    """One position file; `was_lost` tells that there was none, or that nothing in it was good."""

    def __init__(self, path: Path, patience: Patience) -> None:
        """Read what is there.

        Raises `SpoolFormatError` when it is of a format that this version does not know; and the system's `OSError`
        when it cannot be read now.
        """
        self.path = path
        self._descriptor: int | None = None
        self._was_made = False
        self._is_lost = False
        try:
            data = path.read_bytes()
        except OSError as error:
            if not patience.is_over(path, error):
                raise
            data, self._is_lost = b"", True
        patience.forget(path)
        found = decode_position(data)
        self.was_lost = found is None
        self.position, self._turn = found or (Position(), 0)

    @property
    def was_made(self) -> bool:
        """Whether the file was saved to already, and so is there for sure."""
        return self._was_made

    def save(self, position: Position) -> None:
        """Write the position in place of the older of the two that the file holds.

        Raises the system's `OSError`; the file still holds an earlier position then.
        """
        if self._is_lost:
            self.path.unlink(missing_ok=True)
            self._is_lost = False
        turn = self._turn + 1
        slot, offset = encode_slot(position, turn), slot_offset(turn)
        try:
            if self._descriptor is None:
                self._descriptor = _preallocated(self.path)
            files.write_at(self._descriptor, slot, offset)
        except OSError as error:
            if error.errno in _NO_ROOM:
                raise
            # It may be this file alone.
            self.close()
            files.write_file(self.path, bytes(offset) + slot.ljust(POSITION_BYTES - offset, b"\0"))
        self._was_made = True
        self._turn = turn

    def close(self) -> None:
        """Let go of the file until the next save."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _preallocated(path: Path) -> int:
    descriptor = files.open_file(path)
    try:
        files.take_space(descriptor, POSITION_BYTES)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
