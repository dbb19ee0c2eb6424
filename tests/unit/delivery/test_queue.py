"""The queue with its real threads, in front of a fake endpoint; time passes only when a test lets it."""

from __future__ import annotations

import itertools
import math
import random
import re
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kong_metering.config import Queue
from kong_metering.delivery.outcome import Delivered, Failed, Outcome, Rejected
from kong_metering.delivery.policy import MAX_EVENT_BYTES, SUSPICIOUS_FAILURES
from kong_metering.delivery.queue import UNLIMITED_WORKERS
from kong_metering.stats import Snapshot
from tests.support.clock import FakeClock
from tests.support.waiting import wait_until
from tests.unit.delivery.fakes import (
    DOWN,
    UNAUTHORIZED,
    UNREACHABLE,
    Choking,
    FakeEndpoint,
    LogLines,
    Refusing,
    Rig,
    numbered,
    take_all,
)

if TYPE_CHECKING:
    from tests.unit.delivery.conftest import RigMaker


def failing_times(times: int, failure: Failed) -> Callable[[list[bytes]], Outcome]:
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
    it.settle()
    assert it.endpoint.requests == [[b"one"], [b"two"]]
    assert it.timing.coalescing == []


def test_a_full_batch_leaves_at_once(rig: RigMaker) -> None:
    it = rig(max_batch_size=3, max_coalescing_delay=3600)
    it.timing.flows = False
    it.put(b"one", b"two", b"three")
    it.settle()
    assert it.endpoint.requests == [[b"one", b"two", b"three"]]


def test_five_events_leave_in_three_batches_of_two(rig: RigMaker) -> None:
    it = rig(max_batch_size=2, max_coalescing_delay=0.1)
    it.put_while_busy(b"one", b"two", b"three", b"four", b"five")
    it.endpoint.let_go()
    it.settle()
    assert it.endpoint.requests[1:] == [[b"one", b"two"], [b"three", b"four"], [b"five"]]


def test_a_batch_that_is_not_full_leaves_after_the_coalescing_delay(rig: RigMaker) -> None:
    it = rig(max_batch_size=3, max_coalescing_delay=2)
    it.timing.flows = False
    it.put(b"one")
    wait_until(lambda: it.timing.coalescing == [2.0], "the first event waits for others")
    it.timing.let_pass(1.5)
    it.put(b"two")
    wait_until(lambda: len(it.timing.coalescing) == 2, "it waits for the rest of the delay")
    assert it.timing.coalescing[1] == pytest.approx(0.5)
    assert it.endpoint.requests == []
    it.timing.let_pass(0.5)
    it.settle()
    assert it.endpoint.requests == [[b"one", b"two"]]


def test_the_coalescing_delay_counts_from_the_arrival_of_the_first_event(rig: RigMaker) -> None:
    it = rig(max_batch_size=2, max_coalescing_delay=5)
    it.endpoint.hold()
    it.put(b"one", b"two")
    it.endpoint.wait_for_request()
    it.put(b"three")
    it.timing.flows = False
    it.timing.let_pass(4)
    it.endpoint.let_go()
    wait_until(lambda: len(it.timing.coalescing) >= 1, "the third event waits for another")
    assert it.timing.coalescing[-1] == pytest.approx(1.0)
    it.timing.let_pass(1)
    it.settle()


def test_the_longest_coalescing_delay_is_waited_for(rig: RigMaker) -> None:
    it = rig(max_batch_size=1_000_000, max_coalescing_delay=3600, max_entries=1_000_000)
    it.put(b"one", b"two")
    it.settle()
    assert it.timing.coalescing[0] == 3600.0


@pytest.mark.parametrize("size", [7_999, 8_000, 10_000, 100_000])
def test_batches_of_any_allowed_size_work(rig: RigMaker, size: int) -> None:
    it = rig(max_batch_size=size, max_entries=1_000_000, max_coalescing_delay=3600)
    it.timing.flows = False
    events = numbered(size)
    it.put(*events)
    it.settle()
    assert it.endpoint.requests == [events]


def test_a_thousand_events_are_sent_without_any_waiting(rig: RigMaker) -> None:
    it = rig(max_batch_size=10, max_coalescing_delay=3600)
    it.timing.flows = False
    it.put(*numbered(1000))
    assert it.settle().delivered == 1000


def test_one_thread_named_after_the_queue_delivers_from_the_first_event_on(rig: RigMaker) -> None:
    it = rig()
    assert it.workers() == []
    it.put(*numbered(50))
    it.settle()
    (worker,) = it.workers()
    assert worker.name == "metering queue metering"
    assert worker.daemon
    assert [len(sender.threads) for sender in it.endpoint.senders] == [1]


