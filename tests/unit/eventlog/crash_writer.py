"""Kills a process that writes to a log, again and again, and checks each time what it had been told is safe.

Run as a program of its own, so that it may fork: prints the account as JSON.
"""

from __future__ import annotations

import json
import os
import random
import signal
import struct
import sys
import time
from collections import Counter
from pathlib import Path

from kong_metering.eventlog.log import EventLog
from tests.unit.eventlog.helpers import payload, payloads

_TOLD = struct.Struct("<QQ")
_SEGMENT_BYTES = 20_000


def write_for_ever(directory: Path, pipe: int, seed: int) -> None:
    """Append, read, finish and save at random; tell each time what is safe: the last event, and how far it is done."""
    chance = random.Random(seed)  # noqa: S311
    log = EventLog.open(directory, segment_bytes=_SEGMENT_BYTES)
    saved = log.done_up_to
    while True:
        log.append(payloads(log.next_sequence, chance.choice([1, 1, 3, 40, 400])), time.time_ns() // 1_000_000)
        os.write(pipe, _TOLD.pack(log.next_sequence - 1, saved))
        if chance.random() < 0.3:
            batch = log.read(log.done_up_to, chance.randint(1, 500), 1 << 30)
            log.mark_ambiguous(batch[0].sequence, batch[-1].sequence, 1)
            log.save_position()
            log.done(batch[-1].sequence)
            log.save_position()
            saved = log.done_up_to
            os.write(pipe, _TOLD.pack(log.next_sequence - 1, saved))


def killed_writer(directory: Path, seed: int, seconds: float) -> tuple[int, int]:
    """Let a writer live for a while after its first word; give its last."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            write_for_ever(directory, writer, seed)
        finally:
            os._exit(1)
    os.close(writer)
    told = os.read(reader, _TOLD.size)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while more := os.read(reader, 1 << 20):
        told = (told + more)[-_TOLD.size :]
    os.close(reader)
    if len(told) < _TOLD.size:
        raise SystemExit("the writer failed by itself")
    last, done = _TOLD.unpack(told)
    return last, done


def check(directory: Path, last: int, done: int) -> Counter[str]:
    """Open what the writer left and compare it with what it told."""
    log = EventLog.open(directory, segment_bytes=_SEGMENT_BYTES)
    account = Counter(damage.kind.value for damage in log.take_damage())
    account["checked"] = log.waiting
    if not done <= log.done_up_to <= log.next_sequence - 1 or log.next_sequence - 1 < last:
        raise SystemExit(f"told {last=} {done=}, found {log.next_sequence - 1} and {log.done_up_to}")
    expected = log.done_up_to + 1
    while batch := log.read(expected - 1, 1000, 1 << 30):
        for event in batch:
            if (event.sequence, event.payload) != (expected, payload(expected)):
                raise SystemExit(f"event {expected} is wrong or out of order")
            expected += 1
    if expected != log.next_sequence or log.take_damage():
        raise SystemExit(f"{expected=}, next is {log.next_sequence}")
    # Most of the time the next life starts with a little, sometimes with all that waits.
    if log.waiting > 2000:
        log.done(log.next_sequence - 100)
    log.close()
    return account


def main() -> None:
    """Take the directory, the number of kills and a seed."""
    directory, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    chance = random.Random(seed)  # noqa: S311
    account: Counter[str] = Counter()
    for kill in range(kills):
        account += check(directory, *killed_writer(directory, seed + kill, chance.uniform(0, 0.02)))
        account["kills"] += 1
    sys.stdout.write(json.dumps(account))


if __name__ == "__main__":
    main()
