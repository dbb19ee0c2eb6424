"""Measures what a second plugin server is worth: two of Kong's workers, one server or two (`--servers`).

    python bench/servers.py [--requests N] [--rounds R] [--share S]

Two processes play a worker of nginx each (`worker.py`), 16 requests at a time, over MessagePack; every event is
delivered in batches of 500 to a process that counts them. The servers take turns in rounds. Twice:

- with the machine as it is: where workers, servers and collector together fill all cores, a second server has none of
  its own to run on; the table says how busy the machine was, and what a request took of the servers' CPU;
- with each server on a share of a core (`--share`, by a control group, as root), so that there is room for two.

A ratio is the median of the ratios within each round. Fails if an event is missing.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING

import quota
from processes import BENCH, OURS, Candidate, Collector, Server, cpu_seconds
from rich.table import Column, Table
from terminal import CONSOLE, argument_parser, say_progress

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from typing_extensions import Self

_WORKERS = 2
_COUNTS = (1, 2)
_WARM_UP = 500
_WANTED = 1.8


@dataclass(frozen=True)
class Sample:
    """What the servers of one number did in one round; `busy`: the share of all cores that was not idle."""

    per_second: float
    cpu_us: float
    busy: float


class _Worker:
    """A process that plays one of Kong's workers."""

    def __init__(self, socket: Path, endpoint: str) -> None:
        command = [sys.executable, str(BENCH / "worker.py"), str(socket), endpoint]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        self.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def begin(self, requests: int) -> None:
        """Have it send so many requests."""
        if self._process.stdin is not None:
            self._process.stdin.write(f"{requests}\n")

    def wait(self) -> None:
        """Wait until it has done what it was told."""
        if self._process.stdout is None or not self._process.stdout.readline():
            raise RuntimeError("a worker has ended")


class _Set:
    """One or two servers behind a socket, with two workers and a collector."""

    def __init__(self, count: int, directory: Path, stack: ExitStack) -> None:
        self._server = stack.enter_context(
            Server(Candidate(f"{count} servers", (*OURS.command, "--servers", str(count))), directory)
        )
        self._collector = stack.enter_context(Collector())
        endpoint = f"{self._collector.url}/events"
        self._workers = [stack.enter_context(_Worker(self._server.socket, endpoint)) for _ in range(_WORKERS)]
        self.pids = self._server.serving()
        if len(self.pids) != count:
            raise RuntimeError(f"{len(self.pids)} servers, not {count}")
        self._sent = 0

    def send(self, requests: int) -> Sample:
        """Send so many requests, half of them from each worker, and wait until their events have arrived."""
        used, idle, began = self._cpu_seconds(), _idle_seconds(), perf_counter()
        for worker in self._workers:
            worker.begin(requests // _WORKERS)
        for worker in self._workers:
            worker.wait()
        took = perf_counter() - began
        idle = _idle_seconds() - idle
        self._sent += requests // _WORKERS * _WORKERS
        self._collector.wait_for_events(self._sent)
        cpu_us = (self._cpu_seconds() - used) / requests * 1e6
        return Sample(requests / took, cpu_us, 1 - idle / took / (os.cpu_count() or 1))

    def _cpu_seconds(self) -> float:
        return sum(map(cpu_seconds, self.pids))


def main() -> int:
    """Run what the arguments ask for."""
    options = _options()
    with tempfile.TemporaryDirectory(prefix="bench-") as directory, ExitStack() as stack:
        sets = [_Set(count, Path(directory) / f"{count}", stack) for count in _COUNTS]
        for each in sets:
            each.send(_WARM_UP)
        free = _measured(sets, options, None)
        reason = quota.why_not()
        bounded = [] if reason else _measured(sets, options, options.share)
    CONSOLE.print(f"{os.cpu_count()} cores; {options.rounds} rounds of {options.requests} requests; all events arrived")
    CONSOLE.print(_table(free, bounded, options.share))
    if reason:
        CONSOLE.print(f"without a share for each server: {reason}")
        return 0
    ratio = _ratio(bounded)
    verdict = "met" if ratio >= _WANTED else "MISSED"
    CONSOLE.print(f"two servers / one, each on a share of a core: {ratio:.2f}, wanted at least {_WANTED}: {verdict}")
    return 0


def _options() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--requests", type=int, default=4000, help="requests to each number of servers in a round")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--share", type=float, default=0.25, help="of a core, for each server, the second time")
    return parser.parse_args()


def _measured(sets: Sequence[_Set], options: argparse.Namespace, share: float | None) -> list[list[Sample]]:
    pids = [pid for each in sets for pid in each.pids]
    samples: list[list[Sample]] = [[] for _ in sets]
    with quota.limited(pids, share) if share else nullcontext():
        for number in range(options.rounds):
            say_progress(f"round {number + 1} of {options.rounds}")
            turns = list(range(len(sets)))
            for turn in turns if number % 2 else reversed(turns):
                samples[turn].append(sets[turn].send(options.requests))
    return samples


def _table(free: Sequence[Sequence[Sample]], bounded: Sequence[Sequence[Sample]], share: float) -> Table:
    titles = ("requests/s", "/ one server's", "servers' CPU\nµs/request", "machine busy")
    table = Table("servers", "each has", *(Column(title, justify="right") for title in titles))
    for samples, has in ((free, "what is free"), (bounded, f"{share:g} of a core")):
        for count, taken in zip(_COUNTS, samples, strict=False):
            one = f"{_ratio(samples):.2f}" if count > 1 else "1"
            per_second, cpu_us = (median(each) for each in ([s.per_second for s in taken], [s.cpu_us for s in taken]))
            busy = median(sample.busy for sample in taken)
            table.add_row(f"{count}", has, f"{per_second:,.0f}", one, f"{cpu_us:,.0f}", f"{busy:.0%}")
        table.add_section()
    return table


def _ratio(samples: Sequence[Sequence[Sample]]) -> float:
    one, two = samples
    return median(b.per_second / a.per_second for a, b in zip(one, two, strict=True))


def _idle_seconds() -> float:
    """Return the seconds that all cores together were idle since the start."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    return (int(fields[4]) + int(fields[5])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    sys.exit(main())
