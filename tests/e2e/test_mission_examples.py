"""The mission's decK examples, verbatim, at the four scopes: they meter what they should and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

from tests.e2e.balance import stop_with_nothing_more
from tests.e2e.declarative import consumer, document, service
from tests.e2e.traffic import get

if TYPE_CHECKING:
    from kong_metering_sandbox.collector.process import CollectorProcess
    from kong_metering_sandbox.upstream_process import UpstreamProcess
    from tests.e2e.conftest import StartGateway

pytestmark = pytest.mark.e2e

EXAMPLES = Path(__file__).parents[2] / "examples" / "deck"
KONNECT = "https://us.api.konghq.com/v3/openmeter/events"

# What each scope's example meters, of the requests below.
METERED = {
    "global": ["one", "two", "consumer", "nowhere"],
    "service": ["one", "consumer"],
    "route": ["one"],
    "consumer": ["consumer"],
}
NAMES = {"service": "serviceName|Id", "route": "routeName|Id", "consumer": "consumerName|Id"}
TARGETS = {"service": "first", "route": "one", "consumer": "alice"}


@pytest.mark.parametrize("scope", METERED)
def test_deck_example(
    scope: str, start_gateway: StartGateway, upstream: UpstreamProcess, collector: CollectorProcess
) -> None:
    example = (EXAMPLES / f"{scope}.yaml").read_text(encoding="utf-8").replace(KONNECT, collector.ingest_v3)
    if scope in NAMES:
        example = example.replace(NAMES[scope], TARGETS[scope])
    base = yaml.safe_load(
        document(
            service(
                upstream.url,
                "first",
                {"name": "one", "paths": ["/one"]},
                {"name": "guarded", "paths": ["/guarded"], "plugins": [{"name": "key-auth"}]},
            ),
            service(upstream.url, "second", {"name": "two", "paths": ["/two"]}),
            consumers=[consumer("alice")],
        )
    )
    merged = base | {"plugins": base["plugins"] + yaml.safe_load(example)["plugins"]}
    gateway = start_gateway(yaml.safe_dump(merged), DECK_AUTH_TOKEN="om_token", DECK_SUBJECT_HEADER="x-customer-id")
    for path, key in (("/one", ""), ("/two", ""), ("/guarded", "key-alice"), ("/nowhere", "")):
        name = "consumer" if key else path[1:]
        headers = [("X-Customer-Id", name), *([("apikey", key)] if key else [])]
        get(gateway.proxy_port, path, *headers)
        get(gateway.proxy_port, path, *headers[1:])
    collector.client.wait_for_events(len(METERED[scope]))
    stop_with_nothing_more(gateway, collector)
    assert sorted(event.subject for event in collector.client.events()) == sorted(METERED[scope])
    assert not any(request.status == 401 for request in collector.client.requests())
