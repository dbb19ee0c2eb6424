"""Restarts, reloads and troubles of the endpoint: traffic goes on, and the right configuration meters it."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from kong_metering_sandbox.collector.faults import FaultRule
from kong_metering_sandbox.gateways import Gateway, wait_for
from kong_metering_sandbox.status import plugin_status
from tests.e2e.balance import bill, own_lines, stop_with_nothing_more
from tests.e2e.declarative import document, metering, route, service
from tests.e2e.traffic import Header, get

if TYPE_CHECKING:
    from kong_metering_sandbox.collector.process import CollectorProcess
    from kong_metering_sandbox.collector.records import StoredEvent
    from kong_metering_sandbox.upstream_process import UpstreamProcess
    from tests.e2e.conftest import StartGateway

pytestmark = pytest.mark.e2e
KEY_AUTH: dict[str, Any] = {"name": "key-auth"}


def counts(collector: CollectorProcess) -> dict[str, int]:
    return {usage.subject: usage.count for usage in collector.client.usage()}


def meter_until_billed(gateway: Gateway, collector: CollectorProcess, path: str, *headers: Header) -> None:
    """Ask until one request was metered: right after a restart, a worker may still meet the old process."""
    before = collector.client.stats().unique

    def billed() -> bool:
        get(gateway.proxy_port, path, *headers)
        time.sleep(0.2)
        return collector.client.stats().unique > before

    wait_for(billed, "a request is metered again", lambda: gateway.error_log[-3000:])


def metered(gateway: Gateway, collector: CollectorProcess, path: str, *headers: Header) -> list[StoredEvent]:
    """Send ten requests, and give their events, without those of requests before them, which may still arrive."""
    targets = [f"{path}/afterwards/{number}" for number in range(10)]
    for target in targets:
        assert get(gateway.proxy_port, target, *headers) == 200

    def arrived() -> list[StoredEvent]:
        return [event for event in collector.client.events() if (event.data or {})["request_uri"] in targets]

    wait_for(lambda: len(arrived()) >= len(targets), "all of them are metered", lambda: own_lines(gateway))
    return arrived()


def test_after_a_killed_plugin_server_each_route_runs_with_its_own_configuration(
    start_gateway: StartGateway, upstream: UpstreamProcess, collector: CollectorProcess
) -> None:
    def routed(name: str) -> dict[str, object]:
        plugin = metering(collector.ingest_v1, subject={"look_up_value_in": "header", "field": f"x-{name}"})
        return route(name, plugins=[plugin])

    gateway = start_gateway(document(service(upstream.url, "echo", routed("a"), routed("b"))))
    both = [("X-A", "subject-a"), ("X-B", "subject-b")]
    for _ in range(10):
        get(gateway.proxy_port, "/a", *both)
        get(gateway.proxy_port, "/b", *both)
    collector.client.wait_for_events(20)
    gateway.kill_plugin_server()
    gateway.wait_for_plugin_server()
    # The other way round, so that ids handed out again from the start would give each route the other's instance.
    meter_until_billed(gateway, collector, "/b", *both)
    meter_until_billed(gateway, collector, "/a", *both)
    events = metered(gateway, collector, "/b", *both)
    assert [event.subject for event in events] == ["subject-b"] * 10
    assert {(event.data or {})["route_name"] for event in events} == {"b"}


@pytest.mark.parametrize("kill", [Gateway.kill_plugin_server, Gateway.kill_supervisor])
def test_traffic_and_metering_go_on_when_a_process_of_the_plugin_server_was_killed(
    kill: Callable[[Gateway], int], start_gateway: StartGateway, upstream: UpstreamProcess, collector: CollectorProcess
) -> None:
    gateway = start_gateway(document(service(upstream.url), plugins=[metering(collector.ingest_v1)]))
    for _ in range(40):  # each worker has its instance now
        assert get(gateway.proxy_port, "/echo", ("X-Tenant-Id", "acme")) == 200
    collector.client.wait_for_events(40)
    kill(gateway)
    # Only what was under way could fail, and nothing is.
    assert {get(gateway.proxy_port, "/echo", ("X-Tenant-Id", "acme")) for _ in range(20)} == {200}
    collector.client.wait_for_events(60)
    stop_with_nothing_more(gateway, collector)


def test_the_clients_own_header_counts_though_the_server_that_read_it_was_killed(
    start_gateway: StartGateway, upstream: UpstreamProcess, collector: CollectorProcess
) -> None:
    """It is killed while requests wait for their answer; a later plugin has removed the header, or made it another."""
    without = {"name": "request-transformer", "config": {"remove": {"headers": ["x-tenant-id"]}}}
    other = {"name": "request-transformer", "config": {"replace": {"headers": ["x-tenant-id:gateway"]}}}
    transformers = {"without": without, "other": other}
    services = [service(upstream.url, name, plugins=[each]) for name, each in transformers.items()]
    gateway = start_gateway(document(*services, plugins=[metering(collector.ingest_v1)]))
    for _ in range(40):  # each worker has its instance now
        assert get(gateway.proxy_port, "/other", ("X-Tenant-Id", "early")) == 200
    collector.client.wait_for_events(40)
    with ThreadPoolExecutor(20) as clients:
        slow = [(f"/{path}/slow/3", f"{path}-{number}") for path in transformers for number in range(10)]
        asked = [clients.submit(get, gateway.proxy_port, path, ("X-Tenant-Id", subject)) for path, subject in slow]
        time.sleep(1)
        for _ in range(2):
            gateway.kill_plugin_server()
            gateway.wait_for_plugin_server()
        assert [answer.result() for answer in asked] == [200] * len(slow)
    collector.client.wait_for_events(40 + len(slow))
    stop_with_nothing_more(gateway, collector)
    assert counts(collector) == {"early": 40} | {subject: 1 for _, subject in slow}


def test_a_reload_meters_with_the_new_configuration_and_loses_nothing(
    start_gateway: StartGateway, upstream: UpstreamProcess, collector: CollectorProcess
) -> None:
    def with_header(name: str) -> str:
        plugin = metering(
            collector.ingest_v1,
            subject={"look_up_value_in": "header", "field": name},
            queue={"max_batch_size": 20, "max_coalescing_delay": 0.05},
        )
        return document(service(upstream.url), plugins=[plugin])

    gateway = start_gateway(with_header("x-old"))
    both = [("X-Old", "old"), ("X-New", "new")]
    asked = [get(gateway.proxy_port, "/echo", *both) for _ in range(50)]
    with ThreadPoolExecutor(2) as clients:
        traffic = [clients.submit(lambda: get(gateway.proxy_port, "/echo", *both)) for _ in range(200)]
        gateway.reload(with_header("x-new"))
        asked += [answer.result() for answer in traffic]
    answered = asked.count(200)
    assert answered == len(asked)
    meter_until_billed(gateway, collector, "/echo", *both)
    collector.client.wait_for_events(answered + 1)
    assert [event.subject for event in metered(gateway, collector, "/echo", *both)] == ["new"] * 10


def test_a_worker_meters_each_request_from_the_moment_that_it_has_the_plugin(
    start_gateway: StartGateway, upstream: UpstreamProcess, collector: CollectorProcess
) -> None:
    """Workers get a configuration one after the other: what else it has done to an answer tells who had it by then."""
    # Another plugin is left each time: see the next test.
    echo = service(upstream.url, "echo", route("echo"), route("other", plugins=[KEY_AUTH]))
    marked = {"name": "request-termination", "config": {"status_code": 418}}
    without = document(echo)
    having = document(echo, plugins=[metering(collector.ingest_v1), marked])
    gateway = start_gateway(without)
    numbers = itertools.count()
    had_it: set[int] = set()

    def ask(times: int) -> set[int]:
        answers = set()
        for number in itertools.islice(numbers, times):
            answers.add(status := get(gateway.proxy_port, f"/echo/{number}", ("X-Tenant-Id", "acme")))
            if status == 418:
                had_it.add(number)
        return answers

    for _ in range(10):
        gateway.configure(having)
        ask(30)
        gateway.configure(without)
        wait_for(lambda: ask(10) == {200}, "no worker has the plugin", lambda: own_lines(gateway))
    assert had_it
    collector.client.wait_for_events(len(had_it))
    stop_with_nothing_more(gateway, collector)
    assert bill(collector) == dict.fromkeys(had_it, 1)


@pytest.mark.parametrize(("left", "billed"), [([], 0), ([KEY_AUTH], 1)], ids=["none", "another"])
def test_what_is_under_way_when_a_plugin_is_deleted_is_billed_unless_it_was_the_last_one(
    left: list[dict[str, Any]],
    billed: int,
    start_gateway: StartGateway,
    upstream: UpstreamProcess,
    collector: CollectorProcess,
) -> None:
    """Without any plugin Kong 3.9.3 runs no log phase, whatever a request began with (docs/troubleshooting.md)."""
    echo, other = route("echo"), route("other", plugins=left)
    with_all = service(upstream.url, "echo", echo, other, route("gone"))
    gateway = start_gateway(document(with_all, plugins=[metering(collector.ingest_v1)]))
    with ThreadPoolExecutor(1) as client:
        answer = client.submit(get, gateway.proxy_port, "/echo/slow/8", ("X-Tenant-Id", "acme"))
        wait_for(lambda: plugin_status(gateway)["instances_started"], "it has begun", lambda: own_lines(gateway))
        gateway.configure(document(service(upstream.url, "echo", echo, other)))
        wait_for(
            lambda: {get(gateway.proxy_port, "/gone") for _ in range(10)} == {404},
            "all workers have the configuration",
            lambda: own_lines(gateway),
        )
        assert not answer.done()
        assert answer.result() == 200
    collector.client.wait_for_events(billed)
    stop_with_nothing_more(gateway, collector)
    assert len(collector.client.events()) == billed


def test_events_wait_while_the_endpoint_is_down_and_arrive_once_it_is_back(
    start_gateway: StartGateway, upstream: UpstreamProcess, collector: CollectorProcess
) -> None:
    gateway = start_gateway(document(service(upstream.url), plugins=[metering(collector.ingest_v1)]))
    assert get(gateway.proxy_port, "/echo", ("X-Tenant-Id", "before")) == 200
    collector.client.wait_for_events(1)
    collector.pause()
    for _ in range(30):
        assert get(gateway.proxy_port, "/echo", ("X-Tenant-Id", "meanwhile")) == 200
    collector.resume()
    collector.client.wait_for_events(31, timeout=30)
    assert counts(collector) == {"before": 1, "meanwhile": 30}


def test_answers_that_ask_to_come_back_later_lose_nothing(
    start_gateway: StartGateway, upstream: UpstreamProcess, collector: CollectorProcess
) -> None:
    collector.client.faults(
        FaultRule(status=503, times=2),
        FaultRule(status=429, headers={"Retry-After": "1"}, times=1),
        FaultRule(status=401, times=1),
        FaultRule(reset="before", times=1),
        FaultRule(status=500, store=True, times=1),
    )
    gateway = start_gateway(document(service(upstream.url), plugins=[metering(collector.ingest_v3)]))
    for _ in range(50):
        assert get(gateway.proxy_port, "/echo", ("X-Tenant-Id", "acme")) == 200
    collector.client.wait_for_events(50, timeout=30)
    assert counts(collector) == {"acme": 50}
    assert collector.client.stats().conflicts == 0


def test_a_wrong_token_is_said_clearly_in_the_gateways_log(
    start_gateway: StartGateway, upstream: UpstreamProcess, collector: CollectorProcess
) -> None:
    plugin = metering(collector.ingest_v1, api_token="om_wrong_token")
    gateway = start_gateway(document(service(upstream.url), plugins=[plugin]))

    def errors() -> list[str]:
        get(gateway.proxy_port, "/echo", ("X-Tenant-Id", "acme"))
        return [line for line in gateway.error_log.splitlines() if "[error]" in line and "answered 401" in line]

    wait_for(errors, "an error tells of the refused token", lambda: gateway.error_log[-3000:])
    assert "is api_token right" in errors()[0]
    assert "om_wrong_token" not in gateway.error_log


def test_a_rotated_token_delivers_what_the_endpoint_had_refused(
    start_gateway: StartGateway, upstream: UpstreamProcess, collector: CollectorProcess
) -> None:
    """The plugin has an id of its own, as every plugin entity in a database has."""

    def with_token(token: str) -> str:
        plugin = metering(collector.ingest_v1, api_token=token) | {"id": "276df434-3e72-5032-b483-19156b86f1ca"}
        return document(service(upstream.url), plugins=[plugin])

    gateway = start_gateway(with_token("om_token"))
    assert get(gateway.proxy_port, "/echo", ("X-Tenant-Id", "before")) == 200
    collector.client.wait_for_events(1)
    collector.client.set_tokens(["om_next"])
    gateway.reload(with_token("om_next"))
    meter_until_billed(gateway, collector, "/echo", ("X-Tenant-Id", "after"))
    assert counts(collector)["after"] >= 1


def test_what_a_stop_does_not_deliver_the_next_start_does(
    start_gateway: StartGateway, upstream: UpstreamProcess, collector: CollectorProcess
) -> None:
    """Kong grants a plugin server 30 ms at a stop; what is not delivered by then waits on disk."""
    plugin = metering(collector.ingest_v1, queue={"max_batch_size": 1})
    gateway = start_gateway(document(service(upstream.url), plugins=[plugin]))
    for number in range(20):
        assert get(gateway.proxy_port, f"/echo/{number}", ("X-Tenant-Id", "acme")) == 200
    gateway.stop()
    wait_for(lambda: gateway.plugin_server_pids() == [], "the plugin server has ended")
    gateway.start()
    # With the first request Kong starts an instance of the plugin, and that brings the token.
    assert get(gateway.proxy_port, "/echo/20", ("X-Tenant-Id", "acme")) == 200
    wait_for(
        lambda: len(bill(collector)) == 21,
        "all requests are billed",
        lambda: f"{bill(collector)}\n{own_lines(gateway)}",
    )
    gateway.stop()
    assert bill(collector) == Counter(range(21)), "each once by its id"
    assert collector.client.stats().conflicts == 0
