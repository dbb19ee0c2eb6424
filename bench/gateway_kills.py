"""The process that serves is killed with SIGKILL each second under load: what that costs clients and the bill.

Killed is a process of our plugin server that has no other below it: under a supervisor the server that it has forked,
otherwise the only one. A kill lasts from the signal to the end of the process, which takes a while to give back what
it has, and meanwhile keeps its connections open. Allowed to suffer are the requests that were under way during a kill,
from when the client sent them to when it had its answer; and, for the bill, those answered at most 10 ms before one:
Kong runs a log phase after the answer, and an event is on disk 10 ms later at most. Anything else is counted beside,
and misses what was wanted.
"""

from __future__ import annotations

import asyncio
import math
import os
import signal
import time
from collections import Counter
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from gateway_candidates import PROTOCOLS, ours
from gateway_client import NO_ANSWER, Exchange, send_traffic
from gateway_paper import Grid
from gateway_processes import serving_processes
from processes import Collector
from terminal import say_progress

_CONNECTIONS = 16
_GRACE_SECONDS = 0.010
_QUIET_SECONDS = 5.0
_DELIVERY_SECONDS = 60.0
_OK = 200


@dataclass(frozen=True)
class Kill:
    """When a process was sent SIGKILL, and when it had ended; from `time.perf_counter`."""

    sent: float
    ended: float


@dataclass(frozen=True)
class Toll:
    """What kills have cost: requests by status, and those that were not answered 200 or have no event.

    `in_flight` is how many requests were under way at a kill in all. `failed_apart` and `unbilled_apart` tell of those
    that were not, in milliseconds, how long they had been answered before the next kill, as a negative number, or were
    sent after the last one, whichever is nearer.
    """

    kills: int
    statuses: Counter[int]
    in_flight: int
    failed_in_flight: int
    failed_beside: int
    unbilled_in_flight: int
    unbilled_in_grace: int
    unbilled_beside: int
    failed_apart: tuple[float, ...]
    unbilled_apart: tuple[float, ...]


def count_toll(exchanges: Sequence[Exchange], billed: AbstractSet[str], kills: Sequence[Kill]) -> Toll:
    """Work out what kills have cost; `billed` are the subjects that have an event."""
    failed = [one for one in exchanges if one.status != _OK]
    unbilled = [one for one in exchanges if one.status == _OK and one.subject not in billed]
    beside = [one for one in failed if not _spans(one, kills)]
    not_in_flight = [one for one in unbilled if not _spans(one, kills)]
    early = [one for one in not_in_flight if not _spans(one, kills, _GRACE_SECONDS)]
    return Toll(
        kills=len(kills),
        statuses=Counter(one.status for one in exchanges),
        in_flight=sum(_spans(one, kills) for one in exchanges),
        failed_in_flight=len(failed) - len(beside),
        failed_beside=len(beside),
        unbilled_in_flight=len(unbilled) - len(not_in_flight),
        unbilled_in_grace=len(not_in_flight) - len(early),
        unbilled_beside=len(early),
        failed_apart=tuple(_apart(one, kills) for one in beside),
        unbilled_apart=tuple(_apart(one, kills) for one in not_in_flight),
    )


def _spans(one: Exchange, kills: Sequence[Kill], grace: float = 0.0) -> bool:
    """Whether there was a kill between its sending and its end, or a little later."""
    return any(kill.sent <= one.ended + grace and kill.ended >= one.sent for kill in kills)


def _apart(one: Exchange, kills: Sequence[Kill]) -> float:
    """Tell how far the nearest kill was from an exchange during which there was none; below 0 if it came later."""
    distances = [one.sent - kill.ended if kill.ended < one.sent else one.ended - kill.sent for kill in kills]
    return min(distances, key=abs, default=math.inf) * 1e3


def kill_each_second(directory: Path, seconds: int) -> dict[str, Toll]:
    """Run it with each protocol, one after the other."""
    return {protocol: _run(protocol, directory, seconds) for protocol in PROTOCOLS}


