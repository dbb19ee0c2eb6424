"""Flat out: whether each request has its event, and how many log phases Kong itself has dropped.

Kong runs a log phase in a timer after the answer, and at most 4,096 timers at once in a worker. A request with an
access phase of ours waits there, which holds its client back. A request that Kong answers 404 has none: under a global
plugin, a flood of them can have more log phases than timers, and Kong drops the rest, each with a line in its error
log.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from gateway_candidates import PROTOCOLS, ours
from gateway_kong import HEADERS, Kong
from gateway_paper import Grid
from gateway_wrk import run_wrk
from processes import Collector
from terminal import say_progress

DROPPED = "lua_max_running_timers are not enough"
_QUIET_SECONDS = 5.0
_DELIVERY_SECONDS = 120.0


@dataclass(frozen=True)
class Flood:
    """What a flood is of, and over how many connections."""

    title: str
    path: str
    connections: int


FLOODS = (
    *(Flood("metered route", "", connections) for connections in (16, 128, 512)),
    Flood("404 under a global plugin", "/nothing-here", 512),
)


@dataclass(frozen=True)
class Washed:
    """What came of one: requests read by nginx, events, log phases that Kong said that it dropped."""

    protocol: str
    flood: Flood
    per_second: float
    requests: int
    events: int
    dropped: int
    refused: int

    @property
    def missing(self) -> int:
        """How many requests have no event."""
        return self.requests - self.events


def flood(directory: Path, seconds: int) -> list[Washed]:
    """Run all floods with each protocol."""
    found = []
    for protocol in PROTOCOLS:
        with ExitStack() as stack:
            collector = stack.enter_context(Collector())
            candidate = ours(protocol)
            kong = stack.enter_context(candidate.kong(directory / "flood", collector.url, is_global=True))
            for one in FLOODS:
                say_progress(f"{protocol}: {one.title}, {one.connections} connections")
                found.append(_run(protocol, one, kong, collector, seconds))
    say_progress("")
    return found


def _run(protocol: str, one: Flood, kong: Kong, collector: Collector, seconds: int) -> Washed:
    requests, events, dropped = kong.requests(), collector.ask()["events"], kong.error_log.count(DROPPED)
    url = f"http://127.0.0.1:{kong.port}{one.path}" if one.path else kong.url
    load = run_wrk(url, connections=one.connections, seconds=seconds, headers=HEADERS)
    _wait_until_all_or_quiet(kong, collector, requests, events)
    return Washed(
        protocol=protocol,
        flood=one,
        per_second=load.per_second,
        requests=kong.requests() - requests,
        events=collector.ask()["events"] - events,
        dropped=kong.error_log.count(DROPPED) - dropped,
        refused=load.refused,
    )


def _wait_until_all_or_quiet(kong: Kong, collector: Collector, requests: int, events: int) -> None:
    """Wait until each request since then has its event, or no more events come."""
    deadline = time.monotonic() + _DELIVERY_SECONDS
    before, quiet_since = -1, time.monotonic()
    while time.monotonic() < min(deadline, quiet_since + _QUIET_SECONDS):
        arrived = collector.ask()["events"]
        if arrived - events >= kong.requests() - requests:
            return
        if arrived != before:
            before, quiet_since = arrived, time.monotonic()
        time.sleep(0.1)


def table(found: Sequence[Washed]) -> Grid:
    """Show what came of them."""
    columns = ("flat out", "protocol", "connections", "requests/s", "requests", "events", "missing", "dropped by Kong")
    rows = [
        [
            one.flood.title,
            one.protocol,
            f"{one.flood.connections}",
            f"{one.per_second:,.0f}",
            f"{one.requests:,}",
            f"{one.events:,}",
            f"{one.missing:,}",
            f"{one.dropped:,}",
        ]
        for one in found
    ]
    return Grid(columns, rows)


def remarks(found: Sequence[Washed]) -> list[str]:
    """Say what must hold, and whether it does."""
    metered = [one for one in found if not one.flood.path]
    every = all(one.missing == 0 and one.refused == 0 for one in metered)
    return [
        f"every request on the metered route is answered 200 and has its event: {'met' if every else 'MISSED'}",
        f"no event is missing but those whose log phase Kong dropped: {'met' if holds(found) else 'MISSED'}",
        f"the line to watch for in Kong's error log, one for each log phase that it drops: `{DROPPED}`",
    ]


def holds(found: Sequence[Washed]) -> bool:
    """Whether no event is missing but those whose log phase Kong dropped."""
    return all(one.missing <= one.dropped for one in found)
