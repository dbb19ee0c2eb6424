"""The queue of one plugin entity for one endpoint: events wait here and leave in batches, from a thread of its own.

Contract: `put` may be called from any thread; it never waits for the network, holds the lock for microseconds, and
starts the delivering thread at the first event. Events are opaque bytes. They leave in the order in which they came,
at most `max_batch_size` at a time, `max_coalescing_delay` after the first one at the latest (with `concurrency_limit`
-1: each alone, at once, on up to `UNLIMITED_WORKERS` threads, in any order). An event leaves the queue when the
endpoint answers 2xx, and not before. Others overtake an event only while it alone seems to make the endpoint fail.

Given up, counted under a reason and logged: the oldest events beyond `max_entries` or `max_bytes`; a batch that failed
for longer than `max_retry_time`; events that the endpoint refuses for themselves; batches while the circuit breaker is
open; what is left when the process ends.

`reconfigure` changes parameters, token and connection at once, for what waits too, ends a running backoff and closes
the breaker. `close` sends what waits and what still comes, each batch once, until its deadline; what comes later is
dropped and counted. The threads are daemons and harmless at the interpreter's exit.
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
from kong_metering.log import cause_of
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
        self._thresholds = policy.thresholds(settings, MAX_EVENT_BYTES)
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
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
        size = len(event)
        self._stats.accept()
        with self._lock:
            refusal = self._refusal(size) if size > self._thresholds.largest or self._ended else None
            if refusal is None:
                waiting = len(self._entries)
                if waiting >= self._thresholds.roomy:
                    self._make_room(size)
                self._entries.append(_Entry(event, self._clock.monotonic()))
                self._bytes += size
                if waiting == 0 or waiting + 1 >= self._thresholds.wakes_at:
                    self._wake_worker()
        if refusal is not None:
            reason, message = refusal
            self._drop(reason, 1, message)

    def reconfigure(self, settings: Queue, connect: Callable[[], Sender]) -> None:
        """Use other parameters and another connection from now on, for the events that wait too."""
        with self._changed:
            self._settings = settings
            self._thresholds = policy.thresholds(settings, MAX_EVENT_BYTES)
            self._connect = connect
            self._generation += 1
            self._breaker = policy.Breaker()
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

    def _refusal(self, size: int) -> tuple[Dropped, str]:
        if self._ended:
            return Dropped.PROCESS_ENDED, "an event came after the end"
        return Dropped.EVENT_TOO_LARGE, f"an event of {size} bytes is too large"

    def _make_room(self, size: int) -> None:
        settings = self._settings
        if not self._warned and policy.is_nearly_full(settings, len(self._entries), self._bytes):
            self._warned = True
            self._say("capacity", f"at {policy.CAPACITY_WARNING:.0%} capacity", logging.WARNING)
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
        elif waiting == 1 or policy.due_in(self._settings, waiting, self._bytes, 0.0) == 0.0:
            self._changed.notify()

    def _wanted_workers(self) -> int:
        return 1 if self._settings.concurrency_limit == 1 else UNLIMITED_WORKERS

    def _start_worker(self) -> None:
        worker = threading.Thread(target=self._work, name=f"metering queue {self.name}", daemon=True)
        try:
            worker.start()
        except RuntimeError as error:  # no more threads, or the interpreter is exiting; the next event tries again
            self._say("thread", f"cannot deliver: {cause_of(error)}")
            return
        self._workers.append(worker)

    # -- delivering, in the queue's own threads --------------------------------------------------------------------

    def _work(self) -> None:
        line = _Line(self)
        while (batch := self._next_batch()) is not None:
            try:
                self._deliver(batch, line)
            except Exception as error:  # noqa: BLE001 - a bug here must not end delivery for good
                self._say("bug", f"delivery failed: {cause_of(error)}")
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
        return policy.due_in(self._settings, len(self._entries), self._bytes, age)

    def _cut_batch(self) -> list[_Entry]:
        size = min(policy.batch_size(self._settings), len(self._entries))
        self._in_flight += size  # first: `waiting` is read without the lock, and must never miss an event
        batch = [self._entries.popleft() for _ in range(size)]
        self._bytes -= sum(len(entry.event) for entry in batch)
        if self._warned and not policy.is_nearly_full(self._settings, len(self._entries), self._bytes):
            self._warned = False
        if self._dropping:
            self._dropping = False
            self._say("resumed", "resumed processing", logging.INFO)
        return batch

    def _deliver(self, batch: list[_Entry], line: _Line) -> None:
        """Send a batch until each of its events is delivered or given up."""
        trial = _Trial(self._clock.monotonic())
        parts = [_Part(batch, trial.answered_at)]
        while parts:
            part = parts.pop(0)
            if self._sheds(part):
                continue
            outcome = line.send([entry.event for entry in part.entries])
            if isinstance(outcome, Delivered):
                self._settle(part)
                trial.answered(self._clock.monotonic(), delivered=True)
            elif isinstance(outcome, Rejected):
                self._note_that_it_works()
                trial.answered(self._clock.monotonic())
                bad, rest = policy.isolate(part.entries, outcome)
                if bad:
                    self._lose(bad, Dropped.REJECTED, f"{len(bad)} refused for themselves: {outcome.reason}")
                parts[:0] = [_Part(entries, trial.answered_at) for entries in rest]
            elif self._is_last_try(part, trial):
                self._give_up(part, trial, outcome)
            else:
                self._back_off(part, trial, outcome, line.generation)
                self._line_up_again(part, parts, trial, outcome)

    def _is_last_try(self, part: _Part, trial: _Trial) -> bool:
        trying_for = self._clock.monotonic() - max(part.tried_since, trial.answered_at)
        return self._closing or self._breaker.is_open or policy.gives_up(self._settings, trying_for)

    def _back_off(self, part: _Part, trial: _Trial, failed: Failed, generation: int) -> None:
        """Count a failure, say it, and wait; closing, or a newer configuration than that of the request, ends it."""
        part.failures += 1
        trial.failures += 1
        self._say(
            f"failed:{failed.kind}",
            f"could not deliver {len(part.entries)} events, will try again: {failed.reason}",
            logging.ERROR if failed.is_misconfigured else logging.WARNING,
        )
        pause = policy.retry_delay(self._settings, trial.failures, failed.retry_after)
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._generation != generation, pause)

    def _line_up_again(self, part: _Part, parts: list[_Part], trial: _Trial, failed: Failed) -> None:
        """Decide in which order to go on after a failure, to find out whether one event makes the endpoint fail.

        With a server error others are tried first. What keeps failing is cut up, down to single events. Those are
        suspects, and stand behind the others. One that goes on to fail while others are delivered is to blame, and must
        not hold the queue.
        """
        if not policy.is_suspicious(failed, part.failures, among_others=part.among_others and not part.suspicions):
            suspects = sum(other.suspicions > 0 for other in parts) if not part.suspicions else 0
            parts.insert(len(parts) - suspects if failed.is_server_error else 0, part)
        elif len(part.entries) > 1:
            parts[:0] = [_Part(entries, part.tried_since, among_others=True) for entries in policy.cut_up(part.entries)]
        elif trial.suspects(part) >= policy.SUSPICIONS_TO_BLAME:
            message = f"an event fails whenever it is sent, others do not: {failed.reason}"
            self._lose(part.entries, Dropped.REJECTED, message)
        else:
            parts.append(part)
        if 0 < len(parts) < policy.MAX_SUSPECTS and all(other.suspicions for other in parts):
            others = self._cut_waiting()
            parts[:0] = [_Part(others, self._clock.monotonic(), among_others=True)] if others else []

    def _cut_waiting(self) -> list[_Entry]:
        with self._changed:
            return self._cut_batch() if self._entries else []

    def _sheds(self, part: _Part) -> bool:
        with self._changed:
            sheds = self._breaker.sheds(self._settings, self._clock.monotonic())
        if sheds:
            self._lose(part.entries, Dropped.BREAKER_OPEN, "the circuit breaker is open, events are dropped")
        return sheds

    def _settle(self, part: _Part) -> None:
        if self._take_out(part.entries):
            self._stats.deliver(len(part.entries))
        self._note_that_it_works()

    def _note_that_it_works(self) -> None:
        with self._changed:
            closed = self._breaker.succeeded()
        if closed:
            self._say("breaker closed", "the endpoint works again, the circuit breaker closed", logging.INFO)

    def _give_up(self, part: _Part, trial: _Trial, failed: Failed) -> None:
        with self._changed:
            was_open = self._breaker.is_open
            opened = not trial.gave_up and self._breaker.failed(self._settings, self._clock.monotonic())
        trial.gave_up = True  # the breaker counts batches, not their parts
        if opened:
            self._say("breaker opened", "too many batches failed in a row, the circuit breaker opened")
        if self._closing:
            reason, why = Dropped.PROCESS_ENDED, "the process ended before they were delivered"
        elif was_open:
            reason, why = Dropped.BREAKER_OPEN, "the circuit breaker is open"
        else:
            reason, why = Dropped.RETRY_TIME_EXCEEDED, "max_retry_time is exceeded"
        self._lose(part.entries, reason, f"{len(part.entries)} events were lost, {why}: {failed.reason}")

    def _lose(self, entries: list[_Entry], reason: Dropped, message: str) -> None:
        if self._take_out(entries):
            self._drop(reason, len(entries), message)

    def _take_out(self, entries: list[_Entry]) -> bool:
        """Take events out of the queue; False when `close` has already given them up."""
        with self._changed:
            if not self._ended:
                self._in_flight -= len(entries)
            return not self._ended

    def _drop(self, reason: Dropped, events: int, message: str) -> None:
        self._stats.drop(reason, events)
        self._say(f"dropped:{reason.value}", message)

    def _say(self, kind: str, message: str, level: int = logging.ERROR) -> None:
        self._troubles.report(f"{kind}:{self.name}", f"queue {self.name}: {message}", level)

    # -- the connection of one worker ------------------------------------------------------------------------------

    def current_connection(self) -> tuple[int, Callable[[], Sender]]:
        """Give the way to connect, and its number: another number means that the configuration has changed."""
        with self._changed:
            return self._generation, self._connect


class _Line:
    """One worker's sender, replaced when the queue is reconfigured."""

    def __init__(self, queue: EventQueue) -> None:
        self._queue = queue
        self.generation = -1
        self._sender: Sender | None = None

    def send(self, events: Sequence[bytes]) -> Outcome:
        try:
            generation, connect = self._queue.current_connection()
            if self._sender is None or generation != self.generation:
                self.close()
                self.generation = generation
                self._sender = connect()
            return self._sender.send(events)
        except Exception as error:  # noqa: BLE001 - a bug there is a failure like others: its events are not lost
            self.close()
            return Failed(f"the sender broke: {cause_of(error)}", type(error).__name__)

    def close(self) -> None:
        sender, self._sender = self._sender, None
        if sender is not None:
            sender.close()


@dataclass
class _Part:
    """Events that are sent together, a batch or what is left of it, and how they fared.

    `tried_since` (monotonic) is when they were first sent; `among_others`, whether they came to be sent because of a
    suspicion; `failures`, how often they failed since they were suspected themselves; `delivered_before`, how much else
    of the same trial had been delivered by then.
    """

    entries: list[_Entry]
    tried_since: float
    among_others: bool = False
    failures: int = 0
    suspicions: int = 0
    delivered_before: int = -1


class _Trial:
    """How a batch fares: when the endpoint last gave an answer, how often it has failed since, what was delivered."""

    def __init__(self, now: float) -> None:
        self.answered_at = now
        self.failures = 0
        self.delivered = 0
        self.gave_up = False

    def answered(self, now: float, *, delivered: bool = False) -> None:
        """Begin again: the endpoint works."""
        self.answered_at, self.failures = now, 0
        self.delivered += delivered

    def suspects(self, part: _Part) -> int:
        """Suspect a part that fails, and tell how often it was; once more only if others were delivered in between."""
        if self.delivered > part.delivered_before:
            part.suspicions += 1
        part.failures, part.delivered_before = 0, self.delivered
        return part.suspicions
