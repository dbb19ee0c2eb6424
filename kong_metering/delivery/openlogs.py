"""The logs that this process has open in the spool's directory, also over a removal of that directory.

Contract: any thread. What one thread does with the directory, the others wait for: so the logs that are written have an
object of this kind, and those that are taken over from other processes another one, and neither waits for the other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kong_metering.spool.directory import Adoption, HeldLog, SpoolDirectory

if TYPE_CHECKING:
    from kong_metering.spool.identity import QueueIdentity


class OpenLogs:
    """The ones that were opened through it."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._lock = threading.Lock()
        self._directory: SpoolDirectory | None = None
        self._former: list[SpoolDirectory] = []
        self._homes: dict[HeldLog, SpoolDirectory] = {}
        self._own: dict[str, HeldLog] = {}

    def own(self, identity: QueueIdentity) -> HeldLog:
        """Open this process's own log of a queue. Raises `SpoolError`."""
        with self._lock:
            still_open = self._own.get(identity.key)
            if still_open and self._homes[still_open] is self._directory:
                # By a queue that is just ending, and one directory may not be open twice: begin another part.
                self._begin_anew()
            directory = self._opened()
            held = self._own[identity.key] = directory.log_for(identity)
            self._homes[held] = directory
            return held

    def adopt(self, is_wanted: Callable[[QueueIdentity | None], bool]) -> Adoption:
        """Take over the logs of dead processes that are wanted. Raises `SpoolError`."""
        with self._lock:
            directory = self._opened()
            adoption = directory.adopt(is_wanted)
            self._homes.update(dict.fromkeys(adoption.logs, directory))
            return adoption

    def retire(self, logs: Sequence[HeldLog]) -> None:
        """Close those of them that were opened here; one in which nothing waits is removed."""
        with self._lock:
            for held in logs:
                directory = self._homes.pop(held, None)
                if directory:
                    directory.retire(held)
                if held.identity and self._own.get(held.identity.key) is held:
                    del self._own[held.identity.key]

    def leave(self, *, is_gone: bool) -> bool:
        """Begin anew if the directory that is in use is not there any more, or `is_gone` says so; tell whether."""
        with self._lock:
            if self._directory is None or not (is_gone or not self._root.is_dir()):
                return False
            self._begin_anew()
        return True

    def close(self) -> None:
        """Close everything, for others to take over at once."""
        with self._lock:
            for directory in (*self._former, self._directory):
                if directory is not None:
                    directory.close()

    def _begin_anew(self) -> None:
        if self._directory is not None:
            self._former.append(self._directory)
            self._directory = None

    def _opened(self) -> SpoolDirectory:
        if self._directory is None:
            self._directory = SpoolDirectory(self._root)
        return self._directory
