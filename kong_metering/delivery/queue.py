"""The queue of one plugin entity for one endpoint: events come in from the log phase, and leave in batches.

Contract: `put` may be called from any thread; it never waits for the network or the disk. Couriers call `step`, as many
at a time as `width` says, when `wake` has called them; a queue has no thread of its own. A trial (`trial/`) decides
what is sent and whose fault a failure is, and `delivering.py` carries that out.

Events leave in the order in which they came, at most `max_batch_size` at a time, `max_coalescing_delay` after the first
one at the latest (with `concurrency_limit` -1: each alone, at once, many at a time, in any order; with a batch size of
1, Kong's default: the first one alone, at once, those that come soon after it together). An event leaves the
queue when the endpoint answers 2xx, as a dead letter, or, without a spool, by Kong's rules for giving up; never else.

`reconfigure` changes parameters, token and connection at once, for what waits too. `begin_close` sends what waits and
what still comes, each batch once; with a spool nothing more is sent after a failure: the next process goes on there.
`end` accounts for what is left; what comes later is dropped and counted. `hand_over` makes another queue of all that is
here and still comes, when no request is under way.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from kong_metering.delivery.delivering import Delivering
from kong_metering.delivery.requestfigures import LastRequest, RequestFigures
from kong_metering.delivery.succession import StepGate
from kong_metering.log import LOGGER, cause_of, printable, trouble
from kong_metering.measures import Histogram
from kong_metering.reasons import Dropped
from kong_metering.trial import batching
from kong_metering.trial.decisions import Pause, Rules, Send
from kong_metering.trial.outcome import Failed, Outcome
from kong_metering.urls import without_credentials

if TYPE_CHECKING:
    from kong_metering.account import QueueAccount
    from kong_metering.backlog.backlog import Backlog
    from kong_metering.backlog.source import Entry
    from kong_metering.clock import Clock
    from kong_metering.config import Queue
    from kong_metering.delivery.couriers import Couriers
    from kong_metering.delivery.succession import Heir, Succession
    from kong_metering.ingest.arrays import Arrays
    from kong_metering.ingest.client import Endpoint
    from kong_metering.ingest.connections import Connections
    from kong_metering.trial.decisions import Decision


class EventQueue:
    """Events on their way to one endpoint."""

    def __init__(  # noqa: PLR0913 - what it is made of
        self,
        settings: Queue,
        endpoint: Endpoint,
        backlog: Backlog,
        *,
        clock: Clock,
        account: QueueAccount,
        couriers: Couriers,
        connections: Connections,
        arrays: Arrays,
        adaptive_batch: int = 1,
        post_times: Histogram | None = None,
        on_answer: Callable[[Endpoint, Outcome], None] = lambda _endpoint, _outcome: None,
    ) -> None:
        """Put it together; `on_answer` is called on a courier's thread, without a lock, after each request.

        `adaptive_batch`: how many events leave together where one is configured, while more come (1: never more).
        """
        self.name = account.name
        self._endpoint = endpoint
        self._backlog = backlog
        self._clock = clock
        self._account = account
        self._couriers = couriers
        self._connections = connections
        self._arrays = arrays
        self._most_adaptive = adaptive_batch
        self._on_answer = on_answer
        # For rules, so that the trial gets them in the order in which they were made, and for whether all is done.
        self._lock = threading.Lock()
        self._go_by(settings)
        # When its last request was begun.
        self._sent_at = -math.inf
        self._requests = RequestFigures(clock, post_times or Histogram())
        self._delivering = Delivering(self._rules, backlog, clock=clock, account=account)
        # Whether more events would be read, if there were any: who waits for an answer or a pause need not be woken.
        self._wants_more = True
        self._gate = StepGate()
        self._is_closing = False
        self._has_ended = False
        self._is_done = threading.Event()
        # Whoever looked before the last call, or another courier's last step, may not have seen all there is to do.
        self._calls = 0
        backlog.on_ready(self.wake)

    @property
    def waiting(self) -> int:
        """How many events are in the queue, those on their way included."""
        return self._account.waiting

    def told(self) -> dict[str, Any]:
        """Return the queue's figures: its account, how it stands with the endpoint, its requests; times are epoch."""
        delivering = self._delivering.told()
        in_hand_ms = delivering.pop("oldest_in_hand_ms")
        oldest_at = self._backlog.oldest_at() if self.waiting else None
        wall, monotonic = self._clock.wall(), self._clock.monotonic()
        ages = [wall - ms / 1000 for ms in (in_hand_ms, self._backlog.known_oldest_ms) if ms]
        # Minus infinity: it was written before this process began, and is not in its memory.
        ages += [monotonic - oldest_at] if oldest_at is not None and math.isfinite(oldest_at) else []
        ages += [self._backlog.hangs_for]
        return {
            "endpoint": without_credentials(self._endpoint.url),
            **self._account.told(),
            **delivering,
            **self._requests.told(),
            "oldest_seconds": round(max(ages), 3) if self.waiting else 0,
            "letters_pending": self._backlog.letters_pending,
            "disk": self._backlog.disk_state,
        }

    @property
    def origin(self) -> str:
        """Name the endpoint whose share of the couriers it uses."""
        return self._endpoint.url

    @property
    def endpoint(self) -> Endpoint:
        """Where it sends, and with which token."""
        return self._endpoint

    def note_verified(self, result: str, events: int) -> None:
        """Count events of it that were read back from the endpoint."""
        self._account.verify(result, events)

    @property
    def width(self) -> int:
        """How many couriers may serve it at a time."""
        return self._rules.in_flight

    @property
    def delivered(self) -> int:
        """How many events the endpoint has taken."""
        return self._account.delivered

    @property
    def last_request(self) -> LastRequest:
        """What came of the last request."""
        return self._requests.last

    def put(self, event: bytes) -> None:
        """Take an event for delivery."""
        if self._gate.moved_to is not None:
            self._last_heir().put(event)
            return
        self._account.accept()
        if self._has_ended:
            self._account.drop(Dropped.PROCESS_ENDED, 1, "an event came after the end")
        else:
            self._backlog.put(event)
            self._couriers.try_again()

    def _last_heir(self) -> Heir:
        queue: Heir = self
        while (heir := queue.moved_to) is not None:
            queue = heir
        return queue

    def wake(self) -> None:
        """Look at the backlog: it has come to hold more."""
        now = self._clock.monotonic()
        if self._wants_more and (seconds := self._due_in(now)) is not None:
            self._couriers.wake(self, now + seconds)

    def reconfigure(self, settings: Queue, endpoint: Endpoint) -> None:
        """Use other parameters and another connection from now on, for the events that wait too."""
        self._endpoint = endpoint
        self._backlog.reconfigure(settings)
        with self._lock:
            self._go_by(settings)
            self._delivering.reconfigure(self._rules)
        self._call()

    def try_now(self) -> None:
        """Do at once what a pause keeps from being done, with the endpoint and with the disk."""
        self._delivering.try_now()
        self._backlog.try_again()
        self._call()

    def hand_over(self, succession: Succession) -> None:
        """Send nothing more, and give all that waits, and that still comes, to another queue.

        That is done when no request is under way any more, and not at all if one of them has shown that the endpoint
        accepts events.
        """
        self._gate.shut(succession)
        self._call()

    def stay(self) -> bool:
        """Go on, if what waits was to be handed over; False when that is done already."""
        is_here = self._gate.open()
        if is_here:
            self._call()
        return is_here

    @property
    def is_leaving(self) -> bool:
        """Whether it is to hand over to another queue, and has not done so yet."""
        return self._gate.is_shut and not self.has_moved

    @property
    def is_staying(self) -> bool:
        """Whether it sends what waits in it itself, and does not end."""
        return not (self._gate.is_shut or self._is_closing or self._has_ended)

    @property
    def has_moved(self) -> bool:
        """Whether it has handed over to another queue."""
        return self.moved_to is not None

    @property
    def moved_to(self) -> Heir | None:
        """The queue that has taken over, if one has; another one may have taken over from that."""
        return self._gate.moved_to

    def begin_close(self) -> None:
        """Send what waits at once, each batch once."""
        if not self.stay():
            return
        self._is_closing = True
        self._delivering.close()
        self._call()

    def close(self, deadline: float) -> None:
        """Wait until what waits was sent, or could not be, until `deadline` (monotonic)."""
        self.begin_close()
        while (
            self.waiting
            and not (self.has_moved or self._is_done.is_set())
            and (left := deadline - self._clock.monotonic()) > 0
        ):
            self._is_done.wait(left)

    def end(self, deadline: float, *, is_written: bool = True) -> None:
        """Account for what is left; without `is_written` the disk hangs, and some of it is still in the inbox.

        Begins no request, and waits until `deadline` (monotonic) for one that was begun since `close`, as for what came
        from a dead process just then: if it gets through, the next process must not send it once more.
        """
        self.dismiss()
        self._gate.close(max(0.0, deadline - self._clock.monotonic()))
        self._backlog.end(is_written=is_written)

    def dismiss(self) -> None:
        """Be served no more; nothing waits, and nobody puts anything. Waits for no disk."""
        self._has_ended = True
        self._couriers.forget(self)

    def _go_by(self, settings: Queue) -> None:
        """Use parameters, but for a batch size that the endpoint is known not to take."""
        self._configured = settings
        self._is_single = self._arrays.are_refused_by(self._endpoint.url)
        self._settings = settings.model_copy(update={"max_batch_size": 1}) if self._is_single else settings
        self._adaptive_batch = 1 if self._is_single else self._most_adaptive
        batch_size = batching.batch_size(self._settings, self._adaptive_batch)
        self._rules = Rules.of(self._settings, batch_size=batch_size, keeps=self._backlog.keeps)

    def _heed_arrays(self) -> None:
        """Send single events from now on if the endpoint has turned out to take no arrays, here or in another queue."""
        if not self._is_single and self._arrays.are_refused_by(self._endpoint.url):
            with self._lock:
                self._go_by(self._configured)
                self._delivering.reconfigure(self._rules)

    def _call(self) -> None:
        with self._lock:
            self._calls += 1
            self._is_done.clear()
        self._wants_more = True
        self._couriers.wake(self, self._clock.monotonic())

    def _due_in(self, now: float) -> float | None:
        """Tell in how many seconds from `now` a batch may be read; None when there is nothing to read."""
        unread = self._backlog.unread
        oldest_at = self._backlog.oldest_at() if unread else None
        if oldest_at is None:
            return None
        if self._is_closing:
            return 0.0
        return batching.due_in(
            self._settings,
            unread,
            self._backlog.unread_bytes,
            now - oldest_at,
            adaptive_batch=self._adaptive_batch,
            since_last=now - self._sent_at,
        )

    # -- on couriers' threads -----------------------------------------------------------------------------------------

    def step(self) -> float | None:
        """Do what is due, one request at most; tell when to come again (monotonic), None to wait for `wake`."""
        self._move()
        while not self._has_ended and not self._gate.is_shut:
            self._heed_arrays()
            calls = self._calls
            self._wants_more = True
            now = self._clock.monotonic()
            due_in = self._due_in(now)
            ready = self._backlog.unread if due_in == 0.0 else 0
            decision = self._stepped(ready)
            if isinstance(decision, Send):
                return self._clock.monotonic()
            if not isinstance(decision, Pause):
                continue
            self._wants_more = ready == 0
            if ready and calls != self._calls:
                # Another courier may have found nothing left since, and wants to be woken.
                continue
            # The last one to have nothing to do: others may still settle what was answered.
            is_over = self._is_closing and decision.until is None and self._gate.is_empty
            if is_over and not self._note_end(calls):
                continue
            times = [decision.until, now + due_in if due_in else None]
            return min((time for time in times if time is not None), default=None)
        return None

    def _note_end(self, calls: int) -> bool:
        with self._lock:
            if calls == self._calls:
                self._is_done.set()
            return calls == self._calls

    def _stepped(self, ready: int) -> Decision[Entry]:
        if not self._gate.enter():
            return Pause(None)
        try:
            decision = self._delivering.step(ready, self._post)
            if not isinstance(decision, Pause):
                # What it did may have left more to do, as when a probe got through.
                with self._lock:
                    self._calls += 1
            return decision
        finally:
            self._gate.leave()
            if self._gate.is_shut:
                self._couriers.wake(self, self._clock.monotonic())

    def _move(self) -> None:
        """Hand over, if that is to be and no request is under way; none begins meanwhile."""
        succession = self._gate.due()
        if succession is None or not self._gate.settle(succession, is_off=succession.is_off()):
            return
        succession.carry_out()

    def _post(self, events: Sequence[bytes]) -> Outcome:
        if self.width > 1 and (self._delivering.lined_up or self._backlog.unread):
            self._couriers.wake(self, self._clock.monotonic())  # another courier sends what comes next meanwhile
        began = self._sent_at = self._clock.monotonic()
        endpoint = self._endpoint
        outcome = self._posted(events, endpoint)
        try:
            self._note_answer(events, endpoint, outcome, self._clock.monotonic() - began)
        except Exception as error:  # noqa: BLE001 - what was answered is answered, whatever goes wrong here
            LOGGER.error("an answer could not be noted: %s", cause_of(error), extra=trouble("answer bug"))
        return outcome

    def _note_answer(self, events: Sequence[bytes], endpoint: Endpoint, outcome: Outcome, seconds: float) -> None:
        self._requests.note(outcome, seconds)
        if self._arrays.note(endpoint.url, events, outcome):
            LOGGER.warning(
                "%s takes no arrays, only single events: from now on each event is sent alone",
                printable(without_credentials(endpoint.url)),
            )
        self._on_answer(endpoint, outcome)

    def _posted(self, events: Sequence[bytes], endpoint: Endpoint) -> Outcome:
        try:
            client = self._connections.borrow(endpoint)
            try:
                return client.send(events)
            finally:
                self._connections.give_back(client)
        except Exception as error:  # noqa: BLE001 - a bug there is a failure like others: its events are not lost
            return Failed(f"the sender broke: {cause_of(error)}", type(error).__name__)
