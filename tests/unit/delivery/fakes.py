"""An ingest endpoint without a network, and waiting without time passing; the queue and its threads are real."""

from __future__ import annotations

import contextlib
import logging
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kong_metering.config import Queue
from kong_metering.delivery.account import QueueAccount
from kong_metering.delivery.backlog import MemoryBacklog
from kong_metering.delivery.ingest import Delivered, Failed, Outcome, Rejected
from kong_metering.delivery.queue import EventQueue
from kong_metering.delivery.spooler import Spooler
from kong_metering.delivery.spooloptions import SpoolOptions
from kong_metering.log import LOGGER, TroubleLog
from kong_metering.spool.deadletters import DEAD_LETTERS, DeadLetters, StoredLetter
from kong_metering.spool.directory import survey
from kong_metering.spool.identity import QueueIdentity
from kong_metering.spool.log import EventLog
from kong_metering.stats import Snapshot, Stats
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from kong_metering.delivery.spooled import SpooledBacklog
    from tests.support.clock import FakeClock

_PATIENCE_SECONDS = 20.0

Decide = Callable[[list[bytes]], Outcome]

DOWN = Failed("https://ingest.test answered 503: down", "503", is_server_error=True)
UNREACHABLE = Failed("no answer from https://ingest.test: ConnectionError: refused", "ConnectionError")
UNAUTHORIZED = Failed("https://ingest.test answered 401: who are you?", "401", is_misconfigured=True)
# These surely did not bring the events there.
REFUSED = Failed("https://ingest.test: ConnectionRefusedError", "ConnectionRefusedError", may_have_arrived=False)
BUSY = Failed("https://ingest.test answered 429: slow down", "429", may_have_arrived=False)


def take_all(_: list[bytes]) -> Outcome:
    return Delivered()


class Timing(threading.Condition):
    """Stands in for a queue's condition: its timed waits are measured by the fake clock, and kept for the test.

    While it `flows`, a timed wait passes at once and moves the clock. Else it lasts until the test lets time pass.
    """

    def __init__(self, clock: FakeClock) -> None:
        super().__init__()
        self._clock = clock
        self.flows = True
        self.coalescing: list[float] = []
        self.backoffs: list[float] = []

    def let_pass(self, seconds: float) -> None:
        with self:
            self._clock.advance(seconds)
            self.notify_all()

    def wait(self, timeout: float | None = None) -> bool:
        if timeout is not None:
            self.coalescing.append(timeout)
            if self.flows:
                self._clock.advance(timeout)
                return False
        return super().wait(_PATIENCE_SECONDS)

    def wait_for(self, predicate: Callable[[], Any], timeout: float | None = None) -> Any:
        assert timeout is not None
        self.backoffs.append(timeout)
        until = self._clock.monotonic() + timeout
        while not predicate() and self._clock.monotonic() < until:
            if self.flows:
                self._clock.advance(timeout)
                break
            super().wait(_PATIENCE_SECONDS)
        return predicate()


class FakeEndpoint:
    """Answers by its script first, then as it decides; keeps every request, and which connection it came over."""

    def __init__(self, decide: Decide = take_all) -> None:
        self.decide = decide
        self.script: deque[Outcome | Exception] = deque()
        self.requests: list[list[bytes]] = []
        self.senders: list[FakeSender] = []
        self.refused_connections: deque[Exception] = deque()
        self._open = threading.Event()
        self._open.set()
        self._entered = threading.Semaphore(0)
        self._lock = threading.Lock()

    @property
    def delivered(self) -> list[bytes]:
        """The events that were taken, in the order of the answers."""
        return [event for sender in self.senders for event in sender.delivered]

    def connect(self, name: str = "") -> FakeSender:
        with self._lock:
            if self.refused_connections:
                raise self.refused_connections.popleft()
            self.senders.append(FakeSender(self, name))
            return self.senders[-1]

    def hold(self) -> None:
        """From now on requests are not answered before `let_go`."""
        self._open.clear()

    def let_go(self) -> None:
        self._open.set()

    def wait_for_request(self, count: int = 1) -> None:
        """Wait until `count` more requests than were waited for before have come in."""
        for _ in range(count):
            assert self._entered.acquire(timeout=_PATIENCE_SECONDS), "no request came"

    def take(self, events: list[bytes]) -> Outcome:
        with self._lock:
            self.requests.append(events)
            planned = self.script.popleft() if self.script else None
        self._entered.release()
        assert self._open.wait(_PATIENCE_SECONDS)
        if isinstance(planned, Exception):
            raise planned
        return planned or self.decide(events)


