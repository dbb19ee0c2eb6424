"""Whatever happens to the gateway, the plugin server or the endpoint: each answered request is billed, and once.

The gateway answers numbered requests meanwhile; their numbers are in the events. What was answered is compared with
what the collector holds at the end.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kong_metering_sandbox.collector.faults import FaultRule
from kong_metering_sandbox.collector.tokens import fingerprint
from tests.e2e.balance import (
    account,
    bill,
    check_bill,
    check_files,
    check_nothing_is_left,
    kong_metering,
    number_of,
    own_lines,
    spool_of,
    spooled,
    wait_for_bill,
    wait_until,
    waiting_on_disk,
)
from tests.e2e.declarative import document, metering, route, service
from tests.e2e.traffic import Load
from tests.support.ingest import IngestServer

if TYPE_CHECKING:
    from kong_metering_sandbox.collector.process import CollectorProcess
    from kong_metering_sandbox.gateways import Gateway
    from kong_metering_sandbox.upstream_process import UpstreamProcess
    from tests.e2e.conftest import StartGateway
    from tests.e2e.traffic import Answered
    from tests.support.posts import Post

pytestmark = pytest.mark.e2e

# Batches that wait for a while, so that there is always something to lose; and short pauses after a failure.
QUEUE = {"max_batch_size": 100, "max_coalescing_delay": 0.5, "max_retry_delay": 0.5}
# The log phase runs after the response: so long before a kill it is surely over.
LOG_PHASE_SECONDS = 0.1
PLUGIN_A = "276df434-3e72-5032-b483-19156b86f1ca"
PLUGIN_B = "7b61a1ee-29a5-5b43-a39c-3dc1c9d5a85b"

changed_at_a_restart = pytest.param("restart", marks=pytest.mark.db_less)


def one_plugin(upstream: UpstreamProcess, endpoint: str, **config: Any) -> str:
    return document(service(upstream.url), plugins=[metering(endpoint, queue=QUEUE, **config)])


def finish(gateway: Gateway, collector: CollectorProcess, answered: Mapping[int, Answered]) -> None:
    """Wait until every answered request is billed, and check that none is twice and that nothing is left on disk."""
    wait_for_bill(gateway, collector, answered.values())
    account(gateway)
    gateway.stop()
    assert check_bill(collector, answered) == []
    check_nothing_is_left(gateway)


def start_under_load(gateway: Gateway, load: Load, declarative: str | None = None) -> None:
    """Start the gateway, and forgive it the answers 500 that it gives as long as its plugin server does not serve."""
    begins_at = time.time()
    gateway.start(declarative)
    ends_at = time.time()
    load.forgive(lambda one: one.status == 500 and begins_at < one.sent_at < ends_at)


# ------------------------------------------------------------------------------------------ stops, reloads and crashes


def test_a_stop_under_load_loses_nothing(
    start_gateway: StartGateway, upstream: UpstreamProcess, collector: CollectorProcess
) -> None:
    gateway = start_gateway(one_plugin(upstream, collector.ingest_v1))
    with Load(gateway.proxy_port) as load:
        for _ in range(3):
            load.wait_for(200)
            gateway.stop()
            start_under_load(gateway, load)
        load.wait_for(200)
    finish(gateway, collector, load.answered())


def test_a_reload_under_load_loses_nothing(
    start_gateway: StartGateway, upstream: UpstreamProcess, collector: CollectorProcess
) -> None:
    """The load goes on until the old plugin server, which delivers its own events, has ended.

    Kong ends it with the old worker, whose last request may be over soon.
    """
    gateway = start_gateway(one_plugin(upstream, collector.ingest_v1))
    with Load(gateway.proxy_port) as load:
        load.wait_for(200)
        (old,) = gateway.plugin_server_pids()
        gateway.reload()
        wait_until(lambda: old not in gateway.plugin_server_pids(), "the old plugin server ends", gateway)
        load.wait_for(200)
    finish(gateway, collector, load.answered())


@pytest.mark.parametrize("way", ["configure", changed_at_a_restart])
def test_a_corrected_url_delivers_what_waited_for_the_wrong_one(
    start_gateway: StartGateway, upstream: UpstreamProcess, collector: CollectorProcess, way: str
) -> None:
    def sending_to(endpoint: str) -> str:
        plugin = metering(endpoint, queue=QUEUE) | {"id": PLUGIN_A}
        return document(service(upstream.url), plugins=[plugin])

    gateway = start_gateway(sending_to(f"{collector.ingest_v1}-wrong"))
    corrected = sending_to(collector.ingest_v1)
    with Load(gateway.proxy_port) as load:
        load.wait_for(100)
        if way == "configure":
            gateway.configure(corrected)
        else:
            gateway.stop()
            start_under_load(gateway, load, corrected)
        load.wait_for(100)
    finish(gateway, collector, load.answered())
    assert "never accepted an event" in gateway.error_log


@dataclass(frozen=True)
class Gap:
    """The time from a kill until the next plugin server serves; wall clock."""

    begins_at: float
    ends_at: float

    def excuses(self, one: Answered) -> bool:
        """Whether a request may be unmetered because of it."""
        return one.answered_at > self.begins_at - LOG_PHASE_SECONDS and one.sent_at < self.ends_at


def kill_plugin_server(gateway: Gateway) -> Gap:
    begins_at = time.time()
    killed = gateway.kill_plugin_server()
    # Until it is reaped its socket may still take connections.
    wait_until(lambda: not Path(f"/proc/{killed}").exists(), "the plugin server is dead", gateway)
    gateway.wait_for_plugin_server()
    return Gap(begins_at, time.time())


def test_a_kill_under_load_loses_only_what_falls_into_the_gap(
    start_gateway: StartGateway, upstream: UpstreamProcess, collector: CollectorProcess
) -> None:
    gateway = start_gateway(one_plugin(upstream, collector.ingest_v1))
    gaps = []
    with Load(gateway.proxy_port) as load:
        for _ in range(4):
            load.wait_for(200)
            gaps.append(kill_plugin_server(gateway))
        load.wait_for(200)
    answered = load.answered()
    excused = {number for number, one in answered.items() if any(gap.excuses(one) for gap in gaps)}
    wait_for_bill(gateway, collector, (one for number, one in answered.items() if number not in excused))
    account(gateway)
    gateway.stop()
    unmetered = {one.number for one in check_bill(collector, answered)}
    print(f"{len(unmetered)} of {len(excused)} requests in the gaps are unmetered, of {len(answered)} in all")  # noqa: T201
    assert unmetered <= excused
    check_nothing_is_left(gateway)


# ----------------------------------------------------------------------------------------------- an endpoint that fails


def test_events_wait_for_an_endpoint_that_is_down_across_a_restart_and_arrive_in_order(
    start_gateway: StartGateway, upstream: UpstreamProcess, collector: CollectorProcess
) -> None:
    gateway = start_gateway(one_plugin(upstream, collector.ingest_v1))
    collector.pause()
    with Load(gateway.proxy_port) as load:
        load.wait_for(200)
        gateway.stop()
        (left,) = spooled(gateway)
        assert left.holder is None
        start_under_load(gateway, load)
        load.wait_for(200)
    wait_until(lambda: waiting_on_disk(gateway) >= len(load.answered()), "all events are on disk", gateway)
    wait_until(lambda: all(log.holder for log in spooled(gateway)), "the first process's events are adopted", gateway)
    logs = spooled(gateway)
    assert {log.holder for log in logs} == set(gateway.plugin_server_pids())
    assert logs[0].ids == left.ids
    check_files(gateway, "om_token")
    collector.resume()
    wait_for_bill(gateway, collector, load.answered().values())
    assert [event.id for event in collector.client.events()] == [event for log in logs for event in log.ids]
    finish(gateway, collector, load.answered())


def test_events_wait_for_an_endpoint_that_answers_503_across_a_restart(
    start_gateway: StartGateway, upstream: UpstreamProcess, collector: CollectorProcess
) -> None:
    collector.client.faults(FaultRule(status=503))
    gateway = start_gateway(one_plugin(upstream, collector.ingest_v1))
    with Load(gateway.proxy_port) as load:
        load.wait_for(200)
        gateway.stop()
        assert waiting_on_disk(gateway)
        start_under_load(gateway, load)
        load.wait_for(200)
        assert collector.client.stats().unique == 0
        collector.client.clear_faults()
        load.wait_for(200)
    finish(gateway, collector, load.answered())


# ------------------------------------------------------------------------------------------------------------ tokens


class Guarded(IngestServer):
    """An ingest endpoint that accepts one token, and keeps what others were sent."""

    def __init__(self, token: str) -> None:
        super().__init__()
        self._token = token
        self._one_at_a_time = threading.Lock()

    def take(self, post: Post) -> int:
        with self._one_at_a_time:
            self.answer_next(202 if post.headers.get("Authorization") == f"Bearer {self._token}" else 401)
            return super().take(post)

    def tokens(self) -> list[str]:
        """List the tokens of all requests, in the order of their arrival."""
        return [request.headers["Authorization"].removeprefix("Bearer ") for request in self.requests()]

    def billed(self) -> dict[int, str]:
        """Give the ids of the events that were accepted by the numbers of their requests; fail if there are two."""
        events = {(number_of(event["data"]), event["id"]) for event in self.events()}
        billed = dict(events)
        assert len(billed) == len(events)
        return billed


def two_plugins(upstream: UpstreamProcess, a: tuple[str, str], b: tuple[str, str]) -> str:
    """Configure a plugin on each of two routes, with an endpoint and a token each."""
    plugins = {
        name: metering(url, api_token=token, queue=QUEUE) | {"id": plugin_id}
        for (name, plugin_id), (url, token) in zip((("a", PLUGIN_A), ("b", PLUGIN_B)), (a, b), strict=True)
    }
    routes = [route(name, plugins=[plugin]) for name, plugin in plugins.items()]
    return document(service(upstream.url, "echo", *routes))


@pytest.mark.parametrize("way", ["configure", "reload", changed_at_a_restart])
def test_a_rotated_token_delivers_what_waits_and_no_token_goes_astray(
    start_gateway: StartGateway, upstream: UpstreamProcess, way: str
) -> None:
    """What waits is of two processes; both endpoints refuse the old tokens from the start."""
    with Guarded("om_new_a") as a, Guarded("om_new_b") as b:
        gateway = start_gateway(two_plugins(upstream, (a.url, "om_old_a"), (b.url, "om_old_b")))
        new = two_plugins(upstream, (a.url, "om_new_a"), (b.url, "om_new_b"))
        with Load(gateway.proxy_port, "/a", "/b") as load:
            load.wait_for(200)
            gateway.stop()
            start_under_load(gateway, load)
            load.wait_for(200)
            wait_until(
                lambda: all(log.holder in gateway.plugin_server_pids() for log in spooled(gateway)),
                "what the first process left is adopted",
                gateway,
            )
            check_files(gateway, "om_old_a", "om_old_b")
            assert a.events() == b.events() == []
            rotate(gateway, load, new, way)
            load.wait_for(200)
        for server, path in ((a, "/a"), (b, "/b")):
            wait_for_billed(gateway, server, load.answered(path).keys())
        wait_until(lambda: len(gateway.plugin_server_pids()) == 1, "the old plugin server has ended", gateway)
        quiet = len(a.requests()), len(b.requests())
        with load_more(gateway) as more:
            more.wait_for(100)
        wait_until(lambda: account(gateway)["waiting"] == 0, "nothing waits", gateway)

        for server, name, since in ((a, "a", quiet[0]), (b, "b", quiet[1])):
            tokens = server.tokens()
            assert set(tokens) == {f"om_old_{name}", f"om_new_{name}"}
            first_new = tokens.index(f"om_new_{name}")
            # At a reload the old process goes on with the old token until it ends.
            assert f"om_old_{name}" not in tokens[since if way == "reload" else first_new :]
            assert {event["data"]["route_name"] for event in server.events()} == {name}
        gateway.stop()
        assert spooled(gateway) == []


def wait_for_billed(gateway: Gateway, server: Guarded, numbers: AbstractSet[int]) -> None:
    wait_until(lambda: numbers <= server.billed().keys(), "all are billed", gateway)


def load_more(gateway: Gateway) -> Load:
    return Load(gateway.proxy_port, "/a", "/b", first=1_000_000)


def rotate(gateway: Gateway, load: Load, declarative: str, way: str) -> None:
    if way == "configure":
        gateway.configure(declarative)
    elif way == "reload":
        gateway.reload(declarative)
    else:
        gateway.stop()
        start_under_load(gateway, load, declarative)


# ---------------------------------------------------------------------------------------------------- what nobody sends


def test_the_events_of_a_removed_plugin_wait_on_disk_and_can_be_delivered_by_hand(
    start_gateway: StartGateway, upstream: UpstreamProcess, collector: CollectorProcess
) -> None:
    endpoint = collector.ingest_v1, "om_token"
    gateway = start_gateway(two_plugins(upstream, endpoint, endpoint))
    collector.pause()
    with Load(gateway.proxy_port, "/a", "/b") as load:
        load.wait_for(200)
    wait_until(lambda: waiting_on_disk(gateway) >= len(load.answered()), "all events are on disk", gateway)
    removed, pids = len(load.answered("/b")), gateway.plugin_server_pids()

    without_b = document(
        service(
            upstream.url,
            "echo",
            route("a", plugins=[metering(collector.ingest_v1, queue=QUEUE) | {"id": PLUGIN_A}]),
            route("b"),
        )
    )
    gateway.configure(without_b)
    assert queue_status(gateway, PLUGIN_B)["held_by"] == pids
    gateway.stop()
    gateway.start()
    collector.resume()
    with Load(gateway.proxy_port, "/a", "/b", first=1_000_000) as more:
        more.wait_for(200)
    wait_for_bill(gateway, collector, [*load.answered("/a").values(), *more.answered("/a").values()])
    assert collector.client.stats().unique == len(load.answered("/a")) + len(more.answered("/a"))

    waits = queue_status(gateway, PLUGIN_B)
    assert (waits["waiting"], waits["waiting_unheld"], waits["held_by"]) == (removed, removed, [])
    assert waits["endpoint"] == collector.ingest_v1
    arguments = ("--plugin-id", PLUGIN_B, "--token-file", "-")
    assert kong_metering(gateway, "spool", "deliver", *arguments, stdin="om_token\n")["delivered"] == removed
    assert bill(collector).keys() == {*load.answered(), *more.answered("/a")}
    assert check_bill(collector, load.answered()) == []
    gateway.stop()
    check_nothing_is_left(gateway)


def queue_status(gateway: Gateway, plugin_id: str) -> dict[str, Any]:
    queues = kong_metering(gateway, "spool", "status")["queues"]
    (found,) = [queue for queue in queues if queue["plugin_id"] == plugin_id]
    status: dict[str, Any] = found
    return status


def test_without_a_usable_spool_requests_are_metered_from_memory_and_the_log_says_so(
    gateway_class: type[Gateway], tmp_path: Path, upstream: UpstreamProcess, collector: CollectorProcess
) -> None:
    gateway = gateway_class(tmp_path / "gateway", one_plugin(upstream, collector.ingest_v1))
    spool_of(gateway).write_text("not a directory")
    with gateway:
        with Load(gateway.proxy_port) as load:
            load.wait_for(400)
        wait_for_bill(gateway, collector, load.answered().values())
        assert {one.status for one in load.answered().values()} == {200}
        account(gateway)
        assert check_bill(collector, load.answered()) == []
        said = [line for line in gateway.error_log.splitlines() if "[error]" in line and "metering-spool" in line]
        assert [line for line in said if "EVENTS CANNOT BE WRITTEN TO DISK" in line]
        # Once by whoever looks at the start (`--dump`), once for the spool, once for the queue.
        assert len(said) <= 3, said
        assert spool_of(gateway).read_text() == "not a directory"

        spool_of(gateway).unlink()
        wait_until(lambda: spool_of(gateway).is_dir(), "the spool is made, now that it can be", gateway)
        collector.pause()
        with Load(gateway.proxy_port, first=1_000_000) as more:
            more.wait_for(100)
        wait_until(lambda: waiting_on_disk(gateway) >= len(more.answered()), "events are on disk again", gateway)
        collector.resume()
        finish(gateway, collector, more.answered())


def test_files_on_disk_are_private_and_hold_no_token(
    start_gateway: StartGateway, upstream: UpstreamProcess, collector: CollectorProcess
) -> None:
    token = "om_token_that_nobody_may_see"
    collector.client.faults(FaultRule(status=503))
    collector.client.set_tokens([token])
    gateway = start_gateway(one_plugin(upstream, collector.ingest_v1, api_token=token))
    with Load(gateway.proxy_port) as load:
        load.wait_for(100)
    wait_until(lambda: waiting_on_disk(gateway) >= len(load.answered()), "all events are on disk", gateway)
    check_files(gateway, token)
    gateway.stop()
    check_files(gateway, token)
    assert waiting_on_disk(gateway) == len(load.answered())
    gateway.start()
    collector.client.clear_faults()
    with Load(gateway.proxy_port, first=1_000_000) as more:
        more.wait_for(10)
    wait_for_bill(gateway, collector, [*load.answered().values(), *more.answered().values()])
    assert {event.token for event in collector.client.events()} == {fingerprint(f"Bearer {token}")}
    gateway.stop()
    check_nothing_is_left(gateway)
    check_files(gateway, token)
    assert token not in own_lines(gateway, 1_000_000)
