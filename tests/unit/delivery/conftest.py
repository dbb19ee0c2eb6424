"""What the tests of delivery share."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

from kong_metering.config import Queue
from kong_metering.log import LOGGER
from tests.unit.delivery.fakes import Decide, FakeEndpoint, LogLines, Rig, take_all

if TYPE_CHECKING:
    from tests.support.clock import FakeClock

RigMaker = Callable[..., Rig]


@pytest.fixture
def log() -> Iterator[LogLines]:
    lines = LogLines()
    level = LOGGER.level
    LOGGER.addHandler(lines)
    LOGGER.setLevel(logging.DEBUG)
    yield lines
    LOGGER.removeHandler(lines)
    LOGGER.setLevel(level)


@pytest.fixture
def rig(clock: FakeClock, log: LogLines) -> Iterator[RigMaker]:
    """Make queues; at the end of the test each one is closed, adds up, and leaves no thread and no hidden error."""
    made: list[Rig] = []

    def make(decide: Decide = take_all, **settings: object) -> Rig:
        made.append(Rig(Queue.model_validate(settings), clock, log, FakeEndpoint(decide)))
        return made[-1]

    yield make
    for each in made:
        each.endpoint.let_go()
        workers = each.workers()
        account = each.close()
        assert account.waiting == 0
        assert account.accepted == account.delivered + sum(account.dropped.values())
        for worker in workers:
            worker.join(5)
            assert not worker.is_alive()
        assert all(sender.closed for sender in each.endpoint.senders)
    assert log.with_text("delivery failed") == []
