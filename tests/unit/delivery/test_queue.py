"""The queue in memory, in front of a fake endpoint, served by hand; with threads where it is about them."""

from __future__ import annotations

import itertools
import math
import random
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kong_metering.account import QueueAccount
from kong_metering.backlog.memory import MemoryBacklog
from kong_metering.config import Queue
from kong_metering.delivery.couriers import Couriers
from kong_metering.delivery.queue import EventQueue
from kong_metering.ingest.arrays import Arrays
from kong_metering.stats import Snapshot, Stats
from kong_metering.trial.batching import MAX_EVENT_BYTES
from kong_metering.trial.decisions import UNLIMITED_IN_FLIGHT, Pause
from kong_metering.trial.outcome import Delivered, Failed, Outcome, Rejected
from kong_metering.trial.trial import REACH
from tests.support.clock import FakeClock
from tests.support.loglines import LogLines
from tests.support.waiting import wait_until
from tests.unit.delivery.fakes import (
    BUSY,
    DOWN,
    REFUSED,
    UNAUTHORIZED,
    UNREACHABLE,
    Choking,
    FakeEndpoint,
    FakeNetwork,
    LiveRig,
    Refusing,
    Rig,
    SteeredClock,
    numbered,
    take_all,
)

if TYPE_CHECKING:
    from kong_metering.backlog.source import Entry
    from kong_metering.trial.decisions import Decision
    from tests.unit.delivery.conftest import LiveRigMaker, RigMaker


def failing_times(times: int, failure: Outcome) -> Callable[[list[bytes]], Outcome]:
    """Fail so many requests, then take all."""
    left = iter(range(times))
    return lambda _: Delivered() if next(left, None) is None else failure


# -- order and batches -------------------------------------------------------------------------------------------------


def test_events_leave_in_the_order_in_which_they_came(rig: RigMaker) -> None:
    it = rig(max_batch_size=7)
    events = numbered(100)
    it.put(*events)
    it.settle()
    assert it.endpoint.delivered == events


def test_a_batch_size_of_one_sends_each_event_alone_and_at_once(rig: RigMaker) -> None:
    it = rig(max_batch_size=1, max_coalescing_delay=3600)
    it.put(b"one", b"two")
    it.let_pass(0)
    assert it.endpoint.requests == [[b"one"], [b"two"]]


def test_with_adaptive_batches_an_event_after_a_pause_goes_alone_and_at_once(rig: RigMaker) -> None:
    it = rig(adaptive_batch=100, max_batch_size=1, max_coalescing_delay=3600)
    for event in numbered(3):
        it.put(event)
        it.let_pass(0)
        assert it.endpoint.requests[-1] == [event]
        it.let_pass(0.05)


def test_with_adaptive_batches_what_comes_soon_after_a_request_leaves_together_in_order(rig: RigMaker) -> None:
    it = rig(adaptive_batch=100, max_batch_size=1)
    events = numbered(40)
    for event in events:
        it.put(event)
        it.let_pass(0.012)
    it.let_pass(0.05)
    assert it.endpoint.delivered == events
    # One comes each 12 ms: four in 50 ms, in some five.
    first, *others, _ = [len(request) for request in it.endpoint.requests]
    assert first == 1
    assert set(others) == {4, 5}


def test_with_adaptive_batches_a_hundred_leave_at_once_and_no_more_in_one_request(rig: RigMaker) -> None:
    it = rig(adaptive_batch=100, max_batch_size=1)
    it.put(b"first")
    it.let_pass(0)
    it.put(*numbered(250))
    it.let_pass(0)
    assert [len(request) for request in it.endpoint.requests] == [1, 100, 100]
    it.let_pass(0.05)
    assert it.endpoint.delivered == [b"first", *numbered(250)]


def test_with_adaptive_batches_a_slow_endpoint_is_sent_all_that_waits_as_soon_as_it_answers(rig: RigMaker) -> None:
    it = rig(adaptive_batch=100, max_batch_size=1)

    def twenty_come() -> None:
        it.put(*numbered(20))
        it.clock.advance(0.2)

    it.meanwhile(twenty_come)
    it.put(b"first")
    it.settle()
    assert it.pauses == []
    assert it.endpoint.requests == [[b"first"], numbered(20)]


def singles_only(refusal: Outcome) -> Callable[[list[bytes]], Outcome]:
    """Refuse arrays, as an OpenMeter collector does."""
    return lambda events: Delivered() if len(events) == 1 else refusal


@pytest.mark.parametrize("settings", [{"adaptive_batch": 100, "max_batch_size": 1}, {"max_batch_size": 30}])
@pytest.mark.parametrize(
    "refusal",
    [
        Rejected("https://ingest.test answered 400: not an object"),
        Failed("https://ingest.test answered 415: what?", "415", is_misconfigured=True, may_have_arrived=False),
    ],
)
def test_an_endpoint_that_takes_no_arrays_is_learned_once_and_sent_single_events(
    rig: RigMaker, log: LogLines, settings: dict[str, int], refusal: Outcome
) -> None:
    it = rig(singles_only(refusal), **settings)
    it.put(*numbered(300))
    account = it.settle()
    assert account.delivered == 300
    assert sorted(it.endpoint.delivered) == sorted(numbered(300))
    before = len(it.endpoint.requests)
    it.put(*numbered(200, 300))
    it.settle()
    assert it.endpoint.requests[before:] == [[event] for event in numbered(200, 300)]
    it.reconfigure(max_batch_size=50)
    it.put(*numbered(100, 500))
    it.settle()
    assert it.endpoint.requests[before + 200 :] == [[event] for event in numbered(100, 500)]
    assert [level for level, _ in log.with_text("takes no arrays")] == ["WARNING"]


class Meddling(Arrays):
    """Has something done on another thread while a queue that has just learned heeds it."""

    def __init__(self) -> None:
        super().__init__()
        self.other: threading.Thread | None = None
        self._looks = 0

    def are_refused_by(self, url: str) -> bool:
        is_refused = super().are_refused_by(url)
        self._looks += is_refused
        if self._looks == 2 and self.other:
            self._looks += 1
            self.other.start()
            # It may have to wait for us.
            self.other.join(0.1)
        return is_refused


def test_a_configuration_that_comes_while_a_queue_learns_of_arrays_rules_from_then_on(
    clock: FakeClock, log: LogLines
) -> None:
    arrays = Meddling()
    endpoint = FakeEndpoint(singles_only(Rejected("https://ingest.test answered 400: not an object")))
    it = Rig(Queue(max_batch_size=2, initial_retry_delay=1), clock, log, endpoint, arrays=arrays)
    arrays.other = threading.Thread(target=lambda: it.reconfigure(initial_retry_delay=50))
    it.put(*numbered(4))
    it.settle()
    arrays.other.join()
    endpoint.decide = failing_times(1, DOWN)
    before = clock.monotonic()
    it.put(b"more")
    it.settle()
    assert clock.monotonic() - before >= 50
    it.close()


def test_an_endpoint_that_refuses_an_event_for_itself_is_sent_arrays_on(rig: RigMaker, log: LogLines) -> None:
    it = rig(Refusing(b"3"), max_batch_size=10)
    it.put(*numbered(1000))
    it.settle()
    assert [len(request) for request in it.endpoint.requests[-50:]] == [10] * 50
    assert log.with_text("takes no arrays") == []


def test_a_full_batch_leaves_at_once(rig: RigMaker) -> None:
    it = rig(max_batch_size=3, max_coalescing_delay=3600)
    it.put(b"one", b"two", b"three")
    it.let_pass(0)
    assert it.endpoint.requests == [[b"one", b"two", b"three"]]


