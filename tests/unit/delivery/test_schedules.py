"""Random schedules of faults: once all of them are over, everything settles by itself, each event once.

Nobody helps then: nothing more is put, no clock is moved and nothing is asked for, so that an event shows that waits
though nothing is wrong any more. `--schedules=1000:2000` runs those with the seeds from 1000 to below 2000.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest

from kong_metering.config import parse_config, parse_entity
from kong_metering.delivery.registry import Delivery
from kong_metering.errors import SpoolError
from kong_metering.eventlog.position import PositionFile
from kong_metering.spool.deadletters import DeadLetters
from kong_metering.spool.directory import survey
from kong_metering.spool.identity import QueueIdentity
from kong_metering.spool.requests import Asking, Kind, Request, new_id
from kong_metering.trial.outcome import Delivered, Outcome, Rejected
from tests.support.waiting import wait_until
from tests.unit.delivery.fakes import (
    BUSY,
    DOWN,
    REFUSED,
    UNAUTHORIZED,
    UNREACHABLE,
    FakeEndpoint,
    Process,
    SteeredClock,
    crashed,
    letters,
    on_disk,
)

if TYPE_CHECKING:
    from kong_metering.delivery.queue import EventQueue
    from tests.support.loglines import LogLines

pytestmark = pytest.mark.slow

_STEPS = 20
_MOST_BAD = 3
_ERRORS = (errno.EROFS, errno.ENOSPC, errno.EIO, errno.EACCES)
_PRODUCT = str(Path(sys.modules[Delivery.__module__].__file__ or "").parents[1])


class FaultyDisk:
    """The file system of this process, which refuses some of what it is asked, or hangs."""

    def __init__(self) -> None:
        # What refuses, by which error: `all` that writes, `positions`, `letters`, `reads`.
        self.refuses: dict[str, int] = {}
        self._goes_on = threading.Event()
        self._goes_on.set()

    def hang(self) -> None:
        self._goes_on.clear()

    def work(self) -> None:
        self.refuses = {}
        self._goes_on.set()

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        with contextlib.ExitStack() as patches:
            for where, name, what in (
                (os, "pwrite", "all"),
                (os, "posix_fallocate", "all"),
                (Path, "mkdir", "all"),
                (os, "ftruncate", "read-only"),
                (Path, "unlink", "read-only"),
                (Path, "rmdir", "read-only"),
                (Path, "replace", "read-only"),
                (os, "pread", "reads"),
                (PositionFile, "save", "positions"),
                (DeadLetters, "add", "letters"),
            ):
                patches.enter_context(mock.patch.object(where, name, self._faulty(getattr(where, name), name, what)))
            yield

    def _faulty(self, works: Callable[..., Any], name: str, what: str) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if name == "pwrite" and threading.current_thread().name.startswith("metering"):
                self._goes_on.wait(60)
            error = self.refuses.get(what)
            if what == "read-only" and self.refuses.get("all") == errno.EROFS:
                error = errno.EROFS
            if error is not None:
                raise OSError(error, os.strerror(error))
            return works(*arguments, **named)

        return call


class Fickle:
    """An endpoint that changes its mind; `taken` has what it took."""

    def __init__(self, chance: random.Random, bad: set[bytes]) -> None:
        self.fake = FakeEndpoint(self._decide)
        self._taken: Counter[bytes] = Counter()
        self.takes_arrays = True
        self.failures: Sequence[Outcome] = ()
        self._chance = chance
        self._bad = bad
        self._lock = threading.Lock()

    def _decide(self, events: list[bytes]) -> Outcome:
        if not self.takes_arrays and len(events) > 1:
            return Rejected("https://ingest.test answered 400: an object, please")
        bad = tuple(index for index, event in enumerate(events) if event in self._bad)
        outcome = self._chance.choice(self.failures) if self.failures else Delivered()
        if bad and isinstance(outcome, Delivered):
            return Rejected("https://ingest.test answered 400: no subject", self._chance.choice([bad, ()]))
        if isinstance(outcome, Delivered):
            with self._lock:
                self._taken.update(events)
        return outcome

    @property
    def taken(self) -> Counter[bytes]:
        with self._lock:
            return self._taken.copy()


class Dawdling:
    """Threads that are slow at any line of the product, by chance: what one does is met by all that another may do."""

    def __init__(self, seed: int, share: float) -> None:
        self._chance = random.Random(seed)  # noqa: S311
        self._share = share

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        if self._share:
            threading.settrace(self._called)
        try:
            yield
        finally:
            threading.settrace(None)

    def _called(self, frame: FrameType, _event: str, _argument: object) -> Any:
        name = frame.f_code.co_filename
        return self._at_line if name.startswith(_PRODUCT) and "/eventlog/" not in name else None

    def _at_line(self, _frame: FrameType, event: str, _argument: object) -> Any:
        if event == "line" and self._chance.random() < self._share:
            time.sleep(self._chance.random() * 0.01)
        return self._at_line


class World:
    """A spool with its processes, one after the other, two plugin entities and three endpoints."""

    def __init__(self, seed: int, home: Path) -> None:
        self.chance = random.Random(seed)  # noqa: S311
        self.disk = FaultyDisk()
        self.clock = SteeredClock()
        self.numbers = itertools.count()
        self.sequences = itertools.count(1)
        self.put_ones: list[bytes] = []
        self.bad: set[bytes] = set()
        # What a crash may have brought back though it was delivered.
        self.again: set[bytes] = set()
        self.has_bad = self.chance.random() < 0.3
        self.endpoints = [Fickle(random.Random(seed + index), self.bad) for index in range(3)]  # noqa: S311
        self.entities = [f"{number}1111111" for number in range(self.chance.choice([1, 1, 2]))]
        self.home = home
        self.roots = itertools.count()
        self.history: list[str] = []
        self.root = self.new_root()
        self.begin()

    def new_root(self) -> Path:
        home = self.home / str(next(self.roots))
        (home / "shm").mkdir(parents=True)
        return home / "spool"

    def begin(self) -> None:
        has_ring = self.chance.random() < 0.8
        self.process = Process(self.root, self.clock, self.root.parent / "shm" if has_ring else None)
        self.delivery = Delivery(
            clock=self.clock,
            stats=self.process.stats,
            couriers=self.process.couriers,
            connections=self.process.network.connections,
            spooler=self.process.spooler,
            adaptive_batch=self.chance.choice([1, 100]),
        )
        self.queues: dict[str, EventQueue] = {}
        self.opened: list[EventQueue] = []
        for entity in self.entities:
            self.open(entity, self.chance.choice(self.endpoints))

    def open(self, entity: str, endpoint: Fickle) -> None:
        settings = {
            "max_batch_size": self.chance.choice([1, 2, 7, 50]),
            "concurrency_limit": self.chance.choice([1, 1, -1]),
            "max_coalescing_delay": self.chance.choice([0, 0, 0.02]),
            "max_entries": 1_000_000,
            "initial_retry_delay": 0.001,
            "max_retry_delay": 0.01,
            "max_retry_time": 0.01,
            "breaker_cooldown": 0.02,
        }
        url = self.process.network.endpoint(endpoint.fake).url
        config = {"ingest_endpoint": url, "api_token": f"token-{self.chance.randrange(3)}", "queue": settings}
        self.queues[entity] = self.delivery.open(
            parse_entity({"__plugin_id": entity, "__seq__": next(self.sequences)}), parse_config(config)
        )
        self.opened.append(self.queues[entity])

    # -- steps --------------------------------------------------------------------------------------------------------

    def step(self) -> None:
        weights: Mapping[Callable[[], object], int] = {
            self.put_some: 12,
            self.refuse: 4,
            self.refuse_a_part: 5,
            self.hang: 1,
            self.disk_works: 7,
            self.endpoint_fails: 4,
            self.endpoint_hangs: 3,
            self.endpoint_takes_no_arrays: 1,
            self.endpoint_works: 6,
            self.reconfigure: 3,
            self.change_url: 2,
            self.let_go_of_a_queue: 1,
            self.redirect: 2,
            self.try_now: 1,
            self.time_passes: 1,
            self.rest: 2,
            self.end: 1,
            self.crash: 1,
        }
        step = self.chance.choices(list(weights), list(weights.values()))[0]
        self.history.append(getattr(step, "__name__", ""))
        step()
        time.sleep(self.chance.choice([0, 0, 0.001, 0.01, 0.05]) * self.chance.random())

    def put_some(self) -> None:
        entity = self.chance.choice(self.entities)
        for _ in range(self.chance.choice([1, 1, 3, 10, 40, 150])):
            event = b"%s-%06d" % (entity[:1].encode(), next(self.numbers))
            if self.has_bad and len(self.bad) < _MOST_BAD and self.chance.random() < 0.05:
                self.bad.add(event)
            self.put_ones.append(event)
            self.queues[entity].put(event)

    def refuse(self) -> None:
        self.disk.refuses = {**self.disk.refuses, "all": self.chance.choice(_ERRORS)}

    def refuse_a_part(self) -> None:
        what = self.chance.choice(["positions", "positions", "letters", "reads"])
        error = errno.EIO if what == "reads" else self.chance.choice(_ERRORS)
        self.disk.refuses = {**self.disk.refuses, what: error}

    def hang(self) -> None:
        self.disk.hang()

    def disk_works(self) -> None:
        self.disk.work()

    def endpoint_fails(self) -> None:
        failure = self.chance.choice([DOWN, UNREACHABLE, REFUSED, BUSY, UNAUTHORIZED])
        self.chance.choice(self.endpoints).failures = self.chance.choice([[failure], [failure, Delivered(), DOWN]])

    def endpoint_hangs(self) -> None:
        self.chance.choice(self.endpoints).fake.hold()

    def endpoint_takes_no_arrays(self) -> None:
        self.chance.choice(self.endpoints).takes_arrays = False

    def endpoint_works(self) -> None:
        endpoint = self.chance.choice(self.endpoints)
        endpoint.failures = ()
        endpoint.fake.let_go()

    def reconfigure(self) -> None:
        entity = self.chance.choice(self.entities)
        url = self.queues[entity].endpoint.url
        same = next(each for each in self.endpoints if self.process.network.endpoint(each.fake).url == url)
        self.open(entity, same)

    def change_url(self) -> None:
        self.open(self.chance.choice(self.entities), self.chance.choice(self.endpoints))

    def let_go_of_a_queue(self) -> None:
        """Let go of all instances but the last one of each entity, as Kong does after a change."""
        for queue in self.opened:
            if queue not in self.queues.values():
                self.delivery.release(queue)
        self.opened = [queue for queue in self.opened if queue in self.queues.values()]
        self.delivery.sweep()

    def redirect(self) -> None:
        """Ask as `kong-metering spool redirect` does, and wait for the answer a moment only."""
        entity = self.chance.choice(self.entities)
        urls = [self.process.network.endpoint(each.fake).url for each in self.chance.sample(self.endpoints, 2)]
        source, target = (QueueIdentity(entity, entity, url) for url in urls)
        with contextlib.suppress(OSError, SpoolError):
            logs = tuple(
                str(log.directory.relative_to(self.root)) for log in survey(self.root) if log.identity == source
            )
            expires_ms = int(self.clock.wall() * 1000) + 60_000
            request = Request(new_id(), Kind.REDIRECT, source, logs, expires_ms, target)
            with Asking(self.root, request) as asking, contextlib.suppress(AssertionError):
                wait_until(lambda: any(each.is_done for each in asking.answers()), "an answer", seconds=0.2)

    def try_now(self) -> None:
        # As the janitor does, who waits for a disk that hangs.
        threading.Thread(target=self.chance.choice(list(self.queues.values())).try_now, daemon=True).start()

    def time_passes(self) -> None:
        self.process.let_pass(self.chance.choice([0.01, 1, 30, 700]))

    def rest(self) -> None:
        time.sleep(self.chance.choice([0.05, 0.3]))

    def end(self) -> None:
        """End the process in an orderly way while the disk works, and begin the next one."""
        self.disk.work()
        for endpoint in self.endpoints:
            endpoint.fake.let_go()
        wait_until(self.is_on_disk, "all is on disk")
        # Requests that are under way are waited for, so that nothing is sent twice.
        self.close(20)
        self.begin()

    def is_on_disk(self) -> bool:
        self.process.wait_for_a_round()
        backlogs = self.process.spooler._janitor.backlogs()
        return not any(
            each.is_refused or each.held_back or any(log.is_unsaved for log in each._sources.logs())
            for each in backlogs
        )

    def close(self, seconds: float) -> None:
        if not self.process.is_closed:
            self.process.is_closed = True
            self.delivery.close(seconds)
            self.process.couriers.close(20)
            account = self.process.account()
            assert account.waiting == 0, account
            assert not account.dropped, account
            buried = sum(account.dead_letters.values())
            assert account.accepted + account.adopted == account.delivered + buried + account.left, account

    def crash(self) -> None:
        """Go on with what is left when all dies, at a moment in which nothing is on its way."""
        self.disk.work()
        for endpoint in self.endpoints:
            endpoint.failures = [REFUSED]
            endpoint.fake.let_go()
        wait_until(self.is_on_disk, "all is on disk")
        assert self.process.spooler._writer.flush(20)
        self.process.wait_for_rest()
        wait_until(self.is_on_disk, "all is on disk")
        self.process.wait_for_rest()
        copy = crashed(self.root)
        # What stood behind an event that waits comes again: the position tells no more than up to where all is settled.
        self.again.update(set(on_disk(copy)) & set(self.gone()))
        self.close(0)
        for endpoint in self.endpoints:
            endpoint.failures = ()
        self.root = self.new_root()
        copy.replace(self.root)
        self.begin()

    # -- the end ------------------------------------------------------------------------------------------------------

    def lift_all_faults(self) -> None:
        for endpoint in self.endpoints:
            endpoint.failures = ()
            endpoint.fake.let_go()
        self.disk.work()

    def open_everywhere(self) -> None:
        """Open all queues, so that what an earlier process left for any of them has somebody to deliver it."""
        for entity in self.entities:
            for endpoint in self.endpoints:
                self.open(entity, endpoint)

    @property
    def left(self) -> list[bytes]:
        """What is neither delivered nor a dead letter, though it is good."""
        gone = self.gone()
        return [event for event in self.put_ones if event not in gone and event not in self.bad]

    def gone(self) -> Counter[bytes]:
        gone = Counter(stored.letter.event for stored in letters(self.root))
        for endpoint in self.endpoints:
            gone += endpoint.taken
        return gone

    def told(self) -> str:
        """Tell what was done, and how it stands."""
        logs = [
            f"{log.held.directory} of {each.identity.endpoint}: {log.waiting} wait, {log.unread} unread, "
            f"unnotable: {log.is_unnotable}, unsure: {log.is_unsure}, unsaved: {log.is_unsaved}"
            for each in self.process.spooler._janitor.backlogs()
            for log in each._sources.logs()
        ]
        return "\n".join([" ".join(self.history), *map(str, self.delivery.told()), *logs])

    def settle(self) -> None:
        self.lift_all_faults()
        wait_until(lambda: not self.left, "each good event is gone", pause=0.02)
        for number in range(2000):
            if not self.process.account().waiting and on_disk(self.root) == []:
                break
            # Only beside others that get through an event is known to be to blame.
            for index, queue in enumerate({id(queue): queue for queue in self.opened}.values()):
                if queue.waiting:
                    event = b"witness %d %d" % (index, number)
                    self.put_ones.append(event)
                    queue.put(event)
            time.sleep(0.02)
            self.process.let_pass(1)
        wait_until(lambda: not self.process.account().waiting, "each event is gone")

    def check(self) -> None:
        wait_until(lambda: on_disk(self.root) == [], "nothing is left on disk", pause=0.02)
        self.process.wait_for_rest()
        assert sum(self.delivery.waiting().values()) == 0
        # The clock may have been moved a moment ago.
        wait_until(lambda: not any(self.delivery.stalled().values()), "no thread is stalled")
        self.close(20)
        gone = self.gone()
        assert [event for event, count in gone.items() if count > 1 and event not in self.again] == []
        assert sorted(gone) == sorted(self.put_ones)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    first, _, end = metafunc.config.getoption("--schedules").partition(":")
    metafunc.parametrize("seed", range(int(first), int(end)))


def test_once_all_faults_are_over_each_event_is_gone_once(seed: int, tmp_path: Path, log: LogLines) -> None:
    chance = random.Random(seed)  # noqa: S311
    dawdling = Dawdling(seed, chance.choice([0, 0, 0, 0.001]))
    with contextlib.ExitStack() as stack:
        stack.callback(sys.setswitchinterval, sys.getswitchinterval())
        sys.setswitchinterval(chance.choice([1e-5, 5e-3]))
        stack.enter_context(dawdling.in_use())
        world = World(seed, tmp_path)
        stack.enter_context(world.disk.in_use())
        stack.callback(world.close, 20)
        stack.callback(world.lift_all_faults)
        try:
            for _ in range(_STEPS):
                world.step()
            world.lift_all_faults()
            world.open_everywhere()
            world.settle()
            world.check()
        except AssertionError as error:
            raise AssertionError(f"{error}, after: {world.told()}") from error
    assert log.with_text("delivery failed") == []
    assert [text for _, text in log.lines if text.startswith("the spool: ") and "OSError" not in text] == []
