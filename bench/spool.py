"""What events cost on their way through queue, spool and delivery, next to a queue in memory.

    python bench/spool.py [--seconds 5] [--rounds 3] [--waiting 0,1000000,10000000] [--directory /tmp]

Events of 700 bytes are put as fast as they leave (20,000 are under way at most), and delivered to a process that only
counts them. Each line runs in a process of its own; a ratio is against the queue in memory with the same batch size,
in the same round, and the figures are the medians of the rounds. Events that wait on disk are written before, as a
process that was killed leaves them, and come first. Then: how long 10,000 events that come at once take to be on disk,
and how long the plugin server takes to start with so many events waiting. Fails if an event is missing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from client import Client, plugin_config
from processes import OURS, Candidate, Collector, Server, rss_bytes
from rich.table import Column, Table
from terminal import CONSOLE, argument_parser, say_progress

from kong_metering import PLUGIN_NAME
from kong_metering.config import parse_config, parse_entity
from kong_metering.runtime import make_runtime
from kong_metering.spool.directory import SpoolDirectory
from kong_metering.spool.identity import QueueIdentity
from kong_metering.spool.options import SpoolOptions
from kong_metering.upkeep.retention import bytes_used

_EVENT_BYTES = 700
_UNDER_WAY = 20_000
_BATCH = 500
_BURST = 10_000
_PLENTY = 1 << 40
_WANTED_PER_SECOND = 40_000
_WANTED_WITH_WAITING = 0.9


@dataclass(frozen=True)
class Case:
    """One line: the size of a batch, whether there is a spool, and how many events wait on disk."""

    batch: int
    has_spool: bool
    waiting: int = 0

    @property
    def name(self) -> str:
        """What to call it."""
        if not self.has_spool:
            return "in memory"
        return f"spool, {self.waiting:,} waiting" if self.waiting else "spool"


@dataclass(frozen=True)
class Sample:
    """What one process did in one round."""

    per_second: float
    cpu_us: float
    rss_mb: float
    collector_cpu_us: float


def main() -> int:
    """Run what the arguments ask for."""
    options = _options()
    if options.worker:
        sys.stdout.write(json.dumps(_work(json.loads(options.worker))) + "\n")
        return 0
    waiting = [int(count) for count in options.waiting.split(",")]
    batches = sorted({_BATCH, *map(int, options.batches.split(","))})
    cases = [Case(batch, has_spool) for batch in batches for has_spool in (False, True)]
    cases += [Case(_BATCH, has_spool=True, waiting=count) for count in waiting if count]
    with tempfile.TemporaryDirectory(prefix="bench-spool-", dir=options.directory) as directory:
        _throughput(Path(directory), cases, options.seconds, options.rounds)
        _bursts(Path(directory), options.rounds * 3)
        for count in waiting:
            _start(Path(directory), count)
    return 0


def _options() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--seconds", type=float, default=5, help="for each line in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", default="1,100,500,1000", help=f"sizes of batches, {_BATCH} in any case")
    parser.add_argument("--waiting", default="0,1000000,10000000", help="events that wait on disk, several counts")
    parser.add_argument("--directory", default=None, help="where to make the spools; 10 million events take 7.3 GB")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


# -- throughput --------------------------------------------------------------------------------------------------------


def _throughput(directory: Path, cases: list[Case], seconds: float, rounds: int) -> None:
    samples: dict[Case, list[Sample]] = {case: [] for case in cases}
    for number in range(rounds):
        first = number % len(cases)
        # Who comes behind one that wrote gigabytes finds a busy machine, so each round that is another one.
        for case in (*cases[first:], *cases[:first]):
            say_progress(f"round {number + 1} of {rounds}: batches of {case.batch}, {case.name}")
            samples[case].append(_measured(directory / "spool", case, seconds))
    CONSOLE.print(f"{rounds} rounds of {seconds:g} s each; all events that were put arrived")
    CONSOLE.print(_table(samples))
    _say_targets(samples)


def _measured(root: Path, case: Case, seconds: float) -> Sample:
    with Collector() as collector, _spool(root, collector.url, case.waiting):
        cpu = collector.cpu_seconds()
        order = {"root": str(root), "url": collector.url, "seconds": seconds, **case.__dict__}
        command = [sys.executable, __file__, "--worker", json.dumps(order)]
        answer = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        delivered = answer.pop("delivered")
        # What was on its way at the end of one that leaves events may have arrived, and stays for the next process.
        collector.wait_for_events(delivered, spare=case.batch if case.waiting else 0)
        cpu = collector.cpu_seconds() - cpu
    return Sample(**answer, collector_cpu_us=cpu / delivered * 1e6)


def _table(samples: dict[Case, list[Sample]]) -> Table:
    titles = ("events/s", "of in memory", "CPU µs/event", "of in memory", "RSS MB", "collector CPU µs/event")
    table = Table("events a batch", "queue", *(Column(title, justify="right") for title in titles))
    for case, taken in samples.items():
        plain = samples[Case(case.batch, has_spool=False)]
        pairs = list(zip(taken, plain, strict=True))
        table.add_row(
            f"{case.batch:,}",
            case.name,
            f"{median(one.per_second for one in taken):,.0f}",
            f"{median(one.per_second / other.per_second for one, other in pairs):.2f}",
            f"{median(one.cpu_us for one in taken):.1f}",
            f"{median(one.cpu_us / other.cpu_us for one, other in pairs):.2f}",
            f"{median(one.rss_mb for one in taken):.0f}",
            f"{median(one.collector_cpu_us for one in taken):.1f}",
        )
        if case.has_spool and case.batch != _BATCH:
            table.add_section()
    return table


def _say_targets(samples: dict[Case, list[Sample]]) -> None:
    plain = samples[Case(_BATCH, has_spool=True)]
    speed = median(one.per_second for one in plain)
    _say_target(f"events/s at batch {_BATCH}", speed, _WANTED_PER_SECOND, ",.0f")
    for case, taken in samples.items():
        if case.waiting:
            ratio = median(one.per_second / other.per_second for one, other in zip(taken, plain, strict=True))
            _say_target(f"with {case.waiting:,} waiting / with none", ratio, _WANTED_WITH_WAITING, ".2f")


def _say_target(what: str, figure: float, wanted: float, form: str) -> None:
    is_met = "met" if figure >= wanted else "MISSED"
    CONSOLE.print(f"{what}: {figure:{form}}, wanted at least {wanted:{form}}: {is_met}")


def _work(order: dict[str, object]) -> dict[str, float]:
    """Put and deliver events in this process, for the time that is ordered."""
    case = Case(int(str(order["batch"])), bool(order["has_spool"]), int(str(order["waiting"])))
    root = Path(str(order["root"]))
    runtime = make_runtime(spool=SpoolOptions(root, max_bytes=_PLENTY) if case.has_spool else None)
    config = _config(str(order["url"]), case.batch)
    queue = runtime.delivery.open(parse_entity(config), parse_config(config))
    deadline = time.monotonic() + 60
    while runtime.stats.snapshot().adopted < case.waiting and time.monotonic() < deadline:
        time.sleep(0.01)
    events = _events()

    def put_for(seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if queue.waiting < case.waiting + _UNDER_WAY:
                for _ in range(100):
                    queue.put(next(events))
            else:
                time.sleep(0.001)

    put_for(1.0)
    before, cpu, began = runtime.stats.snapshot().delivered, time.process_time(), time.monotonic()
    put_for(float(str(order["seconds"])))
    delivered = runtime.stats.snapshot().delivered - before
    cpu, took = time.process_time() - cpu, time.monotonic() - began
    rss = rss_bytes(os.getpid())
    if case.waiting:
        runtime.delivery.close(0.0)
    else:
        runtime.delivery.close(60.0)
    account = runtime.stats.snapshot()
    if account.dropped or account.dead_letters or account.waiting:
        raise RuntimeError(f"the account is {account}")
    return {
        "delivered": account.delivered,
        "per_second": delivered / took,
        "cpu_us": cpu / delivered * 1e6,
        "rss_mb": rss / 1e6,
    }


# -- a burst -----------------------------------------------------------------------------------------------------------


def _bursts(directory: Path, rounds: int) -> None:
    taken = []
    for number in range(rounds):
        root = directory / f"burst-{number}"
        runtime = make_runtime(spool=SpoolOptions(root))
        config = _config("http://127.0.0.1:1", 1000)
        queue = runtime.delivery.open(parse_entity(config), parse_config(config))
        events = _events()
        queue.put(next(events))
        _wait_for_bytes(root, _EVENT_BYTES)
        burst = [next(events) for _ in range(_BURST)]
        began = time.monotonic()
        for event in burst:
            queue.put(event)
        put = time.monotonic() - began
        _wait_for_bytes(root, _EVENT_BYTES * (_BURST + 1))
        taken.append((put * 1000, (time.monotonic() - began) * 1000))
        runtime.delivery.close(0.0)
        shutil.rmtree(root)
    whole = sorted(whole for _, whole in taken)
    CONSOLE.print(
        f"{_BURST:,} events at once, {rounds} times: put in {median(put for put, _ in taken):.1f} ms, on disk "
        f"{median(whole):.1f} ms after the first was put (at worst {whole[-1]:.1f} ms)"
    )


def _wait_for_bytes(root: Path, size: int) -> None:
    while bytes_used(root) < size:
        time.sleep(0.0002)


# -- a start -----------------------------------------------------------------------------------------------------------


def _start(directory: Path, waiting: int) -> None:
    """Start the plugin server as Kong does, with events waiting in its spool."""
    prefix, root = directory / "start", directory / "spool"
    with Collector() as collector, _spool(root, collector.url, waiting):
        options = ("--spool-dir", str(root), "--spool-max-bytes", str(_PLENTY))
        began = time.monotonic()
        with Server(Candidate(OURS.name, (*OURS.command, *options)), prefix) as server:
            listening = time.monotonic() - began
            client = Client(server.socket)
            instance = client.start_instance(PLUGIN_NAME, _config(collector.url, _BATCH))
            client.run([instance], 1, 1)
            answered = time.monotonic() - began
            while not collector.ask()["events"]:
                time.sleep(0.002)
            arrived = time.monotonic() - began
            slowest = max(client.run([instance], 200, 1).rpcs) * 1000
            client.close()
    shutil.rmtree(prefix)
    CONSOLE.print(
        f"start with {waiting:,} waiting: listens after {listening:.2f} s, a request answered after {answered:.2f} s, "
        f"the first event arrived after {arrived:.2f} s; slowest RPC of the 200 requests after that {slowest:.1f} ms"
    )


# -- what all of them need ---------------------------------------------------------------------------------------------


@contextmanager
def _spool(root: Path, url: str, waiting: int) -> Iterator[None]:
    """Make a spool in which a process that was killed left events."""
    root.mkdir()
    if waiting:
        entity = parse_entity(_config(url, 1))
        directory = SpoolDirectory(root)
        log = directory.log_for(QueueIdentity(entity.id, entity.name, f"{url}/events")).log
        events = _events()
        for first in range(0, waiting, 1000):
            log.append([next(events) for _ in range(min(1000, waiting - first))], time.time_ns() // 1_000_000)
        directory.close()
        # What has waited for long is not being written any more.
        os.sync()
    try:
        yield
    finally:
        shutil.rmtree(root)


def _events() -> Iterator[bytes]:
    """Make events of the size that those of a usual request have, each with an id of its own."""
    head = b'{"specversion":"1.0","type":"kong.api_request","source":"kong","subject":"acme","id":"'
    prefix = os.urandom(8).hex().encode()
    filling = b'","data":"' + b"x" * (_EVENT_BYTES - len(head) - 16 - 10 - 10 - 2) + b'"}'
    for number in itertools.count():
        yield b"%s%s%010d%s" % (head, prefix, number, filling)


def _config(url: str, batch: int) -> dict[str, Any]:
    return plugin_config(f"{url}/events", {"max_batch_size": batch, "max_entries": 1_000_000})


if __name__ == "__main__":
    sys.exit(main())
