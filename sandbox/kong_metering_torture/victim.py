"""Processes with a spool that put events until they are killed; and the last one, which delivers what there is.

    python -m kong_metering_torture.victim DIRECTORY INBOX URL RATE

DIRECTORY/spool is the spool, DIRECTORY/told/NAME the file in which the process NAME tells what it put; INBOX a
directory for shared memory, `none` for what this program keeps, as the supervisor of plugin servers does, or `alone`
for each process's own memory; RATE in events a second. A process's name is its token: so the endpoint knows who sends.

The program itself imports everything, so that who is forked from it meets the spool at once; it has one thread, and no
spool. It takes orders, a line each, and answers each by a line: `start NAME` forks a process; `kill` kills that one,
reaps it, and tells when (monotonic clock), or `dead` if it had ended by itself; `succeed NAME` forks one that takes
over what was left, delivers what it can, and ends; `deliver NAME` makes this process the last one, which then says with
each further order how much waits in its queues, until there are no more.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from kong_metering.app import rings_in
from kong_metering.config import Entity, parse_config
from kong_metering.host.keeping import Keeping, Lent
from kong_metering.runtime import Runtime, make_runtime
from kong_metering.spool.options import SpoolOptions
from kong_metering_torture.events import QUEUES, Name, event_of, told_line

if TYPE_CHECKING:
    from collections.abc import Callable

    from kong_metering.delivery.queue import EventQueue

_LARGEST_BURST = 20
_COMPANY = 20
_CLOSING_SECONDS = 10.0
# Less than the endpoint hangs.
_TIMEOUT_MS = 1500


@dataclass(frozen=True)
class Work:
    """What the command line says."""

    directory: Path
    inbox: Path | None
    url: str
    rate: float
    is_kept: bool


def main() -> None:
    """Take orders."""
    directory, inbox, url, rate = sys.argv[1:]
    place = None if inbox in {"none", "alone"} else Path(inbox)
    work = Work(Path(directory), place, url, float(rate), is_kept=inbox != "alone")
    keeping = Keeping()
    child = 0
    while order := sys.stdin.readline():
        match order.split():
            case ["start", name]:
                child = _forked(lambda lent: _put_for_ever(work, name, lent), keeping)
                _say(str(child))
            case ["kill"]:
                _say(_killed(child, keeping))
            case ["succeed", name]:
                child = _forked(lambda lent: _succeed(work, name, lent), keeping)
                _say(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))
            case ["deliver", name]:
                _deliver(work, name)
                return


def _forked(live: Callable[[Lent], None], keeping: Keeping) -> int:
    """Fork a process that lives so, and is lent what the supervisor would lend it."""
    lent = keeping.lend()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            keeping.close()
            live(lent)
            status = 0
        except BaseException:  # noqa: BLE001 - it is shown, and this process ends
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(status)
    keeping.lent_to(child, lent)
    return child


def _killed(child: int, keeping: Keeping) -> str:
    if os.waitpid(child, os.WNOHANG)[0]:
        return "dead"
    at = time.monotonic()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    keeping.reclaim(child)
    return str(at)


def _succeed(work: Work, name: str, lent: Lent) -> None:
    runtime, _ = _begun(work, name, lent)
    runtime.delivery.close(_CLOSING_SECONDS)


def _deliver(work: Work, name: str) -> None:
    runtime, queues = _begun(work, name, Lent())
    descriptor = _told(work, name)
    numbers = (number for number in itertools.count() if not Name(name, 0, number).is_bad)
    _say("begun")
    while sys.stdin.readline():
        waiting = sum(runtime.delivery.waiting().values())
        _say(str(waiting))
        # An event is to blame only where others get through, so that there have to be others.
        for queue in range(len(queues)) if waiting else ():
            _put(name, queues, descriptor, [(queue, next(numbers)) for _ in range(_COMPANY)])
    runtime.delivery.close(_CLOSING_SECONDS)


def _begun(work: Work, name: str, lent: Lent) -> tuple[Runtime, list[EventQueue]]:
    options = SpoolOptions(work.directory / "spool", inbox_directory=work.inbox)
    runtime = make_runtime(spool=options, lent=rings_in(lent) if work.is_kept else None)
    return runtime, [_opened(runtime, number, work.url, name) for number in range(len(QUEUES))]


def _say(words: str) -> None:
    sys.stdout.write(f"{words}\n")
    sys.stdout.flush()


def _opened(runtime: Runtime, number: int, url: str, token: str) -> EventQueue:
    settings = QUEUES[number].settings
    config = parse_config({"ingest_endpoint": url, "api_token": token, "timeout": _TIMEOUT_MS, "queue": settings})
    return runtime.delivery.open(Entity(f"entity-{number}", f"queue {number}"), config)


def _put_for_ever(work: Work, name: str, lent: Lent) -> NoReturn:
    """Put events in bursts, and tell of each whose `put` returned, when."""
    _, queues = _begun(work, name, lent)
    descriptor = _told(work, name)
    chance = random.Random(name)  # noqa: S311
    shares = [queue.share for queue in QUEUES]
    numbers = itertools.count()
    while True:
        burst = chance.randint(1, _LARGEST_BURST)
        chosen = chance.choices(range(len(queues)), shares, k=burst)
        _put(name, queues, descriptor, [(queue, next(numbers)) for queue in chosen])
        time.sleep(burst / work.rate)


def _put(name: str, queues: list[EventQueue], told: int, numbered: list[tuple[int, int]]) -> None:
    for queue, number in numbered:
        queues[queue].put(event_of(Name(name, queue, number)))
        os.write(told, told_line(queue, number, time.monotonic()))


def _told(work: Work, name: str) -> int:
    return os.open(work.directory / "told" / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)


if __name__ == "__main__":
    main()
