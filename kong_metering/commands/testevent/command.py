"""`kong-metering send-test-event`: one event on purpose, and what the endpoint says to it.

Contract: one POST, to the endpoint that was named, by the client that the plugin server has; the token is printed
nowhere.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kong_metering.clock import SystemClock
from kong_metering.commands import words
from kong_metering.commands.options import CaBundle, json_option, plugin_name_option
from kong_metering.commands.output import say, tell
from kong_metering.commands.testevent.advice import Advice, advice_for
from kong_metering.commands.testevent.post import EVENT_TYPE, Answer, TestEvent, send
from kong_metering.commands.testevent.target import TargetOptions, target_of
from kong_metering.commands.tokens import TOKEN_VARIABLE
from kong_metering.errors import ConfigError
from kong_metering.quantities import Duration
from kong_metering.urls import without_credentials

if TYPE_CHECKING:
    from kong_metering.commands.testevent.post import Target

NOT_ACCEPTED = 1
NOT_REACHED = 3


@click.command("send-test-event")
@click.argument("file", required=False, metavar="[FILE|-]")
@click.option("--ingest-endpoint", metavar="URL", help="Where to send it, if not to the endpoint in FILE.")
@click.option(
    "--plugin", metavar="PATH", help="Which metering plugin of FILE, if there are several: services[0].plugins[1]."
)
@plugin_name_option("What the plugin is called in FILE: the server's --plugin-name.")
@click.option(
    "--token-file",
    type=click.Path(path_type=Path, allow_dash=True),
    metavar="FILE",
    help=f"File with the token; '-' reads it from stdin. Else the token in FILE, else {TOKEN_VARIABLE}, else a prompt.",
)
@click.option(
    "--subject", default="kong-metering-test", show_default=True, metavar="TEXT", help="The subject of the event."
)
@click.option(
    "--ca-bundle",
    type=CaBundle(),
    metavar="FILE",
    help="PEM file with the certificate authorities to verify the endpoint against.",
)
@click.option("--insecure", is_flag=True, help="Do not verify the endpoint's certificate.")
@click.option("--timeout", type=Duration(), metavar="TIME", help="How long to wait for the answer; 10s, or as in FILE.")
@json_option("one JSON document with the answer")
def send_test_event(*, subject: str, as_json: bool, **options: Any) -> None:
    """Send one test event to the ingest endpoint, and say what came of it.

    FILE is the configuration that Kong has or is to have, as for `kong-metering check`: endpoint, token, timeout and
    ssl_verify are taken from it. Or name the endpoint with --ingest-endpoint. A token is never an argument: others
    could see it.

    The event has a type of its own, kong.metering_test, and bills nobody: meters count the types that they name, and
    none names this one unless somebody makes it do so. It stays in OpenMeter's list of events, with the subject
    kong-metering-test.

    \b
    Exit status:
      0  accepted
      1  the endpoint answered, and did not accept it
      2  a wrong call
      3  the endpoint was not reached: name, network, TLS, time
    """  # noqa: D301 - click's mark for lines that stay as they are
    if not subject.strip():
        raise click.UsageError("--subject is empty: OpenMeter refuses an event without one")
    if options["insecure"] and options["ca_bundle"]:
        raise click.UsageError("--insecure verifies nothing: leave --ca-bundle out, or --insecure")
    target, clock = target_of(TargetOptions(**options), os.environ), SystemClock()
    event = TestEvent.made(subject, clock)
    try:
        answer = send(target, event, clock)
    except ConfigError as error:
        raise click.UsageError(f"{error}; `kong-metering check` says more") from error
    advice = advice_for(answer, target.ingest_endpoint)
    if as_json:
        say(words.json_document(_as_json(target, event, answer, advice)))
    else:
        _tell(target, event, answer, advice)
    if not answer.is_accepted:
        raise click.exceptions.Exit(NOT_ACCEPTED if answer.has_arrived else NOT_REACHED)


def _tell(target: Target, event: TestEvent, answer: Answer, advice: Advice) -> None:
    where = words.shown(without_credentials(target.ingest_endpoint, "***@"))
    if answer.is_accepted:
        what = f"the event {event.id} of type {EVENT_TYPE}, subject {words.shown(event.subject)}"
        tell(f"{advice.means} {where} took {what}.")
        tell("It bills nobody. Look for it in OpenMeter's list of events: accepted is not stored yet.")
        return
    tell(f"Not accepted. {advice.means}")
    tell(f"  -> {advice.remedy}")
    tell(f"  {answer.said}")


def _as_json(target: Target, event: TestEvent, answer: Answer, advice: Advice) -> dict[str, Any]:
    return {
        "accepted": answer.is_accepted,
        "outcome": advice.outcome,
        "endpoint": without_credentials(target.ingest_endpoint, "***@"),
        "event": {"id": event.id, "type": EVENT_TYPE, "subject": event.subject},
        "means": advice.means,
        "remedy": advice.remedy or None,
        "said": answer.said or None,
    }
