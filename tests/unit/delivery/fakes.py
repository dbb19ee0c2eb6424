"""An ingest endpoint without a network, and waiting without time passing; the queue and its threads are real."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from unittest import mock

from kong_metering.account import QueueAccount
from kong_metering.backlog.memory import MemoryBacklog
from kong_metering.config import Queue
from kong_metering.delivery.couriers import Couriers
from kong_metering.delivery.queue import EventQueue
from kong_metering.eventlog.log import EventLog
from kong_metering.ingest.arrays import Arrays
from kong_metering.ingest.client import Endpoint
from kong_metering.ingest.connections import Connections
from kong_metering.spool.deadletters import DEAD_LETTERS, DeadLetters, StoredLetter
from kong_metering.spool.directory import SpoolDirectory, survey
from kong_metering.spool.identity import QueueIdentity
from kong_metering.spool.options import SpoolOptions
from kong_metering.stats import Snapshot, Stats
from kong_metering.trial.outcome import Delivered, Failed, Outcome, Rejected
from kong_metering.upkeep.spooler import Spooler
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    import pytest

    from kong_metering.backlog.spooled import SpooledBacklog
    from kong_metering.clock import Clock
    from kong_metering.delivery.couriers import Served
    from kong_metering.inbox.lent import LentRings
    from kong_metering.ingest.client import IngestClient
    from kong_metering.spool.directory import Adoption
    from tests.support.clock import FakeClock
    from tests.support.loglines import LogLines

_PATIENCE_SECONDS = 60.0

Decide = Callable[[list[bytes]], Outcome]

DOWN = Failed("https://ingest.test answered 503: down", "503")
UNREACHABLE = Failed("no answer from https://ingest.test: ConnectionError: refused", "ConnectionError")
UNAUTHORIZED = Failed("https://ingest.test answered 401: who are you?", "401", is_misconfigured=True)
# These surely did not bring the events there.
REFUSED = Failed("https://ingest.test: ConnectionRefusedError", "ConnectionRefusedError", may_have_arrived=False)
BUSY = Failed("https://ingest.test answered 429: slow down", "429", may_have_arrived=False)


def take_all(_: list[bytes]) -> Outcome:
    return Delivered()


class FakeEndpoint:
    """Answers by its script first, then as it decides; keeps every request, and which connection it came over."""

    def __init__(self, decide: Decide = take_all) -> None:
        self.decide = decide
        self.script: deque[Outcome | Exception] = deque()
        self.requests: list[list[bytes]] = []
        self.senders: list[FakeSender] = []
        self.refused_connections: deque[Exception] = deque()
        # What happens while requests are under way, one thing during each.
        self.meanwhile: deque[Callable[[], None]] = deque()
        self._open = threading.Event()
        self._open.set()
        self._entered = threading.Semaphore(0)
        self._lock = threading.Lock()

    @property
    def delivered(self) -> list[bytes]:
        """The events that were taken, in the order of the answers."""
        return [event for sender in self.senders for event in sender.delivered]

    def connect(self, endpoint: Endpoint) -> FakeSender:
        with self._lock:
            if self.refused_connections:
                raise self.refused_connections.popleft()
            self.senders.append(FakeSender(self, endpoint))
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
            meanwhile = self.meanwhile.popleft() if self.meanwhile else None
        self._entered.release()
        if meanwhile is not None:
            meanwhile()
        assert self._open.wait(_PATIENCE_SECONDS)
        if isinstance(planned, Exception):
            raise planned
        return planned or self.decide(events)


class FakeSender:
    """One connection to the fake endpoint."""

    is_connected = True
    has_ended = False
    said_unasked = False

    def __init__(self, fake: FakeEndpoint, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.name = endpoint.token
        self.closed = False
        self.delivered: list[bytes] = []
        self.requests: list[list[bytes]] = []
        self._fake = fake

    def send(self, events: Sequence[bytes]) -> Outcome:
        assert not self.closed
        self.requests.append(list(events))
        outcome = self._fake.take(list(events))
        if isinstance(outcome, Delivered):
            self.delivered.extend(events)
        return outcome

    def close(self) -> None:
        self.closed = True


class FakeNetwork:
    """Fake endpoints by their URL, and kept connections to them."""

    def __init__(self, clock: Clock, arrays: Arrays | None = None) -> None:
        self.arrays = arrays or Arrays()
        self._fakes: dict[str, FakeEndpoint] = {}
        self.connections = Connections(clock, cast("Callable[[Endpoint], IngestClient]", self._connect))

    def endpoint(self, fake: FakeEndpoint, token: str = "") -> Endpoint:
        """Give the way to one of them, with a token."""
        url = f"https://ingest.test/{id(fake)}"
        self._fakes[url] = fake
        return Endpoint(url, token, timeout=60.0, keepalive=60.0, verify=True)

    def _connect(self, endpoint: Endpoint) -> FakeSender:
        return self._fakes[endpoint.url].connect(endpoint)


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


class HandCourier:
    """Serves queues by hand, on the test's thread: time passes only when everybody waits for it."""

    def __init__(self, clock: FakeClock) -> None:
        self._clock = clock
        self._due: dict[Served, float] = {}
        # How long was waited each time.
        self.pauses: list[float] = []

    def wake(self, queue: Served, at: float) -> None:
        self._due[queue] = min(at, self._due.get(queue, at))

    def forget(self, queue: Served) -> None:
        self._due.pop(queue, None)

    def try_again(self) -> None:
        """Do nothing: it cannot fail to be there."""

    def serve(self, *, until: float = math.inf) -> None:
        """Serve what is due until nothing is, or would be before this moment."""
        while self._due:
            queue, at = min(self._due.items(), key=itemgetter(1))
            if at > until:
                return
            if (pause := at - self._clock.monotonic()) > 0:
                self.pauses.append(pause)
                self._clock.advance(pause)
            del self._due[queue]
            if (again := queue.step()) is not None:
                self.wake(queue, again)


