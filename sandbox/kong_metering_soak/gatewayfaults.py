"""What befalls the gateway and its plugin server in a soak: kills, stops, reloads, its disk and its clock.

Contract: used by one thread at a time; `calm` is held while the gateway must not be configured. Every fault ends what
it began. `killed` has who got a SIGKILL.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kong_metering_sandbox.faulty_server import DiskFault, Faults
from kong_metering_sandbox.gateways import Gateway, wait_for
from kong_metering_soak.schedule import Kind
from kong_metering_soak.verdict import Killed

if TYPE_CHECKING:
    from kong_metering_soak.disk import Disk

_DAY = 86_400.0
_MONTH, _YEAR = 31 * _DAY, 365 * _DAY
_TROUBLE_SECONDS = 1.0
_REFILL_SECONDS = 0.1
_KILLED_IN_OVERLAP = 0.3
_MOST_KILLS = 3


@dataclass(frozen=True)
class Victim:
    """What the faults befall. `outage` makes the endpoint fail while its context lasts."""

    gateway: Gateway
    faults: Faults
    disk: Disk
    outage: Callable[[], AbstractContextManager[None]]


class GatewayFaults:
    """Lets them happen.

    `overlap` is for how many seconds the old plugin server lives on after a reload; `kills_in_overlap` whether there is
    time to kill one of the two meanwhile.
    """

    def __init__(self, victim: Victim, *, overlap: float, kills_in_overlap: bool) -> None:
        self.killed: list[Killed] = []
        self.calm = threading.Lock()
        self._gateway = victim.gateway
        self._set = victim.faults
        self._disk = victim.disk
        self._outage = victim.outage
        self._overlap = overlap
        self._kills_in_overlap = kills_in_overlap
        self._faults: dict[Kind, Callable[[float, random.Random], str]] = {
            Kind.KILL: self._kill_several,
            Kind.STOP: self._stop_and_start,
            Kind.RELOAD: self._reload,
            Kind.FULL_DISK: self._fill_disk,
            Kind.READ_ONLY: lambda seconds, _: self._trouble_disk(DiskFault.READ_ONLY, seconds),
            Kind.BROKEN_DISK: lambda seconds, _: self._trouble_disk(DiskFault.BROKEN, seconds),
            Kind.CLOCK_FORWARD: lambda seconds, _: self._set_clock(seconds, _DAY),
            Kind.CLOCK_BACK: lambda seconds, _: self._set_clock(seconds, -_DAY),
            Kind.BORN_AHEAD: lambda seconds, _: self._start_with_clock(seconds, _MONTH),
            Kind.BORN_BEHIND: lambda seconds, _: self._start_with_clock(seconds, -_YEAR),
        }

    def befall(self, kind: Kind, seconds: float, chance: random.Random) -> str:
        """Let a fault happen from its beginning to its end; returns what else is to be told of it."""
        return self._faults[kind](seconds, chance)

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
        with self.calm:
            before = self._plugin_servers()
            pid = before[-1]
            at = time.monotonic()
            os.kill(pid, signal.SIGKILL)
            self.killed.append(Killed(pid, at))
            # A process that dies gives up its command line first, and then its socket: until it is gone for good, it is
            # not listed any more, and its socket takes connections that nobody answers.
            wait_for(lambda: not Path(f"/proc/{pid}").exists(), f"process {pid} has died")
            wait_for(lambda: set(self._gateway.plugin_server_pids()) - set(before), f"another follows process {pid}")
            self._gateway.wait_for_plugin_server()
        return pid

    def _plugin_servers(self) -> list[int]:
        """List the plugin servers, the oldest first; if there is none, wait until the gateway has started one."""
        found: list[int] = []

        def any_found() -> bool:
            found[:] = self._gateway.plugin_server_pids()
            return bool(found)

        wait_for(any_found, "there is a plugin server")
        return found

    def _stop_and_start(self, seconds: float, _chance: random.Random) -> str:
        with self.calm:
            pids = self._gateway.plugin_server_pids()
            self._gateway.stop()
            time.sleep(seconds / 4)
            self._gateway.start()
        return f"process {', '.join(map(str, pids))}"

    def _reload(self, _seconds: float, chance: random.Random) -> str:
        with self.calm:
            old = self._plugin_servers()[-1]
            self._gateway.reload()
        detail = f"process {old} lives on for {self._overlap:g} s"
        if self._kills_in_overlap and chance.random() < _KILLED_IN_OVERLAP:
            time.sleep(self._overlap / 2)
            detail += f", process {self._kill()} is killed meanwhile"
            time.sleep(self._overlap / 2)
        else:
            time.sleep(self._overlap)
        return detail

    # -- its disk -------------------------------------------------------------------------------------------------

    def _fill_disk(self, seconds: float, _chance: random.Random) -> str:
        """Fill the disk while some events wait on it; they leave while it is full."""
        with self._outage():
            time.sleep(_TROUBLE_SECONDS / 2)
            self._disk.fill()
            self._keep_full(_TROUBLE_SECONDS / 2)
        self._keep_full(seconds - _TROUBLE_SECONDS)
        self._disk.free()
        return f"{self._disk.kind}; the endpoint answers 503 for the first {_TROUBLE_SECONDS:g} s"

    def _keep_full(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self._disk.fill()
            time.sleep(_REFILL_SECONDS)

    def _trouble_disk(self, fault: DiskFault, seconds: float) -> str:
        """Let the disk fail while some events wait on it."""
        try:
            with self._outage():
                time.sleep(_TROUBLE_SECONDS / 2)
                self._set.set_disk(fault)
                time.sleep(_TROUBLE_SECONDS / 2)
            time.sleep(max(0.0, seconds - _TROUBLE_SECONDS))
        finally:
            self._set.set_disk(None)
        return f"the endpoint answers 503 for the first {_TROUBLE_SECONDS:g} s"

    # -- its clock ------------------------------------------------------------------------------------------------

    def _set_clock(self, seconds: float, offset: float) -> str:
        with self._clock(offset):
            time.sleep(seconds)
        return "and then right again"

    def _start_with_clock(self, seconds: float, offset: float) -> str:
        """Let a plugin server begin with a wrong clock, while events wait that came when it was right."""
        with self._outage():
            time.sleep(_TROUBLE_SECONDS / 2)
            with self._clock(offset):
                pid = self._kill()
                time.sleep(_TROUBLE_SECONDS / 2)
        time.sleep(max(0.0, seconds - _TROUBLE_SECONDS))
        return f"after a SIGKILL of process {pid}; then it is set right"

    @contextmanager
    def _clock(self, offset: float) -> Iterator[None]:
        self._set.set_clock(offset)
        try:
            yield
        finally:
            self._set.set_clock(0)
