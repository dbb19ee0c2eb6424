"""What a queue counts and says: in which order."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest

from kong_metering.delivery.account import QueueAccount
from kong_metering.log import LOGGER, TroubleLog
from kong_metering.stats import Buried, Dropped, Snapshot, Stats

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.clock import FakeClock


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
def test_who_sees_a_count_finds_its_reason_in_the_log(
    clock: FakeClock, give_up: Callable[[QueueAccount], None]
) -> None:
    stats = Stats()
    handler = CountedMeanwhile(stats)
    LOGGER.addHandler(handler)
    give_up(QueueAccount("metering", stats, TroubleLog(clock, logger=LOGGER)))
    LOGGER.removeHandler(handler)
    assert handler.snapshots == [Snapshot()]
    assert stats.snapshot() != Snapshot()
