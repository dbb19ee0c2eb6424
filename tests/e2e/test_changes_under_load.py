"""POST, PATCH and DELETE of plugins while requests come: each is billed under the configuration that it ran with.

Which one that was, a client cannot know while a change reaches the gateway's workers, one after the other. So a request
that was answered before a change was written ran with what was before, one that was sent after the change was in force
in every worker ran with what is now, and one in between with either of the two, whole.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from kong_metering_sandbox.collector.process import CollectorProcess
from kong_metering_sandbox.status import plugin_status
from tests.e2e.balance import number_of, wait_until
from tests.e2e.declarative import metering
from tests.e2e.traffic import Answered, Load

if TYPE_CHECKING:
    from kong_metering_sandbox.upstream_process import UpstreamProcess
    from tests.e2e.conftest import Writable

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

KEY = "key-of-alice"
# So many changes are waited for; then many follow one another.
_ALONE = 3
_IN_A_ROW = 9
_POLL_SECONDS = 0.2
BOTH = (("X-One", "one"), ("X-Two", "two"), ("apikey", KEY))
# Where an event of a configuration arrives, and for which subject; None: it is not metered.
Bill = tuple[str, str]


@dataclass(frozen=True)
class Period:
    """What requests are billed as from the time when a change was written; all of them from `in_force_at` on."""

    bill: Bill | None
    written_at: float
    in_force_at: float


class Changes:
    """Writes changes, and remembers when; at the end looks whether each request was billed as it had to be."""

    def __init__(self, writable: Writable, collectors: Mapping[str, CollectorProcess]) -> None:
        self._writable = writable
        self._collectors = collectors
        self._periods = [Period(None, 0.0, 0.0)]

    def make(self, write: Callable[[], Any], bill: Bill | None) -> Any:
        """Make a change after which requests are billed so; give what `write` gives."""
        self._periods.append(Period(bill, time.time(), float("inf")))
        return write()

    def settle(self, answered: Sequence[Answered] = ()) -> None:
        """Wait until the last change is in force: these requests are over, log phase and all, and each worker has it.

        What is still under way with the configuration of before brings that back: Kong starts an instance of it, and a
        request that comes meanwhile may meet it, whatever it was to run with.
        """
        self._wait_for_bills(answered)
        self._writable.settle()
        self._periods[-1] = replace(self._periods[-1], in_force_at=time.time())

    def check(self, answered: Sequence[Answered]) -> None:
        """Wait until all that has to be billed is, and fail if something else is, or something twice."""
        assert {one.status for one in answered} == {200}
        self._wait_for_bills(answered)
        wait_until(self._nothing_waits, "nothing waits", self._writable.gateway)
        billed = self._billed()
        bills = {one: billed.get(one.number, [None]) for one in answered}
        assert {one: found for one, found in bills.items() if len(found) > 1} == {}
        assert {one: found for one, found in bills.items() if found[0] not in self._allowed(one)} == {}
        in_force = {period.bill for period in self._periods if period.in_force_at < float("inf")}
        assert in_force <= {found[0] for found in bills.values()}

    def _wait_for_bills(self, answered: Sequence[Answered]) -> None:
        certain = {one.number for one in answered if None not in self._allowed(one)}

        def are_billed() -> bool:
            time.sleep(_POLL_SECONDS)
            return certain <= self._billed().keys()

        wait_until(are_billed, "all are billed", self._writable.gateway)

    def _allowed(self, one: Answered) -> set[Bill | None]:
        """List what a request may be billed as: what began before its answer, and was not over when it was sent."""
        begun = [period for period in self._periods if period.written_at <= one.answered_at]
        over = [number for number, period in enumerate(begun) if period.in_force_at <= one.sent_at]
        return {period.bill for period in begun[over[-1] :]}

    def _billed(self) -> Mapping[int, Sequence[Bill | None]]:
        billed: dict[int, list[Bill | None]] = {}
        for name, collector in self._collectors.items():
            for event in collector.client.events():
                billed.setdefault(number_of(event.data), []).append((name, event.subject))
        return billed

    def _nothing_waits(self) -> bool:
        return int(plugin_status(self._writable.gateway)["waiting"]) == 0


@pytest.fixture(scope="module")
def entities(writable: Writable, upstream: UpstreamProcess) -> Mapping[str, str]:
    """Give the ids of a service, its route `/echo` and the consumer who asks for it, by their kinds."""
    admin = writable.admin
    service = admin.create("services", {"name": "echo", "url": upstream.url})
    route = admin.create("routes", {"name": "echo", "paths": ["/echo"], "service": {"id": service}})
    consumer = admin.create("consumers", {"username": "alice"})
    admin.create("keyauth_credentials", {"key": KEY, "consumer": {"id": consumer}})
    admin.create("plugins", {"name": "key-auth", "service": {"id": service}})
    writable.settle()
    return {"service": service, "route": route, "consumer": consumer}


@pytest.fixture
def other() -> Iterator[CollectorProcess]:
    with CollectorProcess(tokens=["om_token"]) as collector:
        yield collector


@pytest.fixture
def changes(writable: Writable, collector: CollectorProcess, other: CollectorProcess) -> Changes:
    return Changes(writable, {"collector": collector, "other": other})


def by(header: str) -> dict[str, Any]:
    return {"look_up_value_in": "header", "field": header}


@pytest.mark.parametrize("scope", ["global", "service", "route", "consumer"])
def test_a_plugin_that_is_created_and_removed_meters_in_between(
    scope: str, writable: Writable, entities: Mapping[str, str], changes: Changes, collector: CollectorProcess
) -> None:
    place = {} if scope == "global" else {scope: {"id": entities[scope]}}
    plugin = metering(collector.ingest_v1, subject=by("x-one")) | place
    with Load(writable.gateway.proxy_port, headers=BOTH) as load:
        load.wait_for(20)
        for _ in range(2):
            created = changes.make(lambda: writable.admin.create("plugins", plugin), ("collector", "one"))
            load.wait_for(20)
            changes.settle()
            load.wait_for(30)
            changes.make(partial(writable.admin.delete, "plugins", created), None)
            load.wait_for(20)
            changes.settle()
            load.wait_for(30)
    changes.check([*load.answered().values()])


@pytest.mark.parametrize("what", ["subject", "endpoint", "both"])
def test_a_plugin_that_is_changed_meters_each_request_by_one_of_its_configurations(  # noqa: PLR0913, PLR0917 - fixtures
    what: str,
    writable: Writable,
    entities: Mapping[str, str],
    changes: Changes,
    collector: CollectorProcess,
    other: CollectorProcess,
) -> None:
    """At first each change is waited for, then many follow one another."""
    first: dict[str, Any] = {"ingest_endpoint": collector.ingest_v1, "subject": by("x-one")}
    others: Mapping[str, tuple[dict[str, Any], Bill]] = {
        "subject": ({"subject": by("x-two")}, ("collector", "two")),
        "endpoint": ({"ingest_endpoint": other.ingest_v1}, ("other", "one")),
        "both": ({"ingest_endpoint": other.ingest_v1, "subject": by("x-two")}, ("other", "two")),
    }
    changed, bill_when_changed = others[what]
    ways = [(first | changed, bill_when_changed), (first, ("collector", "one"))]
    plugin = metering(collector.ingest_v1, subject=by("x-one")) | {"route": {"id": entities["route"]}}
    plugin_id = changes.make(lambda: writable.admin.create("plugins", plugin), ("collector", "one"))
    changes.settle()

    def change(load: Load, number: int) -> None:
        config, bill = ways[number % 2]
        load.wait_for(10)
        changes.make(lambda: writable.admin.change("plugins", plugin_id, {"config": config}), bill)
        load.wait_for(10)

    # What waits at an endpoint that has accepted nothing yet would go to the next one: it was configured wrong.
    with Load(writable.gateway.proxy_port, headers=BOTH, first=10_000_000) as load:
        load.wait_for(10)
    answered = [*load.answered().values()]
    changes.settle(answered)
    for number in range(4):
        with Load(writable.gateway.proxy_port, headers=BOTH, first=number * 1_000_000) as load:
            for one in range(1 if number < _ALONE else _IN_A_ROW):
                change(load, number + one)
        answered += load.answered().values()
        changes.settle(answered)
    with Load(writable.gateway.proxy_port, headers=BOTH, first=4_000_000) as load:
        load.wait_for(30)
        changes.make(lambda: writable.admin.delete("plugins", plugin_id), None)
        load.wait_for(20)
        changes.settle()
        load.wait_for(20)
    changes.check([*answered, *load.answered().values()])