def _run(protocol: str, directory: Path, seconds: int) -> Toll:
    kills: list[Kill] = []
    with ExitStack() as stack:
        collector = stack.enter_context(Collector())
        candidate = ours(protocol, path="subjects")
        say_progress(f"kills, {protocol}")
        kong = stack.enter_context(candidate.kong(directory / "kills", collector.url))

        def kill() -> None:
            for pid in serving_processes(kong.master):
                _kill(pid, kills)

        exchanges = send_traffic(kong.port, connections=_CONNECTIONS, seconds=seconds, each_second=kill)
        billed = _wait_until_quiet(collector)
    say_progress("")
    return count_toll(exchanges, billed, kills)


def _kill(pid: int, kills: list[Kill]) -> None:
    """Kill a process, and note it once it has ended."""
    loop = asyncio.get_running_loop()
    handle = os.pidfd_open(pid)
    sent = time.perf_counter()

    def ended() -> None:
        kills.append(Kill(sent, time.perf_counter()))
        loop.remove_reader(handle)
        os.close(handle)

    loop.add_reader(handle, ended)
    os.kill(pid, signal.SIGKILL)


def _wait_until_quiet(collector: Collector) -> frozenset[str]:
    """Wait until no more events come, and give the subjects of all."""
    deadline = time.monotonic() + _DELIVERY_SECONDS
    before, quiet_since = -1, time.monotonic()
    while time.monotonic() < min(deadline, quiet_since + _QUIET_SECONDS):
        events = collector.ask()["events"]
        if events != before:
            before, quiet_since = events, time.monotonic()
        time.sleep(0.1)
    return collector.subjects()


def tolls(found: dict[str, Toll]) -> Grid:
    """Show what kills have cost."""
    columns = (
        "protocol",
        "kills",
        "requests",
        "200",
        "other answers",
        "no answer",
        "under way at a kill",
        "not 200: under way",
        "not 200: others",
        "unbilled: under way",
        "unbilled: answered ≤ 10 ms before",
        "unbilled: others",
    )
    rows = []
    for protocol, toll in found.items():
        other = {status: count for status, count in toll.statuses.items() if status not in (_OK, NO_ANSWER)}
        counts = (
            toll.kills,
            toll.statuses.total(),
            toll.statuses[_OK],
            ", ".join(f"{status}: {count:,}" for status, count in sorted(other.items())) or "0",
            toll.statuses[NO_ANSWER],
            toll.in_flight,
            toll.failed_in_flight,
            toll.failed_beside,
            toll.unbilled_in_flight,
            toll.unbilled_in_grace,
            toll.unbilled_beside,
        )
        rows.append([protocol, *(one if isinstance(one, str) else f"{one:,}" for one in counts)])
    return Grid(columns, rows)


def remarks(found: dict[str, Toll]) -> list[str]:
    """Say what was wanted, and whether it is met."""
    said = []
    for protocol, toll in found.items():
        only = toll.failed_beside == 0 and toll.unbilled_beside == 0
        said.append(
            f"{protocol}: only requests under way at a kill fail or go unbilled: {_met(holds=only)}{_how(toll)}"
        )
    if "msgpack" in found:
        none = found["msgpack"].statuses.keys() <= {_OK}
        said.append(f"msgpack: every request is answered 200: {_met(holds=none)}")
    return said


def _met(*, holds: bool) -> str:
    return "met" if holds else "MISSED"


def _how(toll: Toll) -> str:
    said = ""
    for what, apart in (("failed", toll.failed_apart), ("went unbilled", toll.unbilled_apart)):
        before, after = [-one for one in apart if one < 0], [one for one in apart if one >= 0]
        if before:
            said += f"; {len(before):,} others {what} that were answered up to {max(before):,.1f} ms before a kill"
        if after:
            said += f"; {len(after):,} others {what} that were sent up to {max(after):,.1f} ms after one"
    return said
