"""What the gateway of demo and sandbox serves: a service on /orders, a consumer, and the mission's decK example."""

from __future__ import annotations

from typing import Any

import yaml

from kong_metering_sandbox.conf import EXAMPLE
from kong_metering_sandbox.troubles import SUBJECT_HEADER

DECK_EXAMPLE = EXAMPLE.parent / "examples" / "deck" / "global.yaml"
KONNECT = "https://us.api.konghq.com/v3/openmeter/events"
TOKEN = "om_demo_token"  # noqa: S105 - made up
VARIABLES = {"DECK_AUTH_TOKEN": TOKEN, "DECK_SUBJECT_HEADER": SUBJECT_HEADER}


def declarative(upstream_url: str, plugins: list[Any]) -> str:
    """Write its configuration, with these global plugins; decK's variables in it are those of `VARIABLES`."""
    document = {
        "_format_version": "3.0",
        "services": [
            {
                "name": "orders",
                "url": upstream_url,
                "routes": [{"name": "orders", "paths": ["/orders"]}],
            }
        ],
        "consumers": [{"username": "alice", "keyauth_credentials": [{"key": "key-alice"}]}],
        "plugins": plugins,
    }
    return yaml.safe_dump(document, allow_unicode=True)


def deck_example(endpoint: str) -> list[Any]:
    """Read the plugins of the mission's example, with the collector in Konnect's place."""
    text = DECK_EXAMPLE.read_text(encoding="utf-8").replace(KONNECT, endpoint)
    plugins: list[Any] = yaml.safe_load(text)["plugins"]
    return plugins
