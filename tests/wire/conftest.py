"""One plugin server and one ingest endpoint for all tests of a module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.ingest import IngestServer
from tests.support.plugin_server import PluginServerProcess
from tests.support.protocols import PROTOCOLS, Client, Protocol
from tests.support.rpc import KongClient

NO_RECORD = "Kong could not serialise the log record"
NO_SUBJECT = "a request is billed to nobody"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[IngestServer]:
    with IngestServer() as server:
        yield server


@pytest.fixture
def ingest(endpoint: IngestServer) -> IngestServer:
    """Give an ingest endpoint that has seen nothing yet."""
    endpoint.clear()
    return endpoint


@pytest.fixture(scope="module")
def server() -> Iterator[PluginServerProcess]:
    """Start a plugin server that must have nothing to complain about, but what the recordings do not have."""
    process = PluginServerProcess()
    with process:
        yield process
    said = [line for line in process.complaints() if NO_RECORD not in line and NO_SUBJECT not in line]
    assert said == []


@pytest.fixture
def fresh_server() -> Iterator[PluginServerProcess]:
    """Start a process that knows nothing yet: what it asks first is in steps, and it may complain."""
    with PluginServerProcess() as server:
        yield server


@pytest.fixture(params=PROTOCOLS)
def protocol(request: pytest.FixtureRequest) -> Protocol:
    """Give each of the two that Kong may speak."""
    chosen: Protocol = PROTOCOLS[request.param]
    return chosen


@pytest.fixture
def client(protocol: Protocol, server: PluginServerProcess) -> Client:
    return protocol.client(server.path)


@pytest.fixture
def messagepack(server: PluginServerProcess) -> KongClient:
    """Give a client for what was recorded byte for byte of `MsgPack:1`."""
    return KongClient(server.path)
