"""`kong-metering spool purge`: what nobody wants any more, removed for good.

Contract: what is removed is what was counted when the question was asked, never more. Events go only from logs that no
process holds.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from kong_metering.clock import SystemClock
from kong_metering.commands import words
from kong_metering.commands.access import check_writable
from kong_metering.commands.filters import reasons_told
from kong_metering.commands.holders import Holder, held_by
from kong_metering.commands.holding import delivered_in, held_logs
from kong_metering.commands.letters import ChosenLetters, matching_letters
from kong_metering.commands.logs import SeenLog, damaged_files, remove_remains, seen_logs
from kong_metering.commands.options import (
    ChosenEvents,
    filter_options,
    json_option,
    place_options,
    taking,
    yes_option,
)
from kong_metering.commands.output import confirmed, note, say, tell
from kong_metering.commands.sharedmemory import pour
from kong_metering.errors import KongMeteringError
from kong_metering.eventlog.damage import ABOUT
from kong_metering.plurals import form
from kong_metering.quantities import Duration
from kong_metering.spool.deadletters import DEAD_LETTERS, DeadLetters
from kong_metering.spool.directory import Found
from kong_metering.spool.times import SpoolTimes

_NO_CUT = 1 << 63
# How what running servers hold is taken from them.
_AWAY = (
    "To remove them all the same, have `kong-metering spool redirect` move them to a URL that no plugin has, such as "
    "https://purged.invalid/, and purge them with that --endpoint."
)


@dataclass(frozen=True, kw_only=True)
class PurgeOptions(ChosenEvents):
    """What `purge` takes."""

    waiting: bool
    damaged: bool
    older_than: float | None
    yes: bool
    as_json: bool


@dataclass(frozen=True)
class WaitingCut:
    """What is to go from one log: its events up to this number."""

    up_to: int
    events: int


@dataclass
class Plan:
    """What is to be removed."""

    letters: ChosenLetters = field(default_factory=ChosenLetters)
    waiting: dict[Path, WaitingCut] = field(default_factory=dict)
    held: Counter[Holder] = field(default_factory=Counter)
    damaged: list[Path] = field(default_factory=list)
    damaged_bytes: int = 0

    @property
    def events(self) -> int:
        """How many waiting events go."""
        return sum(cut.events for cut in self.waiting.values())

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to remove."""
        return not (self.letters.ids or self.waiting or self.damaged)


@click.command()
@place_options
@filter_options
@click.option("--dead-letters", is_flag=True, help="Remove dead letters, all that match.")
@click.option("--waiting", is_flag=True, help="Remove waiting events that no process holds; needs --plugin-id.")
@click.option("--damaged", is_flag=True, help="Remove the files that hold unreadable bytes.")
@click.option(
    "--older-than",
    type=Duration(may_be_zero=True),
    metavar="TIME",
    help="Only what is older, such as 30d or 12h; units s, m, h, d, w.",
)
@json_option("one JSON document with the counts")
@yes_option
@taking(PurgeOptions)
def purge(options: PurgeOptions) -> None:
    """Remove events for good. They are not billed then.

    Asks first, and tells how many. Think of `export` before it. --older-than goes by the time at which a letter became
    one, at which a waiting event was accepted, and at which a file was last changed.
    """
    _check_call(options)
    check_writable(options.root)
    cut_ms = _NO_CUT
    if options.older_than is not None:
        cut_ms = SpoolTimes(options.root, SystemClock()).now().older_than_ms(options.older_than)
    unpoured = pour(options) if options.waiting else []
    plan = plan_of(options, cut_ms)
    for holder, count in plan.held.items():
        them = form(count, "it", "them")
        note(f"{words.events(count)} left in place: held by {holder.told}, which delivers {them}. {_AWAY}")
    if plan.is_empty:
        removed = Removed()
    else:
        confirmed(_question(plan), yes=options.yes)
        removed = remove(options, plan)
    _tell(options, plan, removed)
    if unpoured:
        raise click.exceptions.Exit(1)


def _check_call(options: PurgeOptions) -> None:
    if not (options.dead_letters or options.waiting or options.damaged):
        raise click.UsageError("tell what to remove: --dead-letters, --waiting with --plugin-id, or --damaged")
    if options.waiting and options.plugin_id is None:
        raise click.UsageError("--waiting needs --plugin-id: whose events are to be removed?")
    options.check_reason()


# ----------------------------------------------------------------------------------------------------------------- plan


