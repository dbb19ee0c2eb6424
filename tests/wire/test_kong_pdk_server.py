"""The plugin is an ordinary PDK plugin: it runs, unchanged, under kong-pdk's own server."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support import kong_pdk_host
from tests.support.plugin_server import BIN, ServerProcess, script_command, short_directory
from tests.support.rpc import Connection, KongClient
from tests.support.transcripts import load, scenarios
from tests.support.waiting import wait_until
from tests.wire.replay import HEADER_SUBJECTS, expected_event, recorded_start, start_instance

if TYPE_CHECKING:
    from tests.support.ingest import IngestServer

SCRIPT = Path(kong_pdk_host.__file__)
# kong-pdk's server drops the connection when a byte is not UTF-8.
BEYOND_IT = ("invalid_utf8_in_other_header", "latin1_subject_header_invalid_utf8")
PLAYED = [scenario for scenario in scenarios() if load(scenario).requests and scenario not in BEYOND_IT]


def accepts(path: Path) -> bool:
    try:
        Connection(path).close()
    except OSError:
        return False
    return True


@pytest.fixture(
    params=["", "--no-lua-style", "--gevent", "--gevent --no-lua-style"],
    ids=["threads, Lua style", "threads", "gevent, Lua style", "gevent"],
)
def foreign_server(request: pytest.FixtureRequest) -> Iterator[ServerProcess]:
    prefix = short_directory()
    process = ServerProcess(script_command(SCRIPT, prefix, request.param), prefix / "metering-and-billing.sock")
    try:
        process.launch()
        wait_until(lambda: accepts(process.path), "kong-pdk's server to accept connections")
        yield process
    finally:
        process.stop(signal.SIGKILL)
        shutil.rmtree(prefix)


def test_the_same_events_arrive_under_kong_pdks_own_server(foreign_server: ServerProcess, ingest: IngestServer) -> None:
    client = KongClient(foreign_server.path)
    instance = start_instance(client, ingest, recorded_start(), meter_ai_token_usage=False)
    expected = []
    for scenario in PLAYED:
        subject = HEADER_SUBJECTS.get(scenario, "acme")
        for request in load(scenario).fresh_requests():
            client.run_phases(instance, request, *request.phases)
            assert request.said == []
            if subject:
                expected.append(expected_event(request, subject))
    assert ingest.wait_for_events(len(expected)) == expected


def test_kong_pdks_own_dump_tells_the_same_of_the_plugin() -> None:
    ours, theirs = _dumped(str(BIN / "kong-metering-plugin-server")), _dumped(sys.executable, str(SCRIPT))
    assert sorted(theirs["Phases"]) == sorted(ours["Phases"])
    assert [theirs[key] for key in ("Name", "Priority", "Version")] == [
        ours[key] for key in ("Name", "Priority", "Version")
    ]
    assert _config_fields(theirs) == _config_fields(ours)


def _dumped(*command: str) -> dict[str, Any]:
    output = subprocess.run([*command, "--dump"], capture_output=True, check=True).stdout
    dumped = json.loads(output)
    (information,) = dumped["Plugins"] if isinstance(dumped, dict) else dumped
    assert isinstance(information, dict)
    return information


def _config_fields(information: dict[str, Any]) -> Any:
    (fields,) = (field["config"]["fields"] for field in information["Schema"]["fields"] if "config" in field)
    return fields
