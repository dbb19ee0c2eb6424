"""`kong-metering spool deliver` where a running server holds what waits: that one is asked to try at once."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from kong_metering.commands.deliver import LEFT_TO_SERVERS
from tests.support.plugin_server import PluginServerProcess
from tests.support.waiting import wait_until
from tests.unit.commands.helpers import PLUGIN
from tests.unit.commands.serving import Gateway, received, wait_for
from tests.unit.ingest.ingest_server import IngestServer, answer

pytestmark = pytest.mark.slow

# So that nothing is tried again by itself while a test runs.
LONG_PAUSES = {"initial_retry_delay": 600, "max_retry_delay": 600}


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    process = PluginServerProcess().start()
    yield Gateway(process, process.path.name)
    process.stop(signal.SIGKILL)


def paused(gateway: Gateway, endpoint: IngestServer, count: int) -> list[str]:
    """Have events wait behind a pause of ten minutes; give their ids."""
    endpoint.on_request = answer(503, b"no room")
    gateway.configure(endpoint.url, **LONG_PAUSES)
    ids = gateway.request(count)
    wait_until(lambda: endpoint.requests and len(gateway.waiting(endpoint.url)) == count, "one was tried, all wait")
    return ids


def deliver(gateway: Gateway, token: Path, *more: object) -> tuple[int, str, str]:
    result = gateway.command("deliver", "--plugin-id", PLUGIN, "--token-file", token, *more)
    return result.returncode, result.stdout, result.stderr


def test_a_server_that_pauses_delivers_at_once(gateway: Gateway, endpoint: IngestServer, token: Path) -> None:
    ids = paused(gateway, endpoint, 25)
    endpoint.on_request = answer(204)
    endpoint.requests.clear()
    status, _, told = deliver(gateway, token)
    assert (status, received(endpoint)) == (0, ids)
    assert f"Process {gateway.process.server_pid}, asked to try at once: 25 events delivered, 0 events left." in told
    assert gateway.waiting(endpoint.url) == []
    assert {request.headers["Authorization"] for request in endpoint.requests} == {"Bearer t0ken"}


def test_what_the_endpoint_says_is_told_where_it_still_fails(
    gateway: Gateway, endpoint: IngestServer, token: Path
) -> None:
    paused(gateway, endpoint, 25)
    tries = len(endpoint.requests)
    status, stdout, _ = deliver(gateway, token, "--json")
    told = json.loads(stdout)
    assert status == LEFT_TO_SERVERS
    assert (told["held"], told["delivered_by_servers"], told["delivered"]) == (25, 0, 0)
    (problem,) = told["server_problems"]
    assert problem.startswith(f"process {gateway.process.server_pid}: ")
    assert "answered 503" in problem
    # A single event probed: no more of them are in doubt than before.
    assert {len(request.events) for request in endpoint.requests[tries:]} == {1}
    assert "redirect" in deliver(gateway, token)[2]


def test_status_asks_the_server_what_it_knows(gateway: Gateway, endpoint: IngestServer) -> None:
    ids = paused(gateway, endpoint, 4)
    (queue,) = json.loads(gateway.command("status", "--ask", "--json").stdout)["queues"]
    (holder,) = queue["holders"]
    assert holder["process"] == gateway.process.server_pid
    assert (holder["told"]["waiting"], holder["told"]["delivered"]) == (len(ids), 0)
    assert "answered 503: no room" in holder["told"]["problem"]
    text = " ".join(gateway.command("status", "--ask").stdout.split())
    assert f"process {gateway.process.server_pid} has 4 events, and has delivered 0; the endpoint takes none" in text


def test_status_tells_of_a_server_that_does_not_answer(gateway: Gateway, endpoint: IngestServer) -> None:
    paused(gateway, endpoint, 4)
    pids = [gateway.process.pid, gateway.process.server_pid]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        text = gateway.command("status", "--ask").stdout
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
    assert f"no answer from process {pids[1]}" in text


def test_what_comes_later_is_delivered_as_ever(gateway: Gateway, endpoint: IngestServer, token: Path) -> None:
    ids = paused(gateway, endpoint, 3)
    endpoint.on_request = answer(204)
    assert deliver(gateway, token)[0] == 0
    later = gateway.request(5)
    wait_for(endpoint, later)
    assert set(received(endpoint)) == {*ids, *later}
