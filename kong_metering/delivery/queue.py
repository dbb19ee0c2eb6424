"""The queue of one plugin entity for one endpoint: events wait here and leave in batches, from a thread of its own.

Contract: `put` may be called from any thread; it never waits for the network, holds the lock for microseconds, and
starts the delivering thread at the first event. Events are opaque bytes. They leave in the order in which they came,
at most `max_batch_size` at a time, `max_coalescing_delay` after the first one at the latest (with `concurrency_limit`
-1: each alone, at once, on up to `UNLIMITED_WORKERS` threads, in any order). An event leaves the queue when the
endpoint answers 2xx, and not before.

Given up, counted under a reason and logged: the oldest events beyond `max_entries` or `max_bytes`; a batch that failed
for longer than `max_retry_time`; events that the endpoint refuses for themselves; batches while the circuit breaker is
open; what is left when the process ends.

`reconfigure` changes parameters, token and connection at once, for what waits too, and ends a running backoff. `close`
refuses nothing: it sends what waits, each batch once, until its deadline. The threads are daemons and harmless at the
interpreter's exit.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from kong_metering.delivery import policy
from kong_metering.delivery.ingest import Delivered, Failed, Outcome, Rejected
from kong_metering.log import LOGGER, cause_of
from kong_metering.stats import Dropped

if TYPE_CHECKING:
    from kong_metering.clock import Clock
    from kong_metering.config import Queue
    from kong_metering.log import TroubleLog
    from kong_metering.stats import Stats

# Kong sets no bound and starts a timer for each event. This one keeps the threads' memory small; an endpoint that
# answers in 50 ms still takes 640 events a second.
UNLIMITED_WORKERS = 32
# OpenMeter hands events to Kafka, which by default refuses messages over about 1 MB, for ever.
MAX_EVENT_BYTES = 900 * 1024


class Sender(Protocol):
    """What delivers a batch; belongs to one thread."""

    def send(self, events: Sequence[bytes]) -> Outcome:
        """Send the events together and tell what came of it."""
        ...

    def close(self) -> None:
        """Let go of connections."""
        ...


class _Entry(NamedTuple):
    event: bytes
    queued_at: float  # monotonic


class EventQueue:
    """Events on their way to one endpoint."""

    def __init__(  # noqa: PLR0913 - it is where the parts of delivery meet
        self,
        name: str,
        settings: Queue,
        connect: Callable[[], Sender],
        *,
        clock: Clock,
        stats: Stats,
        troubles: TroubleLog,
    ) -> None:
        self.name = name
        self._settings = settings
        self._connect = connect
        self._clock = clock
        self._stats = stats
        self._troubles = troubles
        self._changed = threading.Condition()
        self._entries: deque[_Entry] = deque()
        self._bytes = 0
        self._in_flight = 0
        self._workers: list[threading.Thread] = []
        self._idle_workers = 0
        self._generation = 0
        self._closing = False
        self._ended = False
        self._warned = False
        self._dropping = False
        self._breaker = policy.Breaker()

    @property
    def waiting(self) -> int:
        """How many events are in the queue, those on their way included."""
        return len(self._entries) + self._in_flight

    def put(self, event: bytes) -> None:
        """Take an event for delivery."""
        self._stats.accept()
        with self._changed:
            reason = self._reason_to_refuse(event)
            if reason is None:
                self._make_room(len(event))
                self._entries.append(_Entry(event, self._clock.monotonic()))
                self._bytes += len(event)
                self._wake_worker()
        if reason is not None:
            self._drop(reason, 1, f"an event of {len(event)} bytes is too large")

    def reconfigure(self, settings: Queue, connect: Callable[[], Sender]) -> None:
        """Use other parameters and another connection from now on, for the events that wait too."""
        with self._changed:
            self._settings = settings
            self._connect = connect
            self._generation += 1
            self._changed.notify_all()

    def begin_close(self) -> None:
        """Send what waits at once, each batch once."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    def close(self, deadline: float) -> None:
        """Begin to close, and wait for it until `deadline` (monotonic); drop and count what is left then."""
        self.begin_close()
        for worker in list(self._workers):
            worker.join(max(0.0, deadline - self._clock.monotonic()))
        with self._changed:
            left = self.waiting
            self._ended = True
            self._entries.clear()
            self._bytes = self._in_flight = 0
        if left:
            self._drop(Dropped.PROCESS_ENDED, left, f"{left} events were not delivered before the process ended")

    # -- putting, with the lock held ------------------------------------------------------------------------------

    def _reason_to_refuse(self, event: bytes) -> Dropped | None:
        limit = self._settings.max_bytes
        too_large = len(event) > MAX_EVENT_BYTES or (limit is not None and len(event) > limit)
        return Dropped.EVENT_TOO_LARGE if too_large else None

    def _make_room(self, size: int) -> None:
        settings = self._settings
        if len(self._entries) < settings.max_entries * policy.CAPACITY_WARNING:
            self._warned = False
        elif not self._warned:
            self._warned = True
            LOGGER.warning("queue %s: at %d%% capacity", self.name, policy.CAPACITY_WARNING * 100)
        by_entries = by_bytes = 0
        while len(self._entries) >= settings.max_entries:
            self._forget_oldest()
            by_entries += 1
        while settings.max_bytes is not None and self._entries and self._bytes + size > settings.max_bytes:
            self._forget_oldest()
            by_bytes += 1
        if by_entries:
            self._drop(Dropped.QUEUE_FULL, by_entries, "full, dropping the oldest events until delivery works again")
        if by_bytes:
            self._drop(Dropped.QUEUE_BYTES_FULL, by_bytes, "byte capacity exceeded, dropping the oldest events")
        self._dropping = self._dropping or bool(by_entries or by_bytes)

    def _forget_oldest(self) -> None:
        self._bytes -= len(self._entries.popleft().event)

    def _wake_worker(self) -> None:
        waiting = len(self._entries)
        if waiting > self._idle_workers and len(self._workers) < self._wanted_workers():
            self._start_worker()
        elif waiting == 1 or waiting >= policy.batch_size(self._settings):
            self._changed.notify()

    def _wanted_workers(self) -> int:
        return 1 if self._settings.concurrency_limit == 1 else UNLIMITED_WORKERS

    def _start_worker(self) -> None:
        worker = threading.Thread(target=self._work, name=f"metering queue {self.name}", daemon=True)
        try:
            worker.start()
        except RuntimeError as error:  # no more threads, or the interpreter is exiting; the next event tries again
            self._troubles.report(f"thread:{self.name}", f"queue {self.name}: cannot deliver: {cause_of(error)}")
            return
        self._workers.append(worker)

    # -- delivering, in the queue's own threads --------------------------------------------------------------------

    def _work(self) -> None:
        line = _Line(self)
        while (batch := self._next_batch()) is not None:
            try:
                self._deliver(batch, line)
            except Exception as error:  # noqa: BLE001 - a bug here must not end delivery for good
                self._troubles.report(f"bug:{self.name}", f"queue {self.name}: delivery failed: {cause_of(error)}")
        line.close()

    def _next_batch(self) -> list[_Entry] | None:
        """Wait for a batch that may leave; None when the queue closes, empty."""
        with self._changed:
            while True:
                if len(self._workers) > self._wanted_workers() or (self._closing and not self._entries):
                    self._workers.remove(threading.current_thread())
                    return None
                pause = self._pause_before_batch()
                if pause == 0.0:
                    return self._cut_batch()
                self._idle_workers += 1
                self._changed.wait(pause)
                self._idle_workers -= 1

    def _pause_before_batch(self) -> float | None:
        """Tell for how many seconds no batch is due; None: until an event comes."""
        if not self._entries:
            return None
        if self._closing:
            return 0.0
        age = self._clock.monotonic() - self._entries[0].queued_at
        return policy.due_in(self._settings, len(self._entries), age)

    def _cut_batch(self) -> list[_Entry]:
        size = min(policy.batch_size(self._settings), len(self._entries))
        batch = [self._entries.popleft() for _ in range(size)]
        self._bytes -= sum(len(entry.event) for entry in batch)
        self._in_flight += size
        if self._dropping:
            self._dropping = False
            LOGGER.info("queue %s: resumed processing", self.name)
        return batch

    def _deliver(self, batch: list[_Entry], line: _Line) -> None:
        """Send a batch until each of its events is delivered or given up."""
        trial = _Trial(self._clock.monotonic())
        parts = [batch]
        while parts:
            part = parts.pop(0)
            if self._sheds(part):
                continue
            outcome = self._send_until_answered(part, line, trial)
            if isinstance(outcome, Delivered):
                self._settle(part)
                trial.answered(self._clock.monotonic(), delivered=True)
            elif isinstance(outcome, Rejected):
                bad, rest = policy.isolate(part, outcome)
                if bad:
                    self._lose(bad, Dropped.REJECTED, f"{len(bad)} refused for themselves: {outcome.reason}")
                parts[:0] = rest
                trial.answered(self._clock.monotonic())
            elif isinstance(outcome, _Suspect):
                self._compare(part, parts, trial, outcome)
            else:
                self._give_up(part, outcome)

    def _send_until_answered(self, part: list[_Entry], line: _Line, trial: _Trial) -> Outcome | _Suspect:
        """Send one part; a failure is tried again until the policy gives up, or suspects the part itself."""
        events = [entry.event for entry in part]
        failures = 0
        while True:
            outcome = line.send(events)
            if not isinstance(outcome, Failed):
                return outcome
            failures += 1
            trial.failures += 1
            if self._is_last_try(trial):
                return outcome
            self._troubles.report(
                f"failed:{self.name}:{outcome.kind}",
                f"queue {self.name}: could not deliver {len(part)} events, will try again: {outcome.reason}",
                logging.ERROR if outcome.is_misconfigured else logging.WARNING,
            )
            self._pause(policy.retry_delay(self._settings, trial.failures, outcome.retry_after))
            if policy.is_suspicious(outcome, failures):
                return _Suspect(outcome.reason)

    def _compare(self, part: list[_Entry], parts: list[list[_Entry]], trial: _Trial, suspect: _Suspect) -> None:
        """Find out whether one event makes the endpoint fail, or whether it fails for all.

        A part of several is halved. A single event goes behind others; once others were delivered and it still fails,
        it is the one to blame, and must not hold the queue.
        """
        if len(part) > 1:
            parts[:0] = policy.halves(part)
        elif trial.others_delivered and not parts:
            self._lose(part, Dropped.REJECTED, f"an event fails whenever it is sent, others do not: {suspect.reason}")
            trial.answered(self._clock.monotonic())
        else:
            others = [] if parts else self._cut_waiting()
            parts.extend([others, part] if others else [part])

    def _cut_waiting(self) -> list[_Entry]:
        with self._changed:
            return self._cut_batch() if self._entries else []

    def _is_last_try(self, trial: _Trial) -> bool:
        trying_for = self._clock.monotonic() - trial.started_at
        return self._closing or self._breaker.is_open or policy.gives_up(self._settings, trying_for)

    def _pause(self, seconds: float) -> None:
        """Back off; closing and another configuration end it at once."""
        with self._changed:
            generation = self._generation
            self._changed.wait_for(lambda: self._closing or self._generation != generation, seconds)

    def _sheds(self, part: list[_Entry]) -> bool:
        if not self._breaker.sheds(self._settings, self._clock.monotonic()):
            return False
        self._lose(part, Dropped.BREAKER_OPEN, "the circuit breaker is open, events are dropped")
        return True

    def _settle(self, part: list[_Entry]) -> None:
        if self._take_out(part):
            self._stats.deliver(len(part))
        if self._breaker.succeeded():
            LOGGER.info("queue %s: the endpoint works again, the circuit breaker closed", self.name)

    def _give_up(self, part: list[_Entry], failed: Failed) -> None:
        opened = self._breaker.failed(self._settings, self._clock.monotonic())
        if opened:
            LOGGER.error("queue %s: too many batches failed in a row, the circuit breaker opened", self.name)
        reason = Dropped.PROCESS_ENDED if self._closing else Dropped.RETRY_TIME_EXCEEDED
        self._lose(part, reason, f"{len(part)} events were lost, max_retry_time is exceeded: {failed.reason}")

    def _lose(self, part: list[_Entry], reason: Dropped, message: str) -> None:
        if self._take_out(part):
            self._drop(reason, len(part), message)

    def _take_out(self, part: list[_Entry]) -> bool:
        """Take events out of the queue; False when `close` has already given them up."""
        with self._changed:
            if not self._ended:
                self._in_flight -= len(part)
            return not self._ended

    def _drop(self, reason: Dropped, events: int, message: str) -> None:
        self._stats.drop(reason, events)
        self._troubles.report(f"dropped:{self.name}:{reason.value}", f"queue {self.name}: {message}")

    # -- the connection of one worker ------------------------------------------------------------------------------

    def current_connection(self) -> tuple[int, Callable[[], Sender]]:
        """Give the way to connect, and its number: another number means that the configuration has changed."""
        with self._changed:
            return self._generation, self._connect


class _Line:
    """One worker's sender, replaced when the queue is reconfigured."""

    def __init__(self, queue: EventQueue) -> None:
        self._queue = queue
        self._generation = -1
        self._sender: Sender | None = None

    def send(self, events: Sequence[bytes]) -> Outcome:
        generation, connect = self._queue.current_connection()
        if self._sender is None or generation != self._generation:
            self.close()
            self._generation, self._sender = generation, connect()
        return self._sender.send(events)

    def close(self) -> None:
        if self._sender is not None:
            self._sender.close()
            self._sender = None


class _Trial:
    """Since when, and how often in a row, the endpoint has failed the parts of a batch."""

    def __init__(self, started_at: float) -> None:
        self.started_at = started_at
        self.failures = 0
        self.others_delivered = False

    def answered(self, now: float, *, delivered: bool = False) -> None:
        """Begin again: the endpoint works."""
        self.started_at, self.failures = now, 0
        self.others_delivered = self.others_delivered or delivered


@dataclass(frozen=True)
class _Suspect:
    """An outcome of our own: the part failed so often that one of its events may be why."""

    reason: str
