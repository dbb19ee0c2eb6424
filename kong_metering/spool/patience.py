"""When the content of a file that the disk does not give counts as lost.

Contract: a file system that tells of its own damage (EUCLEAN, EBADMSG) and a file that is not there are final. EIO may
pass: it is final once it lasted for a minute, tried again by those who read. Anything else says nothing about the file.
Any thread; a file is asked about by one at a time.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from pathlib import Path

PATIENCE_SECONDS = 60.0

_FINAL = (errno.ENOENT, errno.EUCLEAN, errno.EBADMSG)


class Patience:
    """Remembers since when which files cannot be read."""

    def __init__(self, seconds: float = PATIENCE_SECONDS, clock: Callable[[], float] = time.monotonic) -> None:
        """Wait for as long with EIO, by a clock that never goes back."""
        self._seconds = seconds
        self._clock = clock
        # Where in the file it failed first, and when.
        self._failing: dict[Path, tuple[int, float]] = {}

    def is_over(self, path: Path, error: OSError, at: int = 0) -> bool:
        """Tell whether what is in the file from `at` on is lost, now that reading it failed; else it may come back."""
        if error.errno != errno.EIO:
            return error.errno in _FINAL
        now = self._clock()
        return now - self._failing.setdefault(path, (at, now))[1] >= self._seconds

    def was_read(self, path: Path, up_to: int) -> None:
        """Take note that the file can be read to below `up_to`: if that is where it failed, it was a passing error."""
        failing = self._failing.get(path)
        if failing and failing[0] < up_to:
            self.forget(path)

    def forget(self, path: Path) -> None:
        """Start anew with this file."""
        self._failing.pop(path, None)
