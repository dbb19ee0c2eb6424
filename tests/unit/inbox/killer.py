"""Kills processes with an inbox, and those that pour what they left, again and again, and checks what is there then.

Run as a program of its own, so that it may fork: prints the account as JSON.

    killer.py ring DIRECTORY KILLS SEED    a server appends, advances and moves, and is killed: what is in its ring?
    killer.py pour DIRECTORY KILLS SEED    the same with a writer and logs; who pours is killed as well, while another
                                           process adopts: is each event in a log once, in order?
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import random
import signal
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

from kong_metering.inbox.inbox import Inbox
from kong_metering.inbox.place import Place
from kong_metering.inbox.pouring import Pouring
from kong_metering.inbox.ring import read_header, read_unread
from kong_metering.spool.directory import SpoolDirectory
from kong_metering.spool.identity import QueueIdentity
from tests.unit.eventlog.helpers import payload

_TOLD = struct.Struct("<QQ")
_NO_LIMIT = 1 << 30
_RING = 256 * 1024
_QUEUES = [QueueIdentity(f"entity-{number}", "metering", "https://metering.example") for number in range(3)]
# The one whose log the writer never makes.
_WITHOUT_LOG = 2


class Child:
    """A process that tells numbers until it is killed."""

    def __init__(self, work: Callable[[int], None]) -> None:
        self._reader, writer = os.pipe()
        # Nobody reads it before the end, and what waits for room in it does nothing that could go wrong.
        fcntl.fcntl(self._reader, fcntl.F_SETPIPE_SZ, 1 << 20)
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.close(self._reader)
                work(writer)
            finally:
                os._exit(1)
        os.close(writer)

    def wait_for_word(self) -> bytes:
        return os.read(self._reader, _TOLD.size)

    def kill(self) -> bytes:
        """Kill it, and give all that it told meanwhile."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        told = b""
        while more := os.read(self._reader, 1 << 20):
            told += more
        os.close(self._reader)
        return told


def killed_server(serve: Callable[[int], None], chance: random.Random) -> tuple[int, int]:
    """Let a server live for a while after its first word; give its last."""
    server = Child(serve)
    told = server.wait_for_word()
    time.sleep(chance.choice([chance.uniform(0, 0.002), chance.uniform(0, 0.1)]))
    told = (told + server.kill())[-_TOLD.size :]
    if len(told) < _TOLD.size:
        raise SystemExit("the server failed by itself")
    appended, advanced = _TOLD.unpack(told)
    return appended, advanced


# -- what is in the ring -----------------------------------------------------------------------------------------------


def check_rings(directory: Path, kills: int, chance: random.Random) -> Counter[str]:
    """Kill servers; what each one's ring has is what it told, and perhaps a little more."""
    (directory / "other").mkdir()
    places = [Place(directory, root) for root in (directory, directory / "other")]
    account: Counter[str] = Counter()
    for kill in range(kills):
        seed = chance.randrange(1 << 30)
        appended, advanced = killed_server(partial(append_for_ever, places, seed), chance)
        found = taken_out(places)
        first = found[0][0]
        end = first + len(found)
        if found != [(number, payload(number)) for number in range(first, end)]:
            raise SystemExit(f"kill {kill}: an event is wrong or out of order")
        # The last word may be one append or one advance old.
        if not appended <= end <= appended + 1 or first < advanced:
            raise SystemExit(f"kill {kill}: told {appended=} {advanced=}, found {first} to {end}")
        account += Counter(kills=1, checked=len(found))
    return account


def taken_out(places: list[Place]) -> list[tuple[int, bytes]]:
    """Read what the ring of the one dead process has, which is something, and remove it.

    It may be there twice, the same in both, if the process had just moved.
    """
    found: set[tuple[int, bytes]] = set()
    for ring in (ring for place in places for ring in place.orphans()):
        data = ring.read()
        header = read_header(data)
        found.update(read_unread(data, header) if header else ())
        ring.remove()
    if not found:
        raise SystemExit("nothing is there")
    return sorted(found)


def append_for_ever(places: list[Place], seed: int, pipe: int) -> None:
    """Append, drain, advance and move at random; tell after each append and each advance how far both are."""
    chance = random.Random(seed)  # noqa: S311
    here, there = places
    inbox = Inbox.open(here, lambda: None, ring_bytes=_RING)
    appended = advanced = 0
    while True:
        if chance.random() < 0.01:
            here, there = there, here
            inbox.move(here, survives_supervisor=True)
        if inbox.waiting < chance.randint(100, 1000):
            if not inbox.append(appended, payload(appended)):
                raise SystemExit("no room")
            appended += 1
        else:
            # Never all: what is left tells how far it was.
            drained = inbox.drain(chance.randint(1, inbox.waiting - 1))
            inbox.advance(drained)
            advanced += len(drained.events)
        os.write(pipe, _TOLD.pack(appended, advanced))


# -- what comes into the logs ------------------------------------------------------------------------------------------