def memory_queue(  # noqa: PLR0913 - what it is made of
    settings: Queue,
    endpoint: FakeEndpoint,
    network: FakeNetwork,
    *,
    clock: Clock,
    stats: Stats,
    couriers: Couriers,
    adaptive_batch: int = 1,
) -> EventQueue:
    account = QueueAccount("metering", stats)
    return EventQueue(
        settings,
        network.endpoint(endpoint),
        MemoryBacklog(settings, clock, account, adaptive_batch=adaptive_batch),
        clock=clock,
        account=account,
        couriers=couriers,
        connections=network.connections,
        arrays=network.arrays,
        adaptive_batch=adaptive_batch,
    )


@dataclass
class Rig:
    """A queue in memory in front of a fake endpoint, served by hand, with everything that a test looks at."""

    settings: Queue
    clock: FakeClock
    log: LogLines
    endpoint: FakeEndpoint = field(default_factory=FakeEndpoint)
    adaptive_batch: int = 1
    arrays: Arrays = field(default_factory=Arrays)

    def __post_init__(self) -> None:
        self.courier = HandCourier(self.clock)
        self.network = FakeNetwork(self.clock, self.arrays)
        self.stats = Stats()
        self.queue = memory_queue(
            self.settings,
            self.endpoint,
            self.network,
            clock=self.clock,
            stats=self.stats,
            couriers=cast("Couriers", self.courier),
            adaptive_batch=self.adaptive_batch,
        )

    @property
    def pauses(self) -> list[float]:
        """How long the queue waited each time, for time to pass."""
        return self.courier.pauses

    def put(self, *events: bytes) -> None:
        for event in events:
            self.queue.put(event)

    def meanwhile(self, *actions: Callable[[], None]) -> None:
        """Do this while the next requests are under way, one thing during each."""
        self.endpoint.meanwhile.extend(actions)

    def let_pass(self, seconds: float) -> None:
        """Let so much time pass, with all that is due in it."""
        until = self.clock.monotonic() + seconds
        self.courier.serve(until=until)
        self.clock.advance(max(0.0, until - self.clock.monotonic()))

    def settle(self) -> Snapshot:
        """Serve the queue until nothing is due any more, however long that takes, and give the account."""
        self.courier.serve()
        assert self.queue.waiting == self.stats.snapshot().waiting
        return self.stats.snapshot()

    def reconfigure(self, name: str = "newer", **changes: Any) -> None:
        self.settings = self.settings.model_copy(update=changes)
        self.queue.reconfigure(self.settings, self.network.endpoint(self.endpoint, name))

    def close(self) -> Snapshot:
        """Close the queue: all that waits is tried once more."""
        self.queue.begin_close()
        self.courier.serve()
        self.queue.close(self.clock.monotonic())
        self.queue.end(self.clock.monotonic())
        self.network.connections.close()
        return self.stats.snapshot()


