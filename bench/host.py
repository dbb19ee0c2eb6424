"""Compares this package's plugin server with kong-pdk's own, gevent and threads, in one run.

    python bench/host.py [--requests N] [--rounds R]    the comparison
    python bench/host.py --p99 [--batch N] ...          what deliveries, of 1,000 events each, do to an RPC

All servers run the whole plugin with the same configuration (subject from a header, all event fields, queue, delivery
in batches to a process that counts the events), for the same client; ours with its spool, and once without it. All of
them run at once and take turns in short rounds, so that whatever else the machine does hits them alike; each figure is
the median of the rounds, and a ratio is the median of the ratios within each round. Fails if an event is missing.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

from client import Client, Times, plugin_config
from processes import GEVENT, IN_MEMORY, OURS, THREADS, Candidate, Collector, Server, with_switch_interval
from rich.table import Column, Table
from terminal import CONSOLE, argument_parser, say_progress

from kong_metering import PLUGIN_NAME

_IN_FLIGHT = 16
_MODEST = 4
_WARM_UP = 500
_INSTANCES = 2  # Kong has one for each of its workers
_QUEUE = {"max_batch_size": 500, "max_entries": 1_000_000}
# Half of what it cost in the first version.
_SPOOL_US = 17.5
_SWITCH_INTERVALS = (0.005, 0.001, 0.0005, 0.0001)


@dataclass(frozen=True)
class Sample:
    """What one server did in one round."""

    per_second: float
    cpu_us: float
    p50_modest_us: float
    p99_modest_us: float
    p50_alone_us: float
    p99_alone_us: float
    rss_mb: float


_COLUMNS: tuple[tuple[str, Callable[[Sample], float], str], ...] = (
    (f"requests/s\n{_IN_FLIGHT} at once", lambda sample: sample.per_second, ",.0f"),
    ("server CPU\nµs/request", lambda sample: sample.cpu_us, ",.1f"),
    (f"access p50 µs\n{_MODEST} at once", lambda sample: sample.p50_modest_us, ",.0f"),
    (f"access p99 µs\n{_MODEST} at once", lambda sample: sample.p99_modest_us, ",.0f"),
    ("access p50 µs\none by one", lambda sample: sample.p50_alone_us, ",.0f"),
    ("access p99 µs\none by one", lambda sample: sample.p99_alone_us, ",.0f"),
    ("RSS\nMB", lambda sample: sample.rss_mb, ",.0f"),
)


def main() -> int:
    """Run what the arguments ask for."""
    options = _options()
    gc.disable()  # a collection in the client would look like latency of the server
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        if options.p99:
            _deliveries(Path(directory), options.requests, options.rounds, options.batch)
        else:
            _comparison(Path(directory), options.requests, options.rounds)
    return 0


def _options() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--requests", type=int, default=800, help="requests to each server in a round")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--p99", action="store_true", help="latency of an RPC while batches go out")
    parser.add_argument("--batch", type=int, default=1000, help="events in each of these batches")
    return parser.parse_args()


# -- the comparison ---------------------------------------------------------------------------------------------------


class _Runner:
    """One server with a collector of its own, during the comparison."""

    def __init__(self, server: Server, collector: Collector) -> None:
        self._server = server
        self._collector = collector
        self._client = Client(server.socket)
        config = plugin_config(f"{collector.url}/events", _QUEUE)
        self._instances = [self._client.start_instance(PLUGIN_NAME, config) for _ in range(_INSTANCES)]
        self.sent = 0

    def send(self, requests: int, in_flight: int) -> Times:
        self.sent += requests
        return self._client.run(self._instances, requests, in_flight)

    def cpu_seconds(self) -> float:
        return self._server.cpu_seconds()

    def rss_mb(self) -> float:
        return self._server.rss_bytes() / 1e6

    def wait_for_delivery(self) -> None:
        """Wait until every event has arrived."""
        self._collector.wait_for_events(self.sent)


def _comparison(directory: Path, requests: int, rounds: int) -> None:
    candidates = (OURS, IN_MEMORY, GEVENT, THREADS)
    samples: list[list[Sample]] = [[] for _ in candidates]
    with ExitStack() as stack:
        runners = []
        for number, candidate in enumerate(candidates):
            server = stack.enter_context(Server(candidate, directory / f"{number}"))
            runners.append(_Runner(server, stack.enter_context(Collector())))
        for runner in runners:
            runner.send(_WARM_UP, _IN_FLIGHT)
        for number in range(rounds):
            say_progress(f"round {number + 1} of {rounds}")
            for taken, sample in zip(samples, _round(runners, requests, number % len(runners)), strict=True):
                taken.append(sample)
        for runner in runners:
            runner.wait_for_delivery()
        sent = sum(runner.sent for runner in runners)
    CONSOLE.print(f"{rounds} rounds of {requests} requests; all {sent:,} events arrived")
    CONSOLE.print(_comparison_table([candidate.name for candidate in candidates], samples))
    _say_targets(samples)


def _round(runners: Sequence[_Runner], requests: int, first: int) -> list[Sample]:
    """Let the servers take turns; who comes first finds a rested machine, so each round it is another one."""
    turns = [*range(first, len(runners)), *range(first)]
    for runner in runners:
        runner.wait_for_delivery()
    used = [runner.cpu_seconds() for runner in runners]
    speeds = {turn: requests / runners[turn].send(requests, _IN_FLIGHT).whole for turn in turns}
    for runner in runners:
        runner.wait_for_delivery()  # delivery is part of the work
    used = [runner.cpu_seconds() - before for runner, before in zip(runners, used, strict=True)]

    modest = {turn: runners[turn].send(requests // 2, _MODEST).access for turn in turns}
    alone = {turn: runners[turn].send(requests // 2, 1).access for turn in turns}
    return [
        Sample(
            per_second=speeds[number],
            cpu_us=used[number] / requests * 1e6,
            p50_modest_us=_percentile(modest[number], 50),
            p99_modest_us=_percentile(modest[number], 99),
            p50_alone_us=_percentile(alone[number], 50),
            p99_alone_us=_percentile(alone[number], 99),
            rss_mb=runner.rss_mb(),
        )
        for number, runner in enumerate(runners)
    ]


def _comparison_table(names: Sequence[str], samples: Sequence[Sequence[Sample]]) -> Table:
    table = Table("server", *(Column(title, justify="right") for title, _, _ in _COLUMNS))
    for name, taken in zip(names, samples, strict=True):
        table.add_row(name, *(format(median(map(value, taken)), form) for _, value, form in _COLUMNS))
    table.add_section()
    for name, others in zip(names[1:], samples[1:], strict=True):
        ratios = (_ratio(samples[0], others, value) for _, value, _ in _COLUMNS)
        table.add_row(f"ours / {name}", *(f"{ratio:.3f}" for ratio in ratios))
    return table


def _ratio(ours: Sequence[Sample], others: Sequence[Sample], value: Callable[[Sample], float]) -> float:
    return median(value(one) / value(other) for one, other in zip(ours, others, strict=True))


def _say_targets(samples: Sequence[Sequence[Sample]]) -> None:
    ours, in_memory, gevent, threads = samples
    for what, ratio, target in (
        ("CPU per request / --no-spool's", _ratio(ours, in_memory, lambda sample: sample.cpu_us), 1.3),
        ("CPU per request / gevent's", _ratio(ours, gevent, lambda sample: sample.cpu_us), 0.25),
        ("CPU per request / threads'", _ratio(ours, threads, lambda sample: sample.cpu_us), 0.1),
        ("access p50 / gevent's", _ratio(ours, gevent, lambda sample: sample.p50_modest_us), 0.5),
    ):
        CONSOLE.print(f"{what}: {ratio:.3f}, wanted at most {target}: {'met' if ratio <= target else 'MISSED'}")
    spool = median(one.cpu_us - other.cpu_us for one, other in zip(ours, in_memory, strict=True))
    verdict = "met" if spool <= _SPOOL_US else "MISSED"
    CONSOLE.print(f"CPU per request that the spool costs: {spool:.1f} µs, wanted at most {_SPOOL_US}: {verdict}")


# -- deliveries of large batches --------------------------------------------------------------------------------------

_SITUATIONS = ("no batches", "another process\nsends batches", "this process\nsends batches")


@dataclass
class _Taken:
    """Percentiles of one server's RPCs, for each round, by situation."""

    p50: list[tuple[float, ...]]
    p99: list[tuple[float, ...]]
    batches_per_second: list[float]


