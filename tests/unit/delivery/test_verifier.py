"""The server reads back what it delivered: real queues and a real spool, against the stand-in for OpenMeter."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kong_metering.clock import SystemClock
from kong_metering.config import Entity, PluginConfig
from kong_metering.runtime import Runtime, make_runtime
from kong_metering.spool.deadletters import DEAD_LETTERS, DeadLetters
from kong_metering.spool.delivered import Delivered, verifying
from kong_metering.spool.options import SpoolOptions
from kong_metering.upkeep.verifier import Verifier
from kong_metering_sandbox.collector.faults import FaultMatch, FaultRule
from kong_metering_sandbox.collector.process import CollectorProcess
from tests.support.waiting import wait_until
from tests.unit.eventlog.test_disk_errors import bad_sector

if TYPE_CHECKING:
    from collections.abc import Callable

    from kong_metering.delivery.queue import EventQueue
    from tests.support.loglines import LogLines

ENTITY = Entity("11111111-one", "one")


@pytest.fixture(scope="module")
def process() -> Iterator[CollectorProcess]:
    with CollectorProcess() as running:
        yield running


@pytest.fixture
def collector(process: CollectorProcess) -> CollectorProcess:
    process.client.clear_faults()
    process.client.set_tokens([])
    process.client.set_reading()
    process.client.reset()
    process.client.add_customer("acme")
    process.client.set_tokens(["token-1"])
    return process


class Metering:
    """A process with one queue, and its verifier, which is told when to look and waits for nothing."""

    def __init__(self, root: Path, url: str, **options: bool) -> None:
        self.options = SpoolOptions(
            root, inbox_directory=None, keep_delivered=3600.0, verify_every=600.0, verify_resend=options.pop("resend")
        )
        self.runtime: Runtime = make_runtime(spool=self.options)
        config = {"ingest_endpoint": url, "api_token": "token-1", "queue": {"max_batch_size": 100}}
        self.queue: EventQueue = self.runtime.delivery.open(ENTITY, PluginConfig.model_validate(config))
        self.verifier = Verifier(self.options, self.runtime.delivery.delivered_queues, SystemClock(), 0.0)
        self.delivered = Delivered(root, lambda: 0)
        self.numbers = iter(range(1_000_000))

    def deliver(self, count: int, subject: str = "acme") -> None:
        before = self.runtime.stats.snapshot().delivered
        self.put(count, subject)
        wait_until(lambda: self.runtime.stats.snapshot().delivered == before + count, "they are delivered")

    def put(self, count: int, subject: str) -> None:
        for number in [next(self.numbers) for _ in range(count)]:
            event = {"specversion": "1.0", "id": f"{number:032x}:api_request", "source": "kong", "subject": subject}
            self.queue.put(json.dumps({**event, "type": "kong.api_request"}).encode())

    @property
    def verified(self) -> dict[str, int]:
        return self.runtime.stats.snapshot().verified

    def close(self) -> None:
        self.verifier.end(5)
        assert self.runtime.verifier
        self.runtime.verifier.end(5)
        self.runtime.delivery.close(5)


@pytest.fixture
def metering(tmp_path: Path, collector: CollectorProcess) -> Iterator[Callable[..., Metering]]:
    made: list[Metering] = []

    def make(*, resend: bool = False, path: str = "/api/v3/openmeter/events") -> Metering:
        made.append(Metering(tmp_path / "spool", collector.url + path, resend=resend))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.mark.parametrize("path", ["/api/v3/openmeter/events", "/api/v1/events"])
def test_each_event_that_was_delivered_is_confirmed_once(metering: Callable[..., Metering], path: str) -> None:
    it = metering(path=path)
    it.deliver(150)
    it.verifier.look()
    assert it.verified == {"confirmed": 150}
    it.verifier.look()
    assert it.verified == {"confirmed": 150}
    it.deliver(10)
    it.verifier.look()
    assert it.verified == {"confirmed": 160}
    assert it.queue.told()["verified"] == {"confirmed": 160}
    assert all(segment.is_checked for segment in it.delivered.segments())


def test_a_file_that_the_disk_does_not_give_keeps_no_other_from_being_read_back(
    metering: Callable[..., Metering],
) -> None:
    it = metering()
    for _ in range(2):
        it.deliver(3)
        it.runtime.delivery.delivered_queues()[0].begin_segment()
    first, _ = it.delivered.segments()
    with bad_sector(first.path):
        it.verifier.look()
    assert it.verified == {"confirmed": 3, "unknown": 1}
    it.verifier.look()
    assert it.verified == {"confirmed": 6, "unknown": 1}


def test_what_was_lost_after_a_2xx_is_counted_and_said(
    metering: Callable[..., Metering], collector: CollectorProcess, log: LogLines
) -> None:
    it = metering()
    it.deliver(20)
    collector.client.faults(FaultRule(lose=FaultMatch(subject="gone")))
    it.deliver(3, subject="gone")
    collector.client.clear_faults()
    it.verifier.look()
    assert it.verified == {"confirmed": 20, "missing": 3}
    ((_, line),) = log.with_text("3 events that its endpoint took are not stored there")
    assert "kong-metering verify" in line
    assert "token-1" not in line
    assert collector.client.stats().unique == 20


def test_what_is_missing_is_sent_again_where_that_is_wanted_and_counts_as_what_it_is_then(
    metering: Callable[..., Metering], collector: CollectorProcess
) -> None:
    it = metering(resend=True)
    it.deliver(20)
    collector.client.faults(FaultRule(lose=FaultMatch(subject="gone")))
    it.deliver(3, subject="gone")
    collector.client.clear_faults()
    it.verifier.look()
    assert it.verified == {"confirmed": 20, "unassigned": 3, "resent": 3}
    assert collector.client.stats().unique == 23


def test_what_became_a_dead_letter_is_not_missing_whatever_becomes_of_that(
    metering: Callable[..., Metering], collector: CollectorProcess
) -> None:
    it = metering(resend=True)
    it.deliver(20)
    collector.client.faults(FaultRule(match=FaultMatch(subject="bad"), status=400))
    it.put(1, subject="bad")
    it.deliver(20)
    wait_until(lambda: it.runtime.stats.snapshot().dead_letters == {"rejected": 1}, "it is refused")
    collector.client.clear_faults()
    letters = DeadLetters(it.options.directory / DEAD_LETTERS)
    assert letters.remove([stored.id for stored in letters.letters()]) == 1
    it.verifier.look()
    assert it.verified == {"confirmed": 40}
    assert collector.client.stats().unique == 40


def test_nothing_is_sent_again_while_nothing_can_be_found(
    metering: Callable[..., Metering], collector: CollectorProcess
) -> None:
    it = metering(resend=True)
    it.deliver(20)
    collector.client.set_reading(delay=3600)
    it.verifier.look()
    assert it.verified == {"missing": 20}
    assert collector.client.stats().duplicates == 0


def test_what_cannot_be_asked_for_is_tried_again_in_the_next_round(
    metering: Callable[..., Metering], collector: CollectorProcess, log: LogLines
) -> None:
    it = metering()
    it.deliver(5)
    collector.client.set_tokens(["another"])
    it.verifier.look()
    assert it.verified == {"unknown": 1}
    assert len(log.with_text("cannot be read back, for now")) == 1
    collector.client.set_tokens(["token-1"])
    it.verifier.look()
    assert it.verified == {"unknown": 1, "confirmed": 5}


def test_what_another_process_verifies_is_left_to_it(metering: Callable[..., Metering]) -> None:
    it = metering()
    it.deliver(5)
    (queue,) = it.runtime.delivery.delivered_queues()
    queue.begin_segment()
    (kept,) = it.delivered.queues()
    with verifying(kept.directory):
        it.verifier.look()
    assert it.verified == {}
    it.verifier.look()
    assert it.verified == {"confirmed": 5}


def test_it_ends_while_it_waits(metering: Callable[..., Metering]) -> None:
    it = metering()
    it.deliver(5)
    it.verifier.end(0)
    it.verifier.look()
    assert it.verified == {}


def test_a_query_in_the_endpoints_url_is_none_of_the_list(metering: Callable[..., Metering]) -> None:
    it = metering(path="/api/v3/openmeter/events?x=1")
    it.deliver(2)
    it.verifier.look()
    assert it.verified == {"confirmed": 2}
