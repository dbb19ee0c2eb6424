"""The world of a soak: gateway, plugin server, upstream and collector, and each fault that can befall them.

Contract: faults of the endpoint and faults of the gateway may run on two threads, one of each at a time. Every fault
ends what it began. `timeline` has what happened, with the times of the monotonic clock that the log phases have too.
"""

from __future__ import annotations

import random
import shlex
import threading
import time
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kong_metering_sandbox.collector.faults import FaultRule
from kong_metering_sandbox.collector.process import CollectorProcess
from kong_metering_sandbox.faulty_server import Faults
from kong_metering_sandbox.gateways import StandIn
from kong_metering_sandbox.upstream_process import UpstreamProcess
from kong_metering_soak.disk import make_disk
from kong_metering_soak.endpoint import EndpointFaults
from kong_metering_soak.gatewayfaults import GatewayFaults, Victim
from kong_metering_soak.schedule import CALM_KINDS, ENDPOINT_KINDS, Kind, Planned
from kong_metering_soak.shop import Shop

if TYPE_CHECKING:
    from typing_extensions import Self

    from kong_metering_soak.verdict import Killed

_LONG_SECONDS = 300.0


@dataclass(frozen=True)
class Settings:
    """How a soak runs. `flags` are added to the plugin server's."""

    seconds: float
    rate: float
    has_spool: bool
    flags: str = ""

    @property
    def is_long(self) -> bool:
        """Whether there is time for Kong's ten seconds of overlap, hangs of 30 s and default timeouts."""
        return self.seconds >= _LONG_SECONDS

    @property
    def overlap(self) -> float:
        """For how long the old plugin server lives on after a reload."""
        return 9.5 if self.is_long else 2.0

    @property
    def hang(self) -> float:
        """How long a hanging endpoint hangs."""
        return 30.0 if self.is_long else 3.0

    @property
    def timeout_ms(self) -> int:
        """How long the plugin waits for the endpoint."""
        return 10_000 if self.is_long else 1_500


@dataclass(frozen=True)
class Happened:
    """A fault that is over; times of the monotonic clock."""

    kind: Kind
    begun: float
    ended: float
    detail: str

    @property
    def lane(self) -> str:
        """Whose fault it was."""
        return "endpoint" if self.kind in ENDPOINT_KINDS else "gateway"


class World:
    """Everything that runs; a context manager that ends it."""

    def __init__(self, directory: Path, settings: Settings) -> None:
        self.settings = settings
        self.timeline: list[Happened] = []
        self.log_phases = directory / "log-phases"
        self._faults = Faults(directory / "control")
        self.disk = make_disk(directory / "disk", self._faults)
        self.spool = self.disk.directory / "spool"
        self._directory = directory
        self._vault = directory / "vault"
        self._running = ExitStack()
        self._endpoint_calm = threading.Lock()

    def __enter__(self) -> Self:
        with ExitStack() as running:
            running.callback(self.disk.close)
            upstream = running.enter_context(UpstreamProcess())
            self.collector = running.enter_context(CollectorProcess())
            self.shop = self._open_shop(upstream)
            self.collector.client.set_tokens(self.shop.tokens)
            self.gateway = StandIn(
                self._directory / "gateway",
                self.shop.declarative(),
                settings=self._gateway_settings(),
                environment={"STANDIN_VAULT": str(self._vault)},
            )
            self._endpoint = EndpointFaults(self.collector, self.shop, self._configure, hang=self.settings.hang)
            victim = Victim(self.gateway, self._faults, self.disk, self._outage)
            self._gateway = GatewayFaults(victim, overlap=self.settings.overlap, kills_in_overlap=self.settings.is_long)
            running.enter_context(self.gateway)
            self._running = running.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._running.close()

    @property
    def killed(self) -> list[Killed]:
        """Who got a SIGKILL, and when."""
        return self._gateway.killed

    def befall(self, fault: Planned) -> Happened:
        """Let a fault happen from its beginning to its end, and tell about it."""
        chance = random.Random(fault.seed)  # noqa: S311 - a plan that can be repeated
        is_endpoints = fault.kind in ENDPOINT_KINDS
        with self._endpoint_calm if is_endpoints or fault.kind in CALM_KINDS else nullcontext():
            begun = time.monotonic()
            faults = self._endpoint if is_endpoints else self._gateway
            detail = faults.befall(fault.kind, fault.seconds, chance)
        happened = Happened(fault.kind, begun, time.monotonic(), detail)
        self.timeline.append(happened)
        return happened

    def wait_for_secret(self) -> None:
        """Wait until a rotated secret has arrived where it must; Kong is asked for it once a minute at most."""
        self._endpoint.wait_for_secret()

    def _configure(self) -> None:
        with self._gateway.calm:
            self.gateway.configure(self.shop.declarative())

    def _outage(self) -> AbstractContextManager[None]:
        return self._endpoint.rule(FaultRule(status=503))

    def _open_shop(self, upstream: UpstreamProcess) -> Shop:
        return Shop(
            self._vault,
            upstream.url,
            self.collector.url,
            rate=self.settings.rate,
            timeout_ms=self.settings.timeout_ms,
        )

    def _gateway_settings(self) -> dict[str, str]:
        prefix = self._directory / "gateway" / "prefix"
        command = [*self._faults.command(self.spool), "--kong-prefix", str(prefix)]
        command += ["--spool-dir", str(self.spool)] if self.settings.has_spool else ["--no-spool"]
        return {
            "pluginserver_metering_start_cmd": f"{shlex.join(command)} {self.settings.flags}".rstrip(),
            "nginx_worker_processes": "2",
            "standin_reload_linger": str(self.settings.overlap),
            "standin_log_phases": str(self.log_phases),
        }
