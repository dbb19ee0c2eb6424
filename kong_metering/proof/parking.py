"""Events put aside while others are asked for: in a file without a name, so that memory stays bounded."""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Iterator
from types import TracebackType

_LENGTH = struct.Struct("<I")


class Parking:
    """Events in the order in which they came; the file is gone with the process."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `close`
        self.count = 0

    def __enter__(self) -> Parking:  # noqa: PYI034 - no Self before Python 3.11
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, event: bytes) -> None:
        """Put an event behind the others. Raises the system's `OSError`."""
        self._file.seek(0, 2)
        self._file.write(_LENGTH.pack(len(event)) + event)
        self.count += 1

    def events(self) -> Iterator[bytes]:
        """Go through them, in order; nothing may be added meanwhile."""
        self._file.seek(0)
        while head := self._file.read(_LENGTH.size):
            yield self._file.read(_LENGTH.unpack(head)[0])