def plan_of(options: PurgeOptions, cut_ms: int) -> Plan:
    """Count what there is to remove, older than `cut_ms`."""
    plan = Plan()
    if options.dead_letters:
        for stored in matching_letters(DeadLetters(options.root / DEAD_LETTERS), options.filters):
            if stored.time_ms < cut_ms:
                plan.letters.add(stored)
    if options.waiting:
        _plan_waiting(options, plan, cut_ms)
    if options.damaged:
        _plan_damaged(options.root, plan, cut_ms)
    return plan


def _plan_waiting(options: PurgeOptions, plan: Plan, cut_ms: int) -> None:
    with seen_logs(options.root, options.filters) as logs:
        for log in logs:
            if log.problem:
                note(f"{log.directory} cannot be read, and stays: {words.shown(log.problem)}")
            elif log.holder is not None:
                plan.held += held_by([Found(log.directory, log.identity, log.holder)])
            elif cut := _cut(log, cut_ms):
                plan.waiting[log.directory] = cut


def _cut(log: SeenLog, cut_ms: int) -> WaitingCut | None:
    """Find how far a log is old enough; None when none of it is."""
    if log.view is None or not log.view.waiting:
        return None
    view, up_to = log.view, log.view.done_up_to
    if cut_ms == _NO_CUT:
        return WaitingCut(view.next_sequence - 1, view.waiting)
    while (further := view.last_older_than(up_to, cut_ms)) > up_to:
        up_to = further
    events = view.waiting - view.waiting_after(up_to)
    return WaitingCut(up_to, events) if events else None


def _plan_damaged(root: Path, plan: Plan, cut_ms: int) -> None:
    for path in damaged_files(root):
        with contextlib.suppress(FileNotFoundError):
            found = path.stat()
            if found.st_mtime * 1000 < cut_ms:
                plan.damaged.append(path)
                plan.damaged_bytes += found.st_size


def _question(plan: Plan) -> str:
    parts = []
    if letters := plan.letters.ids:
        parts.append(f"{words.letters(len(letters))} ({reasons_told(plan.letters.reasons)})")
    if plan.waiting:
        parts.append(words.waiting(plan.events))
    if plan.damaged:
        parts.append(f"{words.files(len(plan.damaged))} ({words.size(plan.damaged_bytes)})")
    return f"Remove {' and '.join(parts)} for good?"


# --------------------------------------------------------------------------------------------------------------- remove


@dataclass(frozen=True)
class Removed:
    """What was removed."""

    letters: int = 0
    events: int = 0
    damaged: int = 0


def remove(options: PurgeOptions, plan: Plan) -> Removed:
    """Carry the plan out."""
    letters = DeadLetters(options.root / DEAD_LETTERS).remove(plan.letters.ids) if plan.letters.ids else 0
    events = _remove_waiting(options, plan) if plan.waiting else 0
    return Removed(letters, events, _remove_files(options.root, plan.damaged) if plan.damaged else 0)


def _remove_waiting(options: PurgeOptions, plan: Plan) -> int:
    removed = 0
    # What was delivered before is kept, and what is purged is not; of a segment that goes on, that is noted there.
    with held_logs(options, options.filters.match_queue, delivered_in(options)) as (_, holding):
        for held in holding.logs:
            if cut := plan.waiting.get(held.directory):
                before, up_to = held.log.waiting, min(cut.up_to, held.log.next_sequence - 1)
                held.log.dropped(up_to)
                held.log.done(up_to)
                held.log.save_position()
                removed += before - held.log.waiting
    return removed


def _remove_files(root: Path, paths: Iterable[Path]) -> int:
    removed = 0
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
            path.with_name(path.name + ABOUT).unlink(missing_ok=True)
            removed += 1
    remove_remains(root)
    return removed


# ----------------------------------------------------------------------------------------------------------------- tell


def _tell(options: PurgeOptions, plan: Plan, removed: Removed) -> None:
    if options.as_json:
        say(words.json_document(_as_json(plan, removed)))
    elif plan.is_empty:
        tell("Nothing removed." if plan.held else "There is nothing to remove.")
    else:
        counts = ((removed.letters, words.letters), (removed.events, words.waiting), (removed.damaged, words.files))
        tell(f"{' and '.join(name(count) for count, name in counts if count) or 'Nothing'} removed.")
    if plan.events > removed.events:
        left = words.events(plan.events - removed.events)
        raise KongMeteringError(f"{left} not removed: a server took the log over meanwhile, and delivers it")


def _as_json(plan: Plan, removed: Removed) -> dict[str, Any]:
    return {
        "dead_letters": removed.letters,
        "waiting": removed.events,
        "damaged_files": removed.damaged,
        "waiting_held": plan.held.total(),
    }
