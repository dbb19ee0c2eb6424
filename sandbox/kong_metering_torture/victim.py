"""A process with a spool that puts events until it is killed; or, as the last one, delivers what there is.

    python -m kong_metering_torture.victim NAME DIRECTORY INBOX URL RATE

DIRECTORY/spool is the spool, DIRECTORY/told/NAME the file in which it tells what it put; INBOX a directory for shared
memory, or `none`; RATE in events a second, 0 for the last one. It says `ready` on its standard output when all is
imported, and begins with the first line on its standard input. The last one then says how much waits in its queues,
again and again, until its standard input ends. Its name is its token: so the endpoint knows who sends.
"""

from __future__ import annotations

import itertools
import os
import random
import select
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from kong_metering.config import Entity, parse_config
from kong_metering.runtime import Runtime, make_runtime
from kong_metering.spool.options import SpoolOptions
from kong_metering_torture.events import QUEUES, Name, event_of, told_line

if TYPE_CHECKING:
    from kong_metering.delivery.queue import EventQueue

_LARGEST_BURST = 20
_TELL_SECONDS = 0.1
_CLOSING_SECONDS = 10.0
# Less than the endpoint hangs.
_TIMEOUT_MS = 1500


def main() -> None:
    """Do what the arguments say."""
    name, directory, inbox, url, rate = sys.argv[1:]
    _say("ready")
    sys.stdin.readline()
    inbox_directory = None if inbox == "none" else Path(inbox)
    runtime = make_runtime(spool=SpoolOptions(Path(directory, "spool"), inbox_directory=inbox_directory))
    queues = [_opened(runtime, number, url, name) for number in range(len(QUEUES))]
    if float(rate):
        _put_for_ever(name, queues, Path(directory, "told", name), float(rate))
    while not select.select([sys.stdin], [], [], _TELL_SECONDS)[0]:
        _say(str(sum(runtime.delivery.waiting().values())))
    runtime.delivery.close(_CLOSING_SECONDS)


def _say(words: str) -> None:
    sys.stdout.write(f"{words}\n")
    sys.stdout.flush()


def _opened(runtime: Runtime, number: int, url: str, token: str) -> EventQueue:
    settings = QUEUES[number].settings
    config = parse_config({"ingest_endpoint": url, "api_token": token, "timeout": _TIMEOUT_MS, "queue": settings})
    return runtime.delivery.open(Entity(f"entity-{number}", f"queue {number}"), config)


def _put_for_ever(name: str, queues: list[EventQueue], told: Path, rate: float) -> None:
    """Put events in bursts, and tell of each whose `put` returned, when."""
    descriptor = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    chance = random.Random(name)  # noqa: S311
    shares = [queue.share for queue in QUEUES]
    numbers = itertools.count()
    while True:
        burst = chance.randint(1, _LARGEST_BURST)
        for queue, number in zip(chance.choices(range(len(queues)), shares, k=burst), numbers):  # noqa: B905 - endless
            queues[queue].put(event_of(Name(name, queue, number)))
            os.write(descriptor, told_line(queue, number, time.monotonic()))
        time.sleep(burst / rate)


if __name__ == "__main__":
    main()