def check_pouring(root: Path, kills: int, chance: random.Random) -> Counter[str]:
    """Kill servers, and those who pour what they left; whoever adopts meanwhile finds each event once, in order."""
    place = Place(root, root)
    pouring = Pouring([place], root, lambda: 1)
    heir = SpoolDirectory(root)
    account: Counter[str] = Counter()
    for server in itertools.count():
        if account["kills"] >= kills:
            break
        seed = chance.randrange(1 << 30)
        appended, _ = killed_server(partial(serve_for_ever, root, place, seed), chance)
        found: dict[str, list[bytes]] = {queue.key: [] for queue in _QUEUES}
        # What each third one left is poured here alone, where it is counted.
        for _ in range(chance.randint(1, 4) if server % 3 else 0):
            pourer = Child(partial(pour_for_ever, pouring))
            pourer.wait_for_word()
            until = time.monotonic() + chance.uniform(0, 0.03)
            while time.monotonic() < until:
                adopt(heir, pouring, found)
            pourer.kill()
            account["kills"] += 1
            adopt(heir, pouring, found)
        poured = pouring.pour()
        if poured.unpoured:
            raise SystemExit(f"not poured: {poured.unpoured}")
        adopt(heir, pouring, found)
        check_found(found, appended)
        account += Counter(kills=1, rings=poured.rings, poured=poured.events, known=poured.left_out)
        account["checked"] += sum(map(len, found.values()))
        if list(root.glob("proc-*/*/*.seg")) or list(place.path.glob("*.ring")):
            raise SystemExit("something is left")
    return account


def serve_for_ever(root: Path, place: Place, seed: int, pipe: int) -> None:
    """Append to all queues, in one thread, and write to the logs of all but one, in another."""
    chance = random.Random(seed)  # noqa: S311
    inbox = Inbox.open(place, lambda: None, ring_bytes=_RING * 16)
    for number, queue in enumerate(_QUEUES):
        inbox.open_queue(number, queue)
    threading.Thread(target=write_for_ever, args=(root, inbox, seed), daemon=True).start()
    appended = 0
    while True:
        if inbox.waiting > 3000:
            time.sleep(0.001)
            continue
        if not inbox.append(appended % len(_QUEUES), payload(appended)):
            raise SystemExit("no room")
        appended += 1
        os.write(pipe, _TOLD.pack(appended, 0))
        if chance.random() < 0.001:
            time.sleep(0.001)


def write_for_ever(root: Path, inbox: Inbox, seed: int) -> None:
    """Move events to logs, but never advance past one of the queue that gets no log."""
    chance = random.Random(seed)  # noqa: S311
    directory = SpoolDirectory(root)
    logs = {}
    for number, queue in enumerate(_QUEUES):
        if number != _WITHOUT_LOG:
            logs[number] = held = directory.log_for(queue)
            inbox.log_opened(number, held.directory)
    is_stuck = chance.random() < 0.5
    while True:
        drained = inbox.drain(chance.randint(1, 500))
        for number, held in logs.items():
            held.log.append([event for one, event in drained.events if one == number], 1)
        if is_stuck:
            # As a disk that hangs now: the logs have a part of what the ring has, and no more is written.
            time.sleep(60)
        if any(number == _WITHOUT_LOG for number, _ in drained.events) and _WITHOUT_LOG not in logs:
            logs[_WITHOUT_LOG] = late = directory.log_for(_QUEUES[_WITHOUT_LOG])
            inbox.log_opened(_WITHOUT_LOG, late.directory)
            late.log.append([event for one, event in drained.events if one == _WITHOUT_LOG], 1)
        inbox.advance(drained)


def pour_for_ever(pouring: Pouring, pipe: int) -> None:
    """Pour what there is, once, and stay."""
    os.write(pipe, bytes(_TOLD.size))
    pouring.pour()
    signal.pause()


def adopt(heir: SpoolDirectory, pouring: Pouring, found: dict[str, list[bytes]]) -> None:
    """Adopt what may be, and deliver all of it at once."""
    for held in heir.adopt(held_back=pouring.held_back).logs:
        if held.identity is None:
            raise SystemExit("an owner is not known")
        while events := held.log.read(held.log.done_up_to, 1000, _NO_LIMIT):
            found[held.identity.key] += [event.payload for event in events]
            held.log.done(events[-1].sequence)
        heir.retire(held)


def check_found(found: dict[str, list[bytes]], appended: int) -> None:
    """See that the logs have all that was appended, and at most the one event more that was under way."""
    total = sum(map(len, found.values()))
    if not appended <= total <= appended + 1:
        raise SystemExit(f"{appended} events were appended, and {total} are in the logs")
    for number, queue in enumerate(_QUEUES):
        if found[queue.key] != [payload(one) for one in range(number, total, len(_QUEUES))]:
            raise SystemExit(f"queue {number} has not the events that were appended, in their order")


def main() -> None:
    """Do what the arguments say."""
    check = {"ring": check_rings, "pour": check_pouring}[sys.argv[1]]
    account = check(Path(sys.argv[2]), int(sys.argv[3]), random.Random(int(sys.argv[4])))  # noqa: S311
    sys.stdout.write(json.dumps(account))


if __name__ == "__main__":
    main()
