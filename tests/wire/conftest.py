"""One plugin server and one ingest endpoint for all tests of a module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.ingest import IngestServer
from tests.support.plugin_server import PluginServerProcess
from tests.support.rpc import KongClient

NO_RECORD = "Kong could not serialise the log record of a request"


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
    assert [line for line in process.complaints() if NO_RECORD not in line] == []


@pytest.fixture
def client(server: PluginServerProcess) -> KongClient:
    return KongClient(server.path)
