"""The dead letters that a command is about."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kong_metering.commands.filters import by_reason, reasons_told
from kong_metering.errors import KongMeteringError
from kong_metering.eventlog import files

if TYPE_CHECKING:
    from pathlib import Path

    from kong_metering.commands.filters import Filters
    from kong_metering.spool.deadletters import DeadLetters, StoredLetter

# What is written and synced at a time, and can be in both places after a crash.
_BYTES_AT_ONCE = 1024 * 1024
_LOCK = "replay.lock"


@dataclass
class ChosenLetters:
    """Dead letters that something is to be done with, without the events themselves."""

    ids: list[int] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)

    def add(self, stored: StoredLetter) -> None:
        """Choose one more."""
        self.ids.append(stored.id)
        self.reasons[stored.letter.reason] += 1


def matching_letters(dead_letters: DeadLetters, filters: Filters) -> Iterator[StoredLetter]:
    """Go through the letters that match, the oldest first."""
    return (
        stored for stored in dead_letters.letters() if filters.match_letter(stored.letter.queue, stored.letter.reason)
    )


def nothing_matches(dead_letters: DeadLetters) -> str:
    """Tell that no letter matches, and what there is instead."""
    reasons = by_reason(dead_letters.counts())
    if not reasons:
        return "There are no dead letters."
    return f"No dead letter matches; there are {reasons_told(reasons)}."


@contextlib.contextmanager
def alone(directory: Path) -> Iterator[None]:
    """Keep a second command that moves dead letters away, which would move the same ones once more."""
    if not directory.is_dir():
        yield
        return
    lock = files.open_file(directory / _LOCK)
    try:
        _take(lock)
        yield
    finally:
        os.close(lock)


def _take(lock: int) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise KongMeteringError("another replay or redirect is under way: wait until it has ended") from None


def groups(dead_letters: DeadLetters, ids: Collection[int]) -> Iterator[list[StoredLetter]]:
    """Read the letters again, the events with them now, a group at a time."""
    group: list[StoredLetter] = []
    size = 0
    for stored in dead_letters.letters():
        if stored.id in ids:
            group.append(stored)
            size += len(stored.letter.event)
        if size >= _BYTES_AT_ONCE:
            yield group
            group, size = [], 0
    if group:
        yield group
