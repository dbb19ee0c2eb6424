"""What the instances of the plugin share within one process."""

from __future__ import annotations

import atexit
import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kong_metering import PLUGIN_NAME
from kong_metering.captured import CapturedHeaders
from kong_metering.clock import Clock, SystemClock
from kong_metering.delivery.couriers import MAX_COURIERS, Couriers
from kong_metering.delivery.registry import Delivery
from kong_metering.descriptors import most_of_descriptors
from kong_metering.ingest.client import IngestClient
from kong_metering.ingest.connections import MAX_IDLE, Connections
from kong_metering.log import LOGGER, Once, Relay, Repeats
from kong_metering.measures import Requests, Timings
from kong_metering.stats import Stats
from kong_metering.trial.batching import ADAPTIVE_BATCH
from kong_metering.upkeep.spooler import Spooler
from kong_metering.upkeep.verifier import Verifier

if TYPE_CHECKING:
    from kong_metering.inbox.lent import LentRings
    from kong_metering.spool.options import SpoolOptions

_EXIT_FLUSH_SECONDS = 5.0
# Of the descriptors, where there are few. A courier has a connection, and a file that it reads.
_SHARE_FOR_IDLE, _SHARE_FOR_COURIERS = 8, 16


@dataclass(frozen=True)
class Runtime:
    """Clock, account, delivery, what access phases captured, and what is measured, of one process.

    `shared_key`: under which name an access phase keeps in Kong what it cannot keep here. `unserialisable`: the ids of
    plugin entities of which Kong could not serialise a log record, so that theirs are asked for step by step.
    """

    clock: Clock
    stats: Stats
    delivery: Delivery
    relay: Relay
    captured: CapturedHeaders
    timings: Timings
    requests: Requests
    shared_key: str = PLUGIN_NAME
    verifier: Verifier | None = None
    once: Once = field(default_factory=Once)
    unserialisable: set[str] = field(default_factory=set)


def make_runtime(  # noqa: PLR0913, PLR0917 - what it is made of
    clock: Clock | None = None,
    ca_bundle: str | None = None,
    relay: Relay | None = None,
    spool: SpoolOptions | None = None,
    adaptive_batch: int = ADAPTIVE_BATCH,
    shared_key: str = PLUGIN_NAME,
    lent: LentRings | None = None,
) -> Runtime:
    """Put a runtime together from its parts; without `spool` events wait in memory.

    `lent`: memory that outlives this process, and what dead ones have left there.

    Raises `StartupError` when the spool's threads cannot be started.
    """
    clock = clock or SystemClock()
    relay = Relay() if relay is None else relay
    stats, timings = Stats(), Timings()
    connect = functools.partial(IngestClient, clock=clock)
    connections = Connections(clock, connect, most_of_descriptors(MAX_IDLE, _SHARE_FOR_IDLE))
    spooler = None
    if spool is not None:
        spooler = Spooler(spool, clock=clock, stats=stats, connections=connections, timings=timings, lent=lent)
        spooler.start()
    delivery = Delivery(
        clock=clock,
        stats=stats,
        couriers=Couriers(clock, limit=most_of_descriptors(MAX_COURIERS, _SHARE_FOR_COURIERS)),
        connections=connections,
        ca_bundle=ca_bundle,
        adaptive_batch=adaptive_batch,
        spooler=spooler,
        timings=timings,
    )
    verifier = None
    if spool is not None:
        verifier = Verifier(spool, delivery.delivered_queues, clock)
        verifier.start()
    captured, requests = CapturedHeaders(clock), Requests(clock)
    return Runtime(clock, stats, delivery, relay, captured, timings, requests, shared_key, verifier)


@functools.cache
def default_runtime() -> Runtime:
    """Give the runtime for a foreign host, such as kong-pdk's own server, which knows nothing of one."""
    runtime = make_runtime()
    repeats = Repeats(runtime.clock)
    LOGGER.addFilter(repeats)
    atexit.register(repeats.flush)
    atexit.register(runtime.delivery.close, _EXIT_FLUSH_SECONDS)
    return runtime