class FakeSender:
    """One connection to the fake endpoint."""

    def __init__(self, endpoint: FakeEndpoint, name: str) -> None:
        self.name = name
        self.closed = False
        self.delivered: list[bytes] = []
        self.requests: list[list[bytes]] = []
        self.threads: set[int] = set()
        self._endpoint = endpoint

    def send(self, events: Sequence[bytes]) -> Outcome:
        assert not self.closed
        self.threads.add(threading.get_ident())
        self.requests.append(list(events))
        outcome = self._endpoint.take(list(events))
        if isinstance(outcome, Delivered):
            self.delivered.extend(events)
        return outcome

    def close(self) -> None:
        self.closed = True


def down(failure: Outcome = REFUSED) -> FakeEndpoint:
    """Make an endpoint that takes nothing."""
    return FakeEndpoint(lambda _: failure)


class Refusing:
    """An endpoint that refuses a whole request because of one bad event, as OpenMeter does."""

    def __init__(self, *bad: bytes, names_it: bool = False) -> None:
        self._bad = bad
        self._names_it = names_it

    def __call__(self, events: list[bytes]) -> Outcome:
        indexes = tuple(index for index, event in enumerate(events) if event in self._bad)
        if not indexes:
            return Delivered()
        return Rejected("https://ingest.test answered 400: no subject", indexes if self._names_it else ())


class Choking:
    """An endpoint that answers 500 to any request that holds one of some events."""

    def __init__(self, *bad: bytes) -> None:
        self._bad = set(bad)

    def __call__(self, events: list[bytes]) -> Outcome:
        return DOWN if self._bad & set(events) else Delivered()


@dataclass
class LogLines(logging.Handler):
    """What the package logged, as pairs of level and text."""

    lines: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(logging.DEBUG)

    __hash__ = logging.Handler.__hash__

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append((record.levelname, record.getMessage()))

    def with_text(self, text: str) -> list[tuple[str, str]]:
        return [line for line in self.lines if text in line[1]]


@dataclass
class Rig:
    """A queue in front of a fake endpoint, with everything that a test looks at."""

    settings: Queue
    clock: FakeClock
    log: LogLines
    endpoint: FakeEndpoint = field(default_factory=FakeEndpoint)

    def __post_init__(self) -> None:
        self.timing = Timing(self.clock)
        self.stats = Stats()
        self.troubles = TroubleLog(self.clock, logger=LOGGER)
        account = QueueAccount("metering", self.stats, self.troubles)
        self.backlog = MemoryBacklog(self.settings, account)
        self.queue = EventQueue(self.settings, self.endpoint.connect, self.backlog, clock=self.clock, account=account)
        self.queue._changed = self.timing

    def put(self, *events: bytes) -> None:
        """Put them together, so that the queue does not cut a batch in between."""
        with self.timing:
            for event in events:
                self.queue.put(event)

    def put_while_busy(self, *events: bytes) -> None:
        """Put them while the queue waits for the endpoint's answer to an event before them."""
        self.endpoint.hold()
        self.put(b"before")
        self.endpoint.wait_for_request()
        self.put(*events)

    def settle(self) -> Snapshot:
        """Wait until each event is delivered or dropped, and give the account."""
        wait_until(lambda: self.stats.snapshot().waiting == 0, "each event is delivered or dropped")
        assert self.queue.waiting == 0
        return self.stats.snapshot()

    def reconfigure(self, name: str = "newer", **changes: Any) -> None:
        self.settings = self.settings.model_copy(update=changes)
        self.queue.reconfigure(self.settings, lambda: self.endpoint.connect(name))

    def close(self, seconds: float = 1_000_000) -> Snapshot:
        self.queue.close(self.clock.monotonic() + seconds)
        return self.stats.snapshot()

    def workers(self) -> list[threading.Thread]:
        return list(self.queue._workers)


class SteeredClock:
    """The machine's clocks, which a test can move: both together, or the wall's alone."""

    def __init__(self) -> None:
        self._passed = 0.0
        self._wall_set_by = 0.0

    def advance(self, seconds: float) -> None:
        self._passed += seconds

    def set_wall_by(self, seconds: float) -> None:
        self._wall_set_by += seconds

    def monotonic(self) -> float:
        return time.monotonic() + self._passed

    def wall(self) -> float:
        return time.time() + self._passed + self._wall_set_by


class SteeredCondition(threading.Condition):
    """A queue's condition whose waits end by a clock that a test moves, once it notifies."""

    def __init__(self, lock: Any, clock: SteeredClock) -> None:
        super().__init__(lock)
        self._clock = clock
        self.pauses = 0

    def wait_for(self, predicate: Callable[[], Any], timeout: float | None = None) -> Any:
        assert timeout is not None
        self.pauses += 1
        until = self._clock.monotonic() + timeout
        while not predicate() and (left := until - self._clock.monotonic()) > 0:
            super().wait(left)
        return predicate()


IDENTITY = QueueIdentity("11111111-one", "metering", "https://ingest.test/events")
# A test does not wait for an outage.
IMPATIENT = {"initial_retry_delay": 0.001, "max_retry_delay": 0.005, "max_retry_time": 0.01}


