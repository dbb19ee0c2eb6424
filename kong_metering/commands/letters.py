"""The dead letters that a command is about."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kong_metering.commands.filters import by_reason, reasons_told

if TYPE_CHECKING:
    from kong_metering.commands.filters import Filters
    from kong_metering.spool.deadletters import DeadLetters, StoredLetter


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
