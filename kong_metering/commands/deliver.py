"""`kong-metering spool deliver`: by hand, what no server delivers.

Contract: events leave for the endpoint that they were accepted for, and for no other. The token comes from a file or
from stdin, is in no argument, and is printed nowhere.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kong_metering.clock import SystemClock
from kong_metering.commands import words
from kong_metering.commands.access import check_writable
from kong_metering.commands.filters import is_endpoint, reasons_told
from kong_metering.commands.handdelivery import Account, HandDelivery, Means
from kong_metering.commands.holding import Holding, held_logs
from kong_metering.commands.interruption import Interrupted, Interruption
from kong_metering.commands.options import Place, json_option, place_options, taking
from kong_metering.commands.output import note, progress, say, tell
from kong_metering.delivery.ingest import Endpoint, IngestClient
from kong_metering.errors import KongMeteringError
from kong_metering.quantities import Duration
from kong_metering.spool.deadletters import DEAD_LETTERS, DeadLetters
from kong_metering.spool.directory import Found, HeldLog, survey
from kong_metering.spool.log import EventLog
from kong_metering.urls import without_credentials

if TYPE_CHECKING:
    from kong_metering.spool.identity import QueueIdentity

_MAX_TOKEN_BYTES = 64 * 1024
# How much may be kept is for the servers to say, who know --spool-max-bytes; here no letter is dropped for another.
_NO_BOUND = 1 << 62


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
    as_json: bool


@dataclass(frozen=True)
class Ended:
    """How it ended: the account, what is left, and why it ended before all was delivered."""

    account: Account
    left: int
    problem: str | None = None
    exit: click.exceptions.Exit | None = None


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
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="FILE",
    help="PEM file of the authorities to verify the endpoint with.",
)
@click.option("--insecure", is_flag=True, help="Do not verify the endpoint's certificate.")
@click.option(
    "--batch-size",
    type=click.IntRange(1, 100_000),
    default=1000,
    show_default=True,
    metavar="N",
    help="How many events leave in one request, at most.",
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
@json_option("one JSON document with the account")
@taking(DeliverOptions)
def deliver(options: DeliverOptions) -> None:
    """Deliver by hand what waits and no running server delivers.

    Takes over what dead servers left of one plugin entity, and sends it to the endpoint that it was accepted for, in
    order. What the endpoint refuses for itself becomes a dead letter. When the endpoint keeps failing, or with Ctrl-C,
    the rest stays in the spool: nothing is lost, and it can be run again.
    """
    if options.insecure and options.ca_bundle:
        raise click.UsageError("--insecure verifies nothing: leave --ca-bundle out, or --insecure")
    check_writable(options.root)
    endpoint = _endpoint_of(survey(options.root), options)
    token = _token(options.token_file)
    with held_logs(options.root, lambda queue: _is_wanted(queue, options.plugin_id, endpoint)) as (_, holding):
        _tell_others(holding)
        ended = _deliver(options, holding.logs, Endpoint(endpoint, token, options.timeout, 0, _verify(options)))
    _tell(options, ended, holding)


def _is_wanted(queue: QueueIdentity | None, plugin_id: str, endpoint: str) -> bool:
    return queue is not None and queue.entity_id == plugin_id and queue.endpoint == endpoint


def _verify(options: DeliverOptions) -> bool | str:
    return False if options.insecure else str(options.ca_bundle or "") or True


# -------------------------------------------------------------------------------------------------------------- choices


def _endpoint_of(found: Sequence[Found], options: DeliverOptions) -> str:
    """Find which endpoint the events go to. Raises `KongMeteringError` when that is not clear."""
    queues = [log.identity for log in found if log.identity]
    mine = {queue.endpoint: queue for queue in queues if queue.entity_id == options.plugin_id}
    if not mine:
        raise KongMeteringError(f"nothing waits for the plugin {options.plugin_id}; {_plugins_told(queues)}")
    there = ", ".join(sorted(map(without_credentials, mine)))
    if options.endpoint is None and len(mine) > 1:
        raise KongMeteringError(f"its events were accepted for several endpoints: choose one with --endpoint: {there}")
    chosen = [url for url, queue in mine.items() if options.endpoint is None or is_endpoint(options.endpoint, queue)]
    if len(chosen) != 1:
        raise KongMeteringError(
            f"no events were accepted for {without_credentials(options.endpoint or '')}, and events never leave "
            f"for another endpoint than their own; --endpoint can be: {there}"
        )
    return chosen[0]


def _plugins_told(queues: Sequence[QueueIdentity]) -> str:
    names = sorted({f"{queue.entity_id} ({queue.name})" for queue in queues})
    return f"there are events of {', '.join(names)}" if names else "the spool is empty"


def _token(path: Path) -> str:
    """Read the token; no error quotes it."""
    if str(path) == "-":
        text = _token_from_stdin()
    else:
        with path.open("rb") as file:
            text = file.read(_MAX_TOKEN_BYTES).decode("latin-1")
    token = text.strip()
    if not token:
        raise KongMeteringError(f"--token-file {path} is empty: it has to hold the endpoint's token")
    if not (token.isascii() and token.isprintable() and " " not in token):
        raise KongMeteringError(f"--token-file {path} does not hold a token: it has to be one word in ASCII")
    return token


def _token_from_stdin() -> str:
    if sys.stdin.isatty():
        return str(click.prompt("Token", hide_input=True, err=True))
    return sys.stdin.buffer.read(_MAX_TOKEN_BYTES).decode("latin-1")


# -------------------------------------------------------------------------------------------------------------- deliver


def _deliver(options: DeliverOptions, logs: Sequence[HeldLog], endpoint: Endpoint) -> Ended:
    account, problem, interrupted = Account(), None, None
    total = sum(held.log.waiting for held in logs)
    with (
        Interruption() as interruption,
        closing(IngestClient(endpoint, SystemClock())) as client,
        progress("delivering", total) as advance,
    ):
        dead_letters = DeadLetters(options.root / DEAD_LETTERS, max_bytes=_NO_BOUND)
        means = Means(client, dead_letters, interruption, options.batch_size, options.dedupe_window, account, advance)
        try:
            problem = _deliver_all(logs, means)
        except Interrupted:
            interrupted = interruption.exit()
        except (OSError, KongMeteringError) as error:
            problem = words.shown(str(error))
    return Ended(account, sum(held.log.waiting for held in logs), problem, interrupted)


def _deliver_all(logs: Sequence[HeldLog], means: Means) -> str | None:
    """Deliver one log after another, the one with the oldest events first; tell why it ended before the end."""
    for held in sorted(logs, key=_oldest_ms):
        if held.identity and (failed := HandDelivery(held.log, held.identity, means).run()):
            return failed.reason
    return None


def _oldest_ms(held: HeldLog) -> int:
    oldest = held.log.oldest()
    return oldest.time_ms if oldest else 0


# ----------------------------------------------------------------------------------------------------------------- tell


def _tell_others(holding: Holding) -> None:
    for directory, reason in holding.refused.items():
        note(f"{directory} cannot be opened, and stays as it is: {words.shown(reason)}")
    for found in holding.others:
        if waiting := _waiting_in(found):
            told = (
                f"{words.process(found.holder)} delivers them itself" if found.holder is not None else "not to be had"
            )
            note(f"{words.events(waiting)} in {found.directory}: {told}.")


def _waiting_in(found: Found) -> int:
    try:
        with closing(EventLog.view(found.directory)) as view:
            return view.waiting
    except (OSError, KongMeteringError):
        return 0


def _tell(options: DeliverOptions, ended: Ended, holding: Holding) -> None:
    if options.as_json:
        say(words.json_document(_as_json(ended, holding)))
    elif not holding.logs:
        tell("There is nothing to deliver by hand.")
    else:
        _tell_people(ended)
    if ended.exit:
        raise ended.exit
    if ended.problem:
        raise KongMeteringError(
            f"{ended.problem}; {words.events(ended.left)} left, and nothing is lost: run it again later"
        )
    if any(found.holder is None for found in holding.others):
        raise click.exceptions.Exit(1)


def _tell_people(ended: Ended) -> None:
    tell(f"{words.events(ended.account.delivered)} delivered.")
    letters = {reason.value: count for reason, count in ended.account.dead_letters.items() if count}
    if letters:
        tell(f"Given up, and kept as dead letters: {reasons_told(letters)}.")
    if ended.exit:
        note(f"Interrupted: {words.events(ended.left)} left, and nothing is lost.")


def _as_json(ended: Ended, holding: Holding) -> dict[str, Any]:
    return {
        "delivered": ended.account.delivered,
        "dead_letters": {reason.value: count for reason, count in ended.account.dead_letters.items() if count},
        "left": ended.left,
        "held_by": sorted({found.holder for found in holding.others if found.holder is not None}),
        "problem": ended.problem,
    }
