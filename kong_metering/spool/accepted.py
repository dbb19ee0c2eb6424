"""Which queues' endpoints have accepted an event: an empty file for each, `ROOT/accepted/KEY`, with the queue's key.

What waits at an endpoint that never accepted an event of its plugin entity was configured wrong, so that a corrected
URL may take it over; what waits at one that did stays with it, whoever looks, after a power cut too. So does what
somebody has redirected: where to is noted as if it had accepted one.

A spool without `ROOT/accepted/learned` is one of a version that did not note it: who finds it so notes the queues whose
logs show that something was settled (`learn`), and makes that file.

Contract: any thread may call. Only `knows` never waits for the disk; `note` does once for each key and process. Without
a root, what is noted ends with the process.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from kong_metering.errors import SpoolFormatError
from kong_metering.eventlog import files
from kong_metering.eventlog.damage import Patience
from kong_metering.eventlog.log import POSITION
from kong_metering.eventlog.position import PositionFile
from kong_metering.spool.directory import survey, unusable

ACCEPTED = "accepted"
_LEARNED = "learned"


class Acceptances:
    """What is known of the queues of one spool."""

    def __init__(self, root: Path | None) -> None:
        self._directory = None if root is None else root / ACCEPTED
        self._noted: set[str] = set()
        self._written: set[str] = set()
        self._root = root
        self._has_learned = root is None

    def learn(self) -> None:
        """Note what the logs of a version before this one tell; again, it does nothing.

        What the disk does not tell or take is tried again with the next call. Raises `SpoolError` when it cannot be
        read.
        """
        if self._has_learned or self._root is None or self._directory is None:
            return
        try:
            if not self._root.is_dir():
                return
            is_new = not (self._directory / _LEARNED).exists()
        except OSError as error:
            raise unusable(self._directory, error) from error
        if is_new:
            for found in survey(self._root):
                if found.identity is not None and _has_settled(found.directory):
                    self._noted.add(found.identity.key)
        with contextlib.suppress(OSError):
            for key in tuple(self._noted):
                self.note(key)
            self._write(self._directory, _LEARNED)
            self._has_learned = True

    def note(self, key: str) -> None:
        """Note that an endpoint has accepted an event. Raises the system's `OSError` when only memory has it."""
        if key in self._written:
            return
        self._noted.add(key)
        if self._directory is not None:
            self._write(self._directory, key)
        self._written.add(key)

    def knows(self, key: str) -> bool:
        """Return whether this process has noted it, or seen it noted; waits for no disk."""
        return key in self._noted

    def has(self, key: str) -> bool:
        """Return whether an endpoint is known to have accepted one; where the disk does not tell, it is taken to.

        Where it does not tell `knows` goes on to be false, and it is to be asked again.
        """
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
        self._noted.add(key)
        return True

    def _write(self, directory: Path, key: str) -> None:
        if (directory / key).exists():
            return
        if files.make_directory(directory):
            files.sync(directory.parent)
        # It is empty, so several servers may make it at a time.
        os.close(files.open_file(directory / key))
        files.sync(directory)


def _has_settled(log: Path) -> bool:
    """Return whether something in a log was delivered, as far as can be told: it may have been dropped as well."""
    try:
        return PositionFile(log / POSITION, Patience(0)).position.done > 0
    except (OSError, SpoolFormatError):
        # One that cannot be read now, or not by this version.
        return True
