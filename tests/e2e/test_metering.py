"""Who is billed for what: requests through the gateway, events in the collector."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.e2e.balance import stop_with_nothing_more
from tests.e2e.declarative import consumer, document, metering, metering_at_once, route, service
from tests.e2e.traffic import exchange, get

if TYPE_CHECKING:
    from kong_metering_sandbox.collector.process import CollectorProcess
    from kong_metering_sandbox.gateways import Gateway
    from kong_metering_sandbox.upstream_process import UpstreamProcess
    from tests.e2e.conftest import StartGateway

pytestmark = pytest.mark.e2e


def subjects(collector: CollectorProcess) -> list[str]:
    return [event.subject for event in collector.client.events()]


def test_each_request_with_a_subject_gives_one_event(
    start_gateway: StartGateway, upstream: UpstreamProcess, collector: CollectorProcess
) -> None:
    gateway = start_gateway(document(service(upstream.url), plugins=[metering(collector.ingest_v1)]))
    for number in range(60):
        assert get(gateway.proxy_port, f"/echo/{number}?n={number}", ("X-Tenant-Id", f"tenant-{number % 3}")) == 200
        assert get(gateway.proxy_port, "/echo/unidentified") == 200
    collector.client.wait_for_events(60)
    stop_with_nothing_more(gateway, collector)
    usage = {item.subject: item.count for item in collector.client.usage()}
    assert usage == {"tenant-0": 20, "tenant-1": 20, "tenant-2": 20}
    assert collector.client.stats().duplicates == 0


def test_the_event_tells_what_the_request_was(
    start_gateway: StartGateway, upstream: UpstreamProcess, collector: CollectorProcess
) -> None:
    gateway = start_gateway(document(service(upstream.url), plugins=[metering(collector.ingest_v3)]))
    agent = ("User-Agent", "tests/1")
    assert get(gateway.proxy_port, "/echo/status/404?secret=1", ("X-Tenant-Id", "acme"), agent) == 404
    collector.client.wait_for_events(1)
    (event,) = collector.client.events()
    assert (event.type, event.source, event.subject) == ("kong.api_request", "echo", "acme")
    data = dict(event.data or {})
    sizes = data.pop("request_size_bytes"), data.pop("response_size_bytes")
    assert all(isinstance(size, int) and size > 50 for size in sizes)
    assert all(data.pop(name) for name in ("route_id", "service_id"))
    assert data == {
        "client_ip": "127.0.0.1",
        "request_host": "api.example",
        "request_method": "GET",
        "request_uri": "/echo/status/404",
        "request_user_agent": "tests/1",
        "response_http_status": 404,
        "route_name": "echo",
        "service_name": "echo",
        "service_port": upstream.port,
        "service_protocol": "http",
        "subject_type": "header",
        "upstream_status": 404,
    }


def test_requests_that_kong_answers_itself_are_metered_by_their_header(
    start_gateway: StartGateway, upstream: UpstreamProcess, collector: CollectorProcess
) -> None:
    guarded = service(upstream.url, "guarded", plugins=[{"name": "key-auth"}])
    limited = service(
        upstream.url, "limited", plugins=[{"name": "rate-limiting", "config": {"hour": 1, "policy": "local"}}]
    )
    closed = service(upstream.url, "closed", plugins=[{"name": "request-termination", "config": {"status_code": 503}}])
    gateway = start_gateway(document(guarded, limited, closed, plugins=[metering(collector.ingest_v1)]))
    tenant = ("X-Tenant-Id", "acme")
    assert [get(gateway.proxy_port, path, tenant) for path in ("/guarded", "/closed", "/nowhere")] == [401, 503, 404]
    assert [get(gateway.proxy_port, "/limited", tenant) for _ in range(2)] == [200, 429]
    collector.client.wait_for_events(5)
    statuses = {(event.data or {})["response_http_status"] for event in collector.client.events()}
    assert statuses == {200, 401, 404, 429, 503}
    no_route = next(event for event in collector.client.events() if (event.data or {})["response_http_status"] == 404)
    assert no_route.source == "kong-gateway"
    assert "route_id" not in (no_route.data or {})


def test_the_clients_own_header_counts_whatever_other_plugins_do_to_it(
    start_gateway: StartGateway, upstream: UpstreamProcess, collector: CollectorProcess
) -> None:
    def transformed(name: str, **config: object) -> dict[str, object]:
        return service(upstream.url, name, plugins=[{"name": "request-transformer", "config": config}])

    gateway = start_gateway(
        document(
            transformed("removed", remove={"headers": ["x-tenant-id"]}),
            transformed("renamed", rename={"headers": ["x-tenant-id:x-other"]}),
            transformed("added", add={"headers": ["x-tenant-id:injected"]}),
            transformed("replaced", replace={"headers": ["x-tenant-id:injected"]}),
            plugins=[metering(collector.ingest_v1)],
        )
    )
    for path in ("/removed", "/renamed", "/replaced", "/added"):
        assert get(gateway.proxy_port, path, ("X-Tenant-Id", path[1:])) == 200
    assert get(gateway.proxy_port, "/added") == 200, "a header that only a plugin sends bills nobody"
    collector.client.wait_for_events(4)
    stop_with_nothing_more(gateway, collector)
    assert sorted(subjects(collector)) == ["added", "removed", "renamed", "replaced"]


def test_consumers_are_billed_by_id_or_by_a_field(
    start_gateway: StartGateway, upstream: UpstreamProcess, collector: CollectorProcess
) -> None:
    def by(name: str, **subject: str) -> dict[str, object]:
        plugin = metering(collector.ingest_v1, subject={"look_up_value_in": "consumer", **subject})
        return service(upstream.url, name, plugins=[plugin, {"name": "key-auth"}])

    gateway = start_gateway(
        document(
            by("id"),
            by("username", field="username"),
            by("custom", field="custom_id"),
            consumers=[consumer("alice", custom_id="A-1", id="b32379d9-3d28-5683-a79c-72139be6e34f")],
        )
    )
    for path in ("/id", "/username", "/custom"):
        assert get(gateway.proxy_port, path, ("apikey", "key-alice")) == 200
        assert get(gateway.proxy_port, path) == 401
    collector.client.wait_for_events(3)
    stop_with_nothing_more(gateway, collector)
    found = {event.subject: (event.data or {})["subject_type"] for event in collector.client.events()}
    assert found == {
        "consumer:b32379d9-3d28-5683-a79c-72139be6e34f": "consumer_id",
        "alice": "consumer_username",
        "A-1": "consumer_custom_id",
    }


@pytest.mark.parametrize(
    ("query", "subject"),
    [
        ("tenant=acme", "acme"),
        ("a=1&tenant=acme&tenant=globex", "acme"),
        ("tenant=&tenant=acme", "acme"),
        ("tenant&tenant=acme", "acme"),
        ("t%65nant=%61cme%20inc", "acme inc"),
        ("tenant=acme+inc", "acme inc"),
        ("tenant=a;tenant=b", "a;tenant=b"),
        ("tenant=%zz%4", "%zz%4"),
        ("tenant=caf%E9", "café"),
        ("tenant=caf%C3%A9", "café"),
        ("&".join(f"a{n}=1" for n in range(150)) + "&tenant=acme", "acme"),
        ("tenant[]=acme", None),
        ("tenant=%20", None),
        ("", None),
    ],
)
def test_query_arguments_are_read_from_the_request_target(
    query: str, subject: str | None, query_gateway: tuple[int, CollectorProcess]
) -> None:
    port, collector = query_gateway
    collector.client.reset()
    assert get(port, f"/echo?{query}") == 200
    assert get(port, "/echo?tenant=last") == 200
    collector.client.wait_for_events(1 if subject is None else 2)
    # Two workers of the gateway: whose log phase comes first is chance.
    assert sorted(subjects(collector)) == sorted([*([] if subject is None else [subject]), "last"])


@pytest.fixture(scope="module")
def query_gateway(
    gateway_class: type[Gateway],
    tmp_path_factory: pytest.TempPathFactory,
    upstream: UpstreamProcess,
    shared_collector: CollectorProcess,
) -> Iterator[tuple[int, CollectorProcess]]:
    """One gateway for all query strings: they do not disturb one another."""
    plugin = metering_at_once(shared_collector.ingest_v1, subject={"look_up_value_in": "query", "field": "tenant"})
    directory = tmp_path_factory.mktemp("query")
    with gateway_class(directory / "gateway", document(service(upstream.url), plugins=[plugin])) as gateway:
        yield gateway.proxy_port, shared_collector


def test_a_more_specific_plugin_replaces_a_general_one(
    start_gateway: StartGateway, upstream: UpstreamProcess, collector: CollectorProcess
) -> None:
    special = route("special", plugins=[metering(collector.ingest_v1, subject=header("x-special"))])
    gateway = start_gateway(
        document(service(upstream.url, "echo", route("plain"), special), plugins=[metering(collector.ingest_v1)])
    )
    both = [("X-Tenant-Id", "general"), ("X-Special", "special")]
    assert get(gateway.proxy_port, "/plain", *both) == 200
    assert get(gateway.proxy_port, "/special", *both) == 200
    collector.client.wait_for_events(2)
    stop_with_nothing_more(gateway, collector)
    assert sorted(subjects(collector)) == ["general", "special"]


def header(name: str) -> dict[str, str]:
    return {"look_up_value_in": "header", "field": name}


def test_malformed_requests_are_metered_and_harm_nothing(
    start_gateway: StartGateway, upstream: UpstreamProcess, collector: CollectorProcess
) -> None:
    gateway = start_gateway(document(service(upstream.url), plugins=[metering(collector.ingest_v1)]))
    assert exchange(gateway.proxy_port, b"GET / HTTP/1.1\r\n\r\n") == 400
    assert exchange(gateway.proxy_port, b"nonsense\r\n\r\n") in (400, 0)
    assert get(gateway.proxy_port, "/echo", ("X-Tenant-Id", "acme")) == 200
    collector.client.wait_for_events(1)
    stop_with_nothing_more(gateway, collector)
    assert subjects(collector) == ["acme"]
