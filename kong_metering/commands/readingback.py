"""What the commands share that ask OpenMeter what it has: their options, which endpoint is meant, and its token."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from kong_metering.commands.access import check_readable
from kong_metering.commands.filters import Filters
from kong_metering.commands.handdelivery import Timing
from kong_metering.commands.interruption import Interrupted, Interruption
from kong_metering.commands.options import CaBundle, Place
from kong_metering.commands.tokens import TOKEN_VARIABLE, chosen_token
from kong_metering.errors import KongMeteringError
from kong_metering.ingest.client import Endpoint
from kong_metering.proof.web import Pace, Web
from kong_metering.quantities import Duration
from kong_metering.spool.settled import settled_queues
from kong_metering.urls import without_credentials

if TYPE_CHECKING:
    from kong_metering.spool.identity import QueueIdentity

F = TypeVar("F", bound=Callable[..., Any])

# Between two questions: OpenMeter has other things to do.
_BETWEEN_SECONDS = 0.02


@dataclass(frozen=True, kw_only=True)
class ReadingBack(Place):
    """Which events are meant, and how their endpoint is asked; times in seconds."""

    plugin_id: str | None
    endpoint: str | None
    since: float | None
    token_file: Path | None
    ca_bundle: Path | None
    insecure: bool
    timeout: float

    def since_ms(self, now_ms: int) -> int:
        """Return the time before which what was settled is left out."""
        return now_ms - int(self.since * 1000) if self.since is not None else 0

    @property
    def filters(self) -> Filters:
        """Which queues are meant."""
        return Filters(self.plugin_id, self.endpoint)


def reading_back_options(command: F) -> F:
    """Let a command take them."""
    for option in reversed(
        (
            click.option("--plugin-id", metavar="ID", help="Only events of the plugin entity with this id."),
            click.option(
                "--endpoint", metavar="URL", help="The ingest endpoint that is asked; needed when there are several."
            ),
            click.option(
                "--since",
                type=Duration(),
                metavar="TIME",
                help="Only what was delivered so long ago at most, and what stands beside it in its segment.",
            ),
            click.option(
                "--token-file",
                type=click.Path(path_type=Path, allow_dash=True),
                metavar="FILE",
                help=f"File with a token that may read; '-' reads it from stdin. Else {TOKEN_VARIABLE}, else a prompt.",
            ),
            click.option(
                "--ca-bundle",
                type=CaBundle(),
                metavar="FILE",
                help="PEM file with the certificate authorities to verify the endpoint against.",
            ),
            click.option("--insecure", is_flag=True, help="Do not verify the endpoint's certificate."),
            click.option(
                "--timeout",
                type=Duration(),
                default="60s",
                show_default=True,
                metavar="TIME",
                help="How long to wait for each answer.",
            ),
        )
    ):
        command = option(command)
    return command


def asked_endpoint(options: ReadingBack) -> Endpoint | None:
    """Return the endpoint to ask; None when nothing was delivered. Raises `KongMeteringError` when it is not clear."""
    if options.insecure and options.ca_bundle:
        raise click.UsageError("--insecure verifies nothing: leave --ca-bundle out, or --insecure")
    check_readable(options.root)
    urls = {queue.endpoint for queue in settled_queues(options.root) if options.filters.match_queue(queue)}
    if len(urls) > 1:
        there = ", ".join(sorted(map(without_credentials, urls)))
        raise KongMeteringError(f"events were delivered to several endpoints: choose one with --endpoint: {there}")
    if not urls:
        return None
    token = chosen_token(options.token_file, os.environ)
    verify: bool | str = False if options.insecure else str(options.ca_bundle or "") or True
    return Endpoint(urls.pop(), token, options.timeout, 0, verify)


def meant(options: ReadingBack, endpoint: Endpoint) -> Callable[[QueueIdentity], bool]:
    """Return what tells the queues that are meant."""
    return lambda queue: queue.endpoint == endpoint.url and options.filters.match_queue(queue)


@contextmanager
def asking(endpoint: Endpoint) -> Iterator[tuple[Web, Timing]]:
    """Ask an endpoint, and be interrupted at any moment: nothing here does harm when it is cut short."""
    timing = click.get_current_context().find_object(Timing) or Timing()
    pace = Pace(timing.sleep, _BETWEEN_SECONDS)
    with Interruption() as interruption, closing(Web(endpoint, timing.clock, pace)) as web:
        try:
            with interruption.allowed():
                yield web, timing
        except Interrupted:
            raise interruption.exit() from None


def unknown_api(endpoint: Endpoint) -> KongMeteringError:
    """Make the error for an endpoint that cannot be asked."""
    return KongMeteringError(
        f"{without_credentials(endpoint.url)} is none of OpenMeter's URLs for events (.../api/v1/events, "
        ".../openmeter/events), so it is not known how to ask there"
    )
