"""A plugin server that Kong does not start: as the image runs it, and as `kong-metering install` has systemd run it.

Nothing is billed less for it: over restarts, new versions and reloads under load, and when a pod is drained, which ends
Kong first and the plugin server after.
"""

from __future__ import annotations

import os
import pwd
import re
import shlex
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import requests

from kong_metering_sandbox.gateways import Beside, Gateway, wait_for
from tests.e2e.balance import bill, check_bill
from tests.e2e.declarative import document, metering, service
from tests.e2e.traffic import Load, get
from tests.support.image import command_of_the_image, make_directories, variables_of_the_image
from tests.support.plugin_server import BIN, ServerProcess, remove_directory, short_directory

if TYPE_CHECKING:
    from kong_metering_sandbox.collector.process import CollectorProcess
    from kong_metering_sandbox.upstream_process import UpstreamProcess

pytestmark = pytest.mark.e2e

Way = Callable[[Path, str], ServerProcess]
_SECONDS = 60
_UNIT = "etc/systemd/system/kong-metering.service"


def as_the_image(root: Path, flags: str) -> ServerProcess:
    """Give the server of the image's entry point and variables, below a directory."""
    make_directories(root)
    variables = variables_of_the_image(root)
    command = shlex.join(command_of_the_image("ENTRYPOINT"))
    return ServerProcess(f"{command} {flags}", Path(variables["KONG_METERING_SOCKET"]), environment=variables)


def as_the_service(root: Path, flags: str) -> ServerProcess:
    """Give the server that the service runs which is installed, below a directory."""
    user = pwd.getpwuid(os.geteuid()).pw_name
    command = [str(BIN / "kong-metering"), "install", "--root", str(root), "--user", user, f"--flags={flags}"]
    subprocess.run([*command, "-p", str(root)], capture_output=True, timeout=_SECONDS, check=True)
    (start,) = re.findall(r"^ExecStart=(.*)$", (root / _UNIT).read_text("utf-8"), re.MULTILINE)
    start = re.sub(r"(?<= )(?=/run/|/var/)", str(root), start)
    return ServerProcess(start, root / "run/kong-metering/kong-metering.sock")


def dump_below(root: Path) -> Path:
    """Find the file that describes the plugin."""
    (dump,) = root.glob("*/**/dump.json")
    return dump


class Pair:
    """A plugin server and a gateway beside it; the server is there first, and ends last."""

    def __init__(self, server: ServerProcess, gateway: Gateway) -> None:
        self.server = server
        self.gateway = gateway


@pytest.fixture
def root() -> Iterator[Path]:
    directory = short_directory()
    yield directory
    remove_directory(directory)


@pytest.fixture
def start_pair(
    gateway_class: type[Gateway], root: Path, tmp_path: Path, upstream: UpstreamProcess, collector: CollectorProcess
) -> Iterator[Callable[..., Pair]]:
    with ExitStack() as running:

        def start(
            way: Way, flags: str = "", name: str = "metering-and-billing", others: Sequence[dict[str, Any]] = ()
        ) -> Pair:
            server = running.enter_context(way(root, f"--protocol {gateway_class.protocol} {flags}"))
            plugin = metering(collector.ingest_v1) | {"name": name}
            settings = {"plugins": f"bundled,{name}"}
            gateway = gateway_class(
                tmp_path / "gateway",
                document(service(upstream.url), plugins=[plugin, *others]),
                settings=settings,
                beside=Beside(server.path, dump_below(root)),
            )
            return Pair(server, running.enter_context(gateway))

        yield start


both_ways = pytest.mark.parametrize("way", [as_the_image, as_the_service])


@both_ways
def test_requests_are_metered_and_the_admin_api_answers_at_its_root(
    way: Way, start_pair: Callable[..., Pair], collector: CollectorProcess
) -> None:
    """DecK and the ingress controller ask for the root first; with start_cmd a worker of Kong 3.9 answers 500."""
    pair = start_pair(way)
    for number in range(20):
        assert get(pair.gateway.proxy_port, f"/echo/{number}", ("X-Tenant-Id", "acme")) == 200
        assert requests.get(f"{pair.gateway.admin_url}/", timeout=10).status_code == 200
    collector.client.wait_for_events(20)
    assert sorted(bill(collector).items()) == [(number, 1) for number in range(20)]


def test_when_a_pod_is_drained_every_request_that_was_answered_is_billed(
    start_pair: Callable[..., Pair], collector: CollectorProcess
) -> None:
    """Kong is told first, and ends; the server is told then, and delivers what it has."""
    pair = start_pair(as_the_image)
    with Load(pair.gateway.proxy_port) as load:
        load.wait_for(100)
        pair.gateway.stop()
    assert pair.server.stop() == 0
    answered = load.answered()
    assert {one.status for one in answered.values()} == {200}
    wait_for(lambda: answered.keys() <= bill(collector).keys(), "all are billed", lambda: f"{pair.server.log}", 30)
    assert check_bill(collector, answered) == []


def restart_in_place(pair: Pair) -> None:
    """Start a new version, as `systemctl reload` does."""
    served = pair.server.log.count
    said = f"info: serving on {pair.server.path}, taken over from the previous process"
    before = served(said)
    pair.server.process.send_signal(signal.SIGHUP)
    wait_for(lambda: served(said) > before, "the next one serves", lambda: f"{pair.server.log}", 100)


@contextmanager
def replaced(pair: Pair) -> Iterator[None]:
    """Have another server take over, and end the one before: as an upgrade does that starts the new one first."""
    command = pair.server.command
    with ServerProcess(command, pair.server.path, environment=pair.server._environment):
        pair.server.stop()
        yield


@pytest.mark.slow
def test_a_restart_an_upgrade_and_a_reload_under_load_lose_no_request(
    start_pair: Callable[..., Pair], collector: CollectorProcess
) -> None:
    pair = start_pair(as_the_image)
    with Load(pair.gateway.proxy_port) as load:
        load.wait_for(50)
        restart_in_place(pair)
        load.wait_for(50)
        pair.gateway.reload()
        load.wait_for(50)
        with replaced(pair):
            load.wait_for(100)
            pair.gateway.stop()
    answered = load.answered()
    assert {one.status for one in answered.values()} == {200}
    wait_for(lambda: answered.keys() <= bill(collector).keys(), "all are billed", lambda: f"{pair.server.log}", 30)
    assert check_bill(collector, answered) == []


def test_another_name_is_the_plugins_everywhere(start_pair: Callable[..., Pair], collector: CollectorProcess) -> None:
    pair = start_pair(as_the_service, "--plugin-name api-usage", "api-usage")
    assert get(pair.gateway.proxy_port, "/echo/0", ("X-Tenant-Id", "acme")) == 200
    collector.client.wait_for_events(1)
    plugins = requests.get(f"{pair.gateway.admin_url}/plugins", timeout=10).json()["data"]
    assert [plugin["name"] for plugin in plugins] == ["api-usage"]


@pytest.mark.parametrize(("flags", "subject"), [("", "client"), ("--priority 16", "gateway")])
def test_with_the_vendors_priority_a_header_counts_as_transformers_have_made_it(
    flags: str, subject: str, start_pair: Callable[..., Pair], collector: CollectorProcess
) -> None:
    transformer = {"name": "request-transformer", "config": {"replace": {"headers": ["x-tenant-id:gateway"]}}}
    pair = start_pair(as_the_image, flags, others=[transformer])
    get(pair.gateway.proxy_port, "/echo/0", ("X-Tenant-Id", "client"))
    collector.client.wait_for_events(1)
    assert [event.subject for event in collector.client.events()] == [subject]
