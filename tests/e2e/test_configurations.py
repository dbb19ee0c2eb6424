"""The ready configurations in `examples/`: each meters what it says, and nothing else."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kong_metering_sandbox.collector.process import CollectorProcess
from tests.e2e.balance import stop_with_nothing_more
from tests.e2e.traffic import exchange, request

if TYPE_CHECKING:
    from kong_metering_sandbox.upstream_process import UpstreamProcess
    from tests.e2e.conftest import StartGateway
    from tests.e2e.traffic import Header

pytestmark = pytest.mark.e2e

EXAMPLES = Path(__file__).parents[2] / "examples"
KEY = "key-of-alice"
ALICE: Header = ("apikey", KEY)
CHAT = json.dumps({"messages": [{"role": "user", "content": "Say hello."}]}).encode()
CHAT_REQUEST = request(
    "/chat", ALICE, ("Content-Type", "application/json"), ("Content-Length", str(len(CHAT))), method="POST", body=CHAT
)


def get(target: str, *headers: Header) -> bytes:
    return request(target, *headers)


# For each file: what is sent, with the status that answers it; and the (type, subject) of what is billed, with the
# endpoint that gets it. A subject that ends with `:` is followed by an id of Kong's.
CASES: Mapping[str, tuple[list[tuple[bytes, int]], list[tuple[int, str, str]]]] = {
    "deck/kong.yaml": (
        [(get("/orders/1", ALICE), 200), (get("/orders/2"), 401)],
        [(0, "kong.api_request", "alice")],
    ),
    "configurations/api-requests-by-consumer.yaml": (
        [(get("/orders/1", ALICE), 200), (get("/orders/2"), 401), (get("/orders/3", ("apikey", "wrong")), 401)],
        [(0, "kong.api_request", "consumer:")],
    ),
    "configurations/ai-tokens.yaml": (
        [(CHAT_REQUEST, 200), (get("/chat"), 401)],
        [(0, "kong.llm_request", "consumer:"), (0, "kong.llm_request", "consumer:")],
    ),
    "configurations/tenant-header.yaml": (
        [(get("/orders/1", ("X-Tenant-Id", "acme")), 200), (get("/orders/2"), 200)],
        [(0, "kong.api_request", "acme")],
    ),
    "configurations/department-attributes.yaml": (
        [(get("/orders/1", ALICE, ("X-Department", "engineering"), ("X-Project", "search")), 200)],
        [(0, "kong.api_request", "consumer:")],
    ),
    "configurations/several-endpoints.yaml": (
        [(get("/orders/1", ("X-Tenant-Id", "acme")), 200), (get("/reports/1?tenant=globex"), 200)],
        [(0, "kong.api_request", "acme"), (1, "kong.api_request", "globex")],
    ),
    "configurations/allowed-status-codes.yaml": (
        [
            (get("/orders/status/200", ("X-Tenant-Id", "acme")), 200),
            (get("/orders/status/302", ("X-Tenant-Id", "acme")), 302),
            (get("/orders/status/404", ("X-Tenant-Id", "acme")), 404),
            (get("/orders/status/500", ("X-Tenant-Id", "acme")), 500),
        ],
        [(0, "kong.api_request", "acme"), (0, "kong.api_request", "acme")],
    ),
}


def test_each_configuration_is_tried() -> None:
    files = {f"configurations/{path.name}" for path in (EXAMPLES / "configurations").glob("*.yaml")}
    assert files | {"deck/kong.yaml"} == CASES.keys()


@pytest.mark.parametrize("name", CASES)
def test_a_ready_configuration_meters_what_it_says(
    name: str,
    start_gateway: StartGateway,
    upstream: UpstreamProcess,
    collector: CollectorProcess,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for variable in ("OM_TOKEN", "OTHER_OM_TOKEN"):
        monkeypatch.setenv(variable, "om_token")
    monkeypatch.setenv("MODEL_AUTHORIZATION", "Bearer upstream")
    sent, billed = CASES[name]
    with CollectorProcess(tokens=["om_token"]) as other:
        gateway = start_gateway(
            without_what_is_for_deck((EXAMPLES / name).read_text(encoding="utf-8")),
            DECK_UPSTREAM_URL=upstream.url,
            DECK_MODEL_URL=f"{upstream.url}/v1/chat/completions",
            DECK_ALICE_KEY=KEY,
            DECK_INGEST_ENDPOINT=collector.ingest_v3,
            DECK_OTHER_INGEST_ENDPOINT=other.ingest_v3,
        )
        assert [exchange(gateway.proxy_port, one) for one, _ in sent] == [status for _, status in sent]
        collectors = [collector, other]
        expected = [Counter(each[1:] for each in billed if each[0] == number) for number in range(len(collectors))]
        for each, events in zip(collectors, expected, strict=True):
            each.client.wait_for_events(events.total())
        stop_with_nothing_more(gateway, collector)
        for each, events in zip(collectors, expected, strict=True):
            assert Counter((event.type, known(event.subject)) for event in each.client.events()) == events
            assert not any(one.status == 401 for one in each.client.requests())
    if "department" in name:
        (event,) = collector.client.events()
        assert {"department": "engineering", "project": "search"}.items() <= (event.data or {}).items()


def without_what_is_for_deck(text: str) -> str:
    """Take out the part that decK reads and does not give to Kong, which knows of none."""
    return re.sub(r"^_info:\n(?: .*\n)+", "", text, flags=re.MULTILINE)


def known(subject: str) -> str:
    """Give a subject without an id that is not known beforehand."""
    return "consumer:" if subject.startswith("consumer:") else subject
