"""Who holds logs: the servers that deliver what is in them by themselves, told to people."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kong_metering.commands import words
from kong_metering.errors import KongMeteringError
from kong_metering.eventlog.log import EventLog
from kong_metering.plurals import form
from kong_metering.spool.locks import LOCK

if TYPE_CHECKING:
    from kong_metering.spool.directory import Found


@dataclass(frozen=True)
class Holder:
    """A process that holds logs; `pid` is its id where it runs, 0 if it does not tell, and `is_here`: it runs here."""

    pid: int
    is_here: bool

    @property
    def told(self) -> str:
        """Its name for people."""
        if self.is_here:
            return f"process {self.pid}"
        return (
            f"a process in another container ({self.pid} there)" if self.pid else "a process that does not tell its id"
        )


def held_by(found: Iterable[Found]) -> Counter[Holder]:
    """Count the events that wait in logs which other processes hold, by their holders."""
    counts: Counter[Holder] = Counter()
    for log in found:
        if log.holder is not None:
            counts[Holder(log.holder, _has_open(log.holder, log.directory))] += waiting_in(log.directory)
    return +counts


def waiting_in(directory: Path) -> int:
    """Count the events that wait in a log; 0 where it cannot be read, or is gone by now."""
    try:
        with closing(EventLog.view(directory)) as view:
            return view.waiting
    except (OSError, KongMeteringError):
        return 0


def waiting_told(found: Iterable[Found]) -> list[str]:
    """Tell who holds the events that wait in these logs, and what to do about them; nothing where none do."""
    logs = list(found)
    told = [
        f"{words.events(count)} held by {holder.told}, which delivers {form(count, 'it', 'them')} itself: "
        "`kong-metering spool deliver` has it try at once, `kong-metering spool redirect` moves "
        f"{form(count, 'it', 'them')} to another URL."
        for holder, count in held_by(logs).items()
    ]
    if free := sum(waiting_in(log.directory) for log in logs if log.holder is None):
        them = form(free, "it", "them")
        told.append(f"{words.events(free)} held by nobody: `kong-metering spool deliver` delivers {them}.")
    return told


def _has_open(pid: int, directory: Path) -> bool:
    """Return whether the process with this id here has the lock of a log, or of its part, open."""
    locks = [found for path in (directory / LOCK, directory.parent / LOCK) if (found := _stat(path))]
    with contextlib.suppress(OSError):
        opened = [found for path in Path(f"/proc/{pid}/fd").iterdir() if (found := _stat(path))]
        return any(os.path.samestat(one, other) for one in locks for other in opened)
    return False


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None
