"""How many logs of a process may keep files open between two uses.

Contract: any thread may call. A log that got no place works as well: it opens its files for each use.
"""

from __future__ import annotations

import contextlib
from collections import deque

# With the files that are read, the positions, and those that are appended to, that is some 400 descriptors.
MAX_OPEN_LOGS = 128


class Allowance:
    """The places that are free: items of a deque, which threads can share."""

    def __init__(self, limit: int = MAX_OPEN_LOGS) -> None:
        self._free = deque([None] * limit)

    def take(self) -> bool:
        """Take a place; False when none is free."""
        with contextlib.suppress(IndexError):
            self._free.pop()
            return True
        return False

    def give_back(self) -> None:
        """Give a place back that was taken."""
        self._free.append(None)
