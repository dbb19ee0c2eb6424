"""One `gateway` for all end-to-end tests: the stand-in, or with `--gateway=kong` the real Kong on the PATH.

The tests use only what both offer: a declarative configuration, the proxy port, stop, reload, the plugin server's
process, and the collector. With `--database=postgres` the same is written to the real Kong by its Admin API.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pytest

from kong_metering_sandbox.collector.process import CollectorProcess
from kong_metering_sandbox.gateways import GATEWAYS, Gateway, RealKong, StandIn
from kong_metering_sandbox.upstream_process import UpstreamProcess
from tests.e2e.declarative import document, metering_at_once, route, service
from tests.e2e.hostile import Till, open_till
from tests.support.adminapi import AdminApi
from tests.support.kong_with_database import KongWithDatabase


class StartGateway(Protocol):
    """Starts a gateway with a declarative configuration; it is stopped when the test ends."""

    def __call__(self, declarative: str, *, flags: str = "", **environment: str) -> Gateway: ...


class OpenEchoTill(Protocol):
    """Opens a till that meters by the header x-tenant-id, but on these routes by the plugins that are named."""

    def __call__(
        self, routes: Mapping[str, list[dict[str, Any]]], *consumers: dict[str, Any]
    ) -> AbstractContextManager[Till]: ...


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "real_kong: needs what only a real Kong has, such as HTTP/2")
    config.addinivalue_line("markers", "db_less: needs a configuration that is a file, such as one changed at a start")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("real_kong") and item.config.getoption("--gateway") != "kong":
        pytest.skip("needs a real Kong: --gateway=kong")
    if item.get_closest_marker("db_less") and item.config.getoption("--database") != "off":
        pytest.skip("needs a gateway without a database: --database=off")


@pytest.fixture(scope="session")
def gateway_class(request: pytest.FixtureRequest) -> type[Gateway]:
    gateway = GATEWAYS[request.config.getoption("--gateway")]
    attributes = {"protocol": request.config.getoption("--protocol")}
    if request.config.getoption("--database") == "off":
        return type(gateway.__name__, (gateway,), attributes)
    if gateway is not RealKong:
        pytest.skip("only a real Kong keeps its configuration in PostgreSQL: --gateway=kong")
    attributes["cluster"] = request.getfixturevalue("cluster")
    return type("KongWithDatabase", (KongWithDatabase,), attributes)


@dataclass(frozen=True)
class Writable:
    """A gateway whose Admin API takes entities; `settle` waits until what was written is in force in every worker."""

    gateway: Gateway
    admin: AdminApi
    settle: Callable[[], None]


@pytest.fixture(scope="module")
def writable(gateway_class: type[Gateway], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Writable]:
    """Run one that is empty at first, and looks for changes as often as a Kong does by default."""
    directory = tmp_path_factory.mktemp("w") / "gateway"
    if issubclass(gateway_class, KongWithDatabase):
        kong = gateway_class(directory, document(), settings={"worker_state_update_frequency": "5"})
        with kong:
            yield Writable(kong, kong.admin, kong.settle)
    elif issubclass(gateway_class, StandIn):
        with gateway_class(directory, document(), settings={"database": "memory"}) as gateway:
            # What was written is in force when the answer comes.
            yield Writable(gateway, AdminApi(gateway.admin_url), lambda: None)
    else:
        pytest.skip("a real Kong without a database takes no entities: --database=postgres")


@pytest.fixture
def start_gateway(gateway_class: type[Gateway], tmp_path: Path) -> Iterator[StartGateway]:
    with ExitStack() as running:

        def start(declarative: str, *, flags: str = "", **environment: str) -> Gateway:
            gateway = gateway_class(
                tmp_path / "gateway", declarative, environment=environment, plugin_server_flags=flags
            )
            return running.enter_context(gateway)

        yield start


@pytest.fixture(scope="module")
def open_echo_till(
    gateway_class: type[Gateway],
    tmp_path_factory: pytest.TempPathFactory,
    upstream: UpstreamProcess,
    shared_collector: CollectorProcess,
) -> OpenEchoTill:
    def opened(routes: Mapping[str, list[dict[str, Any]]], *consumers: dict[str, Any]) -> AbstractContextManager[Till]:
        special = [route(name, plugins=plugins) for name, plugins in routes.items()]
        declarative = document(
            service(upstream.url, "echo", route("echo"), *special),
            plugins=[metering_at_once(shared_collector.ingest_v1)],
            consumers=list(consumers),
        )
        gateway = gateway_class(tmp_path_factory.mktemp("till") / "gateway", declarative)
        return open_till(gateway, shared_collector, "/echo", *(f"/{name}" for name in routes))

    return opened


@pytest.fixture(scope="session")
def upstream() -> Iterator[UpstreamProcess]:
    with UpstreamProcess() as upstream:
        yield upstream


@pytest.fixture(scope="module")
def shared_collector() -> Iterator[CollectorProcess]:
    """One for all tests of a module, which do not disturb one another."""
    with CollectorProcess(tokens=["om_token"]) as collector:
        yield collector


@pytest.fixture
def collector() -> Iterator[CollectorProcess]:
    with CollectorProcess(tokens=["om_token"]) as collector:
        yield collector
