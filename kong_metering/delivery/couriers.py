"""The threads that deliver: a bounded pool, shared by all queues of a process.

Contract: `wake` may be called from any thread; it holds a lock for memory only, but for the moment that the system
needs to start a thread. A queue that has nothing to do has no thread; a courier without work for `IDLE_SECONDS` goes.
Queues take turns in the order in which they are due, a queue has at most `width` couriers at a time, an endpoint at
most half of those that others leave, and those that hang have half of all together at most (`shares`): they do not keep
the others from being served. The threads are daemons and harmless at the interpreter's exit.
"""

from __future__ import annotations

import heapq
import itertools
import math
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from kong_metering.delivery.shares import Shares
from kong_metering.log import LOGGER, cause_of, trouble

if TYPE_CHECKING:
    from kong_metering.clock import Clock
    from kong_metering.delivery.requestfigures import LastRequest
    from kong_metering.delivery.shares import Work

# Kong sets no bound and starts a timer for each event. This one keeps the threads' memory small. Half as many more are
# there while requests take long.
MAX_COURIERS = 64
IDLE_SECONDS = 10.0
# What is due and finds no courier for so long is not delivered any more: requests time out before.
STALLED_SECONDS = 120.0
# Nobody is woken to serve a queue sooner by less: what comes in says each few milliseconds when the batch is due.
_NO_SOONER_SECONDS = 0.001
# After a bug, so that it does not take the whole processor.
_AFTER_A_BUG_SECONDS = 1.0


class Served(Protocol):
    """What couriers serve: a queue."""

    @property
    def origin(self) -> str:
        """Name the endpoint whose share of the couriers it uses."""
        ...

    @property
    def width(self) -> int:
        """How many couriers may serve it at a time."""
        ...

    @property
    def last_request(self) -> LastRequest:
        """What came of its last request."""
        ...

    def step(self) -> float | None:
        """Do what is due, one request at most; tell when to come again (monotonic), None to wait for `wake`."""
        ...


@dataclass(eq=False)
class _Turn:
    """When a queue is due next (monotonic), how many couriers serve it now, and whether it stands in line for one."""

    queue: Served
    at: float | None = None
    running: int = 0
    is_in_line: bool = False


