"""Tools, and gateways that they can write to: the stand-in, or with `--gateway=kong` the real Kong on the PATH."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kong_metering_sandbox.collector.process import CollectorProcess
from kong_metering_sandbox.gateways import Gateway, StandIn
from kong_metering_sandbox.upstream_process import UpstreamProcess
from tests.e2e.declarative import document
from tests.examples.kongs import KongBeside

if TYPE_CHECKING:
    from tests.support.postgres import Cluster

TOKEN = "om_token"


def needs(program: str) -> str:
    """Give the path of a program, or skip the test with a word why."""
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"there is no `{program}` on the PATH")
    return found


@pytest.fixture(scope="module")
def vault() -> Iterator[None]:
    """Put the tokens that the examples refer to into the environment of what is started."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OM_TOKEN", TOKEN)
        patch.setenv("OTHER_OM_TOKEN", TOKEN)
        patch.setenv("MODEL_AUTHORIZATION", "Bearer upstream")
        yield


@pytest.fixture(scope="module")
def writable(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """Run an empty gateway whose Admin API takes entities."""
    request.getfixturevalue("vault")
    directory = tmp_path_factory.mktemp("w") / "g"
    gateway: Gateway
    if request.config.getoption("--gateway") == "kong":
        cluster: Cluster = request.getfixturevalue("cluster")
        gateway = KongBeside(directory, document(), settings=cluster.database())
    else:
        gateway = StandIn(directory, document(), settings={"database": "memory"})
    with gateway:
        yield gateway


@pytest.fixture(scope="module")
def upstream() -> Iterator[UpstreamProcess]:
    with UpstreamProcess() as upstream:
        yield upstream


@pytest.fixture
def collector() -> Iterator[CollectorProcess]:
    with CollectorProcess(tokens=[TOKEN]) as collector:
        yield collector


@pytest.fixture(scope="session")
def repository() -> Path:
    return Path(__file__).parents[2]
