"""`kong-metering customers`: who is metered, and billed to nobody.

Contract: a customer is made only with `--create`, and a yes.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import click
import orjson

from kong_metering.commands import words
from kong_metering.commands.options import json_option, place_options, taking, yes_option
from kong_metering.commands.output import cell, confirmed, console, note, say, table, tell
from kong_metering.commands.readingback import (
    ReadingBack,
    asked_endpoint,
    asking,
    meant,
    reading_back_options,
    unknown_api,
)
from kong_metering.plurals import counted, form
from kong_metering.proof.api import CustomersApi
from kong_metering.proof.customers import Customers
from kong_metering.spool.settled import delivered_events, waiting_events

if TYPE_CHECKING:
    from kong_metering.ingest.client import Endpoint
    from kong_metering.proof.customers import Unassigned

UNASSIGNED, UNKNOWN = 1, 3
_MOST_SUBJECTS = 100_000


@dataclass(frozen=True, kw_only=True)
class CustomersOptions(ReadingBack):
    """What `customers` takes."""

    create: bool
    yes: bool
    as_json: bool


@dataclass
class Subjects:
    """The subjects that events name, each with how many; `left_out` events have subjects beyond what fits."""

    events: Counter[str]
    left_out: int = 0


@click.command()
@place_options
@reading_back_options
@click.option("--create", is_flag=True, help="Make a customer for each of them, after asking.")
@yes_option
@json_option("one JSON document")
@taking(CustomersOptions)
def customers(options: CustomersOptions) -> None:
    """Show the subjects that were metered and belong to no customer in OpenMeter, so that nobody pays for them.

    Looks at the events that wait and those that were delivered and are kept. A subject belongs to the customer whose
    key, or one of whose subjects, equals it, case and blanks included; OpenMeter looks that up when it bills, so a
    customer that is made now is billed for events from before as well.

    \b
    Exit status:
      0  each subject is a customer's (or, with --create, is one now)
      1  some are nobody's
      2  wrong call
      3  some could not be asked for
    """  # noqa: D301 - click's mark for lines that stay as they are
    endpoint = asked_endpoint(options)
    if endpoint is None:
        note("No events are kept, or none that match: see the servers' --keep-delivered.")
        return
    api = CustomersApi.of(endpoint.url)
    if api is None:
        raise unknown_api(endpoint)
    with asking(endpoint) as (web, timing):
        subjects = _subjects(options, endpoint, int(timing.clock.wall() * 1000))
        known = Customers(api, web)
        found = known.without(list(subjects.events))
        refused = _created(options, known, found) if options.create and found.subjects else None
    _tell(options, subjects, found, refused)
    if found.subjects and (refused is None or refused):
        raise click.exceptions.Exit(UNASSIGNED)
    if found.unknown or subjects.left_out:
        raise click.exceptions.Exit(UNKNOWN)


def _subjects(options: CustomersOptions, endpoint: Endpoint, now_ms: int) -> Subjects:
    is_meant = meant(options, endpoint)
    subjects = Subjects(Counter())
    delivered = delivered_events(options.root, is_meant, options.since_ms(now_ms))
    for event in chain(delivered, waiting_events(options.root, is_meant)):
        subject = _subject_of(event.payload)
        if subject in subjects.events or len(subjects.events) < _MOST_SUBJECTS:
            subjects.events[subject] += 1
        else:
            subjects.left_out += 1
    del subjects.events[""]
    return subjects


def _subject_of(event: bytes) -> str:
    try:
        subject = orjson.loads(event)["subject"]
    except (ValueError, KeyError, TypeError):
        return ""
    return subject if isinstance(subject, str) else ""


def _created(options: CustomersOptions, known: Customers, found: Unassigned) -> dict[str, str]:
    """Make customers, and return those that could not be, each with the reason."""
    count = counted(len(found.subjects), "customer")
    if not options.yes:
        for subject in found.subjects:
            note(words.shown(subject))
    confirmed(f"Make {count}, each with the subject as its key and name?", yes=options.yes)
    return {subject: reason for subject in found.subjects if (reason := known.create(subject)) is not None}


def _tell(options: CustomersOptions, subjects: Subjects, found: Unassigned, refused: dict[str, str] | None) -> None:
    if options.as_json:
        say(words.json_document(_as_json(subjects, found, refused)))
        return
    asked, subjects_told = len(subjects.events) - len(found.unknown), counted(len(subjects.events), "subject")
    if not found.subjects and found.unknown:
        are = form(asked or len(subjects.events), "is", "are")
        tell(f"{asked:,} of {subjects_told} {are} a customer's; the others could not be asked for.")
    elif not found.subjects:
        tell(f"{counted(asked, 'subject, which is', 'subjects, each of them')} a customer's.")
    elif refused is None:
        shown = table("subject", "events", whole=["events"])
        for subject in sorted(found.subjects, key=lambda each: -subjects.events[each]):
            shown.add_row(cell(subject), f"{subjects.events[subject]:,}")
        console().print(shown)
        belong = form(len(found.subjects), "belongs", "belong")
        tell(f"{len(found.subjects):,} of {subjects_told} {belong} to no customer.")
    else:
        tell(f"{counted(len(found.subjects) - len(refused), 'customer')} made.")
        for subject, reason in refused.items():
            tell(f"not made: {words.shown(subject)}: {words.shown(reason)}")
    for subject, reason in list(found.unknown.items())[:10]:
        note(f"could not be asked for: {words.shown(subject)}: {words.shown(reason)}")
    if subjects.left_out:
        note(f"{words.events(subjects.left_out)} left out: there are more than {_MOST_SUBJECTS:,} subjects.")


def _as_json(subjects: Subjects, found: Unassigned, refused: dict[str, str] | None) -> dict[str, Any]:
    return {
        "subjects": len(subjects.events),
        "unassigned": {subject: subjects.events[subject] for subject in found.subjects},
        "created": [] if refused is None else [each for each in found.subjects if each not in refused],
        "not_created": refused or {},
        "unknown": found.unknown,
        "events_left_out": subjects.left_out,
    }