def test_events_may_be_put_from_many_threads(rig: RigMaker) -> None:
    it = rig(max_batch_size=100, max_entries=100_000)
    lots = [numbered(1000, first=1000 * number) for number in range(8)]
    threads = [threading.Thread(target=it.put, args=lot) for lot in lots]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert it.settle().delivered == 8000
    assert sorted(it.endpoint.delivered) == sorted(itertools.chain.from_iterable(lots))


def test_putting_does_not_wait_for_a_request_under_way(rig: RigMaker) -> None:
    it = rig()
    it.put_while_busy(*numbered(100))
    assert it.queue.waiting == 101
    it.endpoint.let_go()
    it.settle()


def test_a_batch_that_can_never_be_full_leaves_when_the_queue_is_nearly(rig: RigMaker) -> None:
    it = rig(max_batch_size=1000, max_entries=10, max_coalescing_delay=60)
    it.timing.flows = False
    it.put(*numbered(8))
    assert it.settle() == Snapshot(accepted=8, delivered=8)


def test_a_batch_that_can_never_be_full_leaves_when_the_bytes_nearly_are(rig: RigMaker) -> None:
    it = rig(max_batch_size=1000, max_bytes=1000, max_coalescing_delay=60)
    it.timing.flows = False
    it.put(*[b"x" * 100] * 8)
    assert it.settle() == Snapshot(accepted=8, delivered=8)


def test_steady_traffic_into_a_small_queue_does_not_starve_delivery(rig: RigMaker) -> None:
    it = rig(max_batch_size=1000, max_entries=10, max_coalescing_delay=60)
    it.timing.flows = False
    for number in range(1000):
        it.put(b"%d" % number)
        it.timing.let_pass(0.1)
        wait_until(lambda: it.queue.waiting < 10, "the queue is emptied before it overflows")
    it.timing.flows = True
    assert it.close().dropped == {}


# -- what waits --------------------------------------------------------------------------------------------------------


def test_events_on_their_way_count_as_waiting(rig: RigMaker) -> None:
    it = rig(max_batch_size=3)
    it.endpoint.hold()
    it.put(b"one", b"two", b"three")
    it.endpoint.wait_for_request()
    assert it.queue.waiting == it.stats.snapshot().waiting == 3
    it.put(b"four")
    assert it.queue.waiting == it.stats.snapshot().waiting == 4
    it.endpoint.let_go()
    it.settle()


def test_events_never_disappear_between_the_queue_and_the_request(rig: RigMaker) -> None:
    it = rig(max_batch_size=5)
    seen: list[int] = []

    class Watched(deque[Any]):
        def popleft(self) -> Any:
            entry = super().popleft()
            seen.append(it.queue.waiting)
            return entry

    it.backlog._entries = Watched()
    it.put_while_busy(*numbered(5))
    seen.clear()
    it.endpoint.let_go()
    it.settle()
    assert len(seen) == 5
    assert min(seen) >= 5


# -- too much ----------------------------------------------------------------------------------------------------------


def test_the_oldest_events_make_room_beyond_max_entries(rig: RigMaker, log: LogLines) -> None:
    it = rig(max_entries=3, max_batch_size=1)
    it.put_while_busy(*numbered(10))
    assert it.queue.waiting == 4
    it.endpoint.let_go()
    assert it.settle() == Snapshot(accepted=11, delivered=4, dropped={"queue_full": 7})
    assert it.endpoint.delivered == [b"before", b"7", b"8", b"9"]
    assert log.with_text("full, dropping the oldest events") == [
        ("ERROR", "queue metering: full, dropping the oldest events until delivery works again")
    ]


def test_the_oldest_events_make_room_beyond_max_bytes(rig: RigMaker, log: LogLines) -> None:
    it = rig(max_bytes=6, max_batch_size=1)
    it.put_while_busy(b"1", b"22", b"333")
    assert it.queue.waiting == 4
    it.put(b"4444")
    it.endpoint.let_go()
    account = it.settle()
    assert account.dropped == {"queue_bytes_full": 3}
    assert it.endpoint.delivered == [b"before", b"4444"]
    assert len(log.with_text("byte capacity exceeded, dropping the oldest events")) == 1
    it.put(b"55555")
    it.put(b"666666")
    assert it.settle().dropped["queue_bytes_full"] <= 4


