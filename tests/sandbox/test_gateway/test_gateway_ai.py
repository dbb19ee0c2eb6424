"""ai-proxy: the model is asked, its tokens are in the record, in the shape of each Kong version."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import requests

from .fakes import DEADLINE, Gateway, running_gateway

if TYPE_CHECKING:
    from collections.abc import Iterator

SHAPES = ("3.6", "3.7", "3.8", "3.9")


def ai_route(name: str, shape: str, model: str) -> str:
    return f"""
  - name: {name}
    paths: [/{name}]
    plugins:
    - name: ai-proxy
      config:
        route_type: llm/v1/chat
        standin_ai_shape: "{shape}"
        logging: {{log_statistics: true}}
        model: {model}
"""


MODEL = '{provider: openai, name: gpt-4o-mini, options: {upstream_url: "@UPSTREAM@/v1/chat/completions"}}'
CONFIG = (
    '_format_version: "3.0"\nservices:\n- name: echo\n  url: @UPSTREAM@\n  routes:'
    + "".join(ai_route(f"ai-{shape}", shape, MODEL) for shape in SHAPES)
    + ai_route("local", "3.9", "{provider: openai, name: gpt-4o-mini}")
    + "plugins: [{name: metering-and-billing, config: {ingest_endpoint: http://x, api_token: t}}]\n"
)


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with running_gateway(tmp_path_factory.mktemp("gateway"), CONFIG) as gateway:
        yield gateway


def chat(gateway: Gateway, path: str, **fields: Any) -> requests.Response:
    body = {"messages": [{"role": "user", "content": "hi"}], **fields}
    return requests.post(gateway.proxy + path, json=body, timeout=DEADLINE)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("shape", "container", "usage"),
    [
        ("3.6", [], {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18}),
        ("3.7", ["ai-proxy"], {"prompt_token": 11, "completion_token": 7, "total_tokens": 18}),
        ("3.8", ["ai-proxy"], {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18}),
        ("3.9", ["proxy"], {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18}),
    ],
)
def test_the_tokens_are_in_the_record(
    gateway: Gateway,
    shape: str,
    container: list[str],
    usage: dict[str, int],
    stream: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    response = chat(gateway, f"/ai-{shape}", stream=stream)
    assert response.headers["X-Kong-LLM-Model"] == "openai/gpt-4o-mini"
    assert (b"data: [DONE]" in response.content) is stream
    record = gateway.record(response)
    found = record["ai"]
    for name in container:
        found = found[name]
    assert {name: count for name, count in found["usage"].items() if "token" in name and "time" not in name} == usage
    assert found["meta"]["request_model"] == found["meta"]["response_model"] == "gpt-4o-mini"
    assert found["meta"]["provider_name"] == "openai"
    assert ("plugin_id" in found["meta"]) is (shape != "3.6")
    assert ("cache" in found) is (shape == "3.8")
    assert record["upstream_status"] == ("200" if stream else 200)


@pytest.mark.parametrize("stream", [False, True])
def test_without_a_model_the_gateway_answers_itself(gateway: Gateway, stream: bool) -> None:  # noqa: FBT001
    response = chat(gateway, "/local", stream=stream)
    assert response.status_code == 200
    assert (b"data: [DONE]" in response.content) is stream
    assert gateway.record(response)["ai"]["proxy"]["usage"]["total_tokens"] == 18


@pytest.mark.parametrize("body", [b"no json", b"[]", b"{}", b'{"messages": 1}'])
def test_what_is_no_chat_is_refused(gateway: Gateway, body: bytes) -> None:
    response = requests.post(gateway.proxy + "/ai-3.9", data=body, timeout=DEADLINE)
    assert response.status_code == 400
    assert "ai" not in gateway.record(response)
