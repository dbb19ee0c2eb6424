"""What all tests share."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from kong_metering_sandbox.contained import short_base
from tests.support.clock import FakeClock
from tests.support.postgres import Cluster, find_postgres, running_postgres

TESTS = Path(__file__).parent
# The first one is by far the longest of the end-to-end tests: what loads the machine most comes when it is nearly over.
LONGEST_FIRST = (
    "e2e/test_nothing_lost.py",
    "e2e/test_lifecycle.py",
    "e2e/test_configurations.py",
    "e2e/test_metering.py",
    "e2e/test_beside.py",
    "e2e/test_hostile_load.py",
    "e2e/test_changes_under_load.py",
    "wire/test_hostile_records.py",
    "wire/test_transcripts.py",
    "wire/test_protobuf_transcripts.py",
    "packaging/test_distributions.py",
    "sandbox/test_gateway/test_gateway_plugin_server.py",
    "sandbox/test_gateway/test_gateway_rpc.py",
    "sandbox/test_contained.py",
    "sandbox/test_collector.py",
    "sandbox/test_troubles.py",
    "monitoring/test_faults.py",
    "docs/test_troubleshooting.py",
    "unit/host/test_servers.py",
    "unit/host/test_reachable.py",
    "unit/host/test_handover.py",
    "unit/host/test_supervisor.py",
    "unit/host/test_endurance.py",
    "unit/host/test_server.py",
    "unit/trial/test_trial_stories.py",
    "unit/trial/test_trial.py",
    "unit/ingest/test_client.py",
    "unit/delivery/test_spool_apart.py",
    "unit/delivery/test_many_queues.py",
    "unit/delivery/test_spooler.py",
    "unit/commands/test_redirect.py",
    "unit/host/test_pb_messages.py",
)

# Whether an example takes long, or long to make, says more of the machine than of the code.
settings.register_profile("kong-metering", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
# For `make quick`.
settings.register_profile("quick", settings.get_profile("kong-metering"), max_examples=10)
settings.load_profile("kong-metering")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--gateway",
        choices=["standin", "kong"],
        default="standin",
        help="what the end-to-end tests run on: the stand-in, or the real Kong on the PATH",
    )

    parser.addoption(
        "--database",
        choices=["off", "postgres"],
        default="off",
        help="what a real Kong keeps its configuration in: a file, or a PostgreSQL of the tests' own, by the Admin API",
    )

    parser.addoption(
        "--protocol",
        choices=["protobuf", "msgpack"],
        default="protobuf",
        help="what the gateway of the end-to-end tests speaks with the plugin server",
    )

    parser.addoption(
        "--schedules",
        default="0:6",
        help="the seeds of the random schedules of faults that the tests of delivery run: FIRST:END",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "e2e: goes through a whole gateway; runs on a real Kong too")
    config.addinivalue_line("markers", "slow: starts, kills or loads real processes for long; not in `make quick`")
    _keep_paths_short(config)
    # As Ctrl-C does, SIGTERM ends what the tests have started.
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Have the modules begin first that take longest, so that no core waits for one of them at the end."""
    order = {TESTS / name: number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


def _keep_paths_short(config: pytest.Config) -> None:
    """Have all temporary files of the tests in a directory with a short name, if that of the system's has none."""
    base = short_base()
    if base != tempfile.gettempdir():
        directory = tempfile.mkdtemp(prefix="km-", dir=base)
        Path(directory).chmod(0o711)  # some of what lies in it is for other users
        os.environ["TMPDIR"] = tempfile.tempdir = directory
        config.add_cleanup(lambda: shutil.rmtree(directory, ignore_errors=True))


@pytest.fixture
def tmp_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a directory with a short name: sockets lie deep in it, and their paths have 107 bytes at most."""
    return tmp_path_factory.mktemp("t")


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Run a PostgreSQL for gateways with a database, or skip with a word why."""
    programs = find_postgres()
    if programs is None:
        pytest.skip("there is no PostgreSQL server")
    with running_postgres(programs) as cluster:
        yield cluster


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()