@dataclass
class LiveRig:
    """A queue in memory in front of a fake endpoint, served by threads."""

    settings: Queue
    clock: SteeredClock
    endpoint: FakeEndpoint = field(default_factory=FakeEndpoint)

    def __post_init__(self) -> None:
        self.network = FakeNetwork(self.clock)
        self.stats = Stats()
        self.couriers = Couriers(self.clock)
        self.queue = memory_queue(
            self.settings, self.endpoint, self.network, clock=self.clock, stats=self.stats, couriers=self.couriers
        )

    def put(self, *events: bytes) -> None:
        for event in events:
            self.queue.put(event)

    def put_while_busy(self, *events: bytes) -> None:
        """Put them while the queue waits for the endpoint's answer to an event before them."""
        self.endpoint.hold()
        self.put(b"before")
        self.endpoint.wait_for_request()
        self.put(*events)

    def let_pass(self, seconds: float) -> None:
        """Move the clock, and have those look at it who wait for it to move."""
        self.clock.advance(seconds)
        self.couriers.look()

    def settle(self) -> Snapshot:
        """Wait until each event is delivered or dropped, and give the account."""
        wait_until(lambda: self.queue.waiting == 0, "each event is delivered or dropped")
        assert self.stats.snapshot().waiting == 0
        return self.stats.snapshot()

    def reconfigure(self, name: str = "newer", **changes: Any) -> None:
        self.settings = self.settings.model_copy(update=changes)
        self.queue.reconfigure(self.settings, self.network.endpoint(self.endpoint, name))

    def close(self, seconds: float = 20.0) -> Snapshot:
        """End the queue as the registry does, and its couriers too."""
        deadline = self.clock.monotonic() + seconds
        self.queue.close(deadline)
        self.queue.end(deadline)
        account = self.stats.snapshot()
        self.endpoint.let_go()
        self.couriers.close(20)
        self.network.connections.close()
        return account


class SteeredClock:
    """The machine's clocks, which a test can move: both together, or the wall's alone."""

    def __init__(self) -> None:
        self._passed = 0.0
        self._wall_set_by = 0.0
        self._boots = 0
        self._started_at = 0.0

    def advance(self, seconds: float) -> None:
        self._passed += seconds

    def restart(self, off: float, wall_set_by: float = 0.0) -> None:
        """Let the machine be off for so long, and its wall clock be wrong by so much more when it starts."""
        self.advance(off)
        self.set_wall_by(wall_set_by)
        self._boots += 1
        self._started_at = self.monotonic()

    def set_wall_by(self, seconds: float) -> None:
        self._wall_set_by += seconds

    def monotonic(self) -> float:
        return time.monotonic() + self._passed

    def since_boot(self) -> float:
        return self.monotonic() - self._started_at

    def boot_id(self) -> str:
        return f"boot {self._boots}"

    def wall(self) -> float:
        return time.time() + self._passed + self._wall_set_by


