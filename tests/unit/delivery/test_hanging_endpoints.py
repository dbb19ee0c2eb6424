"""Many endpoints that hang, over real HTTP: those that answer are served at once."""

from __future__ import annotations

import functools

from kong_metering.clock import SystemClock
from kong_metering.config import Entity, PluginConfig
from kong_metering.delivery.couriers import Couriers
from kong_metering.delivery.registry import Delivery
from kong_metering.ingest.client import IngestClient
from kong_metering.ingest.connections import Connections
from kong_metering.stats import Stats
from tests.support.waiting import wait_until
from tests.unit.ingest.ingest_server import Exchange, IngestServer, running

HANGING = 80
# No request of theirs ends while the test runs.
TIMEOUT_MS = 600_000


def config(url: str) -> PluginConfig:
    return PluginConfig.model_validate({"ingest_endpoint": url, "api_token": "token", "timeout": TIMEOUT_MS})


def test_eighty_endpoints_that_hang_do_not_keep_one_that_answers_waiting() -> None:
    """They once took all couriers, each for its whole timeout, again and again."""
    clock, stats = SystemClock(), Stats()
    couriers = Couriers(clock)
    connections = Connections(clock, functools.partial(IngestClient, clock=clock))
    delivery = Delivery(clock=clock, stats=stats, couriers=couriers, connections=connections)
    with running(IngestServer()) as silent, running(IngestServer()) as good:
        silent.on_request = Exchange.hang
        queues = [
            delivery.open(Entity(f"entity-{number}", f"entity-{number}"), config(f"{silent.url}/{number}"))
            for number in range(HANGING)
        ]
        for queue in queues:
            queue.put(b"{}")
        answered = delivery.open(Entity("good", "good"), config(good.url))
        for number in range(1, 6):
            answered.put(b"{}")
            wait_until(lambda number=number: answered.delivered == number, "its event is delivered")  # type: ignore[misc]
        wait_until(lambda: len(silent.requests) == HANGING, "the others have their turn too")
        assert not any(queue.last_request.number for queue in queues)
        delivery.close(0)
    couriers.close(20)
    assert couriers.threads == 0