def test_five_events_leave_in_three_batches_of_two(rig: RigMaker) -> None:
    it = rig(max_batch_size=2, max_coalescing_delay=0.1)
    it.put(b"one", b"two", b"three", b"four", b"five")
    it.let_pass(0)
    assert it.endpoint.requests == [[b"one", b"two"], [b"three", b"four"]]
    it.let_pass(0.1)
    assert it.endpoint.requests[2:] == [[b"five"]]


def test_a_batch_that_is_not_full_leaves_after_the_coalescing_delay(rig: RigMaker) -> None:
    it = rig(max_batch_size=3, max_coalescing_delay=2)
    it.put(b"one")
    it.let_pass(1.5)
    it.put(b"two")
    it.let_pass(0.25)
    assert it.endpoint.requests == []
    it.let_pass(0.25)
    assert it.endpoint.requests == [[b"one", b"two"]]


def test_the_coalescing_delay_counts_from_the_arrival_of_the_first_event(rig: RigMaker) -> None:
    it = rig(max_batch_size=2, max_coalescing_delay=5)

    def three_later() -> None:
        it.put(b"three")
        it.clock.advance(4)

    it.meanwhile(three_later)
    it.put(b"one", b"two")
    it.settle()
    assert it.endpoint.requests == [[b"one", b"two"], [b"three"]]
    assert it.pauses == [pytest.approx(1.0)]


def test_the_longest_coalescing_delay_is_waited_for(rig: RigMaker) -> None:
    it = rig(max_batch_size=1_000_000, max_coalescing_delay=3600, max_entries=1_000_000)
    it.put(b"one", b"two")
    it.settle()
    assert it.pauses == [3600.0]


@pytest.mark.parametrize("size", [7_999, 8_000, 10_000, 100_000])
def test_batches_of_any_allowed_size_work(rig: RigMaker, size: int) -> None:
    it = rig(max_batch_size=size, max_entries=1_000_000, max_coalescing_delay=3600)
    events = numbered(size)
    it.put(*events)
    it.let_pass(0)
    assert it.endpoint.requests == [events]


def test_a_thousand_events_are_sent_without_any_waiting(rig: RigMaker) -> None:
    it = rig(max_batch_size=10, max_coalescing_delay=3600)
    it.put(*numbered(1000))
    it.let_pass(0)
    assert it.stats.snapshot().delivered == 1000


def test_events_that_come_while_a_request_is_under_way_leave_after_it(rig: RigMaker) -> None:
    it = rig(max_batch_size=2, max_coalescing_delay=3600)
    it.meanwhile(lambda: it.put(b"three"), lambda: it.put(b"six"))
    it.put(b"one", b"two")
    it.let_pass(0)
    assert it.endpoint.requests == [[b"one", b"two"]]
    it.put(b"four", b"five")
    it.let_pass(0)
    assert it.endpoint.requests[1:] == [[b"three", b"four"], [b"five", b"six"]]


def test_a_batch_that_can_never_be_full_leaves_when_the_queue_is_nearly(rig: RigMaker) -> None:
    it = rig(max_batch_size=1000, max_entries=10, max_coalescing_delay=60)
    it.put(*numbered(7))
    it.let_pass(0)
    assert it.endpoint.requests == []
    it.put(b"another")
    it.let_pass(0)
    assert it.stats.snapshot() == Snapshot(accepted=8, delivered=8)


def test_a_batch_that_can_never_be_full_leaves_when_the_bytes_nearly_are(rig: RigMaker) -> None:
    it = rig(max_batch_size=1000, max_bytes=1000, max_coalescing_delay=60)
    it.put(*[b"x" * 100] * 7)
    it.let_pass(0)
    assert it.endpoint.requests == []
    it.put(b"x" * 100)
    it.let_pass(0)
    assert it.stats.snapshot() == Snapshot(accepted=8, delivered=8)


def test_steady_traffic_into_a_small_queue_does_not_starve_delivery(rig: RigMaker) -> None:
    it = rig(max_batch_size=1000, max_entries=10, max_coalescing_delay=60)
    for number in range(1000):
        it.put(b"%d" % number)
        it.let_pass(0.1)
        assert it.queue.waiting < 10
    assert it.close().dropped == {}


# -- threads -----------------------------------------------------------------------------------------------------------


def test_events_may_be_put_from_many_threads(live: LiveRigMaker) -> None:
    it = live(max_batch_size=100, max_entries=100_000, max_coalescing_delay=0.01)
    lots = [numbered(1000, first=1000 * number) for number in range(8)]
    threads = [threading.Thread(target=it.put, args=lot) for lot in lots]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert it.settle() == Snapshot(accepted=8000, delivered=8000)
    assert sorted(it.endpoint.delivered) == sorted(itertools.chain.from_iterable(lots))
    for lot in lots:
        of_one_thread = set(lot)
        assert [event for event in it.endpoint.delivered if event in of_one_thread] == lot


def test_putting_does_not_wait_for_a_request_under_way(live: LiveRigMaker) -> None:
    it = live()
    it.put_while_busy(*numbered(100))
    assert it.queue.waiting == 101
    assert it.endpoint.requests == [[b"before"]]
    it.endpoint.let_go()
    assert it.settle().delivered == 101
    assert it.endpoint.delivered == [b"before", *numbered(100)]


def test_a_batch_that_is_not_full_is_sent_by_a_thread_when_it_is_due(live: LiveRigMaker) -> None:
    it = live(max_batch_size=3, max_coalescing_delay=3600)
    it.put(b"one", b"two")
    it.let_pass(3599)
    assert it.endpoint.requests == []
    it.let_pass(1)
    assert it.settle().delivered == 2
    assert it.endpoint.requests == [[b"one", b"two"]]


class WatchedBacklog(MemoryBacklog):
    """Lets a test wait until a courier has looked what there is, and keep it there."""

    def __init__(self, settings: Queue, clock: SteeredClock, account: QueueAccount) -> None:
        super().__init__(settings, clock, account)
        self.has_looked = threading.Event()
        self.may_go_on = threading.Event()

    @property
    def unread(self) -> int:
        found = super().unread
        if threading.current_thread().name == "metering courier" and not self.has_looked.is_set():
            self.has_looked.set()
            self.may_go_on.wait(60)
        return found


def test_who_looked_before_the_last_event_came_does_not_end_the_wait_for_it(steered: SteeredClock) -> None:
    endpoint, network, couriers = FakeEndpoint(), FakeNetwork(steered), Couriers(steered)
    account, settings = QueueAccount("metering", Stats()), Queue()
    backlog = WatchedBacklog(settings, steered, account)
    queue = EventQueue(
        settings,
        network.endpoint(endpoint),
        backlog,
        clock=steered,
        account=account,
        couriers=couriers,
        connections=network.connections,
        arrays=network.arrays,
    )
    endpoint.hold()
    queue.begin_close()
    assert backlog.has_looked.wait(60)
    queue.put(b"late")
    closing = threading.Thread(target=queue.close, args=(steered.monotonic() + 60,))
    closing.start()
    wait_until(lambda: queue._calls > 1, "it is closed")
    backlog.may_go_on.set()
    endpoint.wait_for_request()
    closing.join(0.3)
    has_waited = closing.is_alive()
    endpoint.let_go()
    closing.join(60)
    queue.end(steered.monotonic())
    couriers.close(60)
    network.connections.close()
    assert (has_waited, account.waiting, account.delivered) == (True, 0, 1)


class InterruptedClock(SteeredClock):
    """Does something, once, when a thread asks it for the time."""

    def __init__(self) -> None:
        super().__init__()
        self.meanwhile: Callable[[], None] | None = None
        self._thread = threading.current_thread()

    def monotonic(self) -> float:
        if self.meanwhile is not None and threading.current_thread() is self._thread:
            meanwhile, self.meanwhile = self.meanwhile, None
            meanwhile()
        return super().monotonic()


