"""Where the concrete pieces meet; they are started from the far end of the way, and ended from the near one."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from kong_metering.host.dispatch import Dispatcher, Limits
from kong_metering.host.instances import PluginDefinition
from kong_metering.host.server import Hooks, ServerOptions, serve
from kong_metering.log import LOGGER, Relay
from kong_metering.plugin import Plugin
from kong_metering.runtime import Runtime, make_runtime
from kong_metering.schema import PLUGIN_NAME, plugin_info

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kong_metering.delivery.spooloptions import SpoolOptions

PHASES = ("access", "log")


def plugin_information() -> dict[str, Any]:
    """Give what Kong wants to know of the plugin."""
    return plugin_info(PHASES)


def dump(protocol: Literal["protobuf", "msgpack"]) -> object:
    """Give what Kong's query command is to print; Kong speaks the protocol that it names, MessagePack if it names none.

    The plugin server understands both, on the same socket.
    """
    plugins = [plugin_information()]
    return plugins if protocol == "msgpack" else {"Protocol": "ProtoBuf:1", "Plugins": plugins}


@dataclass(frozen=True)
class DeliveryOptions:
    """How events are kept and delivered.

    `stop_timeout`: seconds for what waits when the process is told to end. `ca_bundle`: the PEM file to verify
    endpoints with. `spool`: None to keep events in memory.
    """

    stop_timeout: float
    ca_bundle: str | None
    spool: SpoolOptions | None


def run(server: ServerOptions, limits: Limits, delivery: DeliveryOptions, relay: Relay) -> None:
    """Run the plugin server until it is told to end; raises `StartupError` if it cannot start."""
    runtime = make_runtime(ca_bundle=delivery.ca_bundle, relay=relay, spool=delivery.spool)
    dispatcher = Dispatcher(_definition(runtime), clock=runtime.clock, troubles=runtime.troubles, limits=limits)

    def housekeeping() -> None:
        runtime.delivery.sweep()
        runtime.captured.sweep()
        runtime.troubles.summarise()

    try:
        serve(dispatcher, server, runtime.troubles, Hooks(housekeeping, ending=runtime.delivery.begin_close))
    finally:
        runtime.delivery.close(delivery.stop_timeout)
        dispatcher.close()
        runtime.troubles.flush()
    _say_account(runtime)


def _definition(runtime: Runtime) -> PluginDefinition:
    def create(config: Mapping[str, Any]) -> Plugin:
        return Plugin(config, runtime)

    def status() -> dict[str, Any]:
        account = runtime.stats.snapshot()
        return {
            **asdict(account),
            "waiting": account.waiting,
            "queues": runtime.delivery.waiting(),
            "waiting_for_instances": runtime.delivery.waiting_for_instances(),
        }

    return PluginDefinition(PLUGIN_NAME, PHASES, create, plugin_information(), status)


def _say_account(runtime: Runtime) -> None:
    account = runtime.stats.snapshot()
    LOGGER.info(
        "ended: %d events accepted, %d adopted, %d delivered, %d left on disk, dead letters %s, dropped %s; "
        "requests without an event %s",
        account.accepted,
        account.adopted,
        account.delivered,
        account.left,
        account.dead_letters or "none",
        account.dropped or "none",
        account.skipped or "none",
    )