class Process:
    """A process with a spool: real files, real threads; its queues deliver to fake endpoints."""

    def __init__(self, root: Path, clock: SteeredClock, **options: Any) -> None:
        self.root = root
        self.clock = clock
        self.stats = Stats()
        self.troubles = TroubleLog(clock, logger=LOGGER)
        self.spooler = Spooler(SpoolOptions(root, **options), clock=clock, stats=self.stats, troubles=self.troubles)
        self.queues: list[SpooledQueue] = []
        # How many events came onto its disk besides, or went from it, for the balance.
        self.from_strangers = 0
        self.is_closed = False
        self.spooler.start()

    def open(
        self, endpoint: FakeEndpoint | None = None, identity: QueueIdentity = IDENTITY, **settings: Any
    ) -> SpooledQueue:
        self.queues.append(SpooledQueue(self, endpoint or FakeEndpoint(), identity, settings))
        return self.queues[-1]

    def account(self) -> Snapshot:
        return self.stats.snapshot()

    def settle(self, adopted: int = 0) -> Snapshot:
        """Wait until so many events were adopted, and each is delivered, dropped or a dead letter; give the account."""
        wait_until(lambda: self.account().adopted >= adopted, f"{adopted} events are taken over")
        wait_until(lambda: self.account().waiting == 0, "each event has left")
        assert sum(it.queue.waiting for it in self.queues) == 0
        return self.account()

    def look_at_free_logs(self) -> None:
        """Have the logs looked at whose queues are not open here, as it happens each minute."""
        house = self.spooler._house
        house._free_logs_at = house._bounds_at = 0.0
        wait_until(lambda: house._free_logs_at > 0, "free logs are looked at")

    def wait_for_a_round(self) -> None:
        """Wait until all that the housekeeping does was begun, and done, after this call."""
        house = self.spooler._house
        begun = house.rounds
        wait_until(lambda: house.rounds > begun + 1, "a round of the housekeeping")

    def close(self, seconds: float = 0.0) -> Snapshot:
        if not self.is_closed:
            self.is_closed = True
            for it in self.queues:
                it.queue.begin_close()
            for it in self.queues:
                it.close(seconds)
            self.spooler.close()
        return self.account()


class SpooledQueue:
    """A queue of such a process, in front of a fake endpoint."""

    def __init__(
        self, process: Process, endpoint: FakeEndpoint, identity: QueueIdentity, settings: dict[str, Any]
    ) -> None:
        self.process = process
        self.endpoint = endpoint
        self.settings = Queue.model_validate({"max_coalescing_delay": 0, **IMPATIENT, **settings})
        account = QueueAccount(identity.name, process.stats, process.troubles)
        self.backlog: SpooledBacklog = process.spooler.backlog(identity, self.settings, account)
        self.queue = EventQueue(self.settings, endpoint.connect, self.backlog, clock=process.clock, account=account)
        self.pausing = SteeredCondition(self.queue._lock, process.clock)
        self.queue._changed = self.pausing
        self.backlog.on_ready(self.queue.wake)
        self.is_closed = False

    def put(self, *events: bytes) -> None:
        for event in events:
            self.queue.put(event)

    def put_on_disk(self, *events: bytes) -> None:
        """Put them, and wait until they are on disk."""
        self.put(*events)
        wait_until(lambda: not self.backlog._unwritten.entries and not self.backlog._writing, "they are on disk")

    def reconfigure(self, name: str = "newer", **changes: Any) -> None:
        self.settings = self.settings.model_copy(update=changes)
        self.queue.reconfigure(self.settings, lambda: self.endpoint.connect(name))

    def let_pass(self, seconds: float) -> None:
        """Move the clock, and have those look at it who wait for it to move."""
        self.process.clock.advance(seconds)
        with self.queue._changed:
            self.queue._changed.notify_all()

    def close(self, seconds: float = 0.0) -> None:
        if not self.is_closed:
            self.is_closed = True
            self.queue.close(self.process.clock.monotonic() + seconds)
            self.process.spooler.release(self.backlog)


def numbered(count: int, first: int = 0) -> list[bytes]:
    return [b"%d" % number for number in range(first, first + count)]


def on_disk(root: Path) -> list[bytes]:
    """Give the events that wait on disk, those of all queues, whoever holds them."""
    found: list[bytes] = []
    for each in survey(root) if root.is_dir() else []:
        # Its owner may remove it just now.
        with contextlib.suppress(FileNotFoundError):
            log = EventLog.view(each.directory)
            found += [event.payload for event in log.read(log.done_up_to, log.waiting, 1 << 40)]
            log.close()
    return found


def letters(root: Path) -> list[StoredLetter]:
    return list(DeadLetters(root / DEAD_LETTERS).letters())


def crashed(root: Path) -> Path:
    """Give a copy of a spool that is in use: what is left of it when all of its processes die at this moment."""
    copy = root.with_name(f"{root.name}-crashed")
    shutil.copytree(root, copy)
    return copy
