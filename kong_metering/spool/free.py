"""The logs that no living process holds, as one process sees them when it looks again and again.

Contract: finding takes no lock, so that whatever it finds has to be looked at again under the root's lock. A log that
did not change since the last look costs a `stat`; whose it is is read twice, for a change within the same tick of the
file system's clock shows in no time, and each minute while nobody can tell. One that was refused is left alone until it
changes, or for a minute.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from pathlib import Path

from kong_metering.errors import SpoolFormatError
from kong_metering.eventlog.log import POSITION
from kong_metering.spool import locks
from kong_metering.spool.identity import FILES as IDENTITY_FILES
from kong_metering.spool.identity import QueueIdentity, load_identity

PART = "proc-"
# What every log has beside its events; `.new` is what a crash leaves of writing the file.
FIXTURES = (POSITION, *IDENTITY_FILES, *(f"{name}.new" for name in IDENTITY_FILES), locks.LOCK)

_RETRY_SECONDS = 60.0
# Longer than a tick of any file system's clock.
_TICK_SECONDS = 3.0


@dataclass(frozen=True)
class Refused:
    """A log that was found and cannot be opened, and why; it stays as it is."""

    directory: Path
    reason: str


@dataclass
class Finding:
    """What a look around found: logs that are wanted, parts that seem to be empty, and what could not be looked at."""

    wanted: list[tuple[Path, QueueIdentity | None]] = field(default_factory=list)
    empty: list[Path] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)


@dataclass(frozen=True)
class _Seen:
    """What is known of a log for as long as its directory has this time of modification."""

    stamp: int
    identity: QueueIdentity | None
    # By the monotonic clock: when it may be looked at, and when it is to be read again.
    not_before: float = 0.0
    again_at: float = math.inf


class FreeLogs:
    """The free logs of one spool."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._seen: dict[Path, _Seen] = {}

    def find(self, is_wanted: Callable[[QueueIdentity | None], bool], ours: Container[Path | None]) -> Finding:
        """Look through all parts and logs but `ours`.

        Raises the system's `OSError` when the root cannot be looked at.
        """
        finding = Finding()
        others = [part for part in parts(self._root) if part not in ours]
        free = [path for part in others for path in self._free_in(part, finding) if path not in ours]
        there = {*others, *free}
        self._seen = {path: seen for path, seen in self._seen.items() if path in there}
        for directory in free:
            self._judge(directory, is_wanted, finding)
        return finding

    def refuse(self, path: Path, error: OSError | SpoolFormatError) -> Refused:
        """Leave a log alone for a while: one of another format until it changes."""
        self.postpone(path, math.inf if isinstance(error, SpoolFormatError) else _RETRY_SECONDS)
        return Refused(path, str(error))

    def postpone(self, path: Path, seconds: float = _RETRY_SECONDS) -> None:
        """Leave a log alone for as long, or until something in it changes."""
        with contextlib.suppress(OSError):
            until = time.monotonic() + seconds
            self._seen[path] = _Seen(_stamp(path), None, until, until)

    def _free_in(self, part: Path, finding: Finding) -> list[Path]:
        try:
            if locks.is_locked(part):
                return []
            directories = log_directories(part)
        except OSError as error:
            seen = self._seen.get(part)
            if seen is None or time.monotonic() >= seen.not_before:
                finding.refused.append(self.refuse(part, error))
            return []
        if not directories:
            finding.empty.append(part)
        return directories

    def _judge(self, directory: Path, is_wanted: Callable[[QueueIdentity | None], bool], finding: Finding) -> None:
        try:
            seen = self._look_at(directory)
        except FileNotFoundError:
            return
        except (OSError, SpoolFormatError) as error:
            finding.refused.append(self.refuse(directory, error))
            return
        if time.monotonic() < seen.not_before:
            return
        # What has neither an owner nor events is cleared away by whoever comes first.
        if is_wanted(seen.identity) or (seen.identity is None and _is_bare(directory)):
            finding.wanted.append((directory, seen.identity))

    def _look_at(self, directory: Path) -> _Seen:
        stamp, now = _stamp(directory), time.monotonic()
        seen = self._seen.get(directory)
        is_new = seen is None or seen.stamp != stamp
        if seen is None or is_new or now >= seen.again_at:
            identity = load_identity(directory)
            again = _TICK_SECONDS if is_new else _RETRY_SECONDS if identity is None else math.inf
            seen = self._seen[directory] = _Seen(stamp, identity, again_at=now + again)
        return seen


def parts(root: Path) -> list[Path]:
    """List the parts of a spool, of living processes and dead ones."""
    return _directories(root, PART)


def log_directories(part: Path) -> list[Path]:
    """List the logs of a part; none when it is not there any more."""
    try:
        return _directories(part)
    except FileNotFoundError:
        return []


def _directories(path: Path, prefix: str = "") -> list[Path]:
    with os.scandir(path) as entries:
        names = sorted(entry.name for entry in entries if entry.name.startswith(prefix) and entry.is_dir())
    return [path / name for name in names]


def _stamp(path: Path) -> int:
    return path.stat().st_mtime_ns


def _is_bare(directory: Path) -> bool:
    try:
        return all(path.name in FIXTURES for path in directory.iterdir())
    except OSError:
        return False