def test_bytes_are_free_again_when_events_have_left(rig: RigMaker) -> None:
    it = rig(max_bytes=10)
    for _ in range(100):
        it.put(b"0123456789")
        it.settle()
    assert it.settle() == Snapshot(accepted=100, delivered=100)


def test_dropping_is_counted_whole_and_logged_once_a_minute(rig: RigMaker, log: LogLines) -> None:
    it = rig(max_entries=10)
    it.put_while_busy(*numbered(1000))
    it.clock.advance(60)
    it.put(b"later")
    it.endpoint.let_go()
    assert it.settle().dropped == {"queue_full": 991}
    lines = [text for _, text in log.with_text("full, dropping")]
    assert len(lines) == 2
    assert "989 more like this" in lines[1]


def test_the_queue_warns_once_at_eighty_percent(rig: RigMaker, log: LogLines) -> None:
    it = rig(max_entries=100)
    it.put_while_busy(*numbered(80))
    assert log.with_text("capacity") == []
    it.put(b"another")
    it.put(b"and another")
    assert log.with_text("capacity") == [("WARNING", "queue metering: at 80% capacity")]
    it.endpoint.let_go()
    it.settle()


def test_the_queue_warns_again_after_it_has_been_emptier(rig: RigMaker, log: LogLines) -> None:
    it = rig(max_entries=10)
    it.put_while_busy(*numbered(9))
    it.endpoint.let_go()
    it.settle()
    it.clock.advance(60)
    it.put_while_busy(*numbered(9))
    it.endpoint.let_go()
    it.settle()
    assert len(log.with_text("at 80% capacity")) == 2


def test_the_queue_says_when_it_works_again(rig: RigMaker, log: LogLines) -> None:
    it = rig(max_entries=2)
    it.put_while_busy(*numbered(5))
    assert log.with_text("resumed") == []
    it.endpoint.let_go()
    it.settle()
    it.put(b"after")
    it.settle()
    assert log.with_text("resumed") == [("INFO", "queue metering: resumed processing")]


def test_a_queue_that_overflows_all_the_time_does_not_flood_the_log(rig: RigMaker, log: LogLines) -> None:
    it = rig(max_entries=1)
    for _ in range(200):
        it.put_while_busy(b"one", b"two", b"three")
        it.endpoint.let_go()
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
    it.put_while_busy(b"a", b"b", b"c")
    it.put(b"x" * 11)
    it.endpoint.let_go()
    assert it.settle().dropped == {"event_too_large": 1}
    assert it.endpoint.delivered == [b"before", b"a", b"b", b"c"]


def test_a_batch_size_of_all_entries_survives_a_failing_endpoint(rig: RigMaker) -> None:
    it = rig(failing_times(3, UNREACHABLE), max_batch_size=2, max_entries=2)
    it.endpoint.hold()
    it.put(b"one", b"two")
    it.endpoint.wait_for_request()
    it.put(b"three", b"four")
    it.endpoint.let_go()
    it.settle()
    assert it.endpoint.delivered == [b"one", b"two", b"three", b"four"]


# -- failing and trying again ------------------------------------------------------------------------------------------


def test_a_failed_batch_is_sent_again_with_doubled_pauses(rig: RigMaker) -> None:
    it = rig(failing_times(6, UNREACHABLE), max_batch_size=2, initial_retry_delay=0.5, max_retry_delay=4)
    it.put(b"one", b"two")
    assert it.settle().delivered == 2
    assert it.endpoint.requests == [[b"one", b"two"]] * 7
    assert it.timing.backoffs == [0.5, 1.0, 2.0, 4.0, 4.0, 4.0]


def test_the_next_batch_begins_with_the_shortest_pause_again(rig: RigMaker) -> None:
    it = rig(initial_retry_delay=1)
    for _ in range(3):
        it.endpoint.script.extend([UNREACHABLE, UNREACHABLE])
        it.put(b"event")
        it.settle()
    assert it.timing.backoffs == [1.0, 2.0] * 3


def test_events_keep_their_order_when_a_batch_fails(rig: RigMaker) -> None:
    it = rig(max_batch_size=2)
    it.endpoint.script.extend([UNREACHABLE, UNREACHABLE, Delivered(), UNREACHABLE])
    events = numbered(9)
    it.put(*events)
    it.settle()
    assert it.endpoint.delivered == events


