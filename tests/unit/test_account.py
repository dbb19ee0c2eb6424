"""What a queue counts and says: in which order."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest

from kong_metering.account import QueueAccount
from kong_metering.log import LOGGER
from kong_metering.reasons import Buried, Dropped
from kong_metering.stats import Snapshot, Stats

if TYPE_CHECKING:
    from collections.abc import Callable


class CountedMeanwhile(logging.Handler):
    """Keeps what is counted at the time of each line."""

    def __init__(self, stats: Stats) -> None:
        super().__init__()
        self.snapshots: list[Snapshot] = []
        self._stats = stats

    def emit(self, _: logging.LogRecord) -> None:
        self.snapshots.append(self._stats.snapshot())


@pytest.mark.parametrize(
    "give_up",
    [
        lambda account: account.drop(Dropped.QUEUE_FULL, 1, "it is full"),
        lambda account: account.bury(Buried.REJECTED, 1, "it is refused"),
    ],
    ids=["dropped", "a dead letter"],
)
def test_who_sees_a_count_finds_its_reason_in_the_log(give_up: Callable[[QueueAccount], None]) -> None:
    stats = Stats()
    handler = CountedMeanwhile(stats)
    LOGGER.addHandler(handler)
    give_up(QueueAccount("metering", stats))
    LOGGER.removeHandler(handler)
    assert handler.snapshots == [Snapshot()]
    assert stats.snapshot() != Snapshot()


def test_what_waits_in_a_queue_is_what_came_in_and_has_not_left() -> None:
    account = QueueAccount("metering", Stats())
    for _ in range(10):
        account.accept()
    account.adopt(5)
    account.deliver(3)
    account.leave(2)
    account.drop(Dropped.QUEUE_FULL, 1, "it is full")
    account.bury(Buried.REJECTED, 1, "it is refused")
    assert account.waiting == 8


def test_two_queues_say_the_same_trouble_each(caplog: pytest.LogCaptureFixture) -> None:
    for name in ("one", "two"):
        QueueAccount(name, Stats()).say("full", "it is full")
    assert caplog.messages == ["queue one: it is full", "queue two: it is full"]
