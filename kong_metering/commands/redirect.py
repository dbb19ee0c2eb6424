"""`kong-metering spool redirect`: what waits at one endpoint, to another one.

Contract: whole logs change hands, with their events' ids and their marks, so that nothing is lost, or in two places,
whatever is killed meanwhile. What nobody holds is moved here; what running servers hold they move themselves, when
their requests that are under way are answered. Run again, it goes on where it ended.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import click

from kong_metering.commands import words
from kong_metering.commands.access import check_writable
from kong_metering.commands.asking import Asked, ask, told_problems
from kong_metering.commands.filters import reasons_told
from kong_metering.commands.holders import held_by, waiting_in
from kong_metering.commands.holding import held_logs
from kong_metering.commands.interruption import Interrupted, Interruption
from kong_metering.commands.letters import alone
from kong_metering.commands.options import json_option, place_options, taking, yes_option
from kong_metering.commands.output import confirmed, note, say, tell
from kong_metering.commands.readdressing import readdress
from kong_metering.commands.redirectplan import RedirectOptions, plan_of
from kong_metering.commands.sharedmemory import pour
from kong_metering.errors import DISK_ERRORS, KongMeteringError
from kong_metering.plurals import counted, form
from kong_metering.quantities import Duration
from kong_metering.spool.accepted import Acceptances
from kong_metering.spool.deadletters import DEAD_LETTERS, DeadLetters
from kong_metering.spool.directory import Found, survey
from kong_metering.spool.requests import Kind
from kong_metering.upkeep.redirection import sync_identity

if TYPE_CHECKING:
    from kong_metering.commands.redirectplan import Plan

# How often what was held when it began, and is free now, is taken here.
_ROUNDS = 3
# How much may be kept is for the servers to say, who know --spool-max-bytes; here no letter is dropped for another.
_NO_BOUND = 1 << 62


@dataclass
class Redirected:
    """What came of it: events that were moved here and by servers, dead letters, and what keeps others from it."""

    here: int = 0
    letters: int = 0
    asked: list[Asked] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    exit: click.exceptions.Exit | None = None

    @property
    def events(self) -> int:
        """How many events were moved."""
        return self.here + sum(asked.events for asked in self.asked)

    @property
    def is_complete(self) -> bool:
        """Whether all is done that was asked for."""
        last = self.asked[-1:]
        return not self.problems and self.exit is None and all(asked.is_complete for asked in last)


@click.command()
@place_options
@click.option("--plugin-id", required=True, metavar="ID", help="The plugin entity whose events are redirected.")
@click.option(
    "--endpoint", metavar="URL", help="The ingest endpoint at which they wait; needed when there are several."
)
@click.option("--to", required=True, metavar="URL", help="The ingest endpoint that they go to.")
@click.option("--dead-letters", is_flag=True, help="Its dead letters too: they stay such, for `replay`.")
@click.option(
    "--wait",
    type=Duration(),
    default="2m",
    show_default=True,
    metavar="TIME",
    help="How long to wait for running servers, which first finish the requests that are under way.",
)
@json_option("one JSON document with the counts")
@yes_option
@taking(RedirectOptions)
def redirect(options: RedirectOptions) -> None:
    """Redirect what waits at an endpoint to another one.

    For events that wait at an endpoint that has accepted some before, and will not take these any more: its URL has
    changed, or the service behind it. Also while running servers hold them: these are asked to. Each event keeps its
    id. What comes later goes where the plugin's configuration says.

    Nothing is sent by this: the servers deliver it, if the plugin's configuration has the new URL, or else `deliver`.

    Exit status 1: not all of it was redirected; it says why, and can be run again.
    """
    check_writable(options.root)
    _check_url(options.to)
    unpoured = pour(options)
    plan = plan_of(options)
    redirected = Redirected()
    if plan.logs or plan.letters.ids:
        _tell_plan(plan)
        confirmed(_question(plan), yes=options.yes)
        redirected = _redirect(options, plan)
    _tell(options, plan, redirected)
    if unpoured or not redirected.is_complete:
        raise redirected.exit or click.exceptions.Exit(1)


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        is_usable = (
            parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
        )
    except ValueError:
        is_usable = False
    if not is_usable or any(char.isspace() for char in url):
        raise click.UsageError("--to has to be a URL such as https://us.api.konghq.com/v3/openmeter/events")


# ------------------------------------------------------------------------------------------------------------------ ask


def _tell_plan(plan: Plan) -> None:
    note(f"{words.events(plan.events)} for {words.queue(plan.source)}")
    for holder, count in plan.held.items():
        them = form(count, "it", "them")
        note(f"{count:,} of them held by {holder.told}, which is asked to redirect {them}.")
    if plan.letters.ids:
        note(f"{words.letters(len(plan.letters.ids))} ({reasons_told(plan.letters.reasons)})")
    if plan.unanswered:
        note(
            f"{words.of_them_were(plan.unanswered)} sent without an answer so far, and may have arrived. "
            "They keep their ids: an endpoint that shares its storage with the old one counts them once, any other one "
            "may bill them a second time."
        )


def _question(plan: Plan) -> str:
    parts = []
    if plan.logs:
        parts.append(words.waiting(plan.events))
    if plan.letters.ids:
        parts.append(words.letters(len(plan.letters.ids)))
    return f"Redirect {' and '.join(parts)} to {words.shown(plan.target.endpoint)}?"


# ------------------------------------------------------------------------------------------------------------- redirect


def _redirect(options: RedirectOptions, plan: Plan) -> Redirected:
    done = Redirected()
    with Interruption() as interruption:
        try:
            # So that it stays there: what never accepted an event is given to where the plugin sends now.
            Acceptances(options.root).note(plan.target.key)
            for _ in range(_ROUNDS):
                _move_free(options, plan, done, interruption)
                if not _ask_servers(options, plan, done, interruption):
                    break
            if plan.letters.ids:
                done.letters = _move_letters(options, plan, interruption)
        except Interrupted:
            done.exit = interruption.exit()
        except (OSError, KongMeteringError) as error:
            done.problems.append(words.shown(str(error)))
    return done


def _move_free(options: RedirectOptions, plan: Plan, done: Redirected, interruption: Interruption) -> None:
    """Move what nobody holds."""
    with held_logs(options, plan.is_ours) as (spool, holding):
        for held in holding.logs:
            interruption.check()
            waiting = held.log.waiting
            try:
                sync_identity(spool.reassign(held, plan.target))
            except DISK_ERRORS as error:
                done.problems.append(f"{held.directory}: {words.shown(str(error))}")
            else:
                done.here += waiting
        for directory, reason in holding.refused.items():
            done.problems.append(f"{directory} cannot be opened, and stays as it is: {words.shown(reason)}")


def _ask_servers(options: RedirectOptions, plan: Plan, done: Redirected, interruption: Interruption) -> bool:
    """Have the servers move what they hold of what was there; tell whether some of it is free now."""
    held = [log for log in _still_there(options, plan) if log.holder is not None]
    if not held:
        done.asked.append(Asked())
        return False
    asked = ask(
        options.root,
        Kind.REDIRECT,
        plan.source,
        held,
        interruption=interruption,
        seconds=options.wait,
        target=plan.target,
    )
    done.asked.append(asked)
    return asked.was_freed


def _still_there(options: RedirectOptions, plan: Plan) -> list[Found]:
    return [log for log in survey(options.root) if plan.is_ours(log.identity) and log.directory in plan.logs]


def _move_letters(options: RedirectOptions, plan: Plan, interruption: Interruption) -> int:
    dead_letters = DeadLetters(options.root / DEAD_LETTERS, max_bytes=_NO_BOUND)
    with alone(dead_letters.directory):
        return readdress(dead_letters, plan.letters.ids, plan.target, interruption)


# ----------------------------------------------------------------------------------------------------------------- tell


def _tell(options: RedirectOptions, plan: Plan, redirected: Redirected) -> None:
    left = held_by_anybody(options, plan)
    if options.as_json:
        say(words.json_document(_as_json(plan, redirected, left)))
    elif not (plan.logs or plan.letters.ids):
        tell(
            f"Nothing waits at {words.shown(plan.source.endpoint)} for the plugin {words.shown(plan.source.entity_id)}."
        )
    else:
        _tell_people(plan, redirected)
    _tell_troubles(options, redirected)
    if left and plan.logs:
        wait = counted(left, "event waits", "events wait")
        note(f"{wait} at {words.shown(plan.source.endpoint)} now; it can be run again.")


def held_by_anybody(options: RedirectOptions, plan: Plan) -> int:
    """Count what waits where it was redirected from now."""
    return sum(waiting_in(log.directory) for log in survey(options.root) if plan.is_ours(log.identity))


def _tell_people(plan: Plan, redirected: Redirected) -> None:
    where = words.shown(plan.target.endpoint)
    if plan.logs:
        tell(f"{words.events(redirected.events)} redirected to {where}.")
    if plan.letters.ids:
        tell(f"{words.letters(redirected.letters)} redirected, and still dead letters, for `replay`.")
    if redirected.events:
        tell(
            "A running server that has an instance of the plugin with this URL delivers them. Without one they wait "
            "until there is one, or for `kong-metering spool deliver "
            f"--plugin-id {words.shown(plan.target.entity_id)} --endpoint {where}`."
        )


def _tell_troubles(options: RedirectOptions, redirected: Redirected) -> None:
    for problem in redirected.problems:
        note(problem)
    for asked in redirected.asked:
        for problem in told_problems(asked.answers):
            note(problem)
    last = redirected.asked[-1] if redirected.asked else Asked()
    for holder, count in held_by(last.unheard).items():
        note(
            f"No answer from {holder.told}, which holds {words.events(count)}: "
            f"{form(count, 'it stays where it is', 'they stay where they are')}. It may be "
            "busy, stopped, or of a version that knows no requests; run this again, or once it has ended."
        )
    for holder, count in held_by(last.under_way).items():
        note(
            f"{holder.told} has {words.events(count)} and is not done after {options.wait:g} s: it redirects "
            f"{form(count, 'it', 'them')} once the requests that are under way are answered."
        )
    if redirected.exit:
        note("Interrupted: nothing is lost, and it can be run again.")


def _as_json(plan: Plan, redirected: Redirected, left: int) -> dict[str, Any]:
    last = redirected.asked[-1] if redirected.asked else Asked()
    problems = [*redirected.problems, *(told for asked in redirected.asked for told in told_problems(asked.answers))]
    return {
        "endpoint": plan.source.endpoint,
        "to": plan.target.endpoint,
        "redirected": redirected.events,
        "redirected_by": sorted({answer.process for asked in redirected.asked for answer in asked.answers}),
        "dead_letters": redirected.letters,
        "left": left,
        "unanswered_by": sorted({found.holder for found in last.unheard if found.holder is not None}),
        "under_way": sorted({found.holder for found in last.under_way if found.holder is not None}),
        "problems": problems,
    }
