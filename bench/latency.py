"""How much gets through to an endpoint that is some milliseconds away, with the defaults: Kong's max_batch_size of 1.

    python bench/latency.py [--seconds 20] [--rates 100,1000,5000] [--delays 1,50,200]

Events of 700 bytes come at a rate; an endpoint in a process of its own answers each POST after the delay. Each line
runs in a process of its own, with the spool on disk and all settings at their defaults; then the same with
`--adaptive-batch 1`, where each event goes alone, as in Kong. *waiting*: put and not delivered when the time is over.
*CPU*: of the process that delivers, user and system, for each event that it delivered. One POST is
under way at a time, in order, so 100 events for each answer are the most that the defaults can do: *at most/s*.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import uvloop
from client import plugin_config
from rich.table import Table
from terminal import CONSOLE, argument_parser, say_progress

from kong_metering.config import parse_config, parse_entity
from kong_metering.runtime import make_runtime
from kong_metering.spool.options import SpoolOptions
from kong_metering.trial.batching import ADAPTIVE_BATCH

_EVENT_BYTES = 700
_TICK_SECONDS = 0.01
_NO_CONTENT = b"HTTP/1.1 204 No Content\r\n\r\n"


@dataclass(frozen=True)
class Case:
    """One line: events a second, milliseconds to an answer, and how many events may leave together."""

    rate: int
    delay_ms: int
    adaptive_batch: int


@dataclass(frozen=True)
class Sample:
    """What came of it."""

    put: int
    delivered: int
    posts: int
    cpu_us: float

    @property
    def waiting(self) -> int:
        """How many events were put and not delivered."""
        return self.put - self.delivered


def main() -> int:
    """Run it and show what came of it."""
    options = _options()
    if options.endpoint is not None:
        uvloop.run(_serve(options.endpoint / 1000))
        return 0
    if options.worker:
        json.dump(_work(json.loads(options.worker)), sys.stdout)
        return 0
    cases = [Case(*each) for each in itertools.product(options.rates, options.delays, (ADAPTIVE_BATCH, 1))]
    busy = os.getloadavg()[0]
    samples = {case: _measured(case, options.seconds) for case in cases}
    CONSOLE.print(f"{options.seconds:g} s each; {os.cpu_count()} cores, load {busy:.1f} before it began")
    CONSOLE.print(_table(samples))
    return 0


def _options() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(number) for number in text.split(",")]

    parser = argument_parser(__doc__)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--rates", type=numbers, default=[100, 1000, 5000], help="events a second")
    parser.add_argument("--delays", type=numbers, default=[1, 50, 200], help="milliseconds to an answer")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--endpoint", type=float, help=argparse.SUPPRESS)
    return parser.parse_args()


def _measured(case: Case, seconds: float) -> Sample:
    say_progress(f"{case.rate:,} events/s, {case.delay_ms} ms, up to {case.adaptive_batch} in a POST")
    with tempfile.TemporaryDirectory(prefix="bench-latency-") as directory, _endpoint(case.delay_ms) as url:
        order = {"root": directory, "url": url, "seconds": seconds, **case.__dict__}
        command = [sys.executable, __file__, "--worker", json.dumps(order)]
        answer = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return Sample(**answer)


def _table(samples: dict[Case, Sample]) -> Table:
    table = Table(
        "events/s", "ms", "events in a POST", "at most/s", "put", "delivered", "waiting", "POSTs", "CPU µs/event"
    )
    for case, sample in samples.items():
        most = f"up to {case.adaptive_batch}" if case.adaptive_batch > 1 else "1"
        counts = (sample.put, sample.delivered, sample.waiting, sample.posts)
        table.add_row(
            f"{case.rate:,}",
            str(case.delay_ms),
            most,
            f"{case.adaptive_batch * 1000 // case.delay_ms:,}",
            *(f"{count:,}" for count in counts),
            f"{sample.cpu_us:.0f}",
        )
    return table


# -- who delivers ------------------------------------------------------------------------------------------------------


def _work(order: dict[str, object]) -> dict[str, float]:
    """Put and deliver events in this process at the rate and for the time that are ordered."""
    url, rate, seconds = str(order["url"]), int(str(order["rate"])), float(str(order["seconds"]))
    runtime = make_runtime(
        spool=SpoolOptions(Path(str(order["root"])) / "spool"), adaptive_batch=int(str(order["adaptive_batch"]))
    )
    config = plugin_config(f"{url}/events", {})
    queue = runtime.delivery.open(parse_entity(config), parse_config(config))
    events = _events()
    cpu, began, put = time.process_time(), time.monotonic(), 0
    while (passed := time.monotonic() - began) < seconds:
        for _ in range(int(passed * rate) - put):
            queue.put(next(events))
            put += 1
        time.sleep(_TICK_SECONDS)
    delivered, cpu = runtime.stats.snapshot().delivered, time.process_time() - cpu
    posts = _posts(url)
    runtime.delivery.close(0.0)
    account = runtime.stats.snapshot()
    if account.dropped or account.dead_letters or account.accepted != put:
        raise RuntimeError(f"the account is {account}")
    return {"put": put, "delivered": delivered, "posts": posts, "cpu_us": cpu / max(1, delivered) * 1e6}


def _events() -> Iterator[bytes]:
    head = b'{"specversion":"1.0","type":"kong.api_request","source":"kong","subject":"acme","id":"'
    filling = b'","data":"' + b"x" * (_EVENT_BYTES - len(head) - 10 - 10 - 2) + b'"}'
    for number in itertools.count():
        yield b"%s%010d%s" % (head, number, filling)


# -- the endpoint ------------------------------------------------------------------------------------------------------


@contextmanager
def _endpoint(delay_ms: int) -> Iterator[str]:
    command = [sys.executable, __file__, "--endpoint", str(delay_ms)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline() if process.stdout else 0)}"
        finally:
            process.terminate()


def _posts(url: str) -> int:
    with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310 - the process that was started for it
        return int(json.load(answer))


async def _serve(delay: float) -> None:
    """Answer each POST after so many seconds, and a GET with the number of POSTs; print the port when it is ready."""
    posts = 0

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal posts
        while head := await _head(reader):
            if head.startswith(b"GET"):
                told = str(posts).encode()
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(told), told))
                continue
            length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
            await reader.readexactly(length)
            posts += 1
            await asyncio.sleep(delay)
            writer.write(_NO_CONTENT)
        writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0, limit=1 << 24)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


async def _head(reader: asyncio.StreamReader) -> bytes:
    """Read the head of a request; empty at the end of the connection."""
    try:
        return await reader.readuntil(b"\r\n\r\n")
    except (asyncio.IncompleteReadError, ConnectionError):
        return b""


if __name__ == "__main__":
    sys.exit(main())
