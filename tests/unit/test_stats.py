"""The account of what became of everything."""

from __future__ import annotations

import threading

from hypothesis import given
from hypothesis import strategies as st

from kong_metering.reasons import Dropped, Skipped
from kong_metering.stats import Snapshot, Stats


def test_a_new_account_is_empty() -> None:
    assert Stats().snapshot() == Snapshot()
    assert Snapshot().waiting == 0


def test_everything_is_counted_under_its_name() -> None:
    stats = Stats()
    for _ in range(10):
        stats.accept()
    stats.deliver(3)
    stats.drop(Dropped.QUEUE_FULL)
    stats.drop(Dropped.REJECTED, 2)
    stats.drop(Dropped.QUEUE_FULL, 1)
    stats.skip(Skipped.NO_SUBJECT)
    stats.skip(Skipped.ERROR)
    stats.skip(Skipped.NO_SUBJECT)
    stats.drop_letters(4)
    stats.drop_letters(5)
    assert stats.snapshot() == Snapshot(
        accepted=10,
        delivered=3,
        dropped={"queue_full": 2, "rejected": 2},
        skipped={"no_subject": 2, "error": 1},
        dead_letters_dropped=9,
    )
    assert stats.snapshot().waiting == 3


def test_a_snapshot_does_not_change_any_more() -> None:
    stats = Stats()
    before = stats.snapshot()
    stats.accept()
    stats.drop(Dropped.REJECTED)
    stats.skip(Skipped.ERROR)
    assert before == Snapshot()


@given(st.lists(st.tuples(st.sampled_from(["accept", "deliver", "drop"]), st.sampled_from(Dropped), st.integers(1, 5))))
def test_accepted_is_always_delivered_and_dropped_and_waiting(steps: list[tuple[str, Dropped, int]]) -> None:
    stats = Stats()
    waiting = 0
    for step, reason, events in steps:
        if step == "accept":
            stats.accept()
            waiting += 1
        elif events <= waiting:
            waiting -= events
            if step == "deliver":
                stats.deliver(events)
            else:
                stats.drop(reason, events)
        account = stats.snapshot()
        assert account.waiting == waiting
        assert account.accepted == account.delivered + sum(account.dropped.values()) + waiting


def test_any_thread_may_count() -> None:
    stats = Stats()

    def count() -> None:
        for _ in range(1000):
            stats.accept()
            stats.drop(Dropped.REJECTED)
            stats.skip(Skipped.NO_SUBJECT)

    threads = [threading.Thread(target=count) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert stats.snapshot() == Snapshot(accepted=8000, dropped={"rejected": 8000}, skipped={"no_subject": 8000})
    assert stats.snapshot().waiting == 0
