"""Several Kongs side by side, each with another plugin, that take turns in rounds; another one first in each round.

In a round each one gets requests over 16 connections, and then over one. Its CPU counts until all events that it owes
are there, for delivery is part of the work. After each of the two, the events that have arrived must be exactly the
requests that nginx has read; the run fails if one is missing, or if a request is not answered 200.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from gateway_kong import HEADERS, Kong
from gateway_paper import Grid
from gateway_samples import TARGETS, Sample, Samples
from gateway_wrk import Load, run_wrk
from processes import Collector
from terminal import say_progress

if TYPE_CHECKING:
    from gateway_candidates import Candidate
    from gateway_processes import Cost

CONNECTIONS = 16
_WARM_UP_SECONDS = 1
_DELIVERY_SECONDS = 120.0
_POLL_SECONDS = 0.05

_COLUMNS: tuple[tuple[str, Callable[[Sample], str]], ...] = (
    ("requests/s", lambda sample: f"{sample.per_second:,.0f}"),
    ("Kong CPU µs", lambda sample: f"{sample.kong_us:,.0f}"),
    ("plugin CPU µs", lambda sample: f"{sample.plugin_us:,.0f}" if sample.plugin_us else ""),
    ("p50 ms", lambda sample: f"{sample.p50_us / 1e3:,.2f}"),
    ("p99 ms", lambda sample: f"{sample.p99_us / 1e3:,.2f}"),
    ("p50 ms, 1 connection", lambda sample: f"{sample.p50_alone_us / 1e3:,.3f}"),
    ("p99 ms, 1 connection", lambda sample: f"{sample.p99_alone_us / 1e3:,.2f}"),
)


class EventsMissingError(Exception):
    """Requests and events are not the same; the text tells both numbers."""


class Contender:
    """One candidate that runs, with a collector of its own."""

    def __init__(self, candidate: Candidate, directory: Path, stack: ExitStack) -> None:
        self.name = candidate.name
        self._delivers = candidate.delivers
        self._collector = stack.enter_context(Collector())
        self._kong: Kong = stack.enter_context(candidate.kong(directory, self._collector.url))
        self._before = self._kong.requests()

    @property
    def requests(self) -> int:
        """How many requests it has got so far."""
        return self._kong.requests() - self._before

    def round(self, seconds: int) -> Sample:
        """Measure it once."""
        requests, used = self.requests, self._kong.cost()
        busy = self.load(CONNECTIONS, seconds)
        used, requests = self._kong.cost().since(used), self.requests - requests
        alone = self.load(1, max(1, seconds // 2))
        return _sample(busy, alone, used, requests)

    def load(self, connections: int, seconds: int) -> Load:
        """Send requests, and wait until each of them has its event; raises `EventsMissingError` if one has none."""
        load = run_wrk(self._kong.url, connections=connections, seconds=seconds, headers=HEADERS)
        if load.refused or load.socket_errors:
            raise EventsMissingError(f"{self.name}: not all requests were answered 200: {load}")
        if self._delivers:
            self._wait_for_events()
        return load

    def warm_up(self) -> None:
        """Let it start what it needs."""
        self.load(CONNECTIONS, _WARM_UP_SECONDS)

    def _wait_for_events(self) -> None:
        deadline = time.monotonic() + _DELIVERY_SECONDS
        while (events := self._collector.ask()["events"]) < (requests := self.requests):
            if time.monotonic() > deadline:
                raise EventsMissingError(f"{self.name}: {requests} requests, but {events} events")
            time.sleep(_POLL_SECONDS)
        if events > requests:
            raise EventsMissingError(f"{self.name}: {requests} requests, but {events} events: too many")


def compare(candidates: Sequence[Candidate], directory: Path, rounds: int, seconds: int) -> tuple[Samples, int]:
    """Measure all candidates; gives their samples, and how many events were due and have all arrived."""
    samples: dict[str, list[Sample]] = {candidate.name: [] for candidate in candidates}
    with ExitStack() as stack:
        contenders = []
        for candidate in candidates:
            say_progress(f"starting {candidate.name}")
            contenders.append(Contender(candidate, directory, stack))
        for contender in contenders:
            say_progress(f"warming up {contender.name}")
            contender.warm_up()
        for number in range(rounds):
            first = number % len(contenders)
            for contender in contenders[first:] + contenders[:first]:
                say_progress(f"round {number + 1} of {rounds}: {contender.name}")
                samples[contender.name].append(contender.round(seconds))
        delivering = [candidate.delivers for candidate in candidates]
        events = sum(one.requests for one, delivers in zip(contenders, delivering, strict=True) if delivers)
    say_progress("")
    return samples, events


def figures(candidates: Sequence[Candidate], samples: Samples) -> Grid:
    """Show the medians."""
    rows = [[candidate.title, *_medians(samples[candidate.name])] for candidate in candidates]
    return Grid(["on the route", *(title for title, _ in _COLUMNS)], rows)


def verdicts(candidates: Sequence[Candidate], samples: Samples) -> Grid:
    """Show what was wanted of these candidates, and whether it is met."""
    rows = [
        [
            target.what,
            target.wanted,
            *(target.verdict(samples[candidate.name], samples) or "not measured" for candidate in candidates),
        ]
        for target in TARGETS
    ]
    return Grid(["", "wanted", *(candidate.title for candidate in candidates)], rows)


def _medians(taken: Sequence[Sample]) -> list[str]:
    names = list(Sample.__dataclass_fields__)
    middle = Sample(**{name: median(getattr(sample, name) for sample in taken) for name in names})
    return [shown(middle) for _, shown in _COLUMNS]


def _sample(busy: Load, alone: Load, used: Cost, requests: int) -> Sample:
    return Sample(
        per_second=busy.per_second,
        kong_us=used.kong / requests * 1e6,
        plugin_us=used.plugin / requests * 1e6,
        p50_us=busy.p50_us,
        p99_us=busy.p99_us,
        p50_alone_us=alone.p50_us,
        p99_alone_us=alone.p99_us,
    )
