"""The handle of a gateway that does not start or stop as it should: nothing of it is left."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

from kong_metering_sandbox.gateways import GatewayError, StandIn

METERED = yaml.safe_dump(
    {
        "_format_version": "3.0",
        "plugins": [
            {
                "name": "metering-and-billing",
                "config": {
                    "ingest_endpoint": "http://127.0.0.1:1/api/v1/events",
                    "api_token": "om_token",
                    "meter_ai_token_usage": False,
                    "subject": {"look_up_value_in": "header", "field": "x-tenant-id"},
                },
            }
        ],
    }
)


class Impatient(StandIn):
    patience = 10.0


def test_a_gateway_that_ends_at_its_start_is_not_waited_for(tmp_path: Path) -> None:
    gateway = StandIn(tmp_path, "plugins: [{name: no-such-plugin}]")
    with pytest.raises(GatewayError, match="the stand-in has ended with status 1"), gateway:
        pass
    assert gateway.supervisor_pids() == gateway.plugin_server_pids() == []


def test_a_gateway_whose_plugin_server_does_not_serve_is_stopped(tmp_path: Path) -> None:
    hangs = f"{sys.executable} -c 'import time; time.sleep(600)' --kong-prefix {tmp_path / 'prefix'}"
    settings = {"pluginserver_metering_start_cmd": hangs}
    gateway = Impatient(tmp_path, METERED, settings=settings)
    with pytest.raises(GatewayError, match="until the plugin server serves"), gateway:
        pass
    assert gateway.supervisor_pids() == gateway.plugin_server_pids() == []