class _Sender:
    """A server with a batch that it sends again and again, as long as its collector's gate is closed."""

    def __init__(self, server: Server, collector: Collector, batch: int) -> None:
        self._collector = collector
        collector.ask("hold")
        retry = {"initial_retry_delay": 0.001, "max_retry_delay": 0.001, "max_retry_time": 3600}
        config = plugin_config(f"{collector.url}/gate", _QUEUE | {"max_batch_size": batch} | retry, plugin_id="batches")
        client = Client(server.socket)
        client.run([client.start_instance(PLUGIN_NAME, config)], batch, _IN_FLIGHT)
        client.close()
        self.batches_per_second = 0.0

    @contextmanager
    def sending(self) -> Iterator[None]:
        self._collector.ask("close")
        before, began = self._collector.wait_for_refusals(), perf_counter()
        yield
        self.batches_per_second = (self._collector.ask("hold")["refused"] - before) / (perf_counter() - began)


class _Probed:
    """A server whose RPCs are timed."""

    def __init__(self, candidate: Candidate, directory: Path, stack: ExitStack, batch: int) -> None:
        server = stack.enter_context(Server(candidate, directory))
        collector = stack.enter_context(Collector())
        self._client = Client(server.socket)
        config = plugin_config(f"{collector.url}/events", _QUEUE)
        self._instances = [self._client.start_instance(PLUGIN_NAME, config)]
        self.sender = _Sender(server, collector, batch)

    def rpcs(self, requests: int) -> list[float]:
        return self._client.run(self._instances, requests, 1).rpcs


