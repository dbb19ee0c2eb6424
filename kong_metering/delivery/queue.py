"""The queue of one plugin entity for one endpoint: events leave it in batches, from a thread of its own.

Contract: `put` may be called from any thread; it never waits for the network or the disk, holds locks for microseconds,
and starts the delivering thread at the first event. Events are opaque bytes; where they wait is the backlog's part.
They leave in the order in which they came, at most `max_batch_size` at a time, `max_coalescing_delay` after the first
one at the latest (with `concurrency_limit` -1: each alone, at once, on up to `UNLIMITED_WORKERS` threads, in any
order). An event leaves the queue when the endpoint answers 2xx, and not before. Others overtake an event only while it
alone seems to make the endpoint fail; after an outage in which nothing works the order is as before.

Events that the endpoint refuses for themselves are given to the backlog, which sets them aside. With a backlog that
keeps events, nothing else is ever given up: after `max_retry_time` and while the circuit breaker is open a batch goes
on waiting. With one in memory these are dropped, counted under a reason and logged: a batch that failed for longer than
`max_retry_time`; batches while the circuit breaker is open; what is left when the process ends.

`reconfigure` changes parameters, token and connection at once, for what waits too, ends a running backoff and closes
the breaker. `close` sends what waits and what still comes, each batch once, until its deadline; what comes later is
dropped and counted. With a backlog that keeps events it sends no more once a batch has failed. The threads are daemons
and harmless at the interpreter's exit.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Protocol

from kong_metering.delivery import policy
from kong_metering.delivery.ingest import Delivered, Failed, Outcome, Rejected
from kong_metering.log import cause_of
from kong_metering.stats import Dropped

if TYPE_CHECKING:
    from kong_metering.clock import Clock
    from kong_metering.config import Queue
    from kong_metering.delivery.account import QueueAccount
    from kong_metering.delivery.backlog import Backlog, Entry, Sending

# Kong sets no bound and starts a timer for each event. This one keeps the threads' memory small; an endpoint that
# answers in 50 ms still takes 640 events a second.
UNLIMITED_WORKERS = 32


class Sender(Protocol):
    """What delivers a batch; belongs to one thread."""

    def send(self, events: Sequence[bytes]) -> Outcome:
        """Send the events together and tell what came of it."""
        ...

    def close(self) -> None:
        """Let go of connections."""
        ...


class EventQueue:
    """Events on their way to one endpoint."""

    def __init__(
        self,
        settings: Queue,
        connect: Callable[[], Sender],
        backlog: Backlog,
        *,
        clock: Clock,
        account: QueueAccount,
    ) -> None:
        self.name = account.name
        self._settings = settings
        self._connect = connect
        self._backlog = backlog
        self._clock = clock
        self._account = account
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._workers: list[threading.Thread] = []
        self._idle_workers = 0
        self._pausing_workers = 0
        self._generation = 0
        self._closing = False
        self._leaves_the_rest = False
        self._ended = False
        self._breaker = policy.Breaker()

    @property
    def waiting(self) -> int:
        """How many events are in the queue, those on their way included."""
        return self._backlog.waiting

    def put(self, event: bytes) -> None:
        """Take an event for delivery."""
        self._account.stats.accept()
        is_too_large = len(event) > self._backlog.largest
        with self._lock:
            ended = self._ended
            if not ended and is_too_large:
                self._backlog.refuse(event)
            elif not ended and self._backlog.add(event, self._clock.monotonic()):
                self._wake_worker()
        if ended:
            self._account.drop(Dropped.PROCESS_ENDED, 1, "an event came after the end")

    def wake(self) -> None:
        """Look at the backlog: it has come to hold more, from elsewhere than `put`."""
        with self._changed:
            missing = min(self._backlog.ready - self._idle_workers, self._wanted_workers() - len(self._workers))
            for _ in range(0 if self._ended else missing):
                self._start_worker()
            self._changed.notify_all()

    def reconfigure(self, settings: Queue, connect: Callable[[], Sender]) -> None:
        """Use other parameters and another connection from now on, for the events that wait too."""
        with self._changed:
            self._settings = settings
            self._backlog.reconfigure(settings)
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
        """Begin to close, and wait for it until `deadline` (monotonic); the backlog accounts for what is left then."""
        self.begin_close()
        self._backlog.flush()
        for worker in list(self._workers):
            worker.join(max(0.0, deadline - self._clock.monotonic()))
        with self._changed:
            self._ended = True
        self._backlog.end()

    # -- waking, with the lock held -----------------------------------------------------------------------------------

    def _wake_worker(self) -> None:
        ready = self._backlog.ready
        if ready > self._idle_workers and len(self._workers) < self._wanted_workers():
            self._start_worker()
        elif ready == 1 or self._backlog.due_in(self._clock.monotonic()) == 0.0:
            # Those that pause wait for the same condition, and may come first.
            self._changed.notify(1 + self._pausing_workers)

    def _wanted_workers(self) -> int:
        return 1 if self._settings.concurrency_limit == 1 else UNLIMITED_WORKERS

    def _start_worker(self) -> None:
        worker = threading.Thread(target=self._work, name=f"metering queue {self.name}", daemon=True)
        try:
            worker.start()
        except RuntimeError as error:  # no more threads, or the interpreter is exiting; the next event tries again
            self._account.say("thread", f"cannot deliver: {cause_of(error)}")
            return
        self._workers.append(worker)

    # -- delivering, in the queue's own threads -----------------------------------------------------------------------

    def _work(self) -> None:
        line = _Line(self)
        while (batch := self._next_batch()) is not None:
            try:
                self._deliver(batch, line)
            except Exception as error:  # noqa: BLE001 - a bug here must not end delivery for good
                self._account.say("bug", f"delivery failed: {cause_of(error)}")
        line.close()

    def _next_batch(self) -> list[Entry] | None:
        """Wait for a batch that may leave; None when the queue closes, empty."""
        while self._wait_for_batch():
            batch = self._backlog.take(policy.batch_size(self._settings))
            if batch:
                return batch
        return None

    def _wait_for_batch(self) -> bool:
        """Wait until a batch may leave; False when this worker is not needed any more."""
        with self._changed:
            while True:
                is_done = self._closing and (self._leaves_the_rest or not self._backlog.ready)
                if is_done or len(self._workers) > self._wanted_workers():
                    self._workers.remove(threading.current_thread())
                    return False
                pause = self._backlog.due_in(self._clock.monotonic())
                if pause == 0.0 or (pause is not None and self._closing):
                    return True
                self._idle_workers += 1
                self._changed.wait(pause)
                self._idle_workers -= 1

    def _deliver(self, batch: list[Entry], line: _Line) -> None:
        """Send a batch until each of its events is delivered or given up."""
        trial = _Trial(self._clock.monotonic())
        parts = [trial.part(batch, trial.answered_at)]
        while parts and not self._leaves_the_rest:
            part = trial.pick(parts, probes=self._probes)
            if not trial.has_probed and self._sheds(part):
                continue
            sending = self._backlog.begin_send(part.entries)
            part.entries = sending.entries
            if not part.entries:
                continue
            outcome = self._send(sending, line)
            if isinstance(outcome, Delivered):
                self._settle(part)
                trial.delivers(parts, self._clock.monotonic())
            elif isinstance(outcome, Rejected):
                self._note_that_it_works()
                trial.answered(self._clock.monotonic())
                bad, rest = policy.isolate(part.entries, outcome)
                if bad:
                    self._backlog.reject(bad, f"{len(bad)} refused for themselves: {outcome.reason}")
                parts[:0] = part.cut(rest, trial.answered_at)
            elif trial.is_probing and outcome.is_server_error:
                trial.put_back(part, parts)
            elif self._is_last_try(part, trial) and self._gives_up(part, trial, outcome):
                continue
            else:
                self._back_off(part, trial, outcome, line.generation)
                self._line_up_again(part, parts, trial, outcome)

    def _send(self, sending: Sending, line: _Line) -> Outcome:
        outcome = line.send([entry.event for entry in sending.entries])
        if isinstance(outcome, Rejected) or (isinstance(outcome, Failed) and not outcome.may_have_arrived):
            self._backlog.did_not_arrive(sending)
        return outcome

    @property
    def _probes(self) -> bool:
        """Whether the oldest events may be tried besides those whose turn it is."""
        return not self._closing and (self._backlog.keeps or not self._breaker.is_open)

    def _is_last_try(self, part: _Part, trial: _Trial) -> bool:
        trying_for = self._clock.monotonic() - max(part.tried_since, trial.answered_at)
        return self._closing or self._breaker.is_open or policy.gives_up(self._settings, trying_for)

    def _back_off(self, part: _Part, trial: _Trial, failed: Failed, generation: int) -> None:
        """Count a failure, say it, and wait; closing, or a newer configuration than that of the request, ends it."""
        part.failures += 1
        trial.failures += 1
        self._account.say(
            f"failed:{failed.kind}",
            f"could not deliver {len(part.entries)} events, will try again: {failed.reason}",
            logging.ERROR if failed.is_misconfigured else logging.WARNING,
        )
        pause = policy.retry_delay(self._settings, trial.failures, failed.retry_after)
        with self._changed:
            self._pausing_workers += 1
            self._changed.wait_for(lambda: self._closing or self._generation != generation, pause)
            self._pausing_workers -= 1

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
            parts[:0] = part.cut(policy.cut_up(part.entries), part.tried_since, among_others=True)
        elif trial.suspects(part) >= policy.SUSPICIONS_TO_BLAME:
            message = f"an event fails whenever it is sent, others do not: {failed.reason}"
            self._backlog.reject(part.entries, message)
        else:
            parts.append(part)
        if 0 < len(parts) < policy.MAX_SUSPECTS and all(other.suspicions for other in parts):
            others = self._cut_waiting()
            parts[:0] = [trial.part(others, self._clock.monotonic(), among_others=True)] if others else []

    def _cut_waiting(self) -> list[Entry]:
        return self._backlog.take(policy.batch_size(self._settings)) if self._backlog.ready else []

    def _sheds(self, part: _Part) -> bool:
        """Give a batch up because the breaker is open; or wait until a probe may go, where events are kept."""
        with self._changed:
            while self._breaker.sheds(self._settings, self._clock.monotonic()):
                if not self._backlog.keeps:
                    break
                if self._closing:
                    return False
                self._pausing_workers += 1
                self._changed.wait_for(
                    lambda: self._closing or not self._breaker.is_open,
                    self._breaker.pause(self._settings, self._clock.monotonic()),
                )
                self._pausing_workers -= 1
            else:
                return False
        self._lose(part.entries, Dropped.BREAKER_OPEN, "the circuit breaker is open, events are dropped")
        return True

    def _settle(self, part: _Part) -> None:
        if self._backlog.settle(part.entries):
            self._account.stats.deliver(len(part.entries))
        self._note_that_it_works()

    def _note_that_it_works(self) -> None:
        with self._changed:
            closed = self._breaker.succeeded()
            if closed:
                self._changed.notify_all()
        if closed:
            self._account.say("breaker closed", "the endpoint works again, the circuit breaker closed", logging.INFO)

    def _gives_up(self, part: _Part, trial: _Trial, failed: Failed) -> bool:
        """Give up a part that failed for the last time; False when it is kept, and tried again."""
        with self._changed:
            was_open = self._breaker.is_open
            opened = not trial.gave_up and self._breaker.failed(self._settings, self._clock.monotonic())
        trial.gave_up = True  # the breaker counts batches, not their parts
        if opened:
            self._account.say("breaker opened", "too many batches failed in a row, the circuit breaker opened")
        if self._backlog.keeps:
            return self._puts_off(trial, failed)
        if self._closing:
            reason, why = Dropped.PROCESS_ENDED, "the process ended before they were delivered"
        elif was_open:
            reason, why = Dropped.BREAKER_OPEN, "the circuit breaker is open"
        else:
            reason, why = Dropped.RETRY_TIME_EXCEEDED, "max_retry_time is exceeded"
        self._lose(part.entries, reason, f"{len(part.entries)} events were lost, {why}: {failed.reason}")
        return True

    def _puts_off(self, trial: _Trial, failed: Failed) -> bool:
        """Leave a part where it waits: for the next process when this one ends, else for another `max_retry_time`."""
        if self._closing:
            # What comes behind it stays as well, so that it does not go out first.
            self._leaves_the_rest = True
            return True
        trial.begin_again(self._clock.monotonic())
        message = f"max_retry_time is exceeded, {self.waiting} events are kept until it works again: {failed.reason}"
        self._account.say("kept", message)
        return False

    def _lose(self, entries: list[Entry], reason: Dropped, message: str) -> None:
        if self._backlog.settle(entries):
            self._account.drop(reason, len(entries), message)

    # -- the connection of one worker ---------------------------------------------------------------------------------

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

    `place` is how many events of the trial come before them, at least; `tried_since` (monotonic), when they were first
    sent; `among_others`, whether they came to be sent because of a suspicion; `failures`, how often they failed since
    they were suspected themselves; `delivered_before`, how much else of the same trial had been delivered by then.
    """

    entries: list[Entry]
    place: int
    tried_since: float
    among_others: bool = False
    failures: int = 0
    suspicions: int = 0
    delivered_before: int = -1

    def cut(self, pieces: Sequence[list[Entry]], tried_since: float, *, among_others: bool = False) -> list[_Part]:
        """Make parts of pieces of it, in order."""
        places = itertools.accumulate((len(piece) for piece in pieces), initial=self.place)
        return [_Part(piece, place, tried_since, among_others) for piece, place in zip(pieces, places, strict=False)]


