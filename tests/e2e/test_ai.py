"""Token usage of AI traffic, through the gateway's own ai-proxy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.e2e.declarative import document, metering, route, service
from tests.e2e.traffic import exchange

if TYPE_CHECKING:
    from kong_metering.sandbox.collector.process import CollectorProcess
    from kong_metering.sandbox.upstream_process import UpstreamProcess
    from tests.e2e.conftest import StartGateway

pytestmark = pytest.mark.e2e

CHAT = b'{"messages":[{"role":"user","content":"Say hello."}]}'


def test_prompt_and_completion_tokens_are_billed_to_the_subject(
    start_gateway: StartGateway, upstream: UpstreamProcess, collector: CollectorProcess
) -> None:
    ai_proxy = {
        "name": "ai-proxy",
        "config": {
            "route_type": "llm/v1/chat",
            "auth": {"header_name": "Authorization", "header_value": "Bearer upstream"},
            "model": {
                "provider": "openai",
                "name": "gpt-4o-mini",
                "options": {"upstream_url": f"{upstream.url}/v1/chat/completions"},
            },
            "logging": {"log_statistics": True},
        },
    }
    plugin = metering(collector.ingest_v1, meter_ai_token_usage=True)
    gateway = start_gateway(document(service(upstream.url, "ai", route("chat", plugins=[ai_proxy])), plugins=[plugin]))
    request = (
        b"POST /chat HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX-Tenant-Id: acme\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(CHAT)
    )
    assert exchange(gateway.proxy_port, request + CHAT) == 200
    collector.client.wait_for_events(3)
    events = {(event.type, (event.data or {}).get("type")): event for event in collector.client.events()}
    assert len(events) == 3
    prompt, completion = events["kong.llm_request", "request"], events["kong.llm_request", "response"]
    assert {event.subject for event in events.values()} == {"acme"}
    for event, tokens in ((prompt, 11), (completion, 7)):
        data = dict(event.data or {})
        assert data.pop("ai_plugin_id")
        assert all(data.pop(name) for name in ("route_id", "service_id", "api_request_id", "type"))
        assert data == {
            "ai_plugin_name": "ai-proxy",
            "http_status": 200,
            "model": "gpt-4o-mini",
            "provider": "openai",
            "subject_type": "header",
            "tokens": tokens,
        }
