"""Which queues' endpoints have accepted an event: an empty file for each, `ROOT/accepted/KEY`, with the queue's key.

What waits at an endpoint that never accepted an event of its plugin entity was configured wrong, so that a corrected
URL may take it over; what waits at one that did stays with it, whoever looks, after a power cut too.

Contract: any thread may call. `note` waits for the disk, once for each key and process. Without a root, what is noted
ends with the process.
"""

from __future__ import annotations

import os
from pathlib import Path

from kong_metering.eventlog import files

ACCEPTED = "accepted"


class Acceptances:
    """What is known of the queues of one spool."""

    def __init__(self, root: Path | None) -> None:
        self._directory = None if root is None else root / ACCEPTED
        self._noted: set[str] = set()
        self._written: set[str] = set()

    def note(self, key: str) -> None:
        """Note that an endpoint has accepted an event. Raises the system's `OSError` when only memory has it."""
        if key in self._written:
            return
        self._noted.add(key)
        if self._directory is not None:
            self._write(self._directory, key)
        self._written.add(key)

    def knows(self, key: str) -> bool:
        """Return whether this process has noted it; waits for no disk."""
        return key in self._noted

    def has(self, key: str) -> bool:
        """Return whether an endpoint is known to have accepted one; where the disk does not tell, it is taken to."""
        if key in self._noted:
            return True
        if self._directory is None:
            return False
        try:
            (self._directory / key).stat()
        except FileNotFoundError:
            return False
        except OSError:
            return True
        return True

    def _write(self, directory: Path, key: str) -> None:
        if (directory / key).exists():
            return
        if files.make_directory(directory):
            files.sync(directory.parent)
        # It is empty, so several servers may make it at a time.
        os.close(files.open_file(directory / key))
        files.sync(directory)
