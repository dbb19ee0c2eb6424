"""`kong-metering spool replay`: dead letters back into the queue, to be sent once more.

Contract: an event is in a log, on the disk itself, before its letter is removed; whenever this is killed, none is lost,
and one that is in both places has the same id in both. The log is this process's own, so that what a server does to its
own is not disturbed; it is free to be adopted once this ends.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kong_metering.commands import words
from kong_metering.commands.access import check_writable
from kong_metering.commands.filters import Filters, reasons_told
from kong_metering.commands.holders import waiting_told
from kong_metering.commands.interruption import Interrupted, Interruption
from kong_metering.commands.letters import ChosenLetters, alone, groups, matching_letters, nothing_matches
from kong_metering.commands.options import Chosen, filter_options, json_option, place_options, taking, yes_option
from kong_metering.commands.output import confirmed, note, progress, say, tell
from kong_metering.errors import KongMeteringError
from kong_metering.plurals import form
from kong_metering.quantities import WholeNumber
from kong_metering.reasons import Buried
from kong_metering.spool.deadletters import DEAD_LETTERS, DeadLetters, StoredLetter
from kong_metering.spool.directory import HeldLog, SpoolDirectory, survey

if TYPE_CHECKING:
    from kong_metering.spool.identity import QueueIdentity


@dataclass(frozen=True, kw_only=True)
class ReplayOptions(Chosen):
    """What `replay` takes."""

    ids: tuple[int, ...]
    everything: bool
    yes: bool
    as_json: bool


@dataclass
class Choice:
    """What is to be replayed, and what is left where it is."""

    letters: ChosenLetters = field(default_factory=ChosenLetters)
    found: set[int] = field(default_factory=set)
    queues: Counter[QueueIdentity] = field(default_factory=Counter)
    unreadable: int = 0
    ambiguous_left: int = 0


@dataclass
class Replayed:
    """What came of it: how many letters are gone, and what stopped it before the end.

    Of the letters that are gone, `repeated` had an event that is back in the queue for another one's sake.
    """

    count: int = 0
    repeated: int = 0
    problem: str | None = None
    exit: click.exceptions.Exit | None = None


@click.command()
@place_options
@filter_options
@click.argument("ids", metavar="[ID]...", nargs=-1, type=WholeNumber(min=1))
@click.option("--all", "everything", is_flag=True, help="All dead letters but the ambiguous ones.")
@json_option("one JSON document with the counts")
@yes_option
@taking(ReplayOptions)
def replay(options: ReplayOptions) -> None:
    """Put dead letters back into their queue, to be sent once more.

    Name them by id, by filters, or with --all. A running server that has an instance of the plugin takes them up within
    seconds. Each event keeps its id.

    Ambiguous ones are left out, unless asked for by id or with --reason ambiguous: one that did arrive is billed twice
    if it is sent again when the endpoint has forgotten its id. Unreadable ones stay.
    """
    _check_call(options)
    check_writable(options.root)
    dead_letters = DeadLetters(options.root / DEAD_LETTERS)
    with alone(dead_letters.directory):
        choice, replayed = choose(dead_letters, options.filters, options.ids), Replayed()
        _tell_left_out(choice, options.ids)
        if choice.letters.ids:
            _ask(choice, yes=options.yes)
            replayed = _replay(options.root, dead_letters, choice.letters.ids)
        elif not choice.found:
            note(nothing_matches(dead_letters))
            _tell_waiting(options)
    _tell(options, choice, replayed)


def _tell_waiting(options: ReplayOptions) -> None:
    """Tell of events that wait, and so are no dead letters."""
    for told in waiting_told(log for log in survey(options.root) if options.filters.match_queue(log.identity)):
        note(f"No dead letters, but {told}")


def _check_call(options: ReplayOptions) -> None:
    if options.everything and options.ids:
        raise click.UsageError("name ids, or --all, not both")
    if not (options.ids or options.everything or options.filters != Filters()):
        raise click.UsageError("name ids, filters such as --reason rejected, or --all")


def choose(dead_letters: DeadLetters, filters: Filters, ids: Collection[int]) -> Choice:
    """Find the letters that are meant; without ids, all that match the filters."""
    choice = Choice()
    for stored in matching_letters(dead_letters, filters):
        if ids and stored.id not in ids:
            continue
        choice.found.add(stored.id)
        if stored.letter.reason == Buried.UNREADABLE.value or not stored.letter.event:
            choice.unreadable += 1
        elif _is_ambiguous(stored) and not (ids or filters.reason):
            choice.ambiguous_left += 1
        else:
            choice.letters.add(stored)
            choice.queues[stored.letter.queue] += 1
    return choice


def _is_ambiguous(stored: StoredLetter) -> bool:
    return stored.letter.reason == Buried.AMBIGUOUS.value


def _tell_left_out(choice: Choice, ids: Collection[int]) -> None:
    missing = sorted(set(ids) - choice.found)
    if missing:
        note(f"Not found, or not matching: {', '.join(map(str, missing))}.")
    if choice.unreadable:
        note(f"{words.letters(choice.unreadable)} left in place: what could not be read cannot be replayed.")
    if choice.ambiguous_left:
        note(
            f"{words.letters(choice.ambiguous_left)} left in place: ambiguous events may have arrived. "
            "--reason ambiguous replays them."
        )


def _ask(choice: Choice, *, yes: bool) -> None:
    for queue, count in choice.queues.items():
        note(f"{words.events(count)} for {words.queue(queue)}")
    if ambiguous := choice.letters.reasons[Buried.AMBIGUOUS.value]:
        note(
            f"WARNING: {ambiguous:,} of them may have arrived. {form(ambiguous, 'It was', 'They were')} sent longer "
            f"ago than the deduplication window, so the endpoint may count {form(ambiguous, 'it', 'them')} twice."
        )
    told = f"{words.events(len(choice.letters.ids))} ({reasons_told(choice.letters.reasons)})"
    confirmed(f"Put {told} back into the queue?", yes=yes)


def _replay(root: Path, dead_letters: DeadLetters, ids: Sequence[int]) -> Replayed:
    """Put the letters back, a group at a time; what is interrupted, or stopped by the disk, is told."""
    done = Replayed()
    spool = SpoolDirectory(root)
    logs: dict[QueueIdentity, HeldLog] = {}
    seen: set[bytes] = set()
    with Interruption() as interruption, progress("replaying", len(ids)) as advance:
        try:
            for group in groups(dead_letters, set(ids)):
                interruption.check()
                once = _once(group, seen)
                _put_back(spool, logs, once)
                done.repeated += len(group) - len(once)
                done.count += dead_letters.remove([stored.id for stored in group])
                advance(len(group))
        except Interrupted:
            done.exit = interruption.exit()
        except (OSError, KongMeteringError) as error:
            done.problem = str(error)
        finally:
            for held in logs.values():
                spool.retire(held)
            spool.close()
    return done


def _once(group: Sequence[StoredLetter], seen: set[bytes]) -> list[StoredLetter]:
    """Leave out the letters whose event was in another letter of the same queue: a crash can make two of one event."""
    once: list[StoredLetter] = []
    for stored in group:
        digest = hashlib.sha256(stored.letter.queue.key.encode() + stored.letter.event).digest()
        if digest not in seen:
            seen.add(digest)
            once.append(stored)
    return once


def _put_back(spool: SpoolDirectory, logs: dict[QueueIdentity, HeldLog], group: Sequence[StoredLetter]) -> None:
    """Have the events of a group in logs, on the disk itself."""
    events: dict[QueueIdentity, list[bytes]] = {}
    for stored in group:
        events.setdefault(stored.letter.queue, []).append(stored.letter.event)
    for queue, payloads in events.items():
        log = (logs.get(queue) or logs.setdefault(queue, spool.log_for(queue))).log
        # The age of what waits counts from now on: else --spool-max-age might drop it at once.
        log.append(payloads, time.time_ns() // 1_000_000)
        log.sync()


def _tell(options: ReplayOptions, choice: Choice, replayed: Replayed) -> None:
    left = len(choice.letters.ids) - replayed.count
    if options.as_json:
        say(words.json_document(_as_json(choice, replayed)))
    else:
        _tell_people(choice, replayed, left)
    if replayed.exit:
        raise replayed.exit
    if replayed.problem:
        raise KongMeteringError(f"{replayed.problem}; {words.letters(left)} left as they were")
    if set(options.ids) - choice.found:
        raise click.exceptions.Exit(1)


def _tell_people(choice: Choice, replayed: Replayed, left: int) -> None:
    tell(f"{words.events(replayed.count - replayed.repeated)} back in the queue.")
    if replayed.repeated:
        note(f"{words.letters(replayed.repeated)} removed as well: the same event was in another one.")
    if replayed.count:
        tell(
            "A running server that has an instance of the plugin picks them up within seconds. Without one they wait "
            "until there is one, or for `kong-metering spool deliver`."
        )
    if left and not replayed.problem:
        note(f"{words.letters(left)} of {len(choice.letters.ids):,} left as they were.")


def _as_json(choice: Choice, replayed: Replayed) -> dict[str, Any]:
    return {
        "replayed": replayed.count - replayed.repeated,
        "repeated": replayed.repeated,
        "left": len(choice.letters.ids) - replayed.count,
        "ambiguous_left": choice.ambiguous_left,
        "unreadable": choice.unreadable,
        "problem": replayed.problem,
    }
