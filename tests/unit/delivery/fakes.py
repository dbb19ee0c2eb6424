"""An ingest endpoint without a network, and waiting without time passing; the queue and its threads are real."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kong_metering.delivery.account import QueueAccount
from kong_metering.delivery.backlog import MemoryBacklog
from kong_metering.delivery.ingest import Delivered, Failed, Outcome, Rejected
from kong_metering.delivery.queue import EventQueue
from kong_metering.log import LOGGER, TroubleLog
from kong_metering.stats import Snapshot, Stats
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from kong_metering.config import Queue
    from tests.support.clock import FakeClock

_PATIENCE_SECONDS = 20.0

Decide = Callable[[list[bytes]], Outcome]

DOWN = Failed("https://ingest.test answered 503: down", "503", is_server_error=True)
UNREACHABLE = Failed("no answer from https://ingest.test: ConnectionError: refused", "ConnectionError")
UNAUTHORIZED = Failed("https://ingest.test answered 401: who are you?", "401", is_misconfigured=True)


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
