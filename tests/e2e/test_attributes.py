"""Attributes and allowed status codes: what clients send and what is answered, through the gateway."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.e2e.balance import stop_with_nothing_more
from tests.e2e.declarative import consumer, document, metering, service
from tests.e2e.traffic import get
from tests.support.settings import attribute

if TYPE_CHECKING:
    from kong_metering_sandbox.collector.process import CollectorProcess
    from kong_metering_sandbox.upstream_process import UpstreamProcess
    from tests.e2e.conftest import StartGateway

pytestmark = pytest.mark.e2e

TENANT = ("X-Tenant-Id", "acme")


def transformer(**config: object) -> dict[str, object]:
    return {"name": "request-transformer", "config": config}


def metered(collector: CollectorProcess) -> dict[str, dict[str, object]]:
    """Give the data of all events by the path of their request."""
    return {str((event.data or {})["request_uri"]): event.data or {} for event in collector.client.events()}


def test_attributes_are_what_the_client_sent_whatever_other_plugins_do(
    start_gateway: StartGateway, upstream: UpstreamProcess, collector: CollectorProcess
) -> None:
    attributes = [attribute("header", "x-department", "department"), attribute("query", "plan", "pricing_plan")]
    names = {"headers": ["x-department"], "querystring": ["plan"]}
    values = {"headers": ["x-department:injected"], "querystring": ["plan:injected"]}
    gateway = start_gateway(
        document(
            service(upstream.url, "plain"),
            service(upstream.url, "removed", plugins=[transformer(remove=names)]),
            service(upstream.url, "replaced", plugins=[transformer(replace=values)]),
            service(upstream.url, "added", plugins=[transformer(add=values)]),
            plugins=[metering(collector.ingest_v3, attributes=attributes)],
        )
    )
    department = ("X-Department", "engineering")
    for path in ("/plain", "/removed", "/replaced"):
        assert get(gateway.proxy_port, f"{path}?a=1&plan=gold%20plus", TENANT, department) == 200
    assert get(gateway.proxy_port, "/added", TENANT) == 200
    assert get(gateway.proxy_port, "/plain/blank?plan=", TENANT, ("X-Department", "")) == 200
    collector.client.wait_for_events(5)
    stop_with_nothing_more(gateway, collector)
    found = {path: (data.get("department"), data.get("pricing_plan")) for path, data in metered(collector).items()}
    assert found == {
        **dict.fromkeys(("/plain", "/removed", "/replaced"), ("engineering", "gold plus")),
        **dict.fromkeys(("/added", "/plain/blank"), (None, None)),
    }


def test_an_attribute_cannot_forge_a_field_of_the_event(
    start_gateway: StartGateway, upstream: UpstreamProcess, collector: CollectorProcess
) -> None:
    reserved = ("request_uri", "response_http_status", "subject_type", "application_id", "upstream_status")
    attributes = [attribute("header", "x-forged", name) for name in (*reserved, "department")]
    plugin = metering(collector.ingest_v3, attributes=attributes)
    gateway = start_gateway(document(service(upstream.url), plugins=[plugin]))
    assert get(gateway.proxy_port, "/echo", TENANT, ("X-Forged", "forged")) == 200
    collector.client.wait_for_events(1)
    stop_with_nothing_more(gateway, collector)
    data = metered(collector)["/echo"]
    assert [name for name, value in data.items() if value == "forged"] == ["department"]
    assert (data["response_http_status"], data["upstream_status"], data["subject_type"]) == (200, 200, "header")


def test_only_requests_with_an_allowed_status_are_metered(
    start_gateway: StartGateway, upstream: UpstreamProcess, collector: CollectorProcess
) -> None:
    closed = service(upstream.url, "closed", plugins=[{"name": "request-termination", "config": {"status_code": 503}}])
    guarded = service(upstream.url, "guarded", plugins=[{"name": "key-auth"}])
    down = service("http://127.0.0.1:1", "down", retries=0)
    plugin = metering(collector.ingest_v1, allow_status_codes=["200-299", "404-404"])
    gateway = start_gateway(document(service(upstream.url), closed, guarded, down, plugins=[plugin]))
    for status in (200, 204, 299, 301, 400, 403, 404, 405, 429, 500):
        assert get(gateway.proxy_port, f"/echo/status/{status}", TENANT) == status
    assert [get(gateway.proxy_port, path, TENANT) for path in ("/closed", "/guarded", "/down")] == [503, 401, 502]
    assert get(gateway.proxy_port, "/nowhere", TENANT) == 404
    collector.client.wait_for_events(5)
    stop_with_nothing_more(gateway, collector)
    statuses = {path: data["response_http_status"] for path, data in metered(collector).items()}
    allowed = (200, 204, 299, 404)
    assert statuses == {**{f"/echo/status/{status}": status for status in allowed}, "/nowhere": 404}


def test_an_application_that_another_plugin_names_is_billed(
    request: pytest.FixtureRequest, start_gateway: StartGateway, upstream: UpstreamProcess, collector: CollectorProcess
) -> None:
    """As `docs/events.md` shows it."""
    if request.config.getoption("--gateway") == "standin":
        pytest.skip("the stand-in has no post-function")
    lookup = """
        local consumer = kong.client.get_consumer()
        if consumer then
            kong.log.set_serialize_value("application.id", consumer.custom_id)
            kong.log.set_serialize_value("application.portal_id", "portal-1")
        end
    """
    plugins = [
        {"name": "key-auth"},
        {"name": "post-function", "config": {"access": [lookup]}},
        metering(collector.ingest_v3, subject={"look_up_value_in": "application"}),
    ]
    consumers = [consumer("alice", custom_id="b0ae7412")]
    gateway = start_gateway(document(service(upstream.url, plugins=plugins), consumers=consumers))
    forged = ("X-Application-Id", "forged")
    assert get(gateway.proxy_port, "/echo", forged) == 401
    assert get(gateway.proxy_port, "/echo", forged, ("apikey", "key-alice")) == 200
    collector.client.wait_for_events(1)
    stop_with_nothing_more(gateway, collector)
    (event,) = collector.client.events()
    data = event.data or {}
    assert (event.subject, data["subject_type"]) == ("app:b0ae7412", "application_id")
    assert (data["application_id"], data["portal_id"]) == ("b0ae7412", "portal-1")
