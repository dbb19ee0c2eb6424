"""What a log wrote that a power cut could still take back.

Contract: `take` and `sync` may run in any thread and hold no lock, while the log is appended to, read, done and closed.
A path is noted after it was written, so that whoever takes it syncs what was written. What could not be synced goes
back to the log, whose next `unsynced` gives it again.
"""

from __future__ import annotations

import contextlib
from collections import deque
from pathlib import Path

from kong_metering.spool import files


class Unsynced:
    """Files and directories to be synced in this order, once; false when there are none."""

    def __init__(self, paths: tuple[Path, ...], failed: deque[Path]) -> None:
        """Take the paths, and where to put those that could not be synced: a deque, which threads can share."""
        self._paths = paths
        self._failed = failed

    @classmethod
    def take(cls, written: dict[Path, None], failed: deque[Path]) -> Unsynced:
        """Take all out of both: what failed goes first, since what was written later may be of no use without it."""
        paths: dict[Path, None] = {}
        with contextlib.suppress(IndexError):
            while True:
                paths[failed.popleft()] = None
        # Others go on noting: a copy is one step, and a path that is noted again before it is taken out is synced yet.
        noted = written.copy()
        for path in noted:
            written.pop(path, None)
        return cls(tuple(paths | noted), failed)

    def __bool__(self) -> bool:
        return bool(self._paths)

    def sync(self) -> None:
        """Have all of them survive a power cut.

        Raises the system's `OSError` of the first one that could not be synced; the others are synced even so.
        """
        errors: list[OSError] = []
        for path in self._paths:
            try:
                # By name: the log may close its descriptors meanwhile.
                files.sync(path)
            except FileNotFoundError:
                # Whoever unlinked it did not need it any more.
                continue
            except OSError as error:
                errors.append(error)
                self._failed.append(path)
        if errors:
            raise errors[0]