IDENTITY = QueueIdentity("11111111-one", "metering", "https://ingest.test/events")
# A test does not wait for an outage.
IMPATIENT = {"initial_retry_delay": 0.001, "max_retry_delay": 0.005, "max_retry_time": 0.01}


class Process:
    """A process with a spool: real files, real threads; its queues deliver to fake endpoints."""

    def __init__(
        self,
        root: Path,
        clock: SteeredClock,
        inbox: Path | None,
        round_seconds: float = 0.02,
        lent: LentRings | None = None,
        **options: Any,
    ) -> None:
        self.root = root
        self.inbox = inbox
        self.clock = clock
        self.stats = Stats()
        self.network = FakeNetwork(clock)
        self.couriers = Couriers(clock)
        self.spooler = Spooler(
            SpoolOptions(root, **{"inbox_directory": inbox, **options}),
            clock=clock,
            stats=self.stats,
            connections=self.network.connections,
            lent=lent,
            janitor_round_seconds=round_seconds,
        )
        self.queues: list[SpooledQueue] = []
        # How many events came onto its disk besides, or went from it, for the balance.
        self.from_strangers = 0
        self.is_closed = False
        self.spooler.start()

    def open(
        self, endpoint: FakeEndpoint | None = None, identity: QueueIdentity = IDENTITY, **settings: Any
    ) -> SpooledQueue:
        self.queues.append(SpooledQueue(self, endpoint or FakeEndpoint(), identity, settings))
        # The janitor's first round may be over: where the next one is far off, the queue would never begin.
        self.spooler._janitor._wanted.set()
        return self.queues[-1]

    def account(self) -> Snapshot:
        return self.stats.snapshot()

    def settle(self, adopted: int = 0) -> Snapshot:
        """Wait until so many events were adopted, and each is delivered, dropped or a dead letter; give the account."""
        wait_until(lambda: self.account().adopted >= adopted, f"{adopted} events are taken over")
        wait_until(lambda: self.account().waiting == 0, "each event has left")
        wait_until(lambda: sum(it.queue.waiting for it in self.queues) == 0, "no queue has one")
        return self.account()

    def let_pass(self, seconds: float) -> None:
        """Move the clock, and have those look at it who wait for it to move."""
        self.clock.advance(seconds)
        self.couriers.look()

    def look_at_free_logs(self) -> None:
        """Have the logs looked at whose queues are not open here, as it happens each minute."""
        bounds = self.spooler._bounds
        bounds._free_logs_at = bounds._bounds_at = 0.0
        wait_until(lambda: bounds._free_logs_at > 0, "free logs are looked at")

    def wait_for_a_round(self) -> None:
        """Wait until all that the janitor does was begun, and done, after this call."""
        janitor = self.spooler._janitor
        begun = janitor.rounds
        wait_until(lambda: janitor.rounds > begun + 1, "a round of the janitor")

    def wait_for_rest(self, at_work: int = 0) -> None:
        """Wait until no courier is at work, but for so many."""
        wait_until(lambda: self.couriers.at_work == at_work, "the couriers rest")

    def close(self, seconds: float = 0.0) -> Snapshot:
        """End it as the registry does."""
        if self.is_closed:
            return self.account()
        self.is_closed = True
        deadline = self.clock.monotonic() + seconds
        for it in self.queues:
            it.queue.begin_close()
        self.spooler.flush(self.clock.monotonic() + 20)
        for it in self.queues:
            it.queue.close(deadline)
        has_ended = self.spooler.end()
        for it in self.queues:
            it.end(deadline, is_written=has_ended)
        self.spooler.close()
        self.couriers.close(max(0.0, deadline - self.clock.monotonic()))
        self.network.connections.close()
        return self.account()


