"""The queue with its events on disk: what is where and when, what outlives an outage, what a second process gets."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kong_metering.stats import Snapshot
from kong_metering.trial.batching import MAX_EVENT_BYTES
from kong_metering.trial.outcome import Delivered, Failed, Outcome, Rejected
from tests.support.waiting import wait_until
from tests.unit.delivery.fakes import (
    BUSY,
    DOWN,
    REFUSED,
    UNAUTHORIZED,
    FakeEndpoint,
    Refusing,
    letters,
    numbered,
    on_disk,
)

if TYPE_CHECKING:
    from tests.support.loglines import LogLines
    from tests.unit.delivery.conftest import ProcessMaker


def files_in(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


def bookkeeping(root: Path) -> list[Path]:
    """Name what is there when no event is."""
    return [root / "accepted" / "learned", root / "clock", root / "lock"]


# -- on disk, and off it -----------------------------------------------------------------------------------------------


def test_events_are_on_disk_soon_also_while_the_endpoint_hangs(process: ProcessMaker, root: Path) -> None:
    it = process().open()
    it.endpoint.hold()
    it.put(b"one", b"two", b"three")
    wait_until(lambda: on_disk(root) == [b"one", b"two", b"three"], "they are on disk")
    it.endpoint.wait_for_request()
    it.put(b"four")
    wait_until(lambda: on_disk(root)[3:] == [b"four"], "the next one is on disk too")
    assert it.queue.waiting == it.process.account().waiting == 4


def test_events_are_off_the_disk_after_the_endpoints_yes(process: ProcessMaker, root: Path) -> None:
    it = process().open()
    it.put_on_disk(*numbered(20))
    assert it.process.settle() == Snapshot(accepted=20, delivered=20)
    assert it.endpoint.delivered == numbered(20)
    assert on_disk(root) == []


def test_a_spool_in_which_all_is_delivered_is_empty_after_the_end(process: ProcessMaker, root: Path) -> None:
    it = process().open(max_batch_size=100)
    it.put(*numbered(500))
    it.process.settle()
    it.process.close()
    assert files_in(root) == bookkeeping(root)


def test_segments_go_while_the_queue_goes_on(process: ProcessMaker, root: Path) -> None:
    it = process().open(max_batch_size=50)
    event = b"x" * 100_000
    for _ in range(15):
        it.put_on_disk(*[event] * 10)
    it.process.settle()
    assert len(list(root.rglob("*.seg"))) == 1


def test_an_empty_queue_leaves_nothing_on_disk(process: ProcessMaker, root: Path) -> None:
    it = process()
    it.open()
    wait_until(root.is_dir, "the spool is made")
    it.close()
    assert files_in(root) == bookkeeping(root)


def test_events_leave_in_order_in_batches(process: ProcessMaker) -> None:
    it = process().open(max_batch_size=7)
    it.put(*numbered(1000))
    it.process.settle()
    assert it.endpoint.delivered == numbered(1000)
    assert max(map(len, it.endpoint.requests)) == 7


def test_a_batch_waits_for_others_within_the_coalescing_delay(process: ProcessMaker) -> None:
    it = process().open(max_batch_size=3, max_coalescing_delay=3600)
    it.put_on_disk(b"1", b"2", b"3")
    it.process.settle()
    assert it.endpoint.requests == [[b"1"], [b"2", b"3"]]  # the first one asks
    it.endpoint.requests.clear()
    it.put_on_disk(b"one", b"two")
    assert it.endpoint.requests == []
    it.put(b"three")
    it.process.settle()
    it.put_on_disk(b"four")
    it.put_on_disk(b"five")
    it.let_pass(3600)
    it.process.settle()
    assert it.endpoint.requests == [[b"one", b"two", b"three"], [b"four", b"five"]]


def test_a_batch_is_no_larger_than_max_bytes_but_takes_one_event_at_least(process: ProcessMaker) -> None:
    it = process().open(max_batch_size=100, max_bytes=1000, max_coalescing_delay=3600)
    it.put_on_disk(*[b"x" * 400] * 5, b"y" * 2000)
    it.reconfigure(max_coalescing_delay=0)
    it.process.settle()
    assert [len(request) for request in it.endpoint.requests] == [1, 1, 2, 1, 1]


@pytest.mark.parametrize("concurrency", [1, -1])
def test_events_may_be_put_from_many_threads(process: ProcessMaker, concurrency: int) -> None:
    it = process().open(max_batch_size=100, concurrency_limit=concurrency)
    threads = [threading.Thread(target=it.put, args=numbered(200, first=1000 * lot)) for lot in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert it.process.settle().delivered == 800
    assert sorted(it.endpoint.delivered) == sorted(event for lot in range(4) for event in numbered(200, 1000 * lot))


# -- outages -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failure", [REFUSED, DOWN, BUSY, UNAUTHORIZED], ids=lambda failure: failure.kind)
@pytest.mark.parametrize("settings", [{"failure_threshold": 0}, {"failure_threshold": 1, "breaker_cooldown": 0.01}])
def test_an_outage_longer_than_the_retry_time_costs_nothing(
    process: ProcessMaker, root: Path, failure: Failed, settings: dict[str, Any]
) -> None:
    it = process().open(FakeEndpoint(lambda _: failure), max_batch_size=10, max_entries=5, max_bytes=20, **settings)
    it.put_on_disk(*numbered(100))
    wait_until(lambda: len(it.endpoint.requests) > 30, "it is tried for longer than max_retry_time")
    assert it.process.account() == Snapshot(accepted=100)
    assert on_disk(root) == numbered(100)
    it.put(*numbered(100, first=100))
    it.endpoint.decide = lambda _: Delivered()
    assert it.process.settle() == Snapshot(accepted=200, delivered=200)
    # Where somebody has seen the requests, an event may be the reason, and another one probes beside the oldest: where
    # the endpoint comes back just then, that one is early, and no other.
    first, *others = it.endpoint.delivered
    if failure is REFUSED:
        assert first == b"0"
    assert others == [event for event in numbered(200) if event != first]


def test_memory_holds_no_more_than_a_batch_whatever_waits(process: ProcessMaker) -> None:
    it = process().open(max_batch_size=10, max_entries=20)
    it.endpoint.hold()
    it.put_on_disk(*numbered(5000))
    it.endpoint.wait_for_request()
    assert it.queue.waiting == 5000
    assert it.queue.waiting - it.backlog.unread <= 10
    it.endpoint.let_go()
    it.process.settle()


def test_an_open_breaker_waits_for_its_cooldown_and_probes(process: ProcessMaker, log: LogLines) -> None:
    it = process().open(
        FakeEndpoint(lambda _: REFUSED), max_retry_time=-1, failure_threshold=2, breaker_cooldown=3600, max_batch_size=5
    )
    it.put_on_disk(*numbered(20))
    wait_until(lambda: log.with_text("the circuit breaker opened"), "the breaker opens")
    tries = len(it.endpoint.requests)
    for turn in range(1, 4):
        wait_until(lambda: it.queue.told()["next_try_in_seconds"], "the cooldown has begun")
        it.process.wait_for_rest()  # the answer to a probe begins it anew
        it.let_pass(3600)
        wait_until(lambda turn=turn: len(it.endpoint.requests) == tries + turn, "one probe is sent")  # type: ignore[misc]
    wait_until(lambda: it.queue.told()["next_try_in_seconds"], "the last cooldown has begun")
    it.process.wait_for_rest()
    it.endpoint.decide = lambda _: Delivered()
    it.let_pass(3600)
    assert it.process.settle() == Snapshot(accepted=20, delivered=20)
    assert it.endpoint.delivered == numbered(20)


@pytest.mark.parametrize("settings", [{}, {"failure_threshold": 1, "breaker_cooldown": 3600}])
def test_a_rotated_token_ends_the_wait_and_sends_what_is_on_disk(
    process: ProcessMaker, settings: dict[str, Any]
) -> None:
    it = process().open(
        FakeEndpoint(lambda _: UNAUTHORIZED),
        initial_retry_delay=1000,
        max_retry_delay=1000,
        max_retry_time=-1,
        max_batch_size=5,
        **settings,
    )
    it.put_on_disk(*numbered(20))
    it.endpoint.wait_for_request()
    it.endpoint.decide = lambda _: Delivered()
    it.reconfigure("new token")
    it.process.settle()
    assert it.endpoint.senders[-1].name == "new token"
    assert it.endpoint.senders[-1].delivered == numbered(20)


# -- events that the endpoint refuses ----------------------------------------------------------------------------------


@pytest.mark.parametrize("names_it", [True, False])
def test_a_refused_event_becomes_a_dead_letter_with_the_endpoints_words(
    process: ProcessMaker, root: Path, *, names_it: bool
) -> None:
    it = process().open(FakeEndpoint(Refusing(b"7", names_it=names_it)), max_batch_size=10)
    it.put(*numbered(20))
    assert it.process.settle() == Snapshot(accepted=20, delivered=19, dead_letters={"rejected": 1})
    assert it.endpoint.delivered == [event for event in numbered(20) if event != b"7"]
    (stored,) = letters(root)
    assert (stored.letter.event, stored.letter.reason) == (b"7", "rejected")
    assert "https://ingest.test answered 400: no subject" in stored.letter.answer
    assert stored.letter.queue.entity_id == "11111111-one"
    assert abs(stored.letter.accepted_ms / 1000 - it.process.clock.wall()) < 60
    assert on_disk(root) == []


def test_an_event_that_is_too_large_becomes_a_dead_letter(process: ProcessMaker, root: Path) -> None:
    it = process().open()
    large = b"x" * (MAX_EVENT_BYTES + 1)
    it.put(large, b"x" * MAX_EVENT_BYTES)
    assert it.process.settle() == Snapshot(accepted=2, delivered=1, dead_letters={"too_large": 1})
    (stored,) = letters(root)
    assert stored.letter.event == large
    assert f"an event of {MAX_EVENT_BYTES + 1} bytes is too large" in stored.letter.answer


def test_dead_letters_that_cannot_be_written_wait_and_hold_nothing_else(
    process: ProcessMaker, root: Path, log: LogLines
) -> None:
    it = process().open(FakeEndpoint(Refusing(b"0")))
    wait_until(root.is_dir, "the spool is made")
    (root / "dead-letters").write_text("in the way")
    it.put(*numbered(20))
    wait_until(lambda: it.process.account().delivered == 19, "the others are delivered")
    assert it.queue.waiting == it.process.account().waiting == 1
    wait_until(lambda: log.with_text("dead letters cannot be written, for now"), "it is said")
    assert on_disk(root)[:1] == [b"0"]
    (root / "dead-letters").unlink()
    assert it.process.settle() == Snapshot(accepted=20, delivered=19, dead_letters={"rejected": 1})
    assert [stored.letter.event for stored in letters(root)] == [b"0"]


# -- unlimited concurrency ---------------------------------------------------------------------------------------------


def test_unlimited_concurrency_sends_events_alone_many_at_a_time(process: ProcessMaker) -> None:
    it = process().open(concurrency_limit=-1)
    it.endpoint.hold()
    it.put_on_disk(*numbered(10))
    it.endpoint.wait_for_request(10)
    it.endpoint.let_go()
    assert it.process.settle().delivered == 10


def test_one_slow_request_does_not_hold_the_others_with_unlimited_concurrency(process: ProcessMaker) -> None:
    gate = threading.Event()

    def slow_for_one(events: list[bytes]) -> Outcome:
        assert events != [b"0"] or gate.wait(20)
        return Delivered()

    it = process().open(FakeEndpoint(slow_for_one), concurrency_limit=-1)
    it.put(*numbered(20))
    wait_until(lambda: it.process.account().delivered == 19, "the others are delivered")
    assert it.queue.waiting == 1
    gate.set()
    it.process.settle()


def test_an_endpoint_that_takes_no_arrays_costs_a_spooled_queue_no_event(
    process: ProcessMaker, root: Path, log: LogLines
) -> None:
    refused = Rejected("https://ingest.test answered 400: not an object")
    it = process().open(FakeEndpoint(lambda events: Delivered() if len(events) == 1 else refused), max_batch_size=50)
    it.put(*numbered(500))
    assert it.process.settle().delivered == 500
    assert letters(root) == []
    assert len(log.with_text("takes no arrays")) == 1
