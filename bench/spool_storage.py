"""What the spool's storage costs, next to a plain buffered write of the same bytes to one file.

    python bench/spool_storage.py [--events 200000] [--waiting 1000000] [--directory /tmp]

One thread, events of 700 bytes. Each line is the best of several rounds, taken in turn with those of the others, so
that a busy machine spoils all alike. CPU is that of the process, in the kernel too.
"""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from terminal import argument_parser

from kong_metering.eventlog.format import encode_records
from kong_metering.eventlog.log import EventLog

EVENT_BYTES = 700
ROUNDS = 3


@dataclass(frozen=True)
class Measured:
    """One line of the table; seconds for all events."""

    name: str
    events: int
    seconds: float
    cpu: float


def main() -> None:
    """Measure and print the table."""
    parser = argument_parser(__doc__)
    parser.add_argument("--events", type=int, default=200_000, help="events for each line")
    parser.add_argument("--waiting", type=int, default=1_000_000, help="events that wait when a log is opened")
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()), help="where to write")
    options = parser.parse_args()
    home = Path(tempfile.mkdtemp(prefix="spool-bench-", dir=options.directory))
    try:
        print_table(best_of(lines(home, options.events)))
        print_opening(home / "waiting", options.waiting)
    finally:
        shutil.rmtree(home)


def lines(home: Path, events: int) -> list[Callable[[], Measured]]:
    """List what is measured; the first is what the others are compared with."""
    batch = [os.urandom(EVENT_BYTES) for _ in range(1000)]
    appends = [appending(home, batch[:group], events) for group in (1, 10, 100, 1000)]
    synced = [appending(home, batch[:group], events // 10, sync=True) for group in (100, 1000)]
    reads = [reading(home, batch, events, size) for size in (1, 100, 1000)]
    followed = [following(home, batch[:group], events) for group in (1, 100)]
    whole = [cycle(home, batch[:group], events) for group in (1, 10, 100, 1000)]
    return [
        plain_write(home, batch, events),
        encoding(batch, events),
        *appends,
        *synced,
        *reads,
        *followed,
        *whole,
        burst(home, batch),
    ]


def plain_write(home: Path, batch: list[bytes], events: int) -> Callable[[], Measured]:
    """Write the events one by one to a buffered file."""

    def run() -> Measured:
        path = home / "plain"
        with path.open("wb") as file:
            measured = timed("plain buffered write", events, lambda: [file.write(event) for event in batch], 1000)
        path.unlink()
        return measured

    return run


def encoding(batch: list[bytes], events: int) -> Callable[[], Measured]:
    """Make the records and throw them away."""
    return lambda: timed("encode alone, groups of 1,000", events, lambda: encode_records(batch, 1, 1), 1000)


def appending(home: Path, group: list[bytes], events: int, *, sync: bool = False) -> Callable[[], Measured]:
    """Append groups to a log."""

    def run() -> Measured:
        log = new_log(home)

        def step() -> None:
            log.append(group, 1)
            if sync:
                log.sync()

        name = f"append, groups of {len(group):,}" + (", fdatasync each" if sync else "")
        return timed(name, events, step, len(group))

    return run


def reading(home: Path, batch: list[bytes], events: int, size: int) -> Callable[[], Measured]:
    """Read a log that was just written."""

    def run() -> Measured:
        log = new_log(home)
        for _ in range(events // len(batch)):
            log.append(batch, 1)
        after = 0

        def step() -> None:
            nonlocal after
            after = log.read(after, size, 1 << 30)[-1].sequence

        return timed(f"read, {size:,} at a time", events, step, size)

    return run


def following(home: Path, group: list[bytes], events: int) -> Callable[[], Measured]:
    """Read each group when it was just appended, as if there could be more."""

    def run() -> Measured:
        log = new_log(home)

        def step() -> None:
            log.read(log.append(group, 1)[0] - 1, 500, 1 << 30)

        return timed(f"append and read, groups of {len(group):,}", events, step, len(group))

    return run


def cycle(home: Path, group: list[bytes], events: int) -> Callable[[], Measured]:
    """Let the events come and go as they do while the endpoint answers."""

    def run() -> Measured:
        log = new_log(home)

        def step() -> None:
            log.append(group, 1)
            found = log.read(log.done_up_to, len(group), 1 << 30)
            log.mark_ambiguous(found[0].sequence, found[-1].sequence, 1)
            log.save_position()
            log.done(found[-1].sequence)

        return timed(f"append, read, mark, save, done by {len(group):,}", events, step, len(group))

    return run


def burst(home: Path, batch: list[bytes]) -> Callable[[], Measured]:
    """Append as many as a process may have to save in its last 30 ms."""

    def run() -> Measured:
        log = new_log(home)
        return timed("10,000 at once", 10_000, lambda: log.append(batch * 10, 1), 10_000)

    return run


def new_log(home: Path) -> EventLog:
    """Open an empty log in place of the one before."""
    directory = home / "log"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    return EventLog.open(directory)


def timed(name: str, events: int, step: Callable[[], object], group: int) -> Measured:
    """Run `step`, which handles `group` events, until all are handled."""
    started, cpu = time.perf_counter(), time.process_time()
    for _ in range(events // group):
        step()
    return Measured(name, events, time.perf_counter() - started, time.process_time() - cpu)


def best_of(measurements: list[Callable[[], Measured]]) -> list[Measured]:
    """Measure everything several times in turn and keep the best of each."""
    rounds = [[measure() for measure in measurements] for _ in range(ROUNDS)]
    return [min(results, key=lambda result: result.seconds) for results in zip(*rounds, strict=True)]


def print_table(results: list[Measured]) -> None:
    """Print each line, and its CPU next to that of the first."""
    plain = results[0]
    print(f"{'':46} {'events/s':>10} {'us/event':>9} {'CPU us/event':>13} {'CPU ratio to plain write':>25}")
    for result in results:
        each, cpu = result.seconds / result.events * 1e6, result.cpu / result.events * 1e6
        ratio = cpu / (plain.cpu / plain.events * 1e6)
        print(f"{result.name:46} {result.events / result.seconds:10,.0f} {each:9.2f} {cpu:13.2f} {ratio:25.2f}")


def print_opening(directory: Path, waiting: int) -> None:
    """Fill a log, leave it as a killed process would, and open it."""
    directory.mkdir()
    log = EventLog.open(directory)
    batch = [os.urandom(EVENT_BYTES) for _ in range(1000)]
    for _ in range(waiting // len(batch)):
        log.append(batch, 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    again = EventLog.open(directory)
    opened = time.perf_counter() - started
    again.read(0, 500, 1 << 30)
    first = time.perf_counter() - started
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(
        f"\nopen with {again.waiting:,} waiting ({again.bytes_on_disk / 1e9:.1f} GB): {opened * 1e3:.1f} ms, "
        f"{first * 1e3:.1f} ms until 500 are read; peak memory grew by {grown / 1024:.0f} MB"
    )


if __name__ == "__main__":
    main()
