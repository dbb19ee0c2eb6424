"""What is about to go out: which events may, which may not any more, and what is noted of it before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kong_metering.delivery.source import Entry, Source
    from kong_metering.spool.format import Mark

# Returns the new marks; None when the source holds its events back.
MarkSent = Callable[["Source", list["Entry"]], Sequence["Mark"] | None]


@dataclass(frozen=True)
class Sending:
    """Events that are about to go out: those that may, those that may not any more, and the sources' notes of it.

    `held`: those that may not yet, because the disk does not take the note.
    """

    fresh: list[Entry]
    stale: list[Entry]
    why_stale: str = ""
    notes: Sequence[tuple[Source, Sequence[Mark]]] = ()
    held: Sequence[Entry] = ()


def noted(entries: Sequence[Entry], now_ms: int, dedupe_window: float, mark_sent: MarkSent) -> Sending:
    """Have the sources note, by `mark_sent`, that events are about to go out; return those that may.

    What went out without an answer longer ago than the endpoint recognises duplicate ids (`dedupe_window`, seconds) may
    not: if it did arrive, it would be billed twice. Raises what `mark_sent` raises.
    """
    too_old_ms = now_ms - int(dedupe_window * 1000)
    stale = [each for source, run in by_source(entries) for each in source.sent_before(run, too_old_ms)]
    fresh = [entry for entry in entries if entry not in stale] if stale else list(entries)
    why_stale = f"sent more than {dedupe_window / 3600:g} hours ago without an answer, and may have arrived"
    notes: list[tuple[Source, Sequence[Mark]]] = []
    held: list[Entry] = []
    for source, run in by_source(fresh):
        marks = mark_sent(source, run)
        if marks is None:
            held += run
        else:
            notes.append((source, marks))
    fresh = [entry for entry in fresh if entry not in held] if held else fresh
    return Sending(fresh, stale, why_stale, notes, held)


def by_source(entries: Sequence[Entry]) -> list[tuple[Source, list[Entry]]]:
    """Return the runs of events of one source each, in order."""
    return [(source, list(run)) for source, run in groupby(entries, attrgetter("source"))]
