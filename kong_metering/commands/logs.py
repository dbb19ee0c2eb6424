"""The logs of a spool as they are at this moment, seen beside the processes that hold them; nothing is changed."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from kong_metering.errors import SpoolFormatError
from kong_metering.eventlog.log import DAMAGED, DamageKind, EventLog
from kong_metering.spool.deadletters import DEAD_LETTERS
from kong_metering.spool.directory import survey
from kong_metering.spool.free import log_directories, parts
from kong_metering.spool.identity import load_identity

if TYPE_CHECKING:
    from kong_metering.commands.filters import Filters
    from kong_metering.eventlog.format import Mark, StoredEvent
    from kong_metering.spool.identity import QueueIdentity

_TRIES = 3
_READ_EVENTS = 1000
_READ_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True)
class SeenLog:
    """One log: whose it is, which process holds it, and what is in it; `problem` tells why that cannot be read."""

    directory: Path
    identity: QueueIdentity | None
    holder: int | None
    view: EventLog | None
    problem: str | None = None

    @property
    def waiting(self) -> int:
        """How many events wait in it, as far as it can be read."""
        return self.view.waiting if self.view else 0

    def events(self) -> Iterator[StoredEvent]:
        """Go through the events that wait, in order; those that cannot be read, or are delivered meanwhile, miss."""
        after = 0
        while self.view and (found := self.view.read(after, _READ_EVENTS, _READ_BYTES)):
            yield from found
            after = found[-1].sequence

    def lost(self) -> int:
        """Tell how many events could not be read since the last call; a write that is not finished is no event."""
        damage = self.view.take_damage() if self.view else []
        return sum(each.events for each in damage if each.kind is not DamageKind.TORN)


@contextlib.contextmanager
def seen_logs(root: Path, filters: Filters) -> Iterator[list[SeenLog]]:
    """Open all logs that match for reading, in the order of their queues."""
    with contextlib.ExitStack() as stack:
        logs: list[SeenLog] = []
        for found in survey(root):
            if not filters.match_queue(found.identity):
                continue
            log = _seen(found.directory, found.identity, found.holder)
            if log and log.view:
                stack.callback(log.view.close)
            logs += [log] if log else []
        yield sorted(logs, key=_order)


def _order(log: SeenLog) -> tuple[str, str, str]:
    identity = log.identity
    return (identity.name, identity.entity_id + identity.endpoint, str(log.directory)) if identity else ("~", "", "")


def _seen(directory: Path, identity: QueueIdentity | None, holder: int | None) -> SeenLog | None:
    """Open one log; None when it was removed just now, because all in it is done."""
    for _ in range(_TRIES):
        try:
            if identity is None:
                load_identity(directory)  # tells a format that is not known from damage
            return SeenLog(directory, identity, holder, EventLog.view(directory))
        except FileNotFoundError:
            # Its owner removed a file between our listing it and our reading it.
            if not directory.exists():
                return None
        except (SpoolFormatError, OSError) as error:
            return SeenLog(directory, identity, holder, None, str(error))
    return SeenLog(directory, identity, holder, None, "its files come and go too fast to be read: try again")


def marks_of(view: EventLog) -> tuple[Mark, ...]:
    """Return the marks of the events that wait: of what was sent without an answer so far."""
    after = view.done_up_to
    return tuple(replace(mark, first=max(mark.first, after + 1)) for mark in view.marks if mark.last > after)


def unanswered_in(marks: Sequence[Mark]) -> int:
    """Count the events that are marked."""
    return sum(mark.last - mark.first + 1 for mark in marks)


def damaged_files(root: Path) -> list[Path]:
    """Find the files with bytes that nobody could read; what is removed meanwhile is passed over."""
    places = [root / DAMAGED, root / DEAD_LETTERS / DAMAGED]
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        places += [log / DAMAGED for part in parts(root) for log in log_directories(part)]
    return sorted(path for place in places for path in _damaged_below(place))


def _damaged_below(place: Path) -> Iterator[Path]:
    # Not by `rglob`, which fails where a directory goes after it was listed and before it is looked into.
    for directory, _, names in os.walk(place, onerror=_unless_gone):
        yield from filter(is_damaged_file, (Path(directory, name) for name in names))


def _unless_gone(error: OSError) -> None:
    # What cannot be listed for another reason, want of descriptors for one, is not to be taken for empty.
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def is_damaged_file(path: Path) -> bool:
    """Whether it has such bytes, and is no bookkeeping."""
    return path.suffix in (".seg", ".bytes") and path.is_file()


def remove_remains(root: Path) -> None:
    """Remove the directories of logs in which nothing damaged is left; only bookkeeping is. Raises `OSError`."""
    damaged = root / DAMAGED
    for directory in damaged.iterdir() if damaged.is_dir() else ():
        if directory.is_dir() and not any(_damaged_below(directory)):
            shutil.rmtree(directory)