class SpooledQueue:
    """A queue of such a process, in front of a fake endpoint."""

    def __init__(
        self, process: Process, endpoint: FakeEndpoint, identity: QueueIdentity, settings: dict[str, Any]
    ) -> None:
        self.process = process
        self.endpoint = endpoint
        self.settings = Queue.model_validate({"max_coalescing_delay": 0, **IMPATIENT, **settings})
        account = QueueAccount(identity.name, process.stats)
        self.backlog: SpooledBacklog = process.spooler.backlog(identity, self.settings, account)
        self.queue = EventQueue(
            self.settings,
            process.network.endpoint(endpoint),
            self.backlog,
            clock=process.clock,
            account=account,
            couriers=process.couriers,
            connections=process.network.connections,
            arrays=process.network.arrays,
        )
        process.spooler.look_after(self.backlog)
        self.is_ended = False

    def put(self, *events: bytes) -> None:
        for event in events:
            self.queue.put(event)

    def put_on_disk(self, *events: bytes) -> None:
        """Put them, and wait until they are out of the inbox."""
        self.put(*events)
        assert self.process.spooler._writer.flush(20)

    def reconfigure(self, name: str = "newer", **changes: Any) -> None:
        self.settings = self.settings.model_copy(update=changes)
        self.queue.reconfigure(self.settings, self.process.network.endpoint(self.endpoint, name))

    def let_pass(self, seconds: float) -> None:
        """Move the clock, and have those look at it who wait for it to move."""
        self.process.let_pass(seconds)

    def end(self, deadline: float, *, is_written: bool = True) -> None:
        if not self.is_ended:
            self.is_ended = True
            self.queue.end(deadline, is_written=is_written)
            self.process.spooler.release(self.backlog)

    def close(self, seconds: float = 0.0) -> None:
        """Close this queue alone."""
        if not self.is_ended:
            self.queue.begin_close()
            self.process.spooler.flush(self.process.clock.monotonic() + 20)
            deadline = self.process.clock.monotonic() + seconds
            self.queue.close(deadline)
            self.end(deadline)


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
    shutil.copytree(root, copy, ignore=shutil.ignore_patterns("*.new"))
    return copy


@contextlib.contextmanager
def broken_disk(error: int = errno.ENOSPC) -> Iterator[None]:
    """Let all writes fail, also those that make directories; on a read-only one nothing can be removed either."""

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(error, os.strerror(error))

    with contextlib.ExitStack() as patches:
        for where, name in ((os, "pwrite"), (os, "posix_fallocate"), (Path, "mkdir")):
            patches.enter_context(mock.patch.object(where, name, fail))
        if error == errno.EROFS:
            for where, name in ((os, "ftruncate"), (Path, "unlink"), (Path, "rmdir"), (Path, "replace")):
                patches.enter_context(mock.patch.object(where, name, fail))
        yield


class HangingDisk:
    """A disk whose writes do not come to an end while it hangs, those of one thread."""

    def __init__(self, thread: str = "metering writer") -> None:
        self._thread = thread
        self._goes_on = threading.Event()
        self._goes_on.set()
        self._is_written_to = threading.Event()
        self._pwrite = os.pwrite

    def hang(self) -> None:
        self._goes_on.clear()

    def go_on(self) -> None:
        self._goes_on.set()

    def wait_for_write(self) -> None:
        assert self._is_written_to.wait(_PATIENCE_SECONDS)

    def pwrite(self, descriptor: int, data: bytes, offset: int) -> int:
        if threading.current_thread().name == self._thread and not self._goes_on.is_set():
            self._is_written_to.set()
            self._goes_on.wait(60)
        return self._pwrite(descriptor, data, offset)


def stalled_adoption(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Have nothing taken over before the event that this gives is set."""
    goes_on = threading.Event()
    adopt = SpoolDirectory.adopt

    def slowly(*arguments: Any) -> Adoption:
        goes_on.wait(30)
        return adopt(*arguments)

    monkeypatch.setattr(SpoolDirectory, "adopt", slowly)
    return goes_on
