"""The process that serves is killed with SIGKILL each second under load: what that costs clients and the bill.

Killed is a process of our plugin server that has no other below it: under a supervisor the server that it has forked,
otherwise the only one. Allowed to suffer are the requests that were under way at a kill, from when the client sent them
to when it had its answer; and, for the bill, those answered at most 10 ms before one: Kong runs a log phase after the
answer, and an event is on disk 10 ms later at most. Anything else is counted beside, and misses what was wanted.
"""

from __future__ import annotations

import math
import os
import signal
import time
from bisect import bisect_left, bisect_right
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
class Toll:
    """What kills have cost: requests by status, and those that were not answered 200 or have no event.

    `in_flight` is how many requests were under way at a kill in all. The two last ones are, in milliseconds, how far
    from the nearest kill a request failed, or went unbilled, that was not under way at one; None if there is none.
    """

    kills: int
    statuses: Counter[int]
    in_flight: int
    failed_in_flight: int
    failed_beside: int
    unbilled_in_flight: int
    unbilled_in_grace: int
    unbilled_beside: int
    failed_farthest_ms: float | None
    unbilled_farthest_ms: float | None


def count_toll(exchanges: Sequence[Exchange], billed: AbstractSet[str], kills: Sequence[float]) -> Toll:
    """Work out what kills have cost; `kills` are the moments of them, `billed` the subjects that have an event."""
    ordered = sorted(kills)
    failed = [one for one in exchanges if one.status != _OK]
    unbilled = [one for one in exchanges if one.status == _OK and one.subject not in billed]
    beside = [one for one in failed if not _spans(one, ordered)]
    not_in_flight = [one for one in unbilled if not _spans(one, ordered)]
    early = [one for one in not_in_flight if not _spans(one, ordered, _GRACE_SECONDS)]
    return Toll(
        kills=len(kills),
        statuses=Counter(one.status for one in exchanges),
        in_flight=sum(_spans(one, ordered) for one in exchanges),
        failed_in_flight=len(failed) - len(beside),
        failed_beside=len(beside),
        unbilled_in_flight=len(unbilled) - len(not_in_flight),
        unbilled_in_grace=len(not_in_flight) - len(early),
        unbilled_beside=len(early),
        failed_farthest_ms=max((_distance_ms(one, ordered) for one in beside), default=None),
        unbilled_farthest_ms=max((_distance_ms(one, ordered) for one in not_in_flight), default=None),
    )


def _spans(one: Exchange, kills: Sequence[float], grace: float = 0.0) -> bool:
    """Whether there was a kill between its sending and its end, or a little later."""
    return bisect_left(kills, one.sent) < bisect_right(kills, one.ended + grace)


def _distance_ms(one: Exchange, kills: Sequence[float]) -> float:
    """Tell how far the nearest kill was from an exchange during which there was none."""
    return min((max(one.sent - kill, kill - one.ended) for kill in kills), default=math.inf) * 1e3


def kill_each_second(directory: Path, seconds: int) -> dict[str, Toll]:
    """Run it with each protocol, one after the other."""
    return {protocol: _run(protocol, directory, seconds) for protocol in PROTOCOLS}


def _run(protocol: str, directory: Path, seconds: int) -> Toll:
    kills: list[float] = []
    with ExitStack() as stack:
        collector = stack.enter_context(Collector())
        candidate = ours(protocol, path="subjects")
        say_progress(f"kills, {protocol}")
        kong = stack.enter_context(candidate.kong(directory / "kills", collector.url))

        def kill() -> None:
            for pid in serving_processes(kong.master):
                kills.append(time.perf_counter())
                os.kill(pid, signal.SIGKILL)

        exchanges = send_traffic(kong.port, connections=_CONNECTIONS, seconds=seconds, each_second=kill)
        billed = _wait_until_quiet(collector)
    say_progress("")
    return count_toll(exchanges, billed, kills)


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
    if toll.failed_farthest_ms is not None:
        said += f"; others failed up to {toll.failed_farthest_ms:,.1f} ms away from a kill"
    if toll.unbilled_farthest_ms is not None:
        said += f"; others went unbilled up to {toll.unbilled_farthest_ms:,.1f} ms away from a kill"
    return said
