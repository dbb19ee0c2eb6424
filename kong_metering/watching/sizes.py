"""What the spool takes on disk, looked at on a thread of its own: a disk that hangs must not hold up who watches.

Contract: the thread begins with the first `look_at`, looks each ten seconds, and dies with the process. `sizes` is what
it saw last.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from kong_metering.spool.deadletters import DEAD_LETTERS
from kong_metering.spool.delivered import DELIVERED

_PAUSE_SECONDS = 10.0
_BLOCK_BYTES = 512


@dataclass(frozen=True)
class Sizes:
    """The bytes of the spool, of its parts, and what its file system has left; None: not known."""

    spool: int | None = None
    dead_letters: int | None = None
    delivered: int | None = None
    free: int | None = None


class SpoolSizes:
    """Looks at one directory, again and again."""

    def __init__(self) -> None:
        self.sizes = Sizes()
        self._root: Path | None = None

    def look_at(self, root: Path) -> None:
        """Look there from now on."""
        is_first, self._root = self._root is None, root
        if is_first:
            threading.Thread(target=self._run, name="metering sizes", daemon=True).start()

    def _run(self) -> None:
        while self._root is not None:
            self.sizes = _sizes(self._root)
            time.sleep(_PAUSE_SECONDS)


def _sizes(root: Path) -> Sizes:
    free = None
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(root).free
    return Sizes(_bytes_below(root), _bytes_below(root / DEAD_LETTERS), _bytes_below(root / DELIVERED), free)


def _bytes_below(directory: Path) -> int:
    total = 0
    for where, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(OSError):  # files come and go
                total += os.lstat(os.path.join(where, name)).st_blocks * _BLOCK_BYTES  # noqa: PTH118 - many files, often
    return total