def test_a_batch_is_given_up_after_max_retry_time_and_others_go_on(rig: RigMaker, log: LogLines) -> None:
    it = rig(lambda events: UNREACHABLE if events == [b"unlucky"] else Delivered(), max_retry_time=60)
    started = it.clock.monotonic()
    it.put(b"unlucky", b"lucky")
    assert it.settle() == Snapshot(accepted=2, delivered=1, dropped={"retry_time_exceeded": 1})
    assert it.clock.monotonic() - started == pytest.approx(81.91)  # as Kong's: measured, 14 tries in 82 s
    assert it.endpoint.requests == [[b"unlucky"]] * 14 + [[b"lucky"]]
    assert log.with_text("were lost") == [
        (
            "ERROR",
            f"queue metering: 1 events were lost, max_retry_time is exceeded: {UNREACHABLE.reason}",
        )
    ]


def test_a_retry_time_of_minus_one_means_a_single_try(rig: RigMaker) -> None:
    it = rig(lambda _: UNREACHABLE, max_retry_time=-1)
    it.put(b"one", b"two")
    assert it.settle().dropped == {"retry_time_exceeded": 2}
    assert it.endpoint.requests == [[b"one"], [b"two"]]
    assert it.timing.backoffs == []


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
    assert it.timing.backoffs == [pause]


