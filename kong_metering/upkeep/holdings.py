"""The logs that this process holds in the spool's directory, also over a removal of that directory.

Contract: `make` comes first, alone; `own_log` is the writer's; the janitor calls everything else, and
`close` is for whoever ends the process. Nobody locks: they only share which directory is in use.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Container
from pathlib import Path
from typing import TYPE_CHECKING

from kong_metering.spool.directory import Adoption, HeldLog, SpoolDirectory

if TYPE_CHECKING:
    from kong_metering.spool.delivered import Delivered
    from kong_metering.spool.identity import QueueIdentity
    from kong_metering.spool.times import SpoolTimes

_SHARE_OF_DESCRIPTORS = 4


class Holdings:
    """The spool's directory as this process uses it, and the logs that it has opened there."""

    def __init__(self, root: Path, times: SpoolTimes, delivered: Delivered | None = None) -> None:
        self.root = root
        self._times = times
        self._delivered = delivered
        self._directory: SpoolDirectory | None = None
        # Each takes a descriptor for its lock.
        most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._max_adopted = None if most == resource.RLIM_INFINITY else most // _SHARE_OF_DESCRIPTORS
        # All that were ever made: two threads may both begin anew, and both are good.
        self._made: list[SpoolDirectory] = []

    def make(self) -> None:
        """Make the spool's directory, if it is not there. Raises `SpoolError`."""
        self._opened()

    def own_log(self, identity: QueueIdentity) -> HeldLog:
        """Open another log of this process for a queue. Raises `SpoolError`."""
        return self._opened().log_for(identity)

    def adopt(
        self, is_wanted: Callable[[QueueIdentity | None], bool], held_back: Callable[[], Container[Path]]
    ) -> Adoption:
        """Take over the logs of dead processes that are wanted, but for those held back. Raises `SpoolError`."""
        return self._opened().adopt(is_wanted, held_back, self._max_adopted)

    def reassign(self, held: HeldLog, identity: QueueIdentity) -> HeldLog:
        """Make a log another queue's. Raises the system's `OSError`."""
        return held.home.reassign(held, identity)

    def retire(self, held: HeldLog) -> None:
        """Close a log; one in which nothing waits is removed."""
        held.home.retire(held)

    def set_free(self, held: HeldLog) -> None:
        """Close a log for others to take over at once. Raises the system's `OSError` if it stays ours until we end."""
        held.home.set_free(held)

    def leave(self, *, is_gone: bool) -> bool:
        """Begin anew if the directory that is in use is not there any more, or `is_gone` says so; tell whether."""
        directory = self._directory
        if directory is None or not (is_gone or not self.root.is_dir()):
            return False
        self._directory = None
        return True

    def close(self) -> None:
        """Close everything, for others to take over at once."""
        for directory in self._made:
            directory.close()

    def _opened(self) -> SpoolDirectory:
        directory = self._directory
        if directory is None:
            directory = SpoolDirectory(self.root, times=self._times, delivered=self._delivered)
            self._directory = directory
            self._made.append(directory)
        return directory
