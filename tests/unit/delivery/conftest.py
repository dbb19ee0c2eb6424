"""What the tests of delivery share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kong_metering.config import Queue
from tests.unit.delivery.fakes import (
    Decide,
    FakeEndpoint,
    LiveRig,
    Process,
    Rig,
    SteeredClock,
    on_disk,
    take_all,
)
from tests.unit.ingest.ingest_server import IngestServer, running

if TYPE_CHECKING:
    from tests.support.clock import FakeClock
    from tests.support.loglines import LogLines

RigMaker = Callable[..., Rig]
LiveRigMaker = Callable[..., LiveRig]
ProcessMaker = Callable[..., Process]


@pytest.fixture
def server() -> Iterator[IngestServer]:
    with running(IngestServer()) as server:
        yield server


@pytest.fixture
def rig(clock: FakeClock, log: LogLines) -> Iterator[RigMaker]:
    """Make queues that are served by hand; at the end each is closed, adds up, and leaves no hidden error."""
    made: list[Rig] = []

    def make(decide: Decide = take_all, adaptive_batch: int = 1, **settings: object) -> Rig:
        made.append(Rig(Queue.model_validate(settings), clock, log, FakeEndpoint(decide), adaptive_batch))
        return made[-1]

    yield make
    for each in made:
        account = each.close()
        assert account.waiting == 0
        assert account.accepted == account.delivered + sum(account.dropped.values())
        assert all(sender.closed for sender in each.endpoint.senders)
    assert log.with_text("delivery failed") == []


@pytest.fixture
def live(steered: SteeredClock, log: LogLines) -> Iterator[LiveRigMaker]:
    """Make queues that threads serve; at the end each is closed, adds up, leaves no thread and no hidden error."""
    made: list[LiveRig] = []

    def make(decide: Decide = take_all, **settings: object) -> LiveRig:
        made.append(LiveRig(Queue.model_validate(settings), steered, FakeEndpoint(decide)))
        return made[-1]

    yield make
    for each in made:
        each.endpoint.let_go()
        account = each.close()
        assert account.waiting == each.queue.waiting == 0
        assert account.accepted == account.delivered + sum(account.dropped.values())
        assert each.couriers.threads == 0
        assert all(sender.closed for sender in each.endpoint.senders)
    assert log.with_text("delivery failed") == []


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "spool"


@pytest.fixture
def steered() -> SteeredClock:
    return SteeredClock()


@pytest.fixture
def inbox(tmp_path: Path) -> Path:
    """Give a directory for shared memory that is the test's own."""
    (tmp_path / "shm").mkdir()
    return tmp_path / "shm"


@pytest.fixture
def process(root: Path, inbox: Path, log: LogLines, steered: SteeredClock) -> Iterator[ProcessMaker]:
    """Make processes; at the end of the test each one is closed, adds up, and what it left is on disk."""
    made: list[Process] = []
    at_start: dict[Path, int] = {}

    def make(directory: Path = root, clock: SteeredClock = steered, **options: Any) -> Process:
        if directory not in at_start:
            at_start[directory] = len(on_disk(directory))
        made.append(Process(directory, clock, inbox, **options))
        return made[-1]

    yield make
    for each in made:
        for it in each.queues:
            it.endpoint.let_go()
        assert each.close().waiting == 0, each.account()
        assert sum(it.queue.waiting for it in each.queues) == 0
        each.couriers.close(5)
        assert each.couriers.threads == 0
        assert each.account().waiting == 0
    for directory, before in at_start.items():
        here = [each for each in made if each.root == directory]
        left = sum(each.account().left - each.account().adopted + each.from_strangers for each in here)
        assert before + left == len(on_disk(directory)), [each.account() for each in here]
    assert log.with_text("delivery failed") == []
    assert [text for _, text in log.lines if text.startswith("the spool: ")] == []