def test_a_wall_clock_that_jumps_changes_neither_pauses_nor_the_time_to_give_up(
    rig: RigMaker, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    it = rig(failing_times(10, UNREACHABLE), max_batch_size=10)
    jumps = itertools.cycle([1e9, -1e9, 61.0])
    monkeypatch.setattr(clock, "wall", lambda: next(jumps))
    it.put_while_busy(*numbered(10))
    it.endpoint.let_go()
    assert it.settle().delivered == 11
    assert it.timing.backoffs == [0.01 * 2**failures for failures in range(10)]


@pytest.mark.parametrize(("failure", "level"), [(UNREACHABLE, "WARNING"), (DOWN, "WARNING"), (UNAUTHORIZED, "ERROR")])
def test_a_failure_is_said_with_its_reason(rig: RigMaker, log: LogLines, failure: Failed, level: str) -> None:
    it = rig(failing_times(3, failure))
    it.put(b"event")
    it.settle()
    assert log.lines == [
        (level, f"queue metering: could not deliver 1 events, will try again: {failure.reason}"),
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
    assert len(log.lines) == 1


def test_another_kind_of_failure_is_said_at_once(rig: RigMaker, log: LogLines) -> None:
    it = rig()
    it.endpoint.script.extend([UNREACHABLE, DOWN, UNAUTHORIZED, UNREACHABLE])
    it.put(b"event")
    it.settle()
    assert len(log.lines) == 3


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
    assert it.timing.backoffs == [0.01, 0.02]


def test_a_thread_that_cannot_be_started_is_started_at_the_next_event(
    rig: RigMaker, log: LogLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    it = rig()
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        it.put(b"one", b"two")
    assert it.workers() == []
    assert it.queue.waiting == 2
    (line,) = log.lines
    assert line[0] == "ERROR"
    assert "cannot deliver: RuntimeError: can't start new thread" in line[1]
    it.put(b"three")
    it.settle()
    assert it.endpoint.delivered == [b"one", b"two", b"three"]


def test_a_queue_whose_thread_never_started_counts_its_events_at_the_end(
    rig: RigMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    it = rig()
    it.put(b"one", b"two")
    assert it.close() == Snapshot(accepted=2, dropped={"process_ended": 2})


# -- events that are refused for themselves ----------------------------------------------------------------------------


@pytest.mark.parametrize("names_it", [True, False])
@pytest.mark.parametrize("size", [1, 2, 3, 10, 100, 1000])
def test_a_refused_event_is_dropped_alone(rig: RigMaker, log: LogLines, size: int, *, names_it: bool) -> None:
    events = numbered(size)
    bad = events[size // 3]
    it = rig(Refusing(bad, names_it=names_it), max_batch_size=size, max_coalescing_delay=0)
    it.put_while_busy(*events)
    it.endpoint.let_go()
    account = it.settle()
    assert account.dropped == {"rejected": 1}
    assert it.endpoint.delivered == [b"before", *(event for event in events if event != bad)]
    extra = len(it.endpoint.requests) - 2
    assert extra <= (1 if names_it else 2 * math.log2(size) + 1)
    assert log.lines == [
        ("ERROR", "queue metering: 1 refused for themselves: https://ingest.test answered 400: no subject")
    ]
    assert it.timing.backoffs == []


def test_a_refused_event_does_not_hold_what_comes_after_it(rig: RigMaker) -> None:
    it = rig(Refusing(b"bad"))
    it.put(b"one", b"bad", b"two")
    it.settle()
    assert it.endpoint.delivered == [b"one", b"two"]


def test_good_parts_of_a_refused_batch_are_tried_again_when_they_fail(rig: RigMaker) -> None:
    it = rig(Refusing(b"2"), max_batch_size=4, max_retry_time=1)
    it.endpoint.script.extend([Rejected("400"), UNREACHABLE, UNREACHABLE])
    it.put(*numbered(4))
    account = it.settle()
    assert account.dropped == {"rejected": 1}
    assert it.endpoint.delivered == [b"0", b"1", b"3"]


# -- events that make the endpoint fail --------------------------------------------------------------------------------


def test_an_event_that_makes_the_endpoint_fail_is_isolated_from_its_batch(rig: RigMaker, log: LogLines) -> None:
    it = rig(Choking(b"poison"), max_batch_size=100)
    events = numbered(2000)
    events[37] = b"poison"
    it.put_while_busy(*events)
    it.endpoint.let_go()
    assert it.settle() == Snapshot(accepted=2001, delivered=2000, dropped={"rejected": 1})
    (line,) = log.with_text("an event fails whenever it is sent, others do not")
    assert DOWN.reason in line[1]
    assert len(it.endpoint.requests) < 100


def test_an_event_that_makes_the_endpoint_fail_does_not_hold_the_queue(rig: RigMaker) -> None:
    it = rig(Choking(b"poison"))
    it.put_while_busy(b"poison", *numbered(20))
    it.endpoint.let_go()
    assert it.settle() == Snapshot(accepted=22, delivered=21, dropped={"rejected": 1})
    assert it.endpoint.delivered == [b"before", *numbered(20)]
    assert sum(it.timing.backoffs) < 2


def test_several_events_that_make_the_endpoint_fail_do_not_hold_the_queue(rig: RigMaker) -> None:
    poison = [b"poison 1", b"poison 2", b"poison 3"]
    it = rig(Choking(*poison), max_batch_size=4)
    it.put_while_busy(b"one", *poison, *numbered(1000))
    it.endpoint.let_go()
    assert it.settle() == Snapshot(accepted=1005, delivered=1002, dropped={"rejected": 3})
    assert sum(it.timing.backoffs) < 60


def test_events_in_a_row_that_make_the_endpoint_fail_do_not_hold_the_queue(rig: RigMaker) -> None:
    poison = [b"poison 1", b"poison 2", b"poison 3"]
    it = rig(Choking(*poison))
    it.put_while_busy(*poison, *numbered(100))
    it.endpoint.let_go()
    assert it.settle() == Snapshot(accepted=104, delivered=101, dropped={"rejected": 3})
    assert sum(it.timing.backoffs) < 200


def test_an_event_that_fails_with_nothing_to_compare_it_with_gets_its_whole_retry_time(rig: RigMaker) -> None:
    it = rig(Choking(b"poison"))
    it.put(b"poison")
    assert it.settle().dropped == {"retry_time_exceeded": 1}
    assert it.endpoint.requests == [[b"poison"]] * 14


def test_an_endpoint_that_is_wholly_down_is_not_mistaken_for_poison(rig: RigMaker) -> None:
    it = rig(failing_times(12, DOWN), max_batch_size=4, max_retry_time=100_000)
    it.put_while_busy(*numbered(20))
    it.endpoint.let_go()
    account = it.settle()
    assert account == Snapshot(accepted=21, delivered=21)
    assert len(set(it.endpoint.delivered)) == 21


@pytest.mark.parametrize("batch", [1, 3, 10])
def test_an_endpoint_that_is_down_for_good_costs_retry_time_not_poison(rig: RigMaker, batch: int) -> None:
    it = rig(lambda _: DOWN, max_batch_size=batch)
    it.put_while_busy(*numbered(30))
    it.endpoint.let_go()
    assert it.settle().dropped == {"retry_time_exceeded": 31}


def test_an_endpoint_that_goes_down_between_two_parts_is_not_mistaken_for_poison(rig: RigMaker) -> None:
    it = rig(max_batch_size=2)
    it.endpoint.script.extend([*[DOWN] * SUSPICIOUS_FAILURES, Delivered(), *[DOWN] * 2 * SUSPICIOUS_FAILURES])
    it.put(b"one", b"two")
    assert it.settle() == Snapshot(accepted=2, delivered=2)


@pytest.mark.parametrize("seed", range(5))
def test_an_endpoint_that_fails_half_of_the_time_loses_nothing(rig: RigMaker, seed: int) -> None:
    chance = random.Random(seed)  # noqa: S311
    it = rig(lambda _: chance.choice([Delivered(), DOWN]), max_batch_size=3)
    it.put(*numbered(300))
    assert it.settle() == Snapshot(accepted=300, delivered=300)


def test_an_event_is_not_called_poison_after_fewer_tries_than_kong_would_make(rig: RigMaker) -> None:
    it = rig(Choking(b"poison"))
    it.put_while_busy(b"poison", *numbered(10))
    it.endpoint.let_go()
    it.settle()
    assert it.endpoint.requests.count([b"poison"]) >= 14


def test_what_overtakes_a_suspect_keeps_its_own_retry_time(rig: RigMaker) -> None:
    started: dict[bytes, float] = {}
    ended: dict[bytes, float] = {}
    it = rig(max_retry_time=60)

    def note(events: list[bytes]) -> Outcome:
        started.setdefault(events[0], it.clock.monotonic())
        ended[events[0]] = it.clock.monotonic()
        return DOWN

    it.endpoint.decide = note
    it.put_while_busy(*numbered(6))
    it.endpoint.let_go()
    it.settle()
    assert all(ended[event] - started[event] > 60 for event in started)


def test_a_wholly_down_endpoint_does_not_draw_the_whole_queue_out_of_its_limits(rig: RigMaker) -> None:
    it = rig(lambda _: DOWN, max_entries=1000, max_retry_time=100_000, max_retry_delay=0.01)
    it.timing.flows = False
    it.put(*numbered(1000))
    for turn in range(200):
        wait_until(lambda turn=turn: len(it.timing.backoffs) > turn, "it backs off")  # type: ignore[misc]
        it.timing.let_pass(0.01)
    assert len(it.backlog._entries) >= 980
    it.endpoint.decide = take_all
    it.timing.flows = True
    it.timing.let_pass(0.01)
    assert it.settle().delivered == 1000


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
    it.settle()
    whole = [request[0] for request in it.endpoint.requests if len(request) == 9]
    assert list(dict.fromkeys(whole)) == [b"0", b"9", b"18"]


def test_the_breaker_probes_with_one_batch_after_the_cooldown(rig: RigMaker, log: LogLines) -> None:
    it = rig(lambda _: UNREACHABLE, max_retry_time=-1, failure_threshold=1, breaker_cooldown=60, max_batch_size=2)
    it.put(*numbered(2))
    it.settle()
    it.clock.advance(60)
    it.put_while_busy(*numbered(3))
    it.endpoint.let_go()
    account = it.settle()
    assert len(it.endpoint.requests) == 2
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
    it.put_while_busy(*numbered(3))
    it.endpoint.let_go()
    it.settle()
    it.clock.advance(60)
    it.endpoint.decide = Refusing(b"bad")
    it.put(b"one", b"bad", b"two", b"three")
    it.settle()
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


def test_unlimited_concurrency_sends_events_alone_many_at_a_time(rig: RigMaker) -> None:
    it = rig(concurrency_limit=-1, max_batch_size=100, max_coalescing_delay=3600)
    it.endpoint.hold()
    it.put(*numbered(10))
    it.endpoint.wait_for_request(10)
    assert len(it.workers()) == 10
    it.endpoint.let_go()
    assert it.settle().delivered == 10
    assert all(len(request) == 1 for request in it.endpoint.requests)
    assert all(len(sender.threads) == 1 for sender in it.endpoint.senders)


def test_unlimited_concurrency_has_a_bound_and_keeps_the_limits_of_the_queue(rig: RigMaker) -> None:
    it = rig(concurrency_limit=-1, max_entries=100)
    it.endpoint.hold()
    it.put(*numbered(UNLIMITED_WORKERS))
    it.endpoint.wait_for_request(UNLIMITED_WORKERS)
    it.put(*numbered(500, first=100))
    assert len(it.workers()) == UNLIMITED_WORKERS
    it.endpoint.let_go()
    account = it.settle()
    assert account.delivered == UNLIMITED_WORKERS + 100
    assert account.dropped == {"queue_full": 400}


def test_unlimited_concurrency_starts_no_more_threads_than_there_are_events_at_once(rig: RigMaker) -> None:
    it = rig(concurrency_limit=-1)
    for number in range(50):
        it.put(b"%d" % number)
        it.settle()
        wait_until(lambda: it.queue._idle_workers == len(it.workers()), "the worker is idle again")
    assert len(it.workers()) == 1


def test_one_slow_request_does_not_hold_the_others_with_unlimited_concurrency(rig: RigMaker) -> None:
    gate = threading.Event()

    def slow_for_one(events: list[bytes]) -> Outcome:
        assert events != [b"slow"] or gate.wait(20)
        return Delivered()

    it = rig(slow_for_one, concurrency_limit=-1)
    it.put(b"slow", *numbered(20))
    wait_until(lambda: it.stats.snapshot().delivered == 20, "the others are delivered")
    assert it.queue.waiting == 1
    gate.set()
    it.settle()


def test_only_one_of_many_threads_sends_the_probe(rig: RigMaker) -> None:
    it = rig(lambda _: UNREACHABLE, concurrency_limit=-1, max_retry_time=-1, failure_threshold=1, breaker_cooldown=60)
    it.put(b"first")
    it.settle()
    it.clock.advance(60)
    it.endpoint.hold()
    it.put(*numbered(20))
    it.endpoint.wait_for_request(2)
    wait_until(lambda: it.queue.waiting == 1, "all but the probe are shed")
    it.endpoint.let_go()
    it.settle()
    assert len(it.endpoint.requests) == 2


def test_threads_beyond_the_new_limit_end(rig: RigMaker) -> None:
    it = rig(concurrency_limit=-1)
    it.endpoint.hold()
    it.put(*numbered(5))
    it.endpoint.wait_for_request(5)
    it.reconfigure(concurrency_limit=1)
    it.endpoint.let_go()
    it.settle()
    wait_until(lambda: len(it.workers()) == 1, "four threads end")
    it.put(*numbered(5))
    assert it.settle().delivered == 10


# -- another configuration ---------------------------------------------------------------------------------------------


def test_a_newer_configuration_ends_a_backoff_and_serves_what_waits(rig: RigMaker) -> None:
    it = rig(lambda _: UNAUTHORIZED, initial_retry_delay=1000, max_retry_delay=1000, max_coalescing_delay=0)
    it.timing.flows = False
    it.put(b"one", b"two")
    wait_until(lambda: it.timing.backoffs == [1000.0], "it backs off")
    it.endpoint.decide = take_all
    it.reconfigure("new token", max_batch_size=10)
    assert it.settle().delivered == 2
    old, new = it.endpoint.senders
    assert old.closed
    assert (new.name, new.delivered) == ("new token", [b"one", b"two"])


def test_a_newer_configuration_during_a_request_ends_the_backoff_that_follows(rig: RigMaker) -> None:
    it = rig(lambda _: UNAUTHORIZED, initial_retry_delay=1000, max_retry_delay=1000)
    it.timing.flows = False
    it.endpoint.hold()
    it.put(b"one")
    it.endpoint.wait_for_request()
    it.reconfigure("new token")
    it.endpoint.let_go()
    it.endpoint.wait_for_request()
    assert [sender.name for sender in it.endpoint.senders] == ["", "new token"]
    it.timing.flows = True
    it.timing.let_pass(1000)


def test_a_newer_configuration_shortens_the_coalescing_delay_of_what_waits(rig: RigMaker) -> None:
    it = rig(max_batch_size=100, max_coalescing_delay=3600)
    it.timing.flows = False
    it.put(b"one", b"two")
    wait_until(lambda: it.timing.coalescing, "it waits for more events")
    it.reconfigure(max_coalescing_delay=0)
    it.settle()
    assert it.endpoint.requests == [[b"one", b"two"]]


def test_smaller_limits_of_a_newer_configuration_hold_from_the_next_event_on(rig: RigMaker) -> None:
    it = rig(max_entries=100)
    it.put_while_busy(*numbered(100))
    it.reconfigure(max_entries=10)
    it.put(b"next")
    assert it.queue.waiting == 11
    it.endpoint.let_go()
    assert it.settle().dropped == {"queue_full": 91}


def test_a_request_under_way_is_not_disturbed_by_a_newer_configuration(rig: RigMaker) -> None:
    it = rig()
    it.endpoint.hold()
    it.put(b"one")
    it.endpoint.wait_for_request()
    it.reconfigure("new token")
    it.put(b"two")
    it.endpoint.let_go()
    it.settle()
    assert [(sender.name, sender.delivered) for sender in it.endpoint.senders] == [
        ("", [b"one"]),
        ("new token", [b"two"]),
    ]


# -- the end -----------------------------------------------------------------------------------------------------------


def test_closing_sends_what_waits_without_waiting_for_more(rig: RigMaker) -> None:
    it = rig(max_batch_size=10, max_coalescing_delay=3600)
    it.timing.flows = False
    it.put(*numbered(5))
    account = it.close()
    assert account == Snapshot(accepted=5, delivered=5)
    assert it.endpoint.requests == [numbered(5)]
    assert it.workers() == []
    assert all(sender.closed for sender in it.endpoint.senders)


def test_closing_sends_all_that_waits_in_batches(rig: RigMaker) -> None:
    it = rig(max_batch_size=2, max_coalescing_delay=0.1)
    it.put_while_busy(*numbered(5))
    it.queue.begin_close()
    it.endpoint.let_go()
    assert it.close().delivered == 6
    assert it.endpoint.requests[1:] == [[b"0", b"1"], [b"2", b"3"], [b"4"]]


def test_closing_ends_a_backoff_and_tries_each_batch_once_more(rig: RigMaker, log: LogLines) -> None:
    it = rig(lambda _: UNREACHABLE, initial_retry_delay=1000, max_retry_delay=1000)
    it.timing.flows = False
    it.put(b"one", b"two", b"three")
    wait_until(lambda: it.timing.backoffs == [1000.0], "it backs off")
    account = it.close()
    assert account == Snapshot(accepted=3, dropped={"process_ended": 3})
    assert it.endpoint.requests == [[b"one"], [b"one"], [b"two"], [b"three"]]
    assert log.with_text("max_retry_time") == []
    assert log.with_text("the process ended before they were delivered")


def test_closing_does_not_wait_longer_than_its_deadline(rig: RigMaker, log: LogLines) -> None:
    it = rig()
    it.put_while_busy(*numbered(4))
    account = it.close(0)
    assert account == Snapshot(accepted=5, dropped={"process_ended": 5})
    assert it.queue.waiting == 0
    assert log.with_text("5 events were not delivered before the process ended")


def test_an_answer_that_comes_after_the_deadline_is_not_counted_twice(rig: RigMaker) -> None:
    it = rig()
    it.put_while_busy(b"one")
    (worker,) = it.workers()
    it.close(0)
    it.endpoint.let_go()
    worker.join(20)
    assert not worker.is_alive()
    assert it.stats.snapshot() == Snapshot(accepted=2, dropped={"process_ended": 2})
    assert it.queue.waiting == 0


def test_an_event_that_comes_after_the_end_is_counted_and_not_sent(rig: RigMaker) -> None:
    it = rig()
    it.put(b"in time")
    it.close()
    it.put(b"too late")
    assert it.close() == Snapshot(accepted=2, delivered=1, dropped={"process_ended": 1})
    assert it.queue.waiting == 0
    assert it.workers() == []


def test_an_event_that_comes_while_the_queue_closes_is_still_sent(rig: RigMaker) -> None:
    it = rig()
    it.put_while_busy(b"one")
    it.queue.begin_close()
    it.put(b"two")
    it.endpoint.let_go()
    assert it.close() == Snapshot(accepted=3, delivered=3)


def test_a_queue_without_events_closes_without_a_thread(rig: RigMaker) -> None:
    it = rig()
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

    @rule(
        max_batch_size=st.sampled_from([1, 2, 5, 1000]),
        max_bytes=st.sampled_from([None, 100]),
        max_retry_time=st.sampled_from([-1, 0, 1, 60]),
        concurrency_limit=st.sampled_from([1, -1]),
        failure_threshold=st.sampled_from([0, 1, 3]),
    )
    def the_owner_changes_the_configuration(self, **changes: Any) -> None:
        self.rig.reconfigure(**changes)

    @rule(seconds=st.sampled_from([1, 60, 10_000]))
    def time_passes(self, seconds: int) -> None:
        self.rig.timing.let_pass(seconds)

    @rule()
    def the_queue_empties(self) -> None:
        self.rig.settle()

    @invariant()
    def no_more_is_delivered_than_was_accepted(self) -> None:
        account = self.rig.stats.snapshot()
        assert 0 <= account.waiting <= account.accepted

    def teardown(self) -> None:
        account = self.rig.close()
        assert account.waiting == self.rig.queue.waiting == 0
        assert account.delivered == len(self.rig.endpoint.delivered) == len(set(self.rig.endpoint.delivered))
        assert self.rig.workers() == []
        assert self.rig.log.with_text("delivery failed") == []


TestAccount = Account.TestCase
TestAccount.settings = hypothesis_settings(max_examples=40, stateful_step_count=15, deadline=None)


# -- the comparison with Kong's queue ----------------------------------------------------------------------------------


def test_every_rule_in_the_documentation_names_tests_that_exist() -> None:
    here = Path(__file__)
    sources = "".join(path.read_text("utf-8") for path in here.parent.glob("test_*.py"))
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