def test_an_event_that_is_put_while_those_before_it_leave_is_not_forgotten() -> None:
    clock = InterruptedClock()
    it = LiveRig(Queue(max_batch_size=10, max_coalescing_delay=5), clock)
    it.put(b"before")

    def leaves() -> None:
        it.let_pass(5)
        wait_until(lambda: it.endpoint.delivered == [b"before"], "the one before is delivered")
        wait_until(lambda: not it.couriers.at_work, "nobody is at work")

    clock.meanwhile = leaves
    it.put(b"event")
    it.let_pass(5)
    assert it.settle().delivered == 2
    it.close()


def test_two_couriers_that_look_in_turn_leave_the_queue_to_be_woken(
    live: LiveRigMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of them is slow to note that others were at it, and all of it is delivered meanwhile."""
    it = live(concurrency_limit=-1, initial_retry_delay=60, max_retry_delay=60, max_retry_time=3600)
    stepped, is_slow, goes_on = EventQueue._stepped, threading.Event(), threading.Event()

    def slowly(queue: EventQueue, ready: int) -> Decision[Entry]:
        decision = stepped(queue, ready)
        if ready and isinstance(decision, Pause) and not is_slow.is_set():
            is_slow.set()
            goes_on.wait(20)
        return decision

    it.endpoint.script.append(REFUSED)
    it.put(b"first")
    it.endpoint.wait_for_request()
    wait_until(lambda: not it.couriers.at_work, "there is a pause")
    it.endpoint.hold()
    it.let_pass(60)
    it.endpoint.wait_for_request()
    monkeypatch.setattr(EventQueue, "_stepped", slowly)
    # While it is tried whether anything gets through, all else waits.
    it.put(*numbered(2 * UNLIMITED_IN_FLIGHT))
    assert is_slow.wait(20)
    it.endpoint.let_go()
    it.settle()
    wait_until(lambda: it.couriers.at_work <= 1, "the others have nothing to do")
    goes_on.set()
    wait_until(lambda: not it.couriers.at_work, "nor has that one")
    it.put(b"later")
    it.settle()


def test_a_request_that_was_begun_between_the_close_and_the_end_is_waited_for(live: LiveRigMaker) -> None:
    it = live()
    it.endpoint.hold()
    deadline = it.clock.monotonic() + 60
    it.queue.close(deadline)
    it.put(b"late")  # as what came from a dead process
    it.endpoint.wait_for_request()
    ending = threading.Thread(target=it.queue.end, args=(deadline,))
    ending.start()
    ending.join(0.3)
    has_waited = ending.is_alive()
    it.endpoint.let_go()
    ending.join(60)
    assert (has_waited, it.stats.snapshot()) == (True, Snapshot(accepted=1, delivered=1))


def test_a_queue_with_nothing_to_do_has_no_thread_and_no_connection(live: LiveRigMaker) -> None:
    it = live()
    assert it.couriers.threads == 0
    it.put(*numbered(50))
    it.settle()

    def has_gone() -> bool:
        it.let_pass(60)
        return it.couriers.threads == 0

    wait_until(has_gone, "no thread is left")
    it.network.connections.sweep(it.clock.monotonic())
    assert all(sender.closed for sender in it.endpoint.senders)
    it.put(b"another")
    assert it.settle().delivered == 51


# -- what waits --------------------------------------------------------------------------------------------------------


def test_events_on_their_way_count_as_waiting(live: LiveRigMaker) -> None:
    it = live(max_batch_size=3)
    it.endpoint.hold()
    it.put(b"one", b"two", b"three")
    it.endpoint.wait_for_request()
    assert it.queue.waiting == it.stats.snapshot().waiting == 3
    it.put(b"four")
    assert it.queue.waiting == it.stats.snapshot().waiting == 4
    it.endpoint.let_go()
    it.let_pass(1)
    it.settle()


def test_events_never_disappear_between_the_queue_and_the_request(live: LiveRigMaker) -> None:
    it = live(max_batch_size=5, max_coalescing_delay=0)
    is_over = threading.Event()
    unseen: list[int] = []

    def watch() -> None:
        while not is_over.is_set():
            waiting = it.queue.waiting
            # What does not wait was delivered before that was looked at.
            unseen.append(3000 - waiting - it.stats.snapshot().delivered)

    it.put_while_busy(*numbered(2999))
    watcher = threading.Thread(target=watch)
    watcher.start()
    it.endpoint.let_go()
    it.settle()
    is_over.set()
    watcher.join()
    assert max(unseen) <= 0


# -- too much ----------------------------------------------------------------------------------------------------------


def test_the_oldest_events_make_room_beyond_max_entries(rig: RigMaker, log: LogLines) -> None:
    it = rig(max_entries=3, max_batch_size=1)

    def put_too_many() -> None:
        it.put(*numbered(10))
        assert it.queue.waiting == 4

    it.meanwhile(put_too_many)
    it.put(b"before")
    assert it.settle() == Snapshot(accepted=11, delivered=4, dropped={"queue_full": 7})
    assert it.endpoint.delivered == [b"before", b"7", b"8", b"9"]
    assert log.with_text("full, dropping the oldest events") == [
        ("ERROR", "queue metering: full, dropping the oldest events until delivery works again")
    ]


def test_the_oldest_events_make_room_beyond_max_bytes(rig: RigMaker, log: LogLines) -> None:
    it = rig(max_bytes=6, max_batch_size=1)

    def put_too_many() -> None:
        it.put(b"1", b"22", b"333")
        assert it.queue.waiting == 4
        it.put(b"4444")

    it.meanwhile(put_too_many)
    it.put(b"before")
    account = it.settle()
    assert account.dropped == {"queue_bytes_full": 3}
    assert it.endpoint.delivered == [b"before", b"4444"]
    assert len(log.with_text("byte capacity exceeded, dropping the oldest events")) == 1
    it.put(b"55555")
    it.put(b"666666")
    assert it.settle().dropped["queue_bytes_full"] == 4


def test_bytes_are_free_again_when_events_have_left(rig: RigMaker) -> None:
    it = rig(max_bytes=10)
    for _ in range(100):
        it.put(b"0123456789")
        it.settle()
    assert it.settle() == Snapshot(accepted=100, delivered=100)


def test_dropping_is_counted_whole_and_logged_once_a_minute(rig: RigMaker, log: LogLines) -> None:
    it = rig(max_entries=10)
    it.put(*numbered(1000))
    it.clock.advance(60)
    it.put(b"later")
    assert it.settle().dropped == {"queue_full": 991}
    lines = [text for _, text in log.with_text("full, dropping")]
    assert len(lines) == 2
    assert "989 more like this" in lines[1]


def test_the_queue_warns_once_at_eighty_percent(rig: RigMaker, log: LogLines) -> None:
    it = rig(max_entries=100)
    it.put(*numbered(80))
    assert log.with_text("capacity") == []
    it.put(b"another")
    it.put(b"and another")
    assert log.with_text("capacity") == [("WARNING", "queue metering: at 80% capacity")]
    it.settle()


def test_the_queue_warns_at_eighty_percent_of_its_bytes(rig: RigMaker, log: LogLines) -> None:
    it = rig(max_bytes=100)
    it.put(*[b"0123456789"] * 8)
    assert log.with_text("capacity") == []
    it.put(b"another", b"and one")
    assert log.with_text("capacity") == [("WARNING", "queue metering: at 80% capacity")]
    it.settle()


def test_the_queue_warns_again_after_it_has_been_emptier(rig: RigMaker, log: LogLines) -> None:
    it = rig(max_entries=10)
    it.put(*numbered(9))
    it.settle()
    it.clock.advance(60)
    it.put(*numbered(9))
    it.settle()
    assert len(log.with_text("at 80% capacity")) == 2


def test_the_queue_says_when_it_works_again(rig: RigMaker, log: LogLines) -> None:
    it = rig(max_entries=2)
    it.put(*numbered(5))
    assert log.with_text("resumed") == []
    it.settle()
    it.put(b"after")
    it.settle()
    assert log.with_text("resumed") == [("INFO", "queue metering: resumed processing")]


def test_a_queue_that_overflows_all_the_time_does_not_flood_the_log(rig: RigMaker, log: LogLines) -> None:
    it = rig(max_entries=1)
    for _ in range(200):
        it.put(b"one", b"two", b"three")
        it.settle()
    assert len(log.lines) <= 3


@pytest.mark.parametrize(
    ("changes", "size", "fits"),
    [
        ({}, MAX_EVENT_BYTES, True),
        ({}, MAX_EVENT_BYTES + 1, False),
        ({"max_bytes": 100}, 100, True),
        ({"max_bytes": 100}, 101, False),
        ({"max_bytes": 0}, 1, False),
    ],
)
def test_an_event_that_is_too_large_is_refused_at_the_door(
    rig: RigMaker, log: LogLines, changes: dict[str, int], size: int, *, fits: bool
) -> None:
    it = rig(**changes)
    it.put(b"x" * size)
    account = it.settle()
    assert account.dropped == ({} if fits else {"event_too_large": 1})
    assert len(it.endpoint.requests) == (1 if fits else 0)
    assert len(log.with_text(f"an event of {size} bytes is too large")) == (0 if fits else 1)


def test_an_event_that_is_too_large_pushes_no_other_out(rig: RigMaker) -> None:
    it = rig(max_entries=3, max_bytes=10)
    it.put(b"a", b"b", b"c")
    it.put(b"x" * 11)
    assert it.settle().dropped == {"event_too_large": 1}
    assert it.endpoint.delivered == [b"a", b"b", b"c"]


def test_a_batch_size_of_all_entries_survives_a_failing_endpoint(rig: RigMaker) -> None:
    it = rig(failing_times(3, REFUSED), max_batch_size=2, max_entries=2)
    it.meanwhile(lambda: it.put(b"three", b"four"))
    it.put(b"one", b"two")
    it.settle()
    assert it.endpoint.delivered == [b"one", b"two", b"three", b"four"]


# -- failing and trying again ------------------------------------------------------------------------------------------


def test_what_fails_is_sent_again_with_doubled_pauses(rig: RigMaker) -> None:
    it = rig(failing_times(6, UNREACHABLE), initial_retry_delay=0.5, max_retry_delay=4)
    it.put(b"event")
    assert it.settle().delivered == 1
    assert it.endpoint.requests == [[b"event"]] * 7
    assert it.pauses == [0.5, 1.0, 2.0, 4.0, 4.0, 4.0]


@pytest.mark.parametrize("failure", [UNREACHABLE, DOWN, UNAUTHORIZED, REFUSED, BUSY, Rejected("400")])
def test_while_nothing_gets_through_single_events_probe_and_nothing_is_lost(rig: RigMaker, failure: Outcome) -> None:
    it = rig(lambda _: failure, max_batch_size=100, initial_retry_delay=0.5, max_retry_delay=4)
    it.put(*numbered(100))
    it.let_pass(30)
    whole, oldest, *probes = it.endpoint.requests
    assert whole == numbered(100)
    assert oldest == [b"0"]
    assert probes
    assert all(len(probe) == 1 for probe in probes)
    it.endpoint.decide = take_all
    assert it.settle() == Snapshot(accepted=100, delivered=100)
    assert len(set(it.endpoint.delivered)) == 100


def test_the_next_trouble_begins_with_the_shortest_pause_again(rig: RigMaker) -> None:
    it = rig(initial_retry_delay=1)
    for _ in range(3):
        it.endpoint.script.extend([UNREACHABLE, UNREACHABLE])
        it.put(b"event")
        it.settle()
    assert it.pauses[:2] == [1.0, 2.0]
    assert it.pauses[2::2] == [1.0, 1.0]


@pytest.mark.parametrize("failure", [UNREACHABLE, DOWN, UNAUTHORIZED, REFUSED, BUSY])
@pytest.mark.parametrize("batch", [1, 2, 7])
def test_events_keep_their_order_when_the_endpoint_was_down(rig: RigMaker, failure: Outcome, batch: int) -> None:
    it = rig(max_batch_size=batch)
    up_at = it.clock.monotonic() + 20.001
    it.endpoint.decide = lambda _: failure if it.clock.monotonic() < up_at else Delivered()
    events = numbered(50)
    it.put(*events)
    assert it.settle().delivered == 50
    assert it.endpoint.delivered == events


def test_a_batch_is_given_up_after_max_retry_time(rig: RigMaker, log: LogLines) -> None:
    it = rig(lambda _: UNREACHABLE, max_retry_time=60)
    started = it.clock.monotonic()
    it.put(b"unlucky")
    assert it.settle() == Snapshot(accepted=1, dropped={"retry_time_exceeded": 1})
    assert it.clock.monotonic() - started == pytest.approx(81.91)  # as Kong's: measured, 14 tries in 82 s
    assert it.endpoint.requests == [[b"unlucky"]] * 14
    assert log.with_text("1 event was lost") == [
        ("ERROR", f"queue metering: 1 event was lost, max_retry_time is exceeded: {UNREACHABLE.reason}")
    ]


def test_an_event_that_is_given_up_does_not_hold_the_others(rig: RigMaker) -> None:
    it = rig(lambda events: UNREACHABLE if events == [b"unlucky"] else Delivered(), max_retry_time=60)
    started = it.clock.monotonic()
    it.put(b"unlucky", b"lucky")
    it.let_pass(1)
    assert it.endpoint.delivered == [b"lucky"]
    assert it.settle() == Snapshot(accepted=2, delivered=1, dropped={"retry_time_exceeded": 1})
    assert 60 < it.clock.monotonic() - started < 120


def test_a_retry_time_of_minus_one_means_a_single_try(rig: RigMaker) -> None:
    it = rig(lambda _: UNREACHABLE, max_retry_time=-1)
    it.put(b"one", b"two")
    assert it.settle().dropped == {"retry_time_exceeded": 2}
    assert it.endpoint.requests == [[b"one"], [b"two"]]
    assert it.pauses == []


@pytest.mark.parametrize(
    ("asked", "limit", "pause"), [(5.0, 60.0, 5.0), (0.001, 60.0, 1.0), (1e9, 60.0, 60.0), (None, 60.0, 1.0)]
)
def test_the_endpoint_may_ask_for_a_longer_pause_up_to_the_limit(
    rig: RigMaker, asked: float | None, limit: float, pause: float
) -> None:
    it = rig(initial_retry_delay=1, max_retry_delay=limit)
    it.endpoint.script.append(Failed("https://ingest.test answered 429: slow down", "429", retry_after=asked))
    it.put(b"event")
    it.settle()
    assert it.pauses == [pause]


def test_a_wall_clock_that_jumps_changes_neither_pauses_nor_the_time_to_give_up(
    rig: RigMaker, clock: FakeClock
) -> None:
    it = rig(max_batch_size=10)
    jumps = itertools.cycle([1e9, 2e9, 1_800_000_061.0])
    failing = failing_times(10, UNREACHABLE)

    def jumping(events: list[bytes]) -> Outcome:
        clock.set_wall(next(jumps))
        return failing(events)

    it.endpoint.decide = jumping
    it.put(b"event")
    assert it.settle().delivered == 1
    assert it.pauses[1:] == pytest.approx([0.01 * 2**failures for failures in range(10)])  # after the coalescing delay


@pytest.mark.parametrize(("failure", "level"), [(UNREACHABLE, "WARNING"), (DOWN, "WARNING"), (UNAUTHORIZED, "ERROR")])
def test_a_failure_is_said_with_its_reason(rig: RigMaker, log: LogLines, failure: Failed, level: str) -> None:
    it = rig(failing_times(3, failure))
    it.put(b"event")
    it.settle()
    assert log.lines == [
        (level, f"queue metering: could not deliver 1 event, will try again: {failure.reason}"),
    ]


def test_an_endpoint_whose_words_change_each_time_does_not_flood_the_log(rig: RigMaker, log: LogLines) -> None:
    numbers = itertools.count()

    def traced(_: list[bytes]) -> Outcome:
        number = next(numbers)
        return Failed(f"https://ingest.test answered 503: trace {number}", "503") if number < 13 else Delivered()

    it = rig(traced)
    it.put(b"event")
    it.settle()
    assert len(it.endpoint.requests) == 14
    assert [text.split(": ")[1] for _, text in log.lines] == [
        "could not deliver 1 event, will try again",
        "the endpoint works again after 82 s; 1 event waited",
    ]


def test_another_kind_of_failure_is_said_at_once(rig: RigMaker, log: LogLines) -> None:
    it = rig()
    it.endpoint.script.extend([UNREACHABLE, DOWN, UNAUTHORIZED, UNREACHABLE])
    it.put(b"event")
    it.settle()
    assert len(log.lines) == 3


def test_a_delivery_that_does_not_look_like_one_counts_and_is_said_once(rig: RigMaker, log: LogLines) -> None:
    note = "https://ingest.test answers 200 with text/html, which is unusual for an acceptance"
    it = rig(lambda _: Delivered(note), max_batch_size=1)
    it.put(*numbered(20))
    assert it.settle() == Snapshot(accepted=20, delivered=20)
    assert log.lines == [("WARNING", f"queue metering: {note}")]


# -- a sender that breaks ----------------------------------------------------------------------------------------------


def test_a_sender_that_raises_loses_nothing(rig: RigMaker, log: LogLines) -> None:
    it = rig(max_batch_size=2)
    it.endpoint.script.extend([ZeroDivisionError("a bug"), Delivered()])
    it.put(b"one", b"two", b"three", b"four")
    assert it.settle() == Snapshot(accepted=4, delivered=4)
    assert it.endpoint.delivered == [b"one", b"two", b"three", b"four"]
    (line,) = log.lines
    assert "ZeroDivisionError: a bug at fakes.py" in line[1]


def test_a_sender_that_raises_for_one_event_does_not_stop_the_others(rig: RigMaker) -> None:
    def hard_error(events: list[bytes]) -> Outcome:
        if b"two" in events:
            raise ValueError("hard error")
        return Delivered()

    it = rig(hard_error, max_retry_time=3)
    it.put(b"one", b"two", b"three")
    account = it.settle()
    assert it.endpoint.delivered == [b"one", b"three"]
    assert account.dropped == {"retry_time_exceeded": 1}


def test_a_connection_that_cannot_be_made_loses_nothing(rig: RigMaker) -> None:
    it = rig()
    it.endpoint.refused_connections.extend([OSError("no more files"), ValueError("nonsense")])
    it.put(b"one", b"two")
    assert it.settle() == Snapshot(accepted=2, delivered=2)
    assert it.pauses == pytest.approx([0.01, 0.02])


def no_thread(_: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


@pytest.mark.parametrize("batch", [1, 2, 1000])
def test_a_thread_that_cannot_be_started_is_started_at_the_next_event(
    live: LiveRigMaker, log: LogLines, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    it = live(max_batch_size=batch, max_coalescing_delay=0)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", no_thread)
        it.put(b"one", b"two")
    assert it.couriers.threads == 0
    assert it.queue.waiting == 2
    (line,) = log.lines
    assert line[0] == "ERROR"
    assert "no thread can be started to deliver: RuntimeError: can't start new thread" in line[1]
    it.put(b"three")
    it.settle()
    assert it.endpoint.delivered == [b"one", b"two", b"three"]


def test_a_queue_whose_thread_never_started_counts_its_events_at_the_end(
    live: LiveRigMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threading.Thread, "start", no_thread)
    it = live()
    it.put(b"one", b"two")
    assert it.close(0) == Snapshot(accepted=2, dropped={"process_ended": 2})


# -- events that are refused for themselves ----------------------------------------------------------------------------


@pytest.mark.parametrize("names_it", [True, False])
@pytest.mark.parametrize("size", [2, 3, 10, 100, 1000])
def test_a_refused_event_is_dropped_alone(rig: RigMaker, log: LogLines, size: int, *, names_it: bool) -> None:
    it = rig(Refusing(b"bad", names_it=names_it), max_batch_size=size, max_coalescing_delay=0, max_entries=1_000_000)
    before, events, after = numbered(20 * size), numbered(size, first=10**6), numbered(20 * size, first=10**7)
    good = list(events)
    good.remove(good[size // 3])
    events[size // 3] = b"bad"
    it.put(*before, *events, *after)
    assert it.settle().dropped == {"rejected": 1}
    extra = len(it.endpoint.requests) - 41
    if names_it:
        assert it.endpoint.delivered == [*before, *good, *after]
        # The others without it, then it alone: a name is no proof.
        assert (extra, it.pauses) == (2, [])
    else:
        assert sorted(it.endpoint.delivered) == sorted([*before, *good, *after])
        assert it.endpoint.delivered[: len(before)] == before
        # Finding it costs two for each halving; then it is tried a second and a third time, others in between.
        assert extra <= 2 * math.log2(size) + 4
        assert sum(it.pauses) < 0.1
    assert log.lines[-1] == ("ERROR", "queue metering: https://ingest.test answered 400: no subject")


def test_a_refused_event_does_not_hold_what_comes_after_it(rig: RigMaker) -> None:
    it = rig(Refusing(b"bad"))
    it.put(b"one", b"bad", b"two")
    it.let_pass(1)
    assert it.endpoint.delivered == [b"one", b"two"]
    # Two others are too few to say that it is to blame.
    assert it.settle().dropped == {"retry_time_exceeded": 1}


def test_good_parts_of_a_refused_batch_are_tried_again_when_they_fail(rig: RigMaker) -> None:
    it = rig(Refusing(b"2"), max_batch_size=4, max_retry_time=1)
    it.endpoint.script.extend([Rejected("400"), UNREACHABLE, UNREACHABLE])
    it.put(*numbered(4), *numbered(200, first=1000))
    assert it.settle() == Snapshot(accepted=204, delivered=203, dropped={"rejected": 1})


def test_an_event_that_the_endpoint_named_waits_no_longer_than_the_rest_of_its_batch(rig: RigMaker) -> None:
    it = rig(max_batch_size=2, max_retry_time=-1)
    it.endpoint.script.extend([Rejected("400", (1,)), UNREACHABLE, UNREACHABLE])
    it.put(b"one", b"named")
    assert it.settle() == Snapshot(accepted=2, dropped={"retry_time_exceeded": 2})


# -- events that make the endpoint fail --------------------------------------------------------------------------------


def test_an_event_that_makes_the_endpoint_fail_is_isolated_from_its_batch(rig: RigMaker, log: LogLines) -> None:
    it = rig(Choking(b"poison"), max_batch_size=100)
    events = numbered(2000)
    events[37] = b"poison"
    it.put(*events)
    assert it.settle() == Snapshot(accepted=2000, delivered=1999, dropped={"rejected": 1})
    (line,) = log.with_text("an event fails while others are delivered")
    assert DOWN.reason in line[1]
    assert len(it.endpoint.requests) < 100


@pytest.mark.parametrize("count", [20, 300])
def test_an_event_that_makes_the_endpoint_fail_does_not_hold_the_queue(rig: RigMaker, count: int) -> None:
    it = rig(Choking(b"poison"))
    it.put(b"before", b"poison", *numbered(count))
    it.let_pass(2)
    assert it.settle() == Snapshot(accepted=count + 2, delivered=count + 1, dropped={"rejected": 1})
    assert it.endpoint.delivered == [b"before", *numbered(count)]
    assert sum(it.pauses) < 2


def test_several_events_that_make_the_endpoint_fail_do_not_hold_the_queue(rig: RigMaker) -> None:
    poison = [b"poison 1", b"poison 2", b"poison 3"]
    it = rig(Choking(*poison), max_batch_size=4)
    it.put(b"one", *poison, *numbered(1000))
    assert it.settle() == Snapshot(accepted=1004, delivered=1001, dropped={"rejected": 3})
    assert sum(it.pauses) < 60


def test_events_in_a_row_that_make_the_endpoint_fail_do_not_hold_the_queue(rig: RigMaker) -> None:
    poison = [b"poison 1", b"poison 2", b"poison 3"]
    it = rig(Choking(*poison))
    it.put(*poison, *numbered(300))
    assert it.settle() == Snapshot(accepted=303, delivered=300, dropped={"rejected": 3})
    assert sum(it.pauses) < 60


def test_an_event_that_fails_with_nothing_to_compare_it_with_gets_its_whole_retry_time(rig: RigMaker) -> None:
    it = rig(Choking(b"poison"))
    it.put(b"poison")
    assert it.settle().dropped == {"retry_time_exceeded": 1}
    assert it.endpoint.requests == [[b"poison"]] * 14


def test_an_endpoint_that_is_wholly_down_is_not_mistaken_for_poison(rig: RigMaker) -> None:
    it = rig(failing_times(12, DOWN), max_batch_size=4, max_retry_time=100_000)
    it.put(*numbered(20))
    account = it.settle()
    assert account == Snapshot(accepted=20, delivered=20)
    assert len(set(it.endpoint.delivered)) == 20


@pytest.mark.parametrize("batch", [1, 3, 10])
def test_an_endpoint_that_is_down_for_good_costs_retry_time_not_poison(rig: RigMaker, batch: int) -> None:
    it = rig(lambda _: DOWN, max_batch_size=batch)
    it.put(*numbered(30))
    assert it.settle().dropped == {"retry_time_exceeded": 30}


def test_an_endpoint_that_goes_down_between_two_parts_is_not_mistaken_for_poison(rig: RigMaker) -> None:
    it = rig(max_batch_size=2, max_retry_time=100_000)
    it.endpoint.script.extend([*[DOWN] * 6, Delivered(), *[DOWN] * 12])
    it.put(b"one", b"two")
    assert it.settle() == Snapshot(accepted=2, delivered=2)


@pytest.mark.parametrize("seed", range(5))
def test_an_endpoint_that_fails_half_of_the_time_loses_nothing(rig: RigMaker, seed: int) -> None:
    chance = random.Random(seed)  # noqa: S311
    it = rig(lambda _: chance.choice([Delivered(), DOWN]), max_batch_size=3)
    it.put(*numbered(300))
    assert it.settle() == Snapshot(accepted=300, delivered=300)


def test_an_event_is_not_called_poison_before_enough_others_are_seen_to_be_taken(rig: RigMaker) -> None:
    it = rig(Choking(b"poison"))
    it.put(b"poison", *numbered(10))
    assert it.settle() == Snapshot(accepted=11, delivered=10, dropped={"retry_time_exceeded": 1})
    # It was tried at least as often as Kong would.
    assert it.endpoint.requests.count([b"poison"]) >= 14


def test_what_overtakes_a_suspect_keeps_its_own_retry_time(rig: RigMaker) -> None:
    started: dict[bytes, float] = {}
    ended: dict[bytes, float] = {}
    it = rig(max_retry_time=60)

    def note(events: list[bytes]) -> Outcome:
        started.setdefault(events[0], it.clock.monotonic())
        ended[events[0]] = it.clock.monotonic()
        return DOWN

    it.put(b"before")
    it.settle()
    it.endpoint.decide = note
    it.put(*numbered(6))
    it.settle()
    assert len(started) == 6
    assert all(ended[event] - started[event] > 60 for event in started)


def test_a_wholly_down_endpoint_does_not_draw_the_whole_queue_out_of_its_limits(rig: RigMaker) -> None:
    it = rig(lambda _: DOWN, max_entries=1000, max_retry_time=100_000, max_retry_delay=0.01)
    it.put(*numbered(1000))
    it.let_pass(100)
    it.put(*numbered(1000, first=1000))
    assert 1000 <= it.queue.waiting <= 1001 + REACH
    it.endpoint.decide = take_all
    it.settle()


# -- the circuit breaker -----------------------------------------------------------------------------------------------


def test_the_breaker_sheds_events_after_so_many_failed_batches(rig: RigMaker, log: LogLines) -> None:
    it = rig(lambda _: UNREACHABLE, max_retry_time=-1, failure_threshold=3, breaker_cooldown=60)
    it.put(*numbered(10))
    account = it.settle()
    assert account.dropped == {"retry_time_exceeded": 3, "breaker_open": 7}
    assert len(it.endpoint.requests) == 3
    assert log.with_text("the circuit breaker opened")[0][0] == "ERROR"
    assert len(log.with_text("the circuit breaker is open")) == 1


def test_a_batch_that_was_cut_up_counts_as_one_for_the_breaker(rig: RigMaker) -> None:
    it = rig(lambda _: DOWN, max_batch_size=9, failure_threshold=3, breaker_cooldown=3600, max_retry_time=5)
    it.put(*numbered(45))
    assert it.settle().dropped == {"retry_time_exceeded": 27, "breaker_open": 18}
    whole = [request[0] for request in it.endpoint.requests if len(request) == 9]
    assert list(dict.fromkeys(whole)) == [b"0", b"9", b"18"]


def test_the_breaker_probes_with_one_batch_after_the_cooldown(rig: RigMaker, log: LogLines) -> None:
    it = rig(lambda _: UNREACHABLE, max_retry_time=-1, failure_threshold=1, breaker_cooldown=60, max_batch_size=2)
    it.put(*numbered(2))
    it.settle()
    it.clock.advance(60)
    it.put(b"a", b"probe", *numbered(2))
    account = it.settle()
    assert it.endpoint.requests == [[b"0", b"1"], [b"a", b"probe"]]
    assert account.dropped == {"retry_time_exceeded": 2, "breaker_open": 4}
    it.endpoint.decide = take_all
    it.clock.advance(60)
    it.put(*numbered(4))
    assert it.settle().delivered == 4
    assert log.with_text("the circuit breaker closed") == [
        ("INFO", "queue metering: the endpoint works again, the circuit breaker closed")
    ]


def test_a_probe_is_tried_once_however_long_the_retry_time(rig: RigMaker, log: LogLines) -> None:
    it = rig(lambda _: UNREACHABLE, max_retry_time=0, failure_threshold=1, breaker_cooldown=60)
    it.put(b"one")
    it.settle()
    tries = len(it.endpoint.requests)
    it.clock.advance(60)
    it.put(b"probe")
    account = it.settle()
    assert len(it.endpoint.requests) == tries + 1
    assert account.dropped == {"retry_time_exceeded": 1, "breaker_open": 1}
    assert "max_retry_time" not in log.lines[-1][1]


def test_an_answer_about_an_event_shows_that_the_endpoint_works(rig: RigMaker) -> None:
    it = rig(lambda _: UNREACHABLE, max_retry_time=-1, failure_threshold=1, breaker_cooldown=60, max_batch_size=4)
    it.put(*numbered(4))
    it.settle()
    it.clock.advance(60)
    it.endpoint.decide = Refusing(b"bad")
    it.put(b"one", b"bad", b"two", b"three")
    assert it.settle().dropped == {"retry_time_exceeded": 4, "rejected": 1}
    assert it.endpoint.delivered == [b"one", b"two", b"three"]


def test_a_newer_configuration_closes_the_breaker(rig: RigMaker) -> None:
    it = rig(lambda _: UNAUTHORIZED, max_retry_time=-1, failure_threshold=1, breaker_cooldown=3600)
    it.put(b"lost")
    it.settle()
    it.endpoint.decide = take_all
    it.reconfigure()
    it.put(b"one")
    assert it.settle().delivered == 1


def test_a_configuration_without_a_breaker_tries_for_the_whole_retry_time_again(rig: RigMaker) -> None:
    it = rig(lambda _: UNREACHABLE, max_retry_time=-1, failure_threshold=1, breaker_cooldown=0)
    it.put(b"lost")
    it.settle()
    it.endpoint.script.extend([UNREACHABLE, UNREACHABLE])
    it.endpoint.decide = take_all
    it.reconfigure(failure_threshold=0, max_retry_time=60)
    it.put(b"one")
    assert it.settle().delivered == 1


# -- unlimited concurrency ---------------------------------------------------------------------------------------------


def test_unlimited_concurrency_sends_events_alone_many_at_a_time(live: LiveRigMaker) -> None:
    it = live(concurrency_limit=-1, max_batch_size=100, max_coalescing_delay=3600)
    it.endpoint.hold()
    it.put(*numbered(10))
    it.endpoint.wait_for_request(10)
    it.endpoint.let_go()
    assert it.settle().delivered == 10
    assert all(len(request) == 1 for request in it.endpoint.requests)


def test_unlimited_concurrency_has_a_bound_and_keeps_the_limits_of_the_queue(live: LiveRigMaker) -> None:
    it = live(concurrency_limit=-1, max_entries=100)
    it.endpoint.hold()
    it.put(*numbered(UNLIMITED_IN_FLIGHT))
    it.endpoint.wait_for_request(UNLIMITED_IN_FLIGHT)
    it.put(*numbered(500, first=100))
    assert len(it.endpoint.requests) == UNLIMITED_IN_FLIGHT
    it.endpoint.let_go()
    account = it.settle()
    assert account.delivered == UNLIMITED_IN_FLIGHT + 100
    assert account.dropped == {"queue_full": 400}


def test_unlimited_concurrency_starts_no_more_threads_than_there_are_events_at_once(live: LiveRigMaker) -> None:
    it = live(concurrency_limit=-1)
    couriers = it.couriers
    for number in range(50):
        it.put(b"%d" % number)
        it.settle()
        wait_until(lambda: couriers._spares + couriers._is_watched == couriers.threads, "who delivered it waits")
    assert it.couriers.threads <= 2
    assert len(it.endpoint.senders) <= 2


def test_one_slow_request_does_not_hold_the_others_with_unlimited_concurrency(live: LiveRigMaker) -> None:
    gate = threading.Event()

    def slow_for_one(events: list[bytes]) -> Outcome:
        assert events != [b"slow"] or gate.wait(20)
        return Delivered()

    it = live(slow_for_one, concurrency_limit=-1)
    it.put(b"slow", *numbered(20))
    wait_until(lambda: it.stats.snapshot().delivered == 20, "the others are delivered")
    assert it.queue.waiting == 1
    gate.set()
    it.settle()


def test_only_one_of_many_threads_sends_the_probe(live: LiveRigMaker) -> None:
    it = live(lambda _: UNREACHABLE, concurrency_limit=-1, max_retry_time=-1, failure_threshold=1, breaker_cooldown=60)
    it.put(b"first")
    it.settle()
    it.let_pass(60)
    it.endpoint.hold()
    it.put(*numbered(20))
    it.endpoint.wait_for_request(2)
    wait_until(lambda: it.queue.waiting == 1, "all but the probe are shed")
    it.endpoint.let_go()
    it.settle()
    assert len(it.endpoint.requests) == 2


def test_a_newer_configuration_bounds_how_many_requests_are_under_way(live: LiveRigMaker) -> None:
    it = live(concurrency_limit=-1)
    it.endpoint.hold()
    it.put(*numbered(5))
    it.endpoint.wait_for_request(5)
    it.reconfigure(concurrency_limit=1, max_batch_size=5)
    it.put(*numbered(10, first=5))
    it.endpoint.let_go()
    assert it.settle().delivered == 15
    assert it.endpoint.requests[5:] == [numbered(5, first=5), numbered(5, first=10)]


# -- another configuration ---------------------------------------------------------------------------------------------


def test_a_newer_configuration_ends_a_backoff_and_serves_what_waits(rig: RigMaker) -> None:
    it = rig(lambda _: UNAUTHORIZED, initial_retry_delay=1000, max_retry_delay=1000, max_coalescing_delay=0)
    it.put(b"one", b"two")
    it.let_pass(1)
    assert it.endpoint.requests == [[b"one"]]
    it.endpoint.decide = take_all
    it.reconfigure("new token", max_batch_size=10)
    it.let_pass(0)
    assert it.stats.snapshot().delivered == 2
    assert [(sender.name, sender.delivered) for sender in it.endpoint.senders] == [
        ("", []),
        ("new token", [b"one", b"two"]),
    ]


def test_a_newer_configuration_during_a_request_ends_the_backoff_that_follows(rig: RigMaker) -> None:
    it = rig(lambda _: UNAUTHORIZED, initial_retry_delay=1000, max_retry_delay=1000)
    it.meanwhile(lambda: it.reconfigure("new token"))
    it.put(b"one")
    it.let_pass(0)
    assert [(sender.name, sender.requests) for sender in it.endpoint.senders] == [
        ("", [[b"one"]]),
        ("new token", [[b"one"]]),
    ]


def test_a_newer_configuration_shortens_the_coalescing_delay_of_what_waits(rig: RigMaker) -> None:
    it = rig(max_batch_size=100, max_coalescing_delay=3600)
    it.put(b"one", b"two")
    it.let_pass(1)
    assert it.endpoint.requests == []
    it.reconfigure(max_coalescing_delay=0)
    it.let_pass(0)
    assert it.endpoint.requests == [[b"one", b"two"]]


def test_smaller_limits_of_a_newer_configuration_hold_from_the_next_event_on(rig: RigMaker) -> None:
    it = rig(max_entries=100)
    it.put(*numbered(100))
    it.reconfigure(max_entries=10)
    it.put(b"next")
    assert it.queue.waiting == 10
    assert it.settle().dropped == {"queue_full": 91}


def test_a_request_under_way_is_not_disturbed_by_a_newer_configuration(rig: RigMaker) -> None:
    it = rig()
    it.meanwhile(lambda: it.reconfigure("new token"))
    it.put(b"one", b"two")
    it.settle()
    assert [(sender.name, sender.delivered) for sender in it.endpoint.senders] == [
        ("", [b"one"]),
        ("new token", [b"two"]),
    ]


# -- the end -----------------------------------------------------------------------------------------------------------


def test_closing_sends_what_waits_without_waiting_for_more(live: LiveRigMaker) -> None:
    it = live(max_batch_size=10, max_coalescing_delay=3600)
    it.put(*numbered(5))
    account = it.close()
    assert account == Snapshot(accepted=5, delivered=5)
    assert it.endpoint.requests == [numbered(5)]
    assert it.couriers.threads == 0
    assert all(sender.closed for sender in it.endpoint.senders)


def test_closing_sends_all_that_waits_in_batches(rig: RigMaker) -> None:
    it = rig(max_batch_size=2, max_coalescing_delay=3600)

    def five_and_the_end() -> None:
        it.put(*numbered(5))
        it.queue.begin_close()

    it.meanwhile(five_and_the_end)
    it.put(b"before", b"these")
    it.let_pass(0)
    assert it.stats.snapshot().delivered == 7
    assert it.endpoint.requests[1:] == [[b"0", b"1"], [b"2", b"3"], [b"4"]]


def test_closing_ends_a_backoff_and_tries_each_batch_once_more(rig: RigMaker, log: LogLines) -> None:
    it = rig(lambda _: UNREACHABLE, initial_retry_delay=1000, max_retry_delay=1000)
    it.put(b"one", b"two", b"three")
    it.let_pass(1)
    assert it.endpoint.requests == [[b"one"]]
    account = it.close()
    assert account == Snapshot(accepted=3, dropped={"process_ended": 3})
    assert it.endpoint.requests == [[b"one"], [b"one"], [b"two"], [b"three"]]
    assert it.pauses == []
    assert log.with_text("max_retry_time") == []
    assert log.with_text("the process ended before they were delivered")


def test_closing_ends_as_soon_as_each_batch_was_tried(live: LiveRigMaker) -> None:
    it = live(lambda _: UNREACHABLE, initial_retry_delay=1000, max_retry_delay=1000)
    it.put(*numbered(3))
    it.endpoint.wait_for_request()
    assert it.close(1e9) == Snapshot(accepted=3, dropped={"process_ended": 3})


def test_closing_does_not_wait_longer_than_its_deadline(live: LiveRigMaker, log: LogLines) -> None:
    it = live()
    it.put_while_busy(*numbered(4))
    account = it.close(0)
    assert account == Snapshot(accepted=5, dropped={"process_ended": 5})
    assert it.queue.waiting == 0
    assert log.with_text("5 events were not delivered before the process ended")


def test_an_answer_that_comes_after_the_deadline_is_not_counted_twice(live: LiveRigMaker) -> None:
    it = live()
    it.put_while_busy(b"one")
    it.close(0)
    assert it.couriers.threads == 0
    assert it.endpoint.delivered == [b"before"]
    assert it.stats.snapshot() == Snapshot(accepted=2, dropped={"process_ended": 2})
    assert it.queue.waiting == 0


def test_an_event_that_comes_after_the_end_is_counted_and_not_sent(live: LiveRigMaker) -> None:
    it = live()
    it.put(b"in time")
    it.close()
    it.put(b"too late")
    assert it.close() == Snapshot(accepted=2, delivered=1, dropped={"process_ended": 1})
    assert it.queue.waiting == 0
    assert it.couriers.threads == 0


def test_an_event_that_comes_while_the_queue_closes_is_still_sent(live: LiveRigMaker) -> None:
    it = live(max_batch_size=2, max_coalescing_delay=3600)
    it.endpoint.hold()
    it.put(b"before", b"these")
    it.endpoint.wait_for_request()
    it.put(b"one")
    it.queue.begin_close()
    it.put(b"two", b"three")
    it.endpoint.let_go()
    assert it.close() == Snapshot(accepted=5, delivered=5)


def test_a_queue_without_events_closes_without_a_thread(live: LiveRigMaker) -> None:
    it = live()
    assert it.close() == Snapshot()
    assert it.endpoint.senders == []


# -- the account, whatever happens -------------------------------------------------------------------------------------


class Account(RuleBasedStateMachine):
    """Whatever happens: accepted = delivered + dropped + waiting, and no event is delivered twice."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = itertools.count()
        self.answers = itertools.cycle([0])
        self.rig = Rig(Queue(max_entries=20), FakeClock(), LogLines(), FakeEndpoint(self.decide))

    def decide(self, events: list[bytes]) -> Outcome:
        answer = next(self.answers)
        bad = tuple(index for index, event in enumerate(events) if event.endswith(b"7"))
        outcomes: dict[int, Outcome] = {
            1: UNREACHABLE,
            2: DOWN,
            3: Rejected("400", bad) if bad else Delivered(),
            4: Rejected("400") if bad else Delivered(),
            5: DOWN if bad else Delivered(),
            6: Rejected("413") if len(events) > 3 else Delivered(),
        }
        if answer == 7:
            raise ArithmeticError("a bug")
        return outcomes.get(answer, Delivered())

    @rule(answers=st.lists(st.integers(min_value=0, max_value=7), min_size=1, max_size=5))
    def the_endpoint_behaves_otherwise(self, answers: list[int]) -> None:
        self.answers = itertools.cycle(answers)

    @rule(count=st.integers(min_value=1, max_value=40), size=st.integers(min_value=1, max_value=30))
    def events_come(self, count: int, size: int) -> None:
        self.rig.put(*(b"%0*d" % (size, next(self.numbers)) for _ in range(count)))

    @rule(count=st.integers(min_value=1, max_value=5))
    def events_come_while_a_request_is_under_way(self, count: int) -> None:
        self.rig.meanwhile(lambda: self.events_come(count, 1))

    @rule(
        max_batch_size=st.sampled_from([1, 2, 5, 1000]),
        max_bytes=st.sampled_from([None, 100]),
        max_retry_time=st.sampled_from([-1, 0, 1, 60]),
        concurrency_limit=st.sampled_from([1, -1]),
        failure_threshold=st.sampled_from([0, 1, 3]),
        at_once=st.booleans(),
    )
    def the_owner_changes_the_configuration(self, *, at_once: bool, **changes: Any) -> None:
        if at_once:
            self.rig.reconfigure(**changes)
        else:
            self.rig.meanwhile(lambda: self.rig.reconfigure(**changes))

    @rule(seconds=st.sampled_from([0, 1, 60, 10_000]))
    def time_passes(self, seconds: int) -> None:
        self.rig.let_pass(seconds)

    @rule()
    def the_queue_empties(self) -> None:
        self.rig.settle()
        assert self.rig.queue.waiting == 0

    @invariant()
    def it_adds_up(self) -> None:
        account = self.rig.stats.snapshot()
        assert 0 <= account.waiting == self.rig.queue.waiting <= account.accepted

    def teardown(self) -> None:
        account = self.rig.close()
        assert account.waiting == self.rig.queue.waiting == 0
        assert account.delivered == len(self.rig.endpoint.delivered) == len(set(self.rig.endpoint.delivered))
        assert self.rig.log.with_text("delivery failed") == []


TestAccount = Account.TestCase
TestAccount.settings = hypothesis_settings(max_examples=40, stateful_step_count=15, deadline=None)


# -- the comparison with Kong's queue ----------------------------------------------------------------------------------


def test_every_rule_in_the_documentation_names_tests_that_exist() -> None:
    here = Path(__file__)
    paths = [path for name in ("delivery", "trial", "ingest") for path in (here.parents[1] / name).glob("test_*.py")]
    sources = "".join(path.read_text("utf-8") for path in paths)
    document = (here.parents[3] / "docs" / "queue.md").read_text("utf-8")
    lines = document.splitlines()
    # A table's first two lines are its head.
    rows = [
        line
        for line, following in itertools.pairwise([*lines, ""])
        if line.startswith("|") and not line.startswith("| ---") and not following.startswith("| ---")
    ]
    assert len(rows) > 30
    for row in rows:
        names = re.findall("`([Tt]est[_A][^`]*)`", row.split("|")[-2])
        assert names, f"no test: {row}"
        assert [name for name in names if f"def {name}(" not in sources and f"{name} = " not in sources] == []
