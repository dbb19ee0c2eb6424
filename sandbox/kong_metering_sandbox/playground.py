"""`make sandbox`: gateway, plugin server and collector, kept running, and what can be tried with them."""

from __future__ import annotations

import shlex
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from kong_metering import SPOOL_DIRECTORY
from kong_metering.commands.tokens import TOKEN_VARIABLE
from kong_metering_sandbox.collector.process import CollectorProcess
from kong_metering_sandbox.control import Control, Troubles, Vault
from kong_metering_sandbox.faulty_server import Faults
from kong_metering_sandbox.gateways import GATEWAYS, StandIn
from kong_metering_sandbox.stage import VARIABLES, deck_example, declarative
from kong_metering_sandbox.troubles import Addresses, asking, enabling, troubles
from kong_metering_sandbox.upstream_process import UpstreamProcess

if TYPE_CHECKING:
    from rich.console import Console

    from kong_metering_sandbox.gateways import Gateway
    from kong_metering_sandbox.troubles import Trouble

_FIRST_SECRET = "om_first"  # noqa: S105 - made up


def play(console: Console, directory: Path, gateway_name: str, *, usual_ports: bool) -> int:
    """Keep everything running until SIGINT or SIGTERM; returns the exit status."""
    with ExitStack() as running:
        console.print(f"Starting gateway ({gateway_name}), plugin server, upstream and collector ...")
        upstream = running.enter_context(UpstreamProcess())
        collector = running.enter_context(CollectorProcess())
        vault = Vault(directory / "vault")
        vault.put(_FIRST_SECRET)
        faults = Faults(directory / "control")
        faults.set_bug(is_there=False)
        writable = issubclass(GATEWAYS[gateway_name], StandIn)
        configuration = declarative(upstream.url, [] if writable else deck_example(collector.ingest_v3))
        gateway = GATEWAYS[gateway_name](
            directory / "gateway",
            configuration,
            settings=_settings(directory, faults, writable=writable, usual_ports=usual_ports),
            environment={"STANDIN_VAULT": str(vault.directory), **VARIABLES},
        )
        running.enter_context(gateway)
        control = running.enter_context(Control(Troubles(gateway, collector, faults, vault)))
        at = Addresses(gateway.proxy_url, gateway.admin_url, collector.url, control.url, _verifying(gateway))
        console.print("\n".join(_words(gateway, at, writable=writable)), markup=False, soft_wrap=True)
        with _interrupts() as interrupted:
            while not interrupted:
                time.sleep(0.2)
    console.print("Stopped.")
    return 0


def _settings(directory: Path, faults: Faults, *, writable: bool, usual_ports: bool) -> dict[str, str]:
    prefix = directory / "gateway" / "prefix"
    command = [*faults.command(prefix / SPOOL_DIRECTORY), "--kong-prefix", str(prefix)]
    settings = {"pluginserver_metering_start_cmd": shlex.join(command)}
    if writable:
        settings["database"] = "memory"
    return settings | (_usual_ports() if usual_ports else {})


def _usual_ports() -> dict[str, str]:
    """Take Kong's usual ports where they are free, so that the vendor plugin's examples work letter by letter."""
    ports = {"proxy_listen": 8000, "admin_listen": 8001}
    return {name: f"127.0.0.1:{port}" for name, port in ports.items() if _is_free(port)}


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def _verifying(gateway: Gateway) -> str:
    """Give the command as it works here: with the token, beside this interpreter, at once."""
    command = [
        str(Path(sys.executable).with_name("kong-metering")),
        "verify",
        "-p",
        str(gateway.prefix),
        "--settle",
        "1s",
    ]
    return f"{TOKEN_VARIABLE}={_FIRST_SECRET} {shlex.join(command)}"


def _words(gateway: Gateway, at: Addresses, *, writable: bool) -> Iterator[str]:
    yield f"Gateway        {at.proxy}  (a service on /orders)"
    yield f"Admin API      {at.admin}" + ("" if writable else "  (db-less: read-only)")
    yield f"Collector      {at.collector}  (/usage, /events, /stats, /requests)"
    yield f"Sandbox        {at.control}  (/status: the plugin server's account; /log: warnings and errors)"
    yield f"Error log      {gateway.prefix / 'logs' / 'error.log'}"
    yield f"Spool          {gateway.prefix / SPOOL_DIRECTORY}"
    yield ""
    if writable:
        yield "Enable the plugin:"
        yield f"  {enabling(at)}"
    yield "Send a request, and see who is billed:"
    yield f"  {asking(at)}"
    yield f"  curl {at.collector}/usage"
    yield ""
    yield "What happens when things fail: bring it about, and send requests as above. This ends all of it:"
    yield f"  curl -X DELETE {at.control}/troubles"
    for trouble in troubles(at, writable=writable):
        yield from _told(trouble)
    yield ""
    yield "Ctrl-C ends it."


def _told(trouble: Trouble) -> Iterator[str]:
    yield f"- {trouble.row}"
    for curl, sees in ((trouble.curl, trouble.sees), (trouble.ending, trouble.then)):
        if curl:
            yield f"  {curl}"
        if sees:
            yield f"    -> {sees}"


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of ending at once."""
    received: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda number, _: received.append(number)) for number in numbers]
    try:
        yield received
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
