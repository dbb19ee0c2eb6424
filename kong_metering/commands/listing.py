"""`kong-metering spool list` and `show`: the events themselves, for people and for programs."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import orjson
from rich.table import Table
from rich.text import Text

from kong_metering.commands import words
from kong_metering.commands.access import check_readable
from kong_metering.commands.filters import UNKNOWN, Filters
from kong_metering.commands.letters import matching_letters, nothing_matches
from kong_metering.commands.logs import SeenLog, seen_logs
from kong_metering.commands.options import ChosenEvents, Place, filter_options, json_option, place_options, taking
from kong_metering.commands.output import cell, console, cut, note, say, table, tell
from kong_metering.commands.sharedmemory import tell_unwritten
from kong_metering.errors import KongMeteringError
from kong_metering.plurals import counted
from kong_metering.quantities import WholeNumber
from kong_metering.spool.deadletters import DEAD_LETTERS, DeadLetters, StoredLetter
from kong_metering.urls import without_credentials

if TYPE_CHECKING:
    from kong_metering.eventlog.format import StoredEvent
    from kong_metering.spool.identity import QueueIdentity

_LIMIT = 50
_MOST_LISTED = 1_000_000_000
_WIDE = 100


@dataclass(frozen=True, kw_only=True)
class ListOptions(ChosenEvents):
    """What `list` takes."""

    limit: int | None
    as_json: bool

    @property
    def most(self) -> int | None:
        """How many to list, None for all: a program gets what it asks for, people what fits their screen."""
        if self.limit is None:
            return None if self.as_json else _LIMIT
        return self.limit or None


@dataclass(frozen=True)
class _WaitingEvent:
    log: SeenLog
    stored: StoredEvent


@click.command("list")
@place_options
@filter_options
@click.option("--dead-letters", is_flag=True, help="List the dead letters, not the events that wait.")
@click.option(
    "--limit",
    type=WholeNumber(0, _MOST_LISTED),
    metavar="N",
    help=f"List N at most, 0 for all.  [default: {_LIMIT}; with --json all]",
)
@json_option("one JSON object for each, a line each")
@taking(ListOptions)
def list_events(options: ListOptions) -> None:
    """List the events that wait, or the dead letters.

    The oldest come first. `show` tells all about one dead letter, `export` gives whole events.
    """
    check_readable(options.root)
    options.check_reason()
    if options.dead_letters:
        _list_letters(options)
    else:
        _list_waiting(options)


# -------------------------------------------------------------------------------------------------------------- waiting


def _list_waiting(options: ListOptions) -> None:
    with seen_logs(options.root, options.filters) as logs:
        chosen = itertools.islice(_waiting_events(logs), options.most)
        listed = _print_waiting_json(options.root, chosen) if options.as_json else _print_waiting(list(chosen))
        for log in logs:
            if log.problem:
                note(f"{log.directory.relative_to(options.root)} cannot be read: {words.shown(log.problem)}")
        if not listed and not options.as_json:
            tell("Nothing is waiting." if options.filters == Filters() else "Nothing that matches is waiting.")
        _tell_rest(listed, sum(log.waiting for log in logs), options.most)
        tell_unwritten(options, options.filters, "listed")


def _waiting_events(logs: list[SeenLog]) -> Iterator[_WaitingEvent]:
    for log in logs:
        for stored in log.events():
            yield _WaitingEvent(log, stored)


def _print_waiting_json(root: Path, chosen: Iterator[_WaitingEvent]) -> int:
    count = 0
    for count, event in enumerate(chosen, 1):  # noqa: B007 - the count is what this gives
        summary = words.summary_of(event.stored.payload)
        members = {
            "sequence": event.stored.sequence,
            "accepted": words.timestamp(event.stored.time_ms),
            **_summary_json(summary),
            **words.queue_members(event.log.identity),
            "log": str(event.log.directory.relative_to(root)),
            "held_by": event.log.holder,
        }
        say(words.json_line(members))
    return count


def _print_waiting(chosen: list[_WaitingEvent]) -> int:
    plugins = {event.log.identity for event in chosen}
    columns = _table(["number"], plugins)
    for event in chosen:
        summary = words.summary_of(event.stored.payload)
        queue = [_plugin(event.log.identity)] if len(plugins) > 1 else []
        columns.add_row(
            str(event.stored.sequence), *queue, *_cells(event.stored.time_ms, summary), style=_style_of(summary)
        )
    if chosen:
        console().print(columns)
    return len(chosen)


# --------------------------------------------------------------------------------------------------------- dead letters


def _list_letters(options: ListOptions) -> None:
    dead_letters = DeadLetters(options.root / DEAD_LETTERS)
    matching = matching_letters(dead_letters, options.filters)
    chosen = itertools.islice(matching, options.most)
    listed = _print_letters_json(chosen) if options.as_json else _print_letters(list(chosen))
    if not listed and not options.as_json:
        tell(nothing_matches(dead_letters))
    _tell_rest(listed, listed + sum(1 for _ in matching), options.most)


def _print_letters_json(chosen: Iterator[StoredLetter]) -> int:
    count = 0
    for count, stored in enumerate(chosen, 1):  # noqa: B007 - the count is what this gives
        say(words.json_line(_letter_json(stored)))
    return count


def _print_letters(chosen: list[StoredLetter]) -> int:
    plugins: set[QueueIdentity | None] = {stored.letter.queue for stored in chosen}
    columns = _table(["id", "reason"], plugins)
    for stored in chosen:
        letter, summary = stored.letter, words.summary_of(stored.letter.event)
        queue = [_plugin(letter.queue)] if len(plugins) > 1 else []
        cells = _cells(letter.accepted_ms, summary)
        columns.add_row(str(stored.id), cell(letter.reason), *queue, *cells, style=_style_of(summary))
    if chosen:
        console().print(columns)
    return len(chosen)


def _letter_json(stored: StoredLetter) -> dict[str, Any]:
    letter = stored.letter
    return {
        "id": stored.id,
        "reason": letter.reason,
        "answer": letter.answer,
        "accepted": words.timestamp(letter.accepted_ms),
        "given_up": words.timestamp(stored.time_ms),
        **_summary_json(words.summary_of(letter.event)),
        **words.queue_members(letter.queue),
    }


# ----------------------------------------------------------------------------------------------------------- one of it


@dataclass(frozen=True, kw_only=True)
class ShowOptions(Place):
    """What `show` takes."""

    letter_id: int
    as_json: bool


@click.command()
@place_options
@click.argument("letter_id", metavar="ID", type=WholeNumber(min=1))
@json_option("one JSON document")
@taking(ShowOptions)
def show(options: ShowOptions) -> None:
    """Show one dead letter in full.

    Its id is the one that `list --dead-letters` tells.
    """
    check_readable(options.root)
    stored = DeadLetters(options.root / DEAD_LETTERS).get(options.letter_id)
    if stored is None:
        raise KongMeteringError(
            f"there is no dead letter {options.letter_id}, or no longer; "
            "`kong-metering spool list --dead-letters` lists those that are there"
        )
    if options.as_json:
        say(words.json_document(_letter_json(stored) | {"event": _event_json(stored.letter.event)}))
    else:
        _print_letter(stored)


def _event_json(event: bytes) -> Any:
    """Give the event itself; as a text, if it is no JSON; None for one that could not be read."""
    if not event:
        return None
    try:
        return orjson.loads(event)
    except ValueError:
        return event.decode("utf-8", "backslashreplace")


def _print_letter(stored: StoredLetter) -> None:
    letter, now_ms = stored.letter, time.time_ns() // 1_000_000
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row("dead letter", cell(str(stored.id), "bold"))
    grid.add_row("reason", cell(letter.reason, "yellow"))
    grid.add_row("answer", cell(letter.answer))
    grid.add_row("accepted", cell(_moment(letter.accepted_ms, now_ms)))
    grid.add_row("given up", cell(_moment(stored.time_ms, now_ms)))
    grid.add_row("plugin", cell(words.plugin(letter.queue) or UNKNOWN))
    grid.add_row("endpoint", cell(without_credentials(letter.queue.endpoint)))
    out = console()
    out.print(grid)
    out.print()
    out.print(Text(words.pretty(letter.event)) if letter.event else Text("The event itself could not be read.", "dim"))


def _moment(time_ms: int, now_ms: int) -> str:
    return f"{words.moment(time_ms)} ({words.age((now_ms - time_ms) / 1000)} ago)" if time_ms else words.moment(0)


# --------------------------------------------------------------------------------------------------------------- shared


def _table(first: list[str], plugins: set[QueueIdentity | None]) -> Table:
    """Make the table; which plugin it is shows when there are several."""
    plugin = ["plugin"] if len(plugins) > 1 else []
    kind = ["type"] if _is_wide() else []
    return table(*first, *plugin, "accepted", *kind, "subject", "event id", whole=[*first, "accepted"])


def _cells(time_ms: int, summary: words.EventSummary) -> tuple[Text, ...]:
    kind = [cut(summary.type)] if _is_wide() else []
    return Text(words.moment(time_ms)), *kind, cut(summary.subject), cut(summary.id)


def _is_wide() -> bool:
    """Whether there is room for the events' type, which most of the time is the same and in their id as well."""
    return console().width >= _WIDE


def _style_of(summary: words.EventSummary) -> str:
    return "" if summary.id else "dim"


def _plugin(identity: QueueIdentity | None) -> Text:
    """Name a plugin entity briefly by the start of its id; the names are mostly the same."""
    return cut(identity.entity_id[:8] or UNKNOWN if identity else UNKNOWN)


def _summary_json(summary: words.EventSummary) -> dict[str, str | None]:
    return {"event_id": summary.id or None, "subject": summary.subject or None, "type": summary.type or None}


def _tell_rest(listed: int, there: int, most: int | None) -> None:
    if most is not None and there > listed:
        note(f"{counted(there - listed, 'more is', 'more are')} not listed: --limit 0 lists all.")
