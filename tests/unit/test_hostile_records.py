"""What a real Kong 3.9.1 logged of requests over protocols and connections that the stand-in does not carry."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kong_metering.config import parse_config
from kong_metering.events import Meter
from tests.support.clock import FakeClock
from tests.support.openmeter import valid_event
from tests.support.records import DATA, finished

SCENARIOS = sorted(path.stem for path in (DATA / "hostile").glob("*.json"))


def events_of(scenario: dict[str, Any], captured: object) -> object:
    settings = {"ingest_endpoint": "https://openmeter.example/events", "api_token": "om_token"}
    config = parse_config({**settings, "meter_ai_token_usage": False, "subject": scenario["subject"]})
    return Meter(config, FakeClock()).events(finished(scenario["record"], captured))


@pytest.mark.parametrize("name", SCENARIOS)
def test_it_gives_exactly_this_event(name: str) -> None:
    scenario = json.loads((DATA / "hostile" / f"{name}.json").read_text("utf-8"))
    events = events_of(scenario, scenario["captured"])
    assert isinstance(events, list)
    assert [valid_event(event) for event in events] == [scenario["event"]]


def test_all_of_them_are_here() -> None:
    assert {"http2_get", "grpc_call", "websocket_upgrade", "aborted_upload", "aborted_download"} <= set(SCENARIOS)