class _Trial:
    """How a batch fares: when the endpoint last gave an answer, how often it has failed since, what was delivered.

    While nothing at all works nobody can tell whether it is for an event's sake. Then the oldest part is tried before
    each of the others, so that it is not overtaken when it works again; the other one goes at once behind it, so that
    it gets through if it is the oldest one that makes the endpoint fail.
    """

    def __init__(self, now: float) -> None:
        self.is_probing = False
        self.has_probed = False
        self._turn = 0
        self._events = 0
        self.answered_at = now
        self.failures = 0
        self.delivered = 0
        self.gave_up = False

    def part(self, entries: list[Entry], now: float, *, among_others: bool = False) -> _Part:
        """Make a part of more events, those that come next."""
        self._events += len(entries)
        return _Part(entries, self._events - len(entries), now, among_others)

    def pick(self, parts: list[_Part], *, probes: bool) -> _Part:
        """Take out the part that is sent now: the one whose turn it is, or the oldest one before it."""
        oldest = min(range(len(parts)), key=lambda turn: parts[turn].place)
        self.has_probed = self.is_probing
        self.is_probing = probes and self._nothing_works and oldest > 0 and not self.has_probed
        self._turn = oldest if self.is_probing else 0
        return parts.pop(self._turn)

    def put_back(self, part: _Part, parts: list[_Part]) -> None:
        """Leave the oldest part its turn, after a try in between."""
        parts.insert(self._turn, part)

    def delivers(self, parts: list[_Part], now: float) -> None:
        """Note that a part was delivered, and line the others up in order if nothing had worked before."""
        if self._nothing_works:
            parts.sort(key=attrgetter("place"))
        self.answered(now)
        self.delivered += 1

    @property
    def _nothing_works(self) -> bool:
        return self.failures > 0 and (self.delivered == 0 or self.failures >= policy.SUSPICIOUS_FAILURES)

    def begin_again(self, now: float) -> None:
        """Give the parts another while, after one that the breaker has counted."""
        self.answered_at, self.gave_up = now, False

    def answered(self, now: float) -> None:
        """Note that the endpoint works."""
        self.answered_at, self.failures = now, 0

    def suspects(self, part: _Part) -> int:
        """Suspect a part that fails, and tell how often it was; once more only if others were delivered in between."""
        if self.delivered > part.delivered_before:
            part.suspicions += 1
        part.failures, part.delivered_before = 0, self.delivered
        return part.suspicions
