"""The world of a soak: gateway, plugin server, upstream and collector, and each fault that can befall them.

Contract: faults of the endpoint and faults of the gateway may run on two threads, one of each at a time. Every fault
ends what it began. `timeline` has what happened, with the times of the monotonic clock that the log phases have too.
"""

from __future__ import annotations

import json
import os
import random
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kong_metering import PLUGIN_NAME
from kong_metering_sandbox.collector.faults import FaultMatch, FaultRule
from kong_metering_sandbox.collector.process import CollectorProcess
from kong_metering_sandbox.collector.tokens import fingerprint
from kong_metering_sandbox.gateways import StandIn, wait_for
from kong_metering_sandbox.upstream_process import UpstreamProcess
from kong_metering_soak.disk import make_disk
from kong_metering_soak.schedule import ENDPOINT_KINDS, Kind, Planned
from kong_metering_soak.server import CLOCK
from kong_metering_soak.traffic import REFUSED_SUBJECT, ROUTES, SUBJECT_HEADER
from kong_metering_soak.verdict import Killed

if TYPE_CHECKING:
    from typing_extensions import Self

_DAY = 86_400.0
_FULL_DISK_TROUBLE = 1.0
_REFILL_SECONDS = 0.1
_LONG_SECONDS = 300.0
_KILLED_IN_OVERLAP = 0.3
_MOST_KILLS = 3
_ENTITIES = {
    "orders": "0b1f7c39-52b0-4b5e-9d0b-0e3d7a2f6c01",
    "invoices": "0b1f7c39-52b0-4b5e-9d0b-0e3d7a2f6c02",
}
_PATHS = {"orders": "/api/v3/openmeter/events", "invoices": "/api/v1/events"}
_REFUSES_CHOSEN = FaultRule(status=400, match=FaultMatch(subject=REFUSED_SUBJECT))
_RULES: Mapping[Kind, FaultRule] = {
    Kind.STATUS_500: FaultRule(status=500),
    Kind.STATUS_500_STORED: FaultRule(status=500, store=True),
    Kind.STATUS_503: FaultRule(status=503),
    Kind.STATUS_429: FaultRule(status=429, headers={"Retry-After": "1"}),
    Kind.RESET_IN_BODY: FaultRule(reset="in_body"),
    Kind.RESET_AFTER_STORING: FaultRule(reset="after_store"),
    Kind.RESET_IN_ANSWER: FaultRule(reset="after_headers"),
}


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
        self.killed: list[Killed] = []
        self.timeline: list[Happened] = []
        self.log_phases = directory / "log-phases"
        self._control = directory / "control"
        self._control.mkdir()
        self.disk = make_disk(directory / "disk", self._control)
        self.spool = self.disk.directory / "spool"
        self._directory = directory
        self._rotations = 0
        self._running = ExitStack()
        self._gateway_calm, self._endpoint_calm = threading.Lock(), threading.Lock()
        self._faults: dict[Kind, Callable[[float, random.Random], str]] = {
            **dict.fromkeys(_RULES, self._never),
            Kind.HANG: self._hang,
            Kind.REFUSED: self._refuse_connections,
            Kind.WRONG_TOKEN: self._change_tokens,
            Kind.KILL: self._kill_several,
            Kind.STOP: self._stop_and_start,
            Kind.RELOAD: self._reload,
            Kind.FULL_DISK: self._fill_disk,
            Kind.CLOCK_FORWARD: lambda seconds, _: self._set_clock(seconds, _DAY),
            Kind.CLOCK_BACK: lambda seconds, _: self._set_clock(seconds, -_DAY),
        }

    def __enter__(self) -> Self:
        with ExitStack() as running:
            running.callback(self.disk.close)
            self._upstream = running.enter_context(UpstreamProcess())
            self.collector = running.enter_context(CollectorProcess(tokens=self._tokens()))
            self.collector.client.faults(_REFUSES_CHOSEN)
            self.gateway = StandIn(self._directory / "gateway", self._declarative(), settings=self._gateway_settings())
            running.enter_context(self.gateway)
            self._running = running.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._running.close()

    def befall(self, fault: Planned) -> Happened:
        """Let a fault happen from its beginning to its end, and tell about it."""
        with self._endpoint_calm if fault.kind in ENDPOINT_KINDS else nullcontext():
            begun = time.monotonic()
            detail = self._befall(fault)
        happened = Happened(fault.kind, begun, time.monotonic(), detail)
        self.timeline.append(happened)
        return happened

    def _befall(self, fault: Planned) -> str:
        rule = _RULES.get(fault.kind)
        if rule is not None:
            return self._misbehave(rule, fault.seconds)
        chance = random.Random(fault.seed)  # noqa: S311 - a plan that can be repeated
        return self._faults[fault.kind](fault.seconds, chance)

    def route_of(self, path: str, token: str | None) -> str | None:
        """Tell whose endpoint and token an event came with; None when they do not belong together."""
        for route in ROUTES:
            tokens = [fingerprint(f"Bearer {_token(route, number)}") for number in range(self._rotations + 1)]
            if path == _PATHS[route] and token in tokens:
                return route
        return None

    def route_of_entity(self, entity_id: str, endpoint: str) -> str | None:
        """Tell whose dead letter it is, by its entity and endpoint; None when they do not belong together."""
        for route in ROUTES:
            if (entity_id, endpoint) == (_ENTITIES[route], self.collector.url + _PATHS[route]):
                return route
        return None

    # -- how it is set up -----------------------------------------------------------------------------------------

    def _tokens(self) -> list[str]:
        return [_token(route, self._rotations) for route in ROUTES]

    def _declarative(self) -> str:
        routes = [{"name": route, "paths": [f"/{route}"], "plugins": [self._plugin(route)]} for route in ROUTES]
        service = {"name": "shop", "url": self._upstream.url, "routes": routes}
        return json.dumps({"_format_version": "3.0", "services": [service]})

    def _plugin(self, route: str) -> dict[str, Any]:
        """Configure the entity of a route: one with a breaker and small batches, one without."""
        has_breaker = route == "invoices"
        queue = {
            "max_batch_size": 20 if has_breaker else 100,
            "max_coalescing_delay": 0.1,
            # So many that a full disk is survived, so few that an outage leaves events on disk.
            "max_entries": int(self.settings.rate * 4),
            "max_retry_time": 2,
            "max_retry_delay": 0.5,
            "failure_threshold": 3 if has_breaker else 0,
            "breaker_cooldown": 1,
        }
        config = {
            "ingest_endpoint": self.collector.url + _PATHS[route],
            "api_token": _token(route, self._rotations),
            "meter_ai_token_usage": False,
            "subject": {"look_up_value_in": "header", "field": SUBJECT_HEADER},
            "timeout": self.settings.timeout_ms,
            "queue": queue,
        }
        return {"name": PLUGIN_NAME, "id": _ENTITIES[route], "config": config}

    def _gateway_settings(self) -> dict[str, str]:
        prefix = self._directory / "gateway" / "prefix"
        command = [sys.executable, "-m", "kong_metering_soak.server", str(self._control), "--kong-prefix", str(prefix)]
        command += ["--spool-dir", str(self.spool)] if self.settings.has_spool else ["--no-spool"]
        return {
            "pluginserver_metering_start_cmd": f"{shlex.join(command)} {self.settings.flags}".rstrip(),
            "nginx_worker_processes": "2",
            "standin_reload_linger": str(self.settings.overlap),
            "standin_log_phases": str(self.log_phases),
        }

    # -- the endpoint's faults ------------------------------------------------------------------------------------

    @staticmethod
    def _never(_seconds: float, _chance: random.Random) -> str:
        raise AssertionError("a fault that is a rule")

    def _misbehave(self, rule: FaultRule, seconds: float) -> str:
        with self._rule(rule):
            time.sleep(seconds)
        return ""

    @contextmanager
    def _rule(self, rule: FaultRule) -> Iterator[None]:
        self.collector.client.faults(rule, _REFUSES_CHOSEN)
        try:
            yield
        finally:
            self.collector.client.faults(_REFUSES_CHOSEN)

    def _hang(self, seconds: float, chance: random.Random) -> str:
        stores = chance.choice((True, False))
        self._misbehave(FaultRule(hang=self.settings.hang, store=stores), seconds)
        return f"{self.settings.hang:g} s each, events {'stored' if stores else 'not stored'}"

    def _refuse_connections(self, seconds: float, _chance: random.Random) -> str:
        self.collector.pause()
        try:
            time.sleep(seconds)
        finally:
            self.collector.resume()
        return ""

    def _change_tokens(self, seconds: float, _chance: random.Random) -> str:
        self._rotations += 1
        self.collector.client.set_tokens(self._tokens())
        time.sleep(seconds)
        with self._gateway_calm:
            self.gateway.configure(self._declarative())
        return "then the gateway is told the new ones"

    # -- the gateway's faults -------------------------------------------------------------------------------------

    def _kill_several(self, seconds: float, chance: random.Random) -> str:
        pids = []
        until = time.monotonic() + seconds
        for _ in range(chance.randint(1, _MOST_KILLS)):
            pids.append(self._kill())
            time.sleep(chance.uniform(0.1, 1.0))
            if time.monotonic() > until:
                break
        return f"process {', '.join(map(str, pids))}"

    def _kill(self) -> int:
        """Kill the newest plugin server, and wait for the next one."""
        with self._gateway_calm:
            before = self._plugin_servers()
            pid = before[-1]
            at = time.monotonic()
            os.kill(pid, signal.SIGKILL)
            self.killed.append(Killed(pid, at))
            # A process that dies gives up its command line first, and then its socket: until it is gone for good, it is
            # not listed any more, and its socket takes connections that nobody answers.
            wait_for(lambda: not Path(f"/proc/{pid}").exists(), f"process {pid} has died")
            wait_for(lambda: set(self.gateway.plugin_server_pids()) - set(before), f"another one follows process {pid}")
            self.gateway.wait_for_plugin_server()
        return pid

    def _plugin_servers(self) -> list[int]:
        """List the plugin servers, the oldest first; if there is none, wait until the gateway has started one."""
        found: list[int] = []

        def any_found() -> bool:
            found[:] = self.gateway.plugin_server_pids()
            return bool(found)

        wait_for(any_found, "there is a plugin server")
        return found

    def _stop_and_start(self, seconds: float, _chance: random.Random) -> str:
        with self._gateway_calm:
            pids = self.gateway.plugin_server_pids()
            self.gateway.stop()
            time.sleep(seconds / 4)
            self.gateway.start()
        return f"process {', '.join(map(str, pids))}"

    def _reload(self, _seconds: float, chance: random.Random) -> str:
        with self._gateway_calm:
            old = self._plugin_servers()[-1]
            self.gateway.reload()
        overlap = self.settings.overlap
        detail = f"process {old} lives on for {overlap:g} s"
        if self.settings.is_long and chance.random() < _KILLED_IN_OVERLAP:
            time.sleep(overlap / 2)
            detail += f", process {self._kill()} is killed meanwhile"
            time.sleep(overlap / 2)
        else:
            time.sleep(overlap)
        return detail

    def _fill_disk(self, seconds: float, _chance: random.Random) -> str:
        """Fill the disk while some events wait on it; they leave while it is full."""
        with self._endpoint_calm:
            with self._rule(FaultRule(status=503)):
                time.sleep(_FULL_DISK_TROUBLE / 2)
                self.disk.fill()
                self._keep_full(_FULL_DISK_TROUBLE / 2)
            self._keep_full(seconds - _FULL_DISK_TROUBLE)
            self.disk.free()
        return f"{self.disk.kind}; the endpoint answers 503 for the first {_FULL_DISK_TROUBLE:g} s"

    def _keep_full(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.disk.fill()
            time.sleep(_REFILL_SECONDS)

    def _set_clock(self, seconds: float, offset: float) -> str:
        self._write_clock(offset)
        try:
            time.sleep(seconds)
        finally:
            self._write_clock(0)
        return "and then right again"

    def _write_clock(self, offset: float) -> None:
        draft = self._control / f"{CLOCK}.new"
        draft.write_text(str(offset), encoding="ascii")
        draft.replace(self._control / CLOCK)


def _token(route: str, number: int) -> str:
    return f"om_{route}_{number}"
