"""What carries a trial out, when something in a step raises: a bug, or memory that is short."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from kong_metering.account import QueueAccount
from kong_metering.backlog.memory import MemoryBacklog
from kong_metering.config import Queue
from kong_metering.delivery.couriers import Couriers
from kong_metering.delivery.delivering import Delivering
from kong_metering.delivery.queue import EventQueue
from kong_metering.stats import Stats
from kong_metering.trial.decisions import Pause, Rules
from kong_metering.trial.outcome import Delivered, Outcome
from tests.support.clock import FakeClock
from tests.support.waiting import wait_until
from tests.unit.delivery.fakes import REFUSED, FakeEndpoint, FakeNetwork, Refusing, SteeredClock, numbered

if TYPE_CHECKING:
    from kong_metering.backlog.source import Entry
    from kong_metering.backlog.stock import Sending
    from kong_metering.ingest.client import Endpoint
    from kong_metering.reasons import Buried
    from tests.support.loglines import LogLines

Trouble = Callable[[], None]


def bug() -> None:
    raise MemoryError("no room")


class Shaky(MemoryBacklog):
    """A backlog of which some calls raise: each one tells what happens before it by its own script."""

    def __init__(self, clock: FakeClock | SteeredClock, account: QueueAccount, settings: Queue) -> None:
        super().__init__(settings, clock, account)
        self.before_send: deque[Trouble] = deque()
        self.before_note: deque[Trouble] = deque()
        self.before_settle: deque[Trouble] = deque()
        self.before_reject: deque[Trouble] = deque()

    def begin_send(self, entries: Sequence[Entry]) -> Sending:
        _next(self.before_send)
        return super().begin_send(entries)

    def did_not_arrive(self, sending: Sending) -> None:
        _next(self.before_note)
        super().did_not_arrive(sending)

    def settle(self, entries: Sequence[Entry]) -> int:
        _next(self.before_settle)
        return super().settle(entries)

    def reject(self, entries: Sequence[Entry], reason: Buried, words: str) -> None:
        super().reject(entries, reason, words)
        _next(self.before_reject)


def _next(script: deque[Trouble]) -> None:
    if script:
        script.popleft()()


class Steps:
    """A delivery that is driven step by step, by the rules of a queue."""

    def __init__(self, *events: bytes, **settings: int) -> None:
        self.clock = FakeClock()
        self.stats = Stats()
        self.endpoint = FakeEndpoint()
        self.before_post: deque[Trouble] = deque()
        self.bugs = 0
        queue, account = Queue.model_validate(settings), QueueAccount("metering", self.stats)
        self.backlog = Shaky(self.clock, account, queue)
        # Nothing more comes: an event that fails on is found to be to blame at the end.
        rules = replace(Rules.of(queue, batch_size=queue.max_batch_size, keeps=True), expects_more=False)
        self.delivering = Delivering(rules, self.backlog, clock=self.clock, account=account)
        for event in events:
            account.accept()
            self.backlog.put(event)

    def run(self) -> list[list[bytes]]:
        """Go on until nothing is left to do; return the requests."""
        while True:
            try:
                decision = self.delivering.step(self.backlog.unread, self._post)
            except MemoryError:
                self.bugs += 1
                continue
            if isinstance(decision, Pause):
                if decision.until is None:
                    return self.endpoint.requests
                self.clock.advance(max(0.0, decision.until - self.clock.monotonic()))

    def _post(self, events: Sequence[bytes]) -> Outcome:
        _next(self.before_post)
        return self.endpoint.take(list(events))


@pytest.mark.parametrize("concurrency", [1, -1])
def test_events_whose_sending_cannot_begin_are_due_again(concurrency: int) -> None:
    it = Steps(b"one", b"two", b"three", max_batch_size=1, concurrency_limit=concurrency)
    it.backlog.before_send += [bug, bug]
    assert sorted(it.run()) == [[b"one"], [b"three"], [b"two"]]
    assert (it.bugs, it.stats.snapshot().delivered, it.stats.snapshot().waiting) == (2, 3, 0)


def test_their_order_stays_as_it_was() -> None:
    it = Steps(*numbered(10), max_batch_size=3)
    it.backlog.before_send += [bug, lambda: None, bug]
    assert [event for request in it.run() for event in request] == numbered(10)


def test_events_of_a_request_that_nobody_answered_are_due_again() -> None:
    it = Steps(b"one", b"two", max_batch_size=1)
    it.before_post.append(bug)
    assert it.run() == [[b"one"], [b"two"]]
    assert (it.bugs, it.stats.snapshot().delivered, it.stats.snapshot().waiting) == (1, 2, 0)


def test_what_was_answered_and_could_not_be_settled_is_settled_later_and_not_sent_again() -> None:
    it = Steps(*numbered(10), max_batch_size=5)
    it.backlog.before_settle += [bug, bug]
    requests = it.run()
    assert [event for request in requests for event in request] == numbered(10)
    assert (it.bugs, it.stats.snapshot().delivered, it.stats.snapshot().waiting) == (2, 10, 0)


def test_an_answer_counts_though_it_cannot_be_noted_that_nothing_arrived() -> None:
    it = Steps(b"one", b"two", max_batch_size=1)
    it.endpoint.script.append(REFUSED)
    it.backlog.before_note.append(bug)
    assert it.run() == [[b"one"], [b"one"], [b"two"]]
    assert (it.bugs, it.stats.snapshot().delivered, it.stats.snapshot().waiting) == (1, 2, 0)


def test_an_event_is_rejected_once_though_that_raises_afterwards() -> None:
    it = Steps(b"good", b"bad", b"better", b"best", max_batch_size=1)
    it.endpoint.decide = Refusing(b"bad")
    it.backlog.before_reject.append(bug)
    it.run()
    account = it.stats.snapshot()
    assert (it.bugs, account.delivered, sum(account.dropped.values()), account.waiting) == (1, 3, 1, 0)


def test_a_queue_goes_on_after_a_bug_without_a_new_event(steered: SteeredClock, log: LogLines) -> None:
    endpoint, network, couriers = FakeEndpoint(), FakeNetwork(steered), Couriers(steered)
    account, settings = QueueAccount("metering", Stats()), Queue(max_batch_size=1)
    backlog = Shaky(steered, account, settings)
    backlog.before_send.append(bug)
    answers: list[Outcome] = []

    def note(_: Endpoint, outcome: Outcome) -> None:
        answers.append(outcome)
        bug()

    queue = EventQueue(
        settings,
        network.endpoint(endpoint),
        backlog,
        clock=steered,
        account=account,
        couriers=couriers,
        connections=network.connections,
        arrays=network.arrays,
        on_answer=note,
    )
    queue.put(b"one")
    wait_until(lambda: log.with_text("delivery failed") != [], "the bug is said")
    steered.advance(1)
    couriers.look()
    wait_until(lambda: queue.waiting == 0, "it is delivered")
    queue.close(steered.monotonic() + 20)
    queue.end(steered.monotonic() + 20)
    couriers.close(20)
    network.connections.close()
    assert endpoint.requests == [[b"one"]]
    assert answers == [Delivered()]
    assert len(log.with_text("an answer could not be noted: MemoryError")) == 1
