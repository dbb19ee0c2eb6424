"""Token usage in the shapes of other versions of Kong, which the stand-in's ai-proxy can be told to give."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from kong_metering_sandbox.collector.process import CollectorProcess
from kong_metering_sandbox.gateways import StandIn
from kong_metering_sandbox.upstream_process import UpstreamProcess
from tests.e2e.declarative import document, metering, service
from tests.e2e.test_ai import CHAT_PATH, ask, model_route

if TYPE_CHECKING:
    from kong_metering_sandbox.collector.client import CollectorClient

SHAPES = ("3.6", "3.7", "3.8", "3.9")


@dataclass(frozen=True)
class Rig:
    """A gateway with routes to a model that answers, and to one that does not, for each shape."""

    gateway: StandIn
    collector: CollectorClient

    def ask(self, path: str, **chat: object) -> int:
        self.collector.reset()
        return ask(self.gateway, path, **chat)

    def llm_data(self) -> list[dict[str, Any]]:
        return [dict(event.data or {}) for event in self.collector.events(event_type="kong.llm_request")]


def shaped(model_url: str, name: str, shape: str) -> dict[str, Any]:
    route = model_route(model_url, name)
    route["plugins"][0]["config"]["standin_ai_shape"] = shape
    return route


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    directory = tmp_path_factory.mktemp("shapes")
    with UpstreamProcess() as upstream, CollectorProcess() as collector:
        routes = [shaped(upstream.url + CHAT_PATH, f"good-{shape}", shape) for shape in SHAPES]
        routes += [shaped(upstream.url + "/status/429", f"limited-{shape}", shape) for shape in SHAPES]
        plugin = metering(collector.ingest_v1, meter_ai_token_usage=True)
        with StandIn(directory, document(service(upstream.url, "ai", *routes), plugins=[plugin])) as gateway:
            yield Rig(gateway, collector.client)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_gives_the_same_events(rig: Rig, shape: str, stream: bool) -> None:  # noqa: FBT001
    assert rig.ask(f"/good-{shape}", stream=stream) == 200
    rig.collector.wait_for_events(3)
    data = rig.llm_data()
    assert len({item.pop("api_request_id") for item in data}) == 1
    for item in data:
        assert ("ai_plugin_id" in item) == (shape != "3.6")
        for name in ("route_id", "service_id", "ai_plugin_id"):
            item.pop(name, None)
    common = {
        "ai_plugin_name": "ai-proxy",
        "http_status": 200,
        "model": "gpt-4o-mini",
        "provider": "openai",
        "subject_type": "header",
    }
    assert data == [{**common, "type": "request", "tokens": 11}, {**common, "type": "response", "tokens": 7}]


@pytest.mark.parametrize("shape", ["3.6", "3.7", "3.8"])
def test_before_3_9_an_error_of_the_model_gives_no_tokens(rig: Rig, shape: str) -> None:
    assert rig.ask(f"/limited-{shape}") == 429
    rig.collector.wait_for_events(1)
    assert rig.llm_data() == []