class Couriers:
    """The pool."""

    def __init__(self, clock: Clock, *, limit: int = MAX_COURIERS, idle_seconds: float = IDLE_SECONDS) -> None:
        self._clock = clock
        self._idle_seconds = idle_seconds
        self._lock = threading.Lock()
        # One idle courier watches the time for all; the others wait until there is more to do than it can.
        self._watch = threading.Condition(self._lock)
        self._spare = threading.Condition(self._lock)
        self._is_watched = False
        self._watched_until = 0.0
        self._spares = 0
        # How many were started that have not looked yet.
        self._newcomers = 0
        self._turns: dict[Served, _Turn] = {}
        self._due: list[tuple[float, int, _Turn]] = []
        self._order = itertools.count()
        self._shares = Shares(limit)
        # Those that are due while there is no share for their endpoint, by what they wait for, in order.
        self._held_back: dict[str, list[_Turn]] = {}
        self._threads: set[threading.Thread] = set()
        # Whether one that was needed could not be started.
        self._is_short = False
        self._is_closed = False
        self._served_at = clock.monotonic()

    def is_stalled(self) -> bool:
        """Whether what is due has waited for `STALLED_SECONDS` while no courier has ended a step."""
        with self._lock:
            limit = self._clock.monotonic() - STALLED_SECONDS
            is_due = any(turn.at == at and at <= limit for at, _, turn in self._due)
            return is_due and self._served_at <= limit and not self._is_closed

    @property
    def threads(self) -> int:
        """How many couriers there are."""
        return len(self._threads)

    @property
    def at_work(self) -> int:
        """How many of them serve a queue at the moment."""
        return self._shares.at_work

    def wake(self, queue: Served, at: float) -> None:
        """Have the queue served at this moment (monotonic), or before if that was said already."""
        with self._lock:
            if self._is_closed:
                return
            turn = self._turns.get(queue)
            if turn is None:
                turn = self._turns[queue] = _Turn(queue)
            self._line_up(turn, at)
        self.try_again()

    def look(self) -> None:
        """Look at the clock again: somebody has moved it."""
        with self._lock:
            self._watch.notify_all()
            self._spare.notify_all()

    def try_again(self) -> None:
        """Start the courier that could not be started, if there is one; costs nothing otherwise."""
        if self._is_short:
            with self._lock:
                self._call()

    def forget(self, queue: Served) -> None:
        """Serve a queue no more; a courier that is at it goes on to the end of its step."""
        with self._lock:
            self._shares.forget(queue.origin)
            turn = self._turns.pop(queue, None)
            if turn is not None:
                turn.at = None

    def close(self, timeout: float) -> None:
        """Let all couriers go, and wait for those that are at work, `timeout` seconds at most."""
        with self._lock:
            self._is_closed = True
            self._watch.notify_all()
            self._spare.notify_all()
            threads = list(self._threads)
        deadline = self._clock.monotonic() + timeout
        for thread in threads:
            thread.join(max(0.0, deadline - self._clock.monotonic()))

    # -- with the lock held -------------------------------------------------------------------------------------------

    def _line_up(self, turn: _Turn, at: float) -> None:
        has_room = turn.running < turn.queue.width
        if turn.at is not None and turn.at <= at + _NO_SOONER_SECONDS:
            if turn.is_in_line or not has_room:
                return
            at = turn.at  # it may be served by more than when that was said
        turn.at, turn.is_in_line = at, has_room
        if not has_room:
            return  # who serves it lines it up again
        heapq.heappush(self._due, (at, next(self._order), turn))
        if self._due[0][2] is turn:
            self._call()

    def _call(self) -> None:
        """See to it that somebody looks at what is due; who takes a turn calls the next one."""
        if self._is_watched:
            self._watch.notify()
        elif self._spares:
            self._spare.notify()
        elif not self._newcomers and len(self._threads) < self._shares.most:
            self._start()

    def _call_in_time(self) -> None:
        """Do the same, but leave one to watch who looks in time anyway: each step would wake it while all are busy."""
        if not self._is_watched or self._watched_until > self._next_at():
            self._call()

    def _start(self) -> None:
        thread = threading.Thread(target=self._work, name="metering courier", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # no more threads, or the interpreter is exiting; it is tried again in a second
            self._is_short = True
            LOGGER.error("no thread can be started to deliver: %s", cause_of(error), extra=trouble("courier"))
            return
        self._is_short = False
        self._newcomers += 1
        self._threads.add(thread)

    def _take(self) -> tuple[_Turn, Work] | None:
        """Take the queue whose turn it is, in its endpoint's share; None when none is due, or all couriers are busy."""
        now = self._clock.monotonic()
        self._shares.look(now)
        if self._shares.full_until is not None:
            return None
        while self._due and self._due[0][0] <= now:
            at, _, turn = heapq.heappop(self._due)
            if turn.at != at:
                continue
            turn.is_in_line = turn.running < turn.queue.width
            if not turn.is_in_line:
                continue
            origin = turn.queue.origin
            awaited = self._shares.awaited(origin)
            if awaited is not None:
                self._held_back.setdefault(awaited, []).append(turn)
                continue
            turn.at, turn.is_in_line = None, False
            turn.running += 1
            work = self._shares.begin(origin, now)
            if self._due:
                self._call_in_time()
            return turn, work
        return None

    def _give_back(self, turn: _Turn, work: Work, at: float | None, answered: LastRequest | None) -> None:
        self._served_at = self._clock.monotonic()
        self._shares.look(self._served_at)
        turn.running -= 1
        for awaited in self._shares.end(work, answered):
            for held in self._held_back.pop(awaited, ()):
                if held.at is not None:
                    heapq.heappush(self._due, (held.at, next(self._order), held))
        if self._turns.get(turn.queue) is not turn:
            self._shares.forget(work.origin)
            return
        asked, turn.at, turn.is_in_line = turn.at, None, False
        times = [time for time in (asked, at) if time is not None]
        if times:
            self._line_up(turn, min(times))
        elif not turn.running:
            del self._turns[turn.queue]

    def _wait_for_turn(self) -> tuple[_Turn, Work] | None:
        """Wait for a queue to serve; None when this courier is not needed any more."""
        leaves_at = self._clock.monotonic() + self._idle_seconds
        while not self._is_closed:
            taken = self._take()
            if taken is not None:
                return taken
            now = self._clock.monotonic()
            if self._is_watched:
                self._call_in_time()  # who watches does not know of what was held back until now
                is_needed = self._wait_as_spare(leaves_at - now)
            else:
                is_needed = self._wait_as_watcher(self._next_at() if self._due else leaves_at)
            # One whose time was over before it was called does not know that it was.
            is_needed |= bool(self._due) and not self._is_watched
            if not is_needed and self._clock.monotonic() >= leaves_at:
                return None
        return None

    def _next_at(self) -> float:
        """Tell when the next queue may have its turn, if nothing changes."""
        if not self._due:
            return math.inf
        full_until = self._shares.full_until
        return self._due[0][0] if full_until is None else max(self._due[0][0], full_until)

    def _wait_as_spare(self, seconds: float) -> bool:
        self._spares += 1
        is_called = self._spare.wait(max(0.0, seconds))
        self._spares -= 1
        return is_called

    def _wait_as_watcher(self, until: float) -> bool:
        self._is_watched, self._watched_until = True, until
        is_called = self._watch.wait(max(0.0, until - self._clock.monotonic()))
        self._is_watched = False
        return is_called

    # -- on a courier's thread ----------------------------------------------------------------------------------------

    def _work(self) -> None:
        with self._lock:
            self._newcomers -= 1
        while True:
            with self._lock:
                taken = self._wait_for_turn()
                if taken is None:
                    self._threads.discard(threading.current_thread())
                    return
            turn, work = taken
            before = turn.queue.last_request
            at = self._serve(turn.queue)
            last = turn.queue.last_request
            with self._lock:
                self._give_back(turn, work, at, last if last is not before else None)

    def _serve(self, queue: Served) -> float | None:
        try:
            return queue.step()
        except Exception as error:  # noqa: BLE001 - a bug here must not end delivery for good
            LOGGER.error("delivery failed: %s", cause_of(error), extra=trouble("bug"))
            return self._clock.monotonic() + _AFTER_A_BUG_SECONDS
