"""Where the concrete pieces meet; they are started from the far end of the way, and ended from the near one."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from kong_metering import __version__
from kong_metering.capturememory import CaptureMemory, left_in
from kong_metering.host.absence import Absence
from kong_metering.host.dispatch import Dispatcher, Limits
from kong_metering.host.figures import Figures
from kong_metering.host.instances import PluginDefinition
from kong_metering.host.load import Load
from kong_metering.host.server import Hooks, serve
from kong_metering.host.supervisor import Supervisor, SupervisorOptions
from kong_metering.inbox.lent import LentRings
from kong_metering.information import PHASES, plugin_information
from kong_metering.log import LOGGER, ProcessLog, Reminder, cause_of
from kong_metering.memoryfile import Use
from kong_metering.plugin import Plugin
from kong_metering.plurals import form
from kong_metering.runtime import Runtime, make_runtime

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from kong_metering.captured import CapturedHeaders
    from kong_metering.host.board import Slot
    from kong_metering.host.keeping import Lent
    from kong_metering.host.opening import Opening
    from kong_metering.host.station import Station
    from kong_metering.plugin_identity import PluginIdentity
    from kong_metering.quantities import Listen
    from kong_metering.spool.options import SpoolOptions

# How long reading back may take to end: nothing is lost with it.
_VERIFIER_SECONDS = 0.2
# How long the disk may take over the end of a server: the supervisor kills it three seconds after `stop_timeout`.
_DISK_TIMEOUT_SECONDS = 2.5
# Each server counts what waits on disk in the one spool.
_ALIKE = ("waiting_for_instances",)


@dataclass(frozen=True)
class DeliveryOptions:
    """How events are kept and delivered.

    `stop_timeout`: seconds for what waits when the process is told to end. `ca_bundle`: the PEM file to verify
    endpoints with. `spool`: None to keep events in memory. `adaptive_batch`: how many events leave together, while more
    come, where `max_batch_size` is 1.
    """

    stop_timeout: float
    ca_bundle: str | None
    spool: SpoolOptions | None
    adaptive_batch: int


@dataclass(frozen=True)
class ServerOptions:
    """How servers serve and deliver: as which plugin, how long they keep what Kong forgot.

    `metrics`: where those who watch are answered, None: nowhere.
    """

    limits: Limits
    delivery: DeliveryOptions
    identity: PluginIdentity
    metrics: Listen | None = None


def run(
    opening: Opening,
    supervisor: SupervisorOptions,
    options: ServerOptions,
    log: ProcessLog,
) -> None:
    """Run the plugin server until it is told to end; raises `StartupError` if it cannot start."""

    def run_server(station: Station) -> None:
        _run_server(station, options, log)

    Supervisor(opening, supervisor, log, run_server, _watcher(opening.place.path, options.metrics)).run()


def _watcher(path: Path, listen: Listen | None) -> Callable[[Sequence[Slot], int], None] | None:
    """Return what the process beside the servers runs; None if there is to be none."""
    if listen is None:
        return None
    # Takes long, and memory. Not as late as in that process: one that is started anew is of the same version.
    from kong_metering.watching.watcher import watch  # noqa: PLC0415

    return lambda slots, supervisor: watch(slots, path, listen, supervisor)


def _run_server(station: Station, options: ServerOptions, log: ProcessLog) -> None:
    """Run one server, in a process of its own."""
    delivery, identity = options.delivery, options.identity
    runtime = make_runtime(
        ca_bundle=delivery.ca_bundle,
        relay=log.relay,
        spool=delivery.spool,
        adaptive_batch=delivery.adaptive_batch,
        shared_key=identity.name,
        lent=rings_in(station.lent),
    )
    _keep_captured(runtime.captured, station.lent)
    figures = Figures(station, lambda: _figures(runtime, dispatcher), lambda: _details(runtime, delivery), alike=_ALIKE)
    definition = _definition(identity, runtime, figures.told)
    dispatcher = Dispatcher(definition, clock=runtime.clock, limits=options.limits)
    absence = Absence(station.path, runtime.clock) if station.index == 0 and not station.takes_over else None
    load = Load(runtime.clock)
    # One of the servers says it for all.
    reminder = Reminder(log.complaints if station.index == 0 else (), runtime.clock)

    def housekeeping() -> None:
        runtime.delivery.sweep()
        runtime.captured.sweep()
        log.repeats.summarise()
        reminder.remind()
        figures.publish()
        if absence is not None:
            absence.look(lambda: bool(figures.told()["instances_started"]))
        if (trouble := load.trouble()) is not None:
            servers = len(station.slots)
            LOGGER.warning("a server %s; start more of them, with --servers %d or more", trouble, servers + 1)

    hooks = Hooks(
        housekeeping,
        ending=runtime.delivery.begin_close,
        parting=runtime.captured.pack,
        arriving=runtime.captured.unpack,
    )
    try:
        serve(dispatcher, station, hooks)
        # Not where it failed: the next server goes on with what is there.
        runtime.captured.leave_nothing()
    finally:
        if runtime.verifier is not None:
            runtime.verifier.end(_VERIFIER_SECONDS)
        runtime.delivery.close(delivery.stop_timeout, _DISK_TIMEOUT_SECONDS)
        dispatcher.close()
        log.repeats.flush()
        figures.publish()
    _say_account(runtime)


def rings_in(lent: Lent) -> LentRings:
    """Return the rings in what the supervisor lends a server."""
    return LentRings(lent.empty_for(Use.EVENTS), lent.left_for(Use.EVENTS))


def _keep_captured(captured: CapturedHeaders, lent: Lent) -> None:
    """Have what access phases capture outlive this process, and take over what dead ones had captured."""
    own = lent.empty_for(Use.REQUESTS)
    if own is not None:
        try:
            captured.mirror_to(CaptureMemory(own.descriptor))
        except OSError as error:
            LOGGER.warning(
                "if this process is killed, requests under way are billed by the headers in Kong's record: %s",
                cause_of(error),
            )
    for file in lent.left_for(Use.REQUESTS):
        try:
            captured.recover(left_in(file.descriptor))
        except Exception as error:  # noqa: BLE001 - or no server would ever serve again
            LOGGER.error("what a killed process knew of requests under way cannot be read: %s", cause_of(error))
        finally:
            # Returned even where this process has none of its own: what is taken over twice stays twice as long.
            os.ftruncate(file.descriptor, 0)


def _definition(
    identity: PluginIdentity, runtime: Runtime, status: Callable[[], Mapping[str, Any]]
) -> PluginDefinition:
    def create(config: Mapping[str, Any]) -> Plugin:
        return Plugin(config, runtime)

    observers = {"access": runtime.timings.access.observe, "log": runtime.timings.log.observe}
    return PluginDefinition(identity.name, PHASES, create, plugin_information(identity), status, observers)


def _figures(runtime: Runtime, dispatcher: Dispatcher) -> dict[str, Any]:
    account = runtime.stats.snapshot()
    return {
        **asdict(account),
        "waiting": account.waiting,
        "queues": runtime.delivery.waiting(),
        "instances_started": dispatcher.instances.times.starts,
        "stalled": runtime.delivery.stalled(),
        "held_back": runtime.delivery.held_back(),
        "waiting_for_instances": runtime.delivery.waiting_for_instances(),
    }


def _details(runtime: Runtime, delivery: DeliveryOptions) -> dict[str, Any]:
    """Return what is told of each server by itself: its plugin entities, queues and times."""
    spool = delivery.spool
    return {
        "version": __version__,
        "plugins": runtime.requests.told(),
        "queue_details": runtime.delivery.told(),
        "timings": runtime.timings.told(),
        "spool": None if spool is None else {"directory": str(spool.directory), "max_bytes": spool.max_bytes},
    }


def _say_account(runtime: Runtime) -> None:
    account = runtime.stats.snapshot()
    letters = account.dead_letters_dropped
    # The numbers are plain: programs read them.
    LOGGER.info(
        "ended: process %d, %d %s accepted, %d adopted, %d delivered, %d left on disk; dead letters %s; "
        "dropped %s; requests without an event %s%s%s",
        os.getpid(),
        account.accepted,
        form(account.accepted, "event"),
        account.adopted,
        account.delivered,
        account.left,
        _listed(account.dead_letters),
        _listed(account.dropped),
        _listed(account.skipped),
        f"; {letters} {form(letters, 'dead letter')} dropped for newer ones" if letters else "",
        f"; read back {_listed(account.verified)}" if account.verified else "",
    )


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items()) or "none"
