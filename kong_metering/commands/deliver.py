"""`kong-metering spool deliver`: by hand, what no server delivers.

Contract: events leave for the endpoint that they were accepted for, and for no other. The token comes from a file or
from stdin, is in no argument, and is printed nowhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kong_metering import ENVIRONMENT_PREFIX
from kong_metering.commands import words
from kong_metering.commands.access import check_writable
from kong_metering.commands.asking import Asked, ask, told_problems
from kong_metering.commands.filters import chosen_endpoint, reasons_told
from kong_metering.commands.handdelivery import Account, HandDelivery, HeldEvents, Timing, rules_by_hand
from kong_metering.commands.holders import Holder, held_by, waiting_in
from kong_metering.commands.holding import Holding, delivered_in, held_logs
from kong_metering.commands.interruption import Interrupted, Interruption
from kong_metering.commands.options import CaBundle, Place, json_option, place_options, taking
from kong_metering.commands.output import note, progress, say, tell
from kong_metering.commands.sharedmemory import pour
from kong_metering.commands.tokens import read_token
from kong_metering.delivery.delivering import Delivering
from kong_metering.errors import DISK_ERRORS, KongMeteringError
from kong_metering.ingest.client import Endpoint, IngestClient
from kong_metering.plurals import form
from kong_metering.quantities import Duration, WholeNumber
from kong_metering.spool.deadletters import DEAD_LETTERS, DeadLetters
from kong_metering.spool.directory import Found, HeldLog, survey
from kong_metering.spool.requests import Kind

if TYPE_CHECKING:
    from kong_metering.spool.delivered import Delivered
    from kong_metering.spool.identity import QueueIdentity

# How much may be kept is for the servers to say, who know --spool-max-bytes; here no letter is dropped for another.
_NO_BOUND = 1 << 62
_UNSURE = (
    "the machine's clock was set, or the machine started, a short time ago, and nobody knows yet how long ago events "
    "went out that were not answered: try again when the clock has run evenly for ten minutes"
)
# Exit status when all that waits is in the hands of running servers.
LEFT_TO_SERVERS = 3


@dataclass(frozen=True, kw_only=True)
class DeliverOptions(Place):
    """What `deliver` takes."""

    plugin_id: str
    endpoint: str | None
    token_file: Path
    ca_bundle: Path | None
    insecure: bool
    batch_size: int
    dedupe_window: float
    timeout: float
    wait: float
    keep_delivered: float
    as_json: bool

    @property
    def delivered(self) -> Delivered | None:
        """Where what was delivered is kept; None to keep nothing."""
        return delivered_in(self) if self.keep_delivered else None


@dataclass(frozen=True)
class Ended:
    """How it ended: the account, what is left, and why it ended before all was delivered."""

    account: Account
    left: int
    problem: str | None = None
    exit: click.exceptions.Exit | None = None


@dataclass(frozen=True)
class Rest:
    """What is not ours: events by the servers that hold them; and whether any are stuck, or any were ours at all."""

    held: Counter[Holder]
    asked: Asked
    has_stuck: bool
    had_own: bool

    @property
    def is_left(self) -> bool:
        """Whether any of it waits still."""
        return bool(self.held) and not self.asked.is_complete


@click.command()
@place_options
@click.option("--plugin-id", required=True, metavar="ID", help="The plugin entity whose events are delivered.")
@click.option(
    "--endpoint", metavar="URL", help="The ingest endpoint that they were accepted for; needed when there are several."
)
@click.option(
    "--token-file",
    required=True,
    type=click.Path(path_type=Path, allow_dash=True),
    metavar="FILE",
    help="File with the endpoint's token; '-' reads it from stdin.",
)
@click.option(
    "--ca-bundle",
    type=CaBundle(),
    metavar="FILE",
    help="PEM file with the certificate authorities to verify the endpoint against.",
)
@click.option("--insecure", is_flag=True, help="Do not verify the endpoint's certificate.")
@click.option(
    "--batch-size",
    type=WholeNumber(1, 100_000),
    default=1000,
    show_default=True,
    metavar="N",
    help="The most events to send in one request.",
)
@click.option(
    "--dedupe-window",
    type=Duration(may_be_zero=True),
    default="24h",
    show_default=True,
    metavar="TIME",
    help="How long the endpoint recognises duplicate ids; units s, m, h, d, w.",
)
@click.option(
    "--timeout",
    type=Duration(),
    default="60s",
    show_default=True,
    metavar="TIME",
    help="How long to wait for the endpoint's answer.",
)
@click.option(
    "--wait",
    type=Duration(),
    default="30s",
    show_default=True,
    metavar="TIME",
    help="How long to wait for running servers, which are asked to try at once.",
)
@click.option(
    "--keep-delivered",
    type=Duration(may_be_zero=True),
    default="24h",
    show_default=True,
    envvar=f"{ENVIRONMENT_PREFIX}KEEP_DELIVERED",
    show_envvar=True,
    metavar="TIME",
    help="The servers' --keep-delivered: with 0 nothing is kept here either. Else what is delivered is kept for "
    "`kong-metering verify`, and a server removes it when its time is over.",
)
@json_option("one JSON document with the account")
@taking(DeliverOptions)
def deliver(options: DeliverOptions) -> None:
    """Deliver what waits: by hand what no running server holds, and through the servers what they hold.

    Takes over what dead servers left of one plugin entity, and sends it to the endpoint that it was accepted for, in
    order. An event that the endpoint refuses while it takes others becomes a dead letter. When nothing gets through for
    half a minute, or with Ctrl-C, the rest stays in the spool: nothing is lost, and it can be run again.

    Running servers deliver what they hold themselves, with their own tokens. They are asked to try at once, whatever
    pause they make, and tell what came of it.

    Exit status 3: all that waits is held by running servers, and some of it waits still.
    """
    if options.insecure and options.ca_bundle:
        raise click.UsageError("--insecure verifies nothing: leave --ca-bundle out, or --insecure")
    check_writable(options.root)
    delivered = options.delivered
    unpoured = pour(options, delivered)
    queues = [log.identity for log in survey(options.root) if log.identity]
    endpoint = chosen_endpoint(queues, options.plugin_id, options.endpoint, "--endpoint")
    token = read_token(options.token_file)
    wanted = partial(_is_wanted, plugin_id=options.plugin_id, endpoint=endpoint)
    with held_logs(options, wanted, delivered) as (_, holding):
        _tell_stuck(holding)
        ended = _deliver(options, holding.logs, Endpoint(endpoint, token, options.timeout, 0, _verify(options)))
    held = held_by(holding.others)
    asked = _asked(options, holding, ended)
    _tell(options, ended, Rest(held, asked, bool(unpoured or _stuck(holding)), bool(holding.logs)))


def _is_wanted(queue: QueueIdentity | None, plugin_id: str, endpoint: str) -> bool:
    return queue is not None and queue.entity_id == plugin_id and queue.endpoint == endpoint


def _verify(options: DeliverOptions) -> bool | str:
    return False if options.insecure else str(options.ca_bundle or "") or True


# -------------------------------------------------------------------------------------------------------------- choices


# -------------------------------------------------------------------------------------------------------------- deliver


def _deliver(options: DeliverOptions, logs: Sequence[HeldLog], endpoint: Endpoint) -> Ended:
    timing = click.get_current_context().find_object(Timing) or Timing()
    total = sum(held.log.waiting for held in logs)
    with (
        Interruption() as interruption,
        closing(IngestClient(endpoint, timing.clock)) as client,
        progress("delivering", total) as advance,
    ):
        account = Account(advance, note)
        problem, interrupted = None, None
        try:
            with closing(_held_events(options, logs, account, timing)) as events:
                rules = rules_by_hand(options.batch_size)
                delivering = Delivering(rules, events, clock=timing.clock, account=account)
                problem = HandDelivery(delivering, events, client.send, interruption, timing).run()
                if events.is_unsure and problem is None:
                    problem = _UNSURE
        except Interrupted:
            interrupted = interruption.exit()
        except DISK_ERRORS as error:
            problem = words.shown(str(error))
    return Ended(account, sum(held.log.waiting for held in logs), problem, interrupted)


def _held_events(options: DeliverOptions, logs: Sequence[HeldLog], account: Account, timing: Timing) -> HeldEvents:
    dead_letters = DeadLetters(options.root / DEAD_LETTERS, max_bytes=_NO_BOUND)
    return HeldEvents(
        logs, dead_letters, account, root=options.root, clock=timing.clock, dedupe_window=options.dedupe_window
    )


# ------------------------------------------------------------------------------------------------------------- servers


def _asked(options: DeliverOptions, holding: Holding, ended: Ended) -> Asked:
    """Have the servers that hold something try at once."""
    held = [found for found in holding.others if found.holder is not None and waiting_in(found.directory)]
    if not held or held[0].identity is None or ended.exit:
        return Asked()
    with Interruption() as interruption:
        try:
            return ask(options.root, Kind.TRY, held[0].identity, held, interruption=interruption, seconds=options.wait)
        except Interrupted:
            raise interruption.exit() from None
        except DISK_ERRORS as error:
            note(f"Running servers cannot be asked to try at once: {words.shown(str(error))}")
            return Asked(unheard=tuple(held))


# ----------------------------------------------------------------------------------------------------------------- tell


def _tell_stuck(holding: Holding) -> None:
    for directory, reason in holding.refused.items():
        note(f"{directory} cannot be opened, and stays as it is: {words.shown(reason)}")
    for found in _stuck(holding):
        if found.directory not in holding.refused:
            note(f"{words.events(waiting_in(found.directory))} in {found.directory}: cannot be taken over just now.")


def _stuck(holding: Holding) -> list[Found]:
    """Find the logs that nobody holds, and that were not to be had all the same."""
    return [found for found in holding.others if found.holder is None]


def _tell(options: DeliverOptions, ended: Ended, rest: Rest) -> None:
    if options.as_json:
        say(words.json_document(_as_json(ended, rest)))
    elif rest.had_own:
        _tell_people(ended)
    elif not rest.held and not rest.has_stuck:
        tell("Nothing waits.")
    if rest.held:
        _tell_held(rest)
    if ended.exit:
        raise ended.exit
    if ended.problem:
        raise KongMeteringError(
            f"{ended.problem}; {words.events(ended.left)} left, and nothing is lost: run it again later"
        )
    if rest.has_stuck:
        raise click.exceptions.Exit(1)
    if rest.is_left and not rest.had_own:
        raise click.exceptions.Exit(LEFT_TO_SERVERS)


def _tell_people(ended: Ended) -> None:
    tell(f"{words.events(ended.account.delivered)} delivered.")
    letters = {reason.value: count for reason, count in ended.account.dead_letters.items() if count}
    if letters:
        tell(f"Given up, and kept as dead letters: {reasons_told(letters)}.")
    if ended.exit:
        note(f"Interrupted: {words.events(ended.left)} left, and nothing is lost.")


def _tell_held(rest: Rest) -> None:
    asked = rest.asked
    for answer in asked.answers:
        told = f"{words.process(answer.process)}, asked to try at once: {words.events(answer.events)} delivered"
        note(f"{told[0].upper()}{told[1:]}, {words.events(answer.left)} left.")
    for problem in told_problems(asked.answers):
        note(problem)
    silent = held_by(asked.unheard)
    for holder, count in rest.held.items():
        if holder in silent or not asked.answers:
            note(f"{words.events(count)} held by {holder.told}, which delivers {form(count, 'it', 'them')} itself.")
    if silent:
        note("No answer to the request to try at once: a server may be busy, stopped, or of a version that knows none.")
    if asked.was_freed:
        note("A server has ended meanwhile: run this again, to deliver by hand what it held.")
    if rest.is_left:
        note(
            "Kong's error log says why they do not get through, in lines with 'queue' and the plugin's name. "
            "`kong-metering spool redirect` moves them to another URL. Once the server has ended, they can be "
            "delivered by hand."
        )


def _as_json(ended: Ended, rest: Rest) -> dict[str, Any]:
    return {
        "delivered": ended.account.delivered,
        "dead_letters": {reason.value: count for reason, count in ended.account.dead_letters.items() if count},
        "left": ended.left,
        "held": rest.held.total(),
        "held_by": sorted({holder.pid for holder in rest.held}),
        "delivered_by_servers": rest.asked.events,
        "unanswered_by": sorted({found.holder for found in rest.asked.unheard if found.holder is not None}),
        "server_problems": told_problems(rest.asked.answers),
        "problem": ended.problem,
    }
