"""One `gateway` for all end-to-end tests: the stand-in, or with `--gateway=kong` the real Kong on the PATH.

The tests use only what both offer: a declarative configuration, the proxy port, stop, reload, the plugin server's
process, and the collector.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import pytest

from kong_metering.sandbox.collector.process import CollectorProcess
from kong_metering.sandbox.gateways import GATEWAYS, Gateway
from kong_metering.sandbox.upstream_process import UpstreamProcess


class StartGateway(Protocol):
    """Starts a gateway with a declarative configuration; it is stopped when the test ends."""

    def __call__(self, declarative: str, *, flags: str = "", **environment: str) -> Gateway: ...


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "real_kong: needs what only a real Kong has, such as HTTP/2")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("real_kong") and item.config.getoption("--gateway") != "kong":
        pytest.skip("needs a real Kong: --gateway=kong")


@pytest.fixture
def gateway_class(request: pytest.FixtureRequest) -> type[Gateway]:
    return GATEWAYS[request.config.getoption("--gateway")]


@pytest.fixture
def start_gateway(gateway_class: type[Gateway], tmp_path: Path) -> Iterator[StartGateway]:
    with ExitStack() as running:

        def start(declarative: str, *, flags: str = "", **environment: str) -> Gateway:
            gateway = gateway_class(
                tmp_path / "gateway", declarative, environment=environment, plugin_server_flags=flags
            )
            return running.enter_context(gateway)

        yield start


@pytest.fixture(scope="session")
def upstream() -> Iterator[UpstreamProcess]:
    with UpstreamProcess() as upstream:
        yield upstream


@pytest.fixture
def collector() -> Iterator[CollectorProcess]:
    with CollectorProcess(tokens=["om_token"]) as collector:
        yield collector
