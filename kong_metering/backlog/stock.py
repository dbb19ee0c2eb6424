"""What delivery asks of a place where events wait, whether a queue delivers them or a person does by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from kong_metering.backlog.source import Entry, Source
    from kong_metering.eventlog.format import Mark
    from kong_metering.reasons import Buried
    from kong_metering.spool.times import Window

# Returns the new marks; None when the source holds its events back.
MarkSent = Callable[["Source", list["Entry"]], "Sequence[Mark] | None"]


@dataclass(frozen=True)
class Sending:
    """Events that are about to go out: those that may, those that may not any more, and the sources' notes of it.

    `held`: those that may not yet, because the disk does not take the note, or, `unsure`, because it is not known how
    long ago they went out.
    """

    fresh: list[Entry]
    stale: list[Entry]
    why_stale: str = ""
    notes: Sequence[tuple[Source, Sequence[Mark]]] = ()
    held: Sequence[Entry] = ()
    unsure: bool = False


class Stock(Protocol):
    """Where the events wait."""

    def read(self, limit: int) -> list[Entry]:
        """Read the next events."""
        ...

    def begin_send(self, entries: Sequence[Entry]) -> Sending:
        """Note that events are about to go out."""
        ...

    def did_not_arrive(self, sending: Sending) -> None:
        """Note that the endpoint surely has none of them."""
        ...

    def give_back(self, entries: Sequence[Entry]) -> None:
        """Have events read again that may not be sent yet."""
        ...

    def settle(self, entries: Sequence[Entry]) -> int:
        """Let events go that need not wait any longer; return how many were still here."""
        ...

    def reject(self, entries: Sequence[Entry], reason: Buried, words: str) -> None:
        """Settle and account for events that will not be delivered."""
        ...


def noted(entries: Sequence[Entry], window: Window, dedupe_window: float, mark_sent: MarkSent) -> Sending:
    """Have the sources note, by `mark_sent`, that events are about to go out; return those that may.

    What went out without an answer longer ago than the endpoint recognises duplicate ids (`dedupe_window`, seconds) may
    not: if it did arrive, it would be billed twice. Where nobody can tell yet how long ago something went out, all of
    its source is held. Raises what `mark_sent` raises.
    """
    stale = [each for source, run in by_source(entries) for each in source.sent_before(run, window.over_ms)]
    fresh = [entry for entry in entries if entry not in stale] if stale else list(entries)
    why_stale = f"sent more than {dedupe_window / 3600:g} hours ago without an answer, and may have arrived"
    notes: list[tuple[Source, Sequence[Mark]]] = []
    held: list[Entry] = []
    unsure = False
    for source, run in by_source(fresh):
        is_unsure = window.over_ms < window.perhaps_over_ms and source.is_unsure_of(*window[1:])
        unsure |= is_unsure
        marks = None if is_unsure else mark_sent(source, run)
        if marks is None:
            held += run
        else:
            notes.append((source, marks))
    fresh = [entry for entry in fresh if entry not in held] if held else fresh
    return Sending(fresh, stale, why_stale, notes, held, unsure)


def note_undelivered(entries: Sequence[Entry]) -> None:
    """Have the sources note that events which are about to be settled were not delivered."""
    for source, run in by_source(entries):
        source.note_undelivered(run)


def by_source(entries: Sequence[Entry]) -> list[tuple[Source, list[Entry]]]:
    """Return the runs of events of one source each, in order."""
    return [(source, list(run)) for source, run in groupby(entries, attrgetter("source"))]
