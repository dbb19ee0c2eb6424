"""OpenMeter's meters in `examples/openmeter`: both forms say the same, of fields that the events have."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from kong_metering.events import EVENT_FIELDS

FOLDER = Path(__file__).parents[2] / "examples" / "openmeter"
KEY = re.compile(r"[a-z0-9]+(?:_[a-z0-9]+)*\Z")


def configured() -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((FOLDER / "config.yaml").read_text(encoding="utf-8"))
    return config


def bodies() -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = json.loads((FOLDER / "meters.json").read_text(encoding="utf-8"))
    return content


def test_the_api_bodies_say_what_the_configuration_says() -> None:
    assert [
        {
            "slug": body["key"],
            "description": body["name"],
            "eventType": body["event_type"],
            "aggregation": body["aggregation"].upper(),
            "groupBy": body["dimensions"],
            **({"valueProperty": body["value_property"]} if "value_property" in body else {}),
        }
        for body in bodies()
    ] == configured()["meters"]


def test_meters_read_what_the_events_have() -> None:
    for meter in configured()["meters"]:
        paths = {**meter["groupBy"], **({"value": meter["valueProperty"]} if "valueProperty" in meter else {})}
        assert {path.removeprefix("$.") for path in paths.values()} <= EVENT_FIELDS[meter["eventType"]]
        assert all(KEY.match(name) for name in (meter["slug"], *meter["groupBy"]))
        # OpenMeter refuses a COUNT of something.
        assert ("valueProperty" in meter) == (meter["aggregation"] == "SUM")


def test_they_are_the_two_that_bills_are_made_of() -> None:
    assert {meter["slug"]: list(meter["groupBy"]) for meter in configured()["meters"]} == {
        "api_requests_total": ["request_method", "route_name", "service_name"],
        "llm_tokens_total": ["model", "provider", "type"],
    }


def test_deduplication_is_on_where_it_loses_nothing() -> None:
    config = configured()
    assert config["sink"]["dedupe"]["enabled"] is True
    assert "dedupe" not in config
