"""Token usage of AI traffic, through the gateway's own ai-proxy."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e.balance import stop_with_nothing_more
from tests.e2e.declarative import document, metering, route, service
from tests.e2e.traffic import exchange, request
from tests.support.settings import DEPARTMENT

if TYPE_CHECKING:
    from kong_metering_sandbox.collector.process import CollectorProcess
    from kong_metering_sandbox.collector.records import StoredEvent
    from kong_metering_sandbox.gateways import Gateway
    from kong_metering_sandbox.upstream_process import UpstreamProcess
    from tests.e2e.conftest import StartGateway

pytestmark = pytest.mark.e2e

API_REQUEST, PROMPT, COMPLETION = "kong.api_request", "kong.llm_request request", "kong.llm_request response"
CHAT_PATH = "/v1/chat/completions"

StartAI = Callable[..., "Gateway"]


def model_route(model_url: str, name: str = "chat", **logging: bool) -> dict[str, Any]:
    """Give a route to a model, whose statistics are logged."""
    ai_proxy = {
        "name": "ai-proxy",
        "config": {
            "route_type": "llm/v1/chat",
            "auth": {"header_name": "Authorization", "header_value": "Bearer upstream"},
            "model": {"provider": "openai", "name": "gpt-4o-mini", "options": {"upstream_url": model_url}},
            "logging": {"log_statistics": True, **logging},
        },
    }
    return route(name, plugins=[ai_proxy])


def ask(gateway: Gateway, path: str = "/chat", **chat: object) -> int:
    """Send a chat request of the subject acme, and give the status of the answer."""
    body = json.dumps({"messages": [{"role": "user", "content": "Say hello."}], **chat}).encode()
    headers = [
        ("X-Tenant-Id", "acme"),
        ("X-Department", "engineering"),
        ("Content-Type", "application/json"),
        ("Content-Length", str(len(body))),
    ]
    return exchange(gateway.proxy_port, request(path, *headers, method="POST", body=body))


class SlowModel(BaseHTTPRequestHandler):
    """Streams twenty words, one each tenth of a second."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        with contextlib.suppress(OSError):  # whoever reads it has left
            for number in range(20):
                choice = {"index": 0, "delta": {"content": f"word {number} "}, "finish_reason": None}
                self.wfile.write(b"data: %b\n\n" % json.dumps({"model": "m", "choices": [choice]}).encode())
                time.sleep(0.1)
            self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def slow_model() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), SlowModel) as server:
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        yield f"http://127.0.0.1:{server.server_port}{CHAT_PATH}"
        server.shutdown()
        serving.join()


@pytest.fixture
def start_ai(start_gateway: StartGateway, upstream: UpstreamProcess, collector: CollectorProcess) -> StartAI:
    """Start a gateway with routes to models, whose tokens are metered."""

    def start(*routes: dict[str, Any], **config: object) -> Gateway:
        plugin = metering(collector.ingest_v1, meter_ai_token_usage=True, **config)
        return start_gateway(document(service(upstream.url, "ai", *routes), plugins=[plugin]))

    return start


def billed(gateway: Gateway, collector: CollectorProcess, count: int) -> dict[str, StoredEvent]:
    """Wait for so many events, stop, and give all events by their kind, of which there is one each."""
    collector.client.wait_for_events(count)
    stop_with_nothing_more(gateway, collector)
    events = collector.client.events()
    found = {f"{event.type} {(event.data or {}).get('type', '')}".strip(): event for event in events}
    assert len(found) == len(events)
    return found


def test_prompt_and_completion_tokens_are_billed_to_the_subject(
    start_ai: StartAI, upstream: UpstreamProcess, collector: CollectorProcess
) -> None:
    gateway = start_ai(model_route(upstream.url + CHAT_PATH), attributes=[DEPARTMENT])
    assert ask(gateway) == 200
    events = billed(gateway, collector, 3)
    assert events.keys() == {API_REQUEST, PROMPT, COMPLETION}
    assert {event.subject for event in events.values()} == {"acme"}
    assert {event.source for event in events.values()} == {"ai"}
    assert {event.time for event in events.values()} == {events[API_REQUEST].time}
    assert all((event.data or {})["department"] == "engineering" for event in events.values())
    request_id = events[API_REQUEST].id.removesuffix(":api_request")
    for kind, name, tokens in ((PROMPT, "request", 11), (COMPLETION, "response", 7)):
        assert events[kind].id == f"{request_id}:llm_request:ai-proxy:{name}"
        data = dict(events[kind].data or {})
        assert data.pop("ai_plugin_id")
        assert all(data.pop(field) == (events[API_REQUEST].data or {})[field] for field in ("route_id", "service_id"))
        assert data == {
            "ai_plugin_name": "ai-proxy",
            "api_request_id": request_id,
            "department": "engineering",
            "http_status": 200,
            "model": "gpt-4o-mini",
            "provider": "openai",
            "subject_type": "header",
            "tokens": tokens,
            "type": name,
        }