def _deliveries(directory: Path, requests: int, rounds: int, batch: int) -> None:
    candidates = [with_switch_interval(seconds) for seconds in _SWITCH_INTERVALS]
    taken = [_Taken([], [], []) for _ in candidates]
    with ExitStack() as stack:
        probed = [_Probed(one, directory / f"{number}", stack, batch) for number, one in enumerate(candidates)]
        elsewhere = _Probed(OURS, directory / "elsewhere", stack, batch).sender
        for one in probed:
            one.rpcs(_WARM_UP)
        for number in range(rounds):
            say_progress(f"round {number + 1} of {rounds}")
            for one, results in zip(probed, taken, strict=True):
                _probe(one, elsewhere, requests, results)
    CONSOLE.print(f"batches of {batch:,} events; {rounds} rounds of {requests} requests in each situation")
    CONSOLE.print(_deliveries_table([candidate.name for candidate in candidates], taken))


def _probe(probed: _Probed, elsewhere: _Sender, requests: int, results: _Taken) -> None:
    """Time the RPCs in all three situations, one right after the other."""
    idle = probed.rpcs(requests)
    with elsewhere.sending():
        beside = probed.rpcs(requests)
    with probed.sender.sending():
        within = probed.rpcs(requests)
    results.p50.append(tuple(_percentile(rpcs, 50) for rpcs in (idle, beside, within)))
    results.p99.append(tuple(_percentile(rpcs, 99) for rpcs in (idle, beside, within)))
    results.batches_per_second.append(probed.sender.batches_per_second)


def _deliveries_table(names: Sequence[str], taken: Sequence[_Taken]) -> Table:
    table = Table(
        "switch interval",
        *(Column(f"p50 µs\n{situation}", justify="right") for situation in _SITUATIONS),
        *(Column(f"p99 µs\n{situation}", justify="right") for situation in _SITUATIONS),
        Column("batches/s", justify="right"),
        title="One RPC at a time",
    )
    for name, results in zip(names, taken, strict=True):
        figures = [median(column) for rounds in (results.p50, results.p99) for column in zip(*rounds, strict=True)]
        table.add_row(name, *(f"{figure:,.0f}" for figure in figures), f"{median(results.batches_per_second):,.0f}")
    return table


# -- what both need ---------------------------------------------------------------------------------------------------


def _percentile(seconds: Sequence[float], share: float) -> float:
    """Give a percentile, in microseconds."""
    ordered = sorted(seconds)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share / 100))] * 1e6


if __name__ == "__main__":
    sys.exit(main())
