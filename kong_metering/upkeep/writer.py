"""The one thread that takes events from the inbox to the logs of their queues.

Contract: it drains the inbox every `ROUND_SECONDS` while events come (every `BRIEF_ROUND_SECONDS` where the inbox ends
with the supervisor), sleeps when none came for a few rounds, and writes each queue's events to that queue's log; what
was taken from the inbox leaves it only afterwards. It waits for the disk, and for nobody else: what others want of a
log that it appends to, they order (`order`), and it does that between two rounds.
`flush` waits until all that was in the inbox is written, or was tried to be.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from kong_metering.upkeep.guard import guarded

if TYPE_CHECKING:
    from kong_metering.clock import Clock
    from kong_metering.inbox.inbox import Inbox
    from kong_metering.measures import Histogram

# Kong is answered before; what comes meanwhile is written together.
ROUND_SECONDS = 0.008
# What ends with the supervisor may be lost with both: less of it, for a little more CPU.
BRIEF_ROUND_SECONDS = 0.003
# After so many rounds in which nothing came it sleeps: to be woken costs the thread that answers Kong more than a look.
_IDLE_ROUNDS = 4
_EVENTS_A_ROUND = 20_000
# So many logs hold the file open that they append to.
_MAX_AWAKE = 128


class Log(Protocol):
    """Where the writer puts the events of a queue. Must not raise for the disk's sake."""

    def write(self, events: Sequence[bytes]) -> None:
        """Write events, or keep them somewhere else."""
        ...

    def rest(self) -> None:
        """Hold no file open until the next write."""
        ...


class Bell:
    """Wakes one thread. A `threading.Event` that is waited for with a timeout costs several times as much."""

    def __init__(self) -> None:
        self._quiet = threading.Lock()
        self._quiet.acquire()

    def ring(self) -> None:
        """End the wait that is on, or else the next one; any thread may."""
        if self._quiet.locked():
            with contextlib.suppress(RuntimeError):  # another thread was faster
                self._quiet.release()

    def wait(self) -> None:
        """Wait for the ring."""
        self._quiet.acquire()


class Writer:
    """The thread, and the logs by the number of their queue."""

    def __init__(self, inbox: Inbox, bell: Bell, clock: Clock, times: Histogram) -> None:
        """Take the inbox, the bell that it rings, and where the time of each write is counted."""
        self._inbox = inbox
        self._bell = bell
        self._clock = clock
        self._times = times
        self._logs: dict[int, Log] = {}
        # Those that were written to lately, and so hold a file open, the longest ago first.
        self._awake: dict[int, Log] = {}
        self._orders: deque[Callable[[], None]] = deque()
        self._ending = False
        self._idle_rounds = 0
        # Since when it has been writing to one log (monotonic): a disk that hangs shows here.
        self.writing_since: float | None = None
        self._thread = threading.Thread(target=self._run, name="metering writer", daemon=True)

    def start(self) -> None:
        """Begin; raises `RuntimeError` when no thread can be started."""
        self._thread.start()

    def is_stalled(self, seconds: float) -> bool:
        """Whether it has ended though nobody told it to, or has been writing to one log for so long."""
        if self._ending:
            return False
        since = self.writing_since
        return not self._thread.is_alive() or (since is not None and self._clock.monotonic() - since >= seconds)

    def register(self, number: int, log: Log) -> None:
        """Tell where the events with this number go, before the first of them comes."""
        self._logs[number] = log

    def forget(self, number: int) -> None:
        """Let go of a log once what is in the inbox by now is written: no more events come with this number."""

        def let_go() -> None:
            self._logs.pop(number, None)

        self.order(let_go)

    def order(self, step: Callable[[], None]) -> None:
        """Have something done on the writer's thread, soon."""
        self._orders.append(step)
        self._bell.ring()

    def flush(self, timeout: float) -> bool:
        """Wait until all that is in the inbox was taken out, `timeout` seconds at most; tell whether it was."""
        is_done = threading.Event()
        self.order(is_done.set)
        return is_done.wait(timeout)

    def end(self, timeout: float) -> bool:
        """Take out what is in the inbox, and end; False when that took longer than `timeout` seconds."""
        self._ending = True
        self._bell.ring()
        if self._thread.ident is not None:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    # -- on the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._ending:
            # Under load nobody waits for the bell: each time that a thread waits costs the answering thread as well.
            if self._idle_rounds >= _IDLE_ROUNDS and self._inbox.may_sleep() and not self._orders:
                self._bell.wait()
            if not self._orders and not self._ending:
                # The inbox may move to another place.
                time.sleep(ROUND_SECONDS if self._inbox.survives_supervisor else BRIEF_ROUND_SECONDS)
            self._round()
        self._round()

    def _round(self) -> None:
        # Those that were given before the round: `flush` is done when it is.
        orders = [self._orders.popleft() for _ in range(len(self._orders))]
        self._idle_rounds += 1
        while self._write_some():
            pass
        self.writing_since = None
        for step in orders:
            guarded(step)

    def _write_some(self) -> bool:
        drained = self._inbox.drain(_EVENTS_A_ROUND)
        if not drained.events:
            return False
        self._idle_rounds = 0
        by_queue: dict[int, list[bytes]] = {}
        for number, event in drained.events:
            by_queue.setdefault(number, []).append(event)
        for number, events in by_queue.items():
            log = self._logs[number]
            began = self.writing_since = self._clock.monotonic()
            guarded(functools.partial(log.write, events))
            self._times.observe(self._clock.monotonic() - began)
            self._let_others_rest(number, log)
        self._inbox.advance(drained)
        return len(drained.events) == _EVENTS_A_ROUND

    def _let_others_rest(self, number: int, log: Log) -> None:
        self._awake.pop(number, None)
        self._awake[number] = log
        if len(self._awake) > _MAX_AWAKE:
            guarded(self._awake.pop(next(iter(self._awake))).rest)