def test_a_stream_is_metered_with_the_counts_that_kong_makes(
    start_ai: StartAI, upstream: UpstreamProcess, collector: CollectorProcess
) -> None:
    """Kong 3.9 estimates both counts, and the completion's only with log_payloads."""
    gateway = start_ai(model_route(upstream.url + CHAT_PATH, log_payloads=True))
    assert ask(gateway, stream=True) == 200
    events = billed(gateway, collector, 3)
    assert events.keys() == {API_REQUEST, PROMPT, COMPLETION}
    for kind in (PROMPT, COMPLETION):
        data = events[kind].data or {}
        assert isinstance(data["tokens"], int)
        assert data["tokens"] > 0
        assert (data["http_status"], data["model"], data["provider"]) == (200, "gpt-4o-mini", "openai")


def test_a_stream_whose_completion_kong_does_not_count_is_metered_by_its_prompt(
    start_ai: StartAI, upstream: UpstreamProcess, collector: CollectorProcess
) -> None:
    """What comes of the completion is up to Kong: 3.9 counts none without log_payloads."""
    gateway = start_ai(model_route(upstream.url + CHAT_PATH))
    assert ask(gateway, stream=True) == 200
    assert billed(gateway, collector, 2).keys() - {COMPLETION} == {API_REQUEST, PROMPT}


@pytest.mark.real_kong
def test_of_a_stream_that_the_client_leaves_kong_counts_no_tokens(
    start_ai: StartAI, slow_model: str, collector: CollectorProcess
) -> None:
    """Kong 3.9.3 counts at the end of a stream; docs/ai-usage.md says what to do about it."""
    gateway = start_ai(model_route(slow_model, log_payloads=True) | {"response_buffering": False})
    body = json.dumps({"messages": [{"role": "user", "content": "Say hello."}], "stream": True}).encode()
    headers = [("X-Tenant-Id", "acme"), ("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
    with socket.create_connection(("127.0.0.1", gateway.proxy_port), timeout=30) as client:
        client.sendall(request("/chat", *headers, method="POST", body=body))
        answer = b""
        while b"word 18" not in answer:
            received = client.recv(65536)
            assert received, answer
            answer += received
    events = billed(gateway, collector, 1)
    assert events.keys() == {API_REQUEST}
    assert (events[API_REQUEST].data or {})["response_http_status"] == 200


@pytest.mark.real_kong
def test_a_model_that_a_client_names_has_no_control_characters_in_events(
    start_ai: StartAI, upstream: UpstreamProcess, collector: CollectorProcess
) -> None:
    chat = model_route(upstream.url + CHAT_PATH)
    del chat["plugins"][0]["config"]["model"]["name"]
    gateway = start_ai(chat)
    assert ask(gateway, model="a\0b") == 200
    assert (billed(gateway, collector, 3)[PROMPT].data or {})["model"] == "a␛0;b"


def test_an_error_of_the_model_is_billed_no_completion(
    start_ai: StartAI, upstream: UpstreamProcess, collector: CollectorProcess
) -> None:
    """Kong 3.9 notes an estimate of the prompt then; it tells its status, so that a meter can leave it out."""
    gateway = start_ai(model_route(upstream.url + "/status/429"))
    assert ask(gateway) == 429
    events = billed(gateway, collector, 1)
    assert (events[API_REQUEST].data or {})["response_http_status"] == 429
    assert COMPLETION not in events
    if PROMPT in events:
        assert (events[PROMPT].data or {})["http_status"] == 429


def test_with_allowed_status_codes_an_error_of_the_model_is_billed_nothing(
    start_ai: StartAI, upstream: UpstreamProcess, collector: CollectorProcess
) -> None:
    gateway = start_ai(
        model_route(upstream.url + CHAT_PATH, "good"),
        model_route(upstream.url + "/status/429", "limited"),
        model_route(upstream.url + "/status/500", "failing"),
        model_route("http://127.0.0.1:1" + CHAT_PATH, "down"),
        allow_status_codes=["200-299"],
    )
    assert [ask(gateway, path) for path in ("/limited", "/failing", "/down", "/good")] == [429, 500, 502, 200]
    events = billed(gateway, collector, 3)
    assert events.keys() == {API_REQUEST, PROMPT, COMPLETION}
    assert (events[API_REQUEST].data or {})["request_uri"] == "/good"


def test_without_statistics_there_is_nothing_to_meter_but_the_request(
    start_ai: StartAI, upstream: UpstreamProcess, collector: CollectorProcess
) -> None:
    gateway = start_ai(model_route(upstream.url + CHAT_PATH, log_statistics=False))
    assert ask(gateway) == 200
    assert billed(gateway, collector, 1).keys() == {API_REQUEST}
