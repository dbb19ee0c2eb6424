"""`kong-metering verify`: reads back what was delivered.

Contract: nothing in the spool is changed. What is missing is sent again only with `--resend`, and a yes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from kong_metering.commands import words
from kong_metering.commands.options import json_option, place_options, taking, yes_option
from kong_metering.commands.output import Failure, confirmed, note, say, tell
from kong_metering.commands.readingback import (
    ReadingBack,
    asked_endpoint,
    asking,
    meant,
    reading_back_options,
    unknown_api,
)
from kong_metering.ingest.client import IngestClient
from kong_metering.plurals import form
from kong_metering.proof.api import EventsApi
from kong_metering.proof.asking import Asker
from kong_metering.proof.parking import Parking
from kong_metering.proof.resending import Resent, resend
from kong_metering.proof.verifying import Findings, Verification
from kong_metering.proof.web import CannotAsk
from kong_metering.quantities import Duration
from kong_metering.spool.settled import delivered_events, still_here
from kong_metering.urls import without_credentials

if TYPE_CHECKING:
    from kong_metering.commands.handdelivery import Timing
    from kong_metering.ingest.client import Endpoint

MISSING, UNKNOWN, NOT_BILLED = 1, 3, 4
_SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class VerifyOptions(ReadingBack):
    """What `verify` takes."""

    settle: float
    resend: bool
    yes: bool
    as_json: bool


@dataclass(frozen=True)
class Outcome:
    """What was found, what was sent again, and why it ended before all was asked for."""

    findings: Findings
    resent: Resent | None = None
    problem: str | None = None


@click.command()
@place_options
@reading_back_options
@click.option(
    "--settle",
    type=Duration(may_be_zero=True),
    default="60s",
    show_default=True,
    metavar="TIME",
    help="How long OpenMeter gets to store an event, before one that it does not have is called missing.",
)
@click.option("--resend", is_flag=True, help="Send what is missing again, with the same ids, after asking.")
@yes_option
@json_option("one JSON document")
@taking(VerifyOptions)
def verify(options: VerifyOptions) -> None:
    """Read back from OpenMeter what was delivered, and show what it does not have, or will not count.

    A 2xx is not yet "stored": OpenMeter answers before its Kafka confirms. Servers keep what they delivered for a while
    (--keep-delivered, 24 h), and this command asks for each of these events by its id. It changes nothing in the spool,
    and works beside running servers.

    \b
    Exit status:
      0  all that is kept is stored, and will be counted
      1  events are missing (or, after --resend, still are), or something failed
      2  wrong call
      3  not all could be asked for
      4  all is stored, but some events are no customer's, or no meter counts them
    """  # noqa: D301 - click's mark for lines that stay as they are
    endpoint = asked_endpoint(options)
    if endpoint is None:
        _tell(options, Outcome(Findings()))
        note("Nothing that was delivered is kept, or nothing that matches: see the servers' --keep-delivered.")
        return
    outcome = _verified(options, endpoint)
    _tell(options, outcome)
    if status := _status(outcome):
        raise click.exceptions.Exit(status)


def _verified(options: VerifyOptions, endpoint: Endpoint) -> Outcome:
    api = EventsApi.of(endpoint.url)
    if api is None:
        raise unknown_api(endpoint)
    is_meant = meant(options, endpoint)
    with (
        asking(endpoint) as (web, timing),
        _verification(options, endpoint, Asker(api, web), timing) as verification,
        Parking() as undelivered,
    ):
        since_ms = options.since_ms(int(timing.clock.wall() * 1000))
        delivered = delivered_events(options.root, is_meant, since_ms, undelivered.add)
        try:
            verification.run(event.payload for event in delivered)
            verification.leave_out(undelivered.events())
            resent = _resent(options, endpoint, verification, timing) if verification.missing.count else None
        except CannotAsk as error:
            return Outcome(verification.findings, None, str(error))
        return Outcome(verification.findings, resent)


def _verification(options: VerifyOptions, endpoint: Endpoint, asker: Asker, timing: Timing) -> Verification:
    here = partial(still_here, options.root, is_meant=meant(options, endpoint))
    return Verification(asker, here, timing.sleep, settle_seconds=options.settle)


def _resent(options: VerifyOptions, endpoint: Endpoint, verification: Verification, timing: Timing) -> Resent | None:
    """Send what is missing again, if that was asked for and is wanted, and look for it once more."""
    if not options.resend:
        return None
    count, url = verification.missing.count, without_credentials(endpoint.url)
    if not verification.findings.stored:
        note("Nothing else was found either: OpenMeter may only be behind (does its sink-worker run, and read?).")
    try:
        confirmed(
            f"Send {words.events(count)} again to {url}, with the same {form(count, 'id')}? If "
            f"{form(count, 'it arrives', 'they arrive')} later after all, OpenMeter counts {form(count, 'it', 'them')} "
            "once only with sink.dedupe.",
            yes=options.yes,
        )
    except (click.exceptions.Exit, Failure):
        _tell(options, Outcome(verification.findings))
        raise
    with closing(IngestClient(endpoint, timing.clock)) as client:
        resent = resend(verification.missing.events(), client.send, timing.sleep)
    if resent.sent:
        verification.recheck(verification.missing.events())
    return resent


def _status(outcome: Outcome) -> int:
    counts = outcome.findings.counts
    if counts["missing"]:
        return MISSING
    if counts["unknown"] or outcome.problem or outcome.findings.is_cut_short:
        return UNKNOWN
    return NOT_BILLED if counts["unassigned"] or counts["invalid"] else 0


# ----------------------------------------------------------------------------------------------------------------- tell


def _tell(options: VerifyOptions, outcome: Outcome) -> None:
    if options.as_json:
        say(words.json_document(_as_json(outcome)))
    else:
        for line in _lines(outcome):
            tell(line)
    if outcome.problem:
        note(f"Not all could be asked for: {words.shown(outcome.problem)}")


def _lines(outcome: Outcome) -> Iterator[str]:
    yield f"{words.events(outcome.findings.counts['confirmed'])} confirmed: stored, and counted."
    yield from _missing_lines(outcome)
    yield from _uncounted_lines(outcome.findings)
    yield from _further_lines(outcome.findings)


def _missing_lines(outcome: Outcome) -> Iterator[str]:
    findings, resent = outcome.findings, outcome.resent
    counts = findings.counts
    if resent:
        yield f"{words.events(resent.sent)} sent again."
        if resent.refused:
            yield f"{words.events(resent.refused)} refused by the endpoint."
        if resent.problem:
            yield f"Not all were sent: {words.shown(resent.problem)}"
    if missing := counts["missing"]:
        them = form(missing, "it", "them")
        yield f"{words.events(missing)} MISSING: OpenMeter took {them}, and does not have {them}."
        yield f"  {_some(findings.missing_ids, missing)}"
        if resent is None:
            yield f"  `kong-metering verify --resend` sends {them} again."
        elif resent.sent:
            yield "  Sent again, and still not there: is its sink-worker behind? What was stored once, and deleted,"
            yield "  is not stored anew for as long as sink.dedupe knows its id."


def _uncounted_lines(findings: Findings) -> Iterator[str]:
    counts, subjects = findings.counts, len(findings.subjects)
    if unassigned := counts["unassigned"]:
        whose = f"{form(unassigned, 'its', 'their')} {form(subjects, 'subject is', 'subjects are')}"
        yield f"{words.events(unassigned)} unassigned: {whose} no customer's."
        yield f"  {_some([_counted(*each) for each in findings.subjects.most_common()], subjects)}"
        made = form(subjects, "a customer for it", "customers for them")
        yield f"  `kong-metering customers --create` makes {made}."
    if counts["invalid"]:
        yield f"{words.events(counts['invalid'])} invalid: stored, and not counted."
    if unknown := counts["unknown"]:
        yield f"{words.events(unknown)} unknown: {form(unknown, 'it', 'they')} could not be asked for."
    for reason, count in findings.reasons.most_common(_SHOWN):
        yield f"  {_counted(reason, count)}"


def _further_lines(findings: Findings) -> Iterator[str]:
    if findings.doubled:
        yield f"{words.events(findings.doubled)} stored more than once: is sink.dedupe on?"
    if left_out := findings.left_out:
        why = form(left_out, "it waits, or is a dead letter", "they wait, or are dead letters")
        yield f"{words.events(left_out)} left out: {why}."
    if findings.is_cut_short:
        yield "So many are missing that the rest was not asked for."


def _some(names: list[str], total: int) -> str:
    shown = ", ".join(words.shown(name) for name in names[:_SHOWN])
    return f"{shown}, ..." if total > _SHOWN else shown


def _counted(name: str, count: int) -> str:
    return f"{words.shown(name)} ({count:,})"


def _as_json(outcome: Outcome) -> dict[str, Any]:
    findings, resent = outcome.findings, outcome.resent
    counts: Counter[str] = findings.counts
    return {
        **{name: counts[name] for name in ("confirmed", "missing", "unassigned", "invalid", "unknown")},
        "doubled": findings.doubled,
        "left_out": findings.left_out,
        "resent": resent.sent if resent else 0,
        "refused": resent.refused if resent else 0,
        "missing_ids": findings.missing_ids,
        "unassigned_subjects": dict(findings.subjects),
        "reasons": dict(findings.reasons),
        "is_cut_short": findings.is_cut_short,
        "problem": outcome.problem or (resent.problem if resent else None),
    }
