"""Who reads only README and the troubleshooting page finds what is wrong.

A fault is planted in real processes; the command of a section of the page is typed; and the first row of that section
whose words are in the answer has to be the one that tells of this fault, and what to do.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest
from click.testing import CliRunner

from kong_metering.commands.main import program
from kong_metering_sandbox.collector.faults import FaultMatch, FaultRule
from kong_metering_sandbox.collector.process import CollectorProcess
from tests.support.ingest import IngestServer
from tests.support.kongs import kong_in
from tests.support.plugin_server import ROOT, PluginServerProcess, remove_directory, short_directory
from tests.support.rpc import KongClient, KongRequest
from tests.support.waiting import wait_until
from tests.unit.commands.test_verify import TOKEN, event, keep, post
from tests.unit.host.conftest import answers, header_config

# On a machine that has much else to do the gateway alone may take a minute.
pytestmark = pytest.mark.timeout(300)

_STRANGER = 54_321
_PATIENCE = 90.0
_SERVER = "kong-metering-plugin-server"
_EVENTS_WAIT = "Events wait"
_NO_EVENT = "Request sent, no event"
_NOT_REACHED = "500 on metered routes"
_NO_INVOICE = "Event sent, no invoice"


@dataclass(frozen=True)
class Row:
    """A row of the page: words to look for, all of them or any; what it means and what to do."""

    words: tuple[str, ...]
    is_any: bool
    rest: str

    def fits(self, answer: str) -> bool:
        return (any if self.is_any else all)(words in answer for words in self.words)


def rows(section: str) -> list[Row]:
    """Read the tables of a section, as far as their first columns have words to look for."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
    lines = page.partition(f"\n## {section}\n")[2].partition("\n## ")[0].splitlines()
    cells = [line.strip("| ").split(" | ", 1) for line in lines if line.startswith("| ")]
    found = [Row(tuple(re.findall(r"`([^`]+)`", first)), " or " in first, rest) for first, rest in cells]
    return [row for row in found if row.words]


def advice(section: str, answer: str) -> str:
    """Give what the page says of an answer; "" if it has no word of it."""
    told = " ".join(answer.split())
    return next((row.rest for row in rows(section) if row.fits(told)), "")


def typed(*arguments: str | Path) -> str:
    """Run `kong-metering`, and give all that it says, whatever its exit status."""
    return CliRunner(env={"COLUMNS": "200"}).invoke(program, [str(argument) for argument in arguments]).output


@pytest.fixture
def prefix() -> Iterator[Path]:
    directory = short_directory()
    yield directory
    remove_directory(directory)


@pytest.fixture
def ingest() -> Iterator[IngestServer]:
    with IngestServer() as server:
        yield server


Metered = Callable[..., PluginServerProcess]


@pytest.fixture
def metered(prefix: Path) -> Iterator[Metered]:
    """Start a plugin server and have it meter a request, under header_config with changes."""
    with ExitStack() as running:

        def start(url: str, *flags: str, subject: str | None = "acme", **config: object) -> PluginServerProcess:
            server = running.enter_context(PluginServerProcess(*flags, prefix=prefix))
            client = KongClient(server.path)
            instance = client.start_instance(header_config(url, **config))
            client.run_phases(instance, KongRequest(answers(subject)))
            return server

        yield start


def wait_for_advice(section: str, words: str, *command: str | Path) -> None:
    """Type a command until the page's advice for what it says has these words."""
    wait_until(lambda: words in advice(section, typed(*command)), f"{words!r} from {command}", _PATIENCE)


@pytest.mark.parametrize(("status", "words"), [(401, "the token is wrong"), (404, "nothing takes events at this path")])
def test_a_wrong_token_or_path(metered: Metered, ingest: IngestServer, status: int, words: str) -> None:
    ingest.answer_next(*[status] * 100)
    server = metered(ingest.url)
    wait_for_advice(_EVENTS_WAIT, words, "status", "--socket", server.path)
    assert "waits" in advice(_NO_EVENT, typed("status", "--socket", server.path))


def test_an_endpoint_at_which_nobody_listens(metered: Metered) -> None:
    with IngestServer() as gone:
        url = gone.url
    server = metered(url)
    wait_for_advice(_EVENTS_WAIT, "nobody listens", "status", "--socket", server.path)


def test_https_where_there_is_none(metered: Metered, ingest: IngestServer) -> None:
    server = metered(ingest.url.replace("http:", "https:"))
    wait_for_advice(_EVENTS_WAIT, "no TLS", "status", "--socket", server.path)


def test_a_spool_that_cannot_be_written(metered: Metered, ingest: IngestServer) -> None:
    server = metered(ingest.url, "--spool-dir /proc/nothing")
    wait_for_advice(_EVENTS_WAIT, "the spool cannot be written", "status", "--socket", server.path)
    assert any("cannot be used for the spool" in line for line in server.log)


def test_a_header_that_nobody_sends(metered: Metered, ingest: IngestServer) -> None:
    server = metered(ingest.url, subject=None)
    wait_for_advice(_NO_EVENT, "name nobody who could be billed", "status", "--socket", server.path)
    server.wait_for_log("a request is billed to nobody, it has no header x-tenant-id that is not blank")


def test_a_configuration_that_cannot_be_used(metered: Metered, ingest: IngestServer) -> None:
    server = metered(ingest.url, api_token="")
    wait_for_advice(_NO_EVENT, "cannot be used", "status", "--socket", server.path)
    server.wait_for_log("THIS CONFIGURATION CANNOT BE USED")


def test_status_codes_that_are_left_out(metered: Metered, ingest: IngestServer) -> None:
    server = metered(ingest.url, allow_status_codes=["400-499"])
    wait_for_advice(_NO_EVENT, "leaves these answers out", "status", "--socket", server.path)


def test_a_plugin_that_no_request_has_met(prefix: Path) -> None:
    with PluginServerProcess(prefix=prefix) as server:
        assert "enabled on other routes" in advice(_NO_EVENT, typed("status", "--socket", server.path))


def test_a_server_that_is_not_up(prefix: Path) -> None:
    assert "no server was started there" in advice(_NOT_REACHED, typed("health", "-p", prefix))


def test_a_server_that_has_ended(prefix: Path) -> None:
    with PluginServerProcess(prefix=prefix) as server:
        server.kill()
        assert "has ended" in advice(_NOT_REACHED, typed("health", "-p", prefix))


def test_a_server_that_kong_looks_for_elsewhere(prefix: Path) -> None:
    with PluginServerProcess(prefix=prefix):
        assert "Kong connects to another one" in advice(_NOT_REACHED, typed("health", "-p", prefix))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be several users")
def test_workers_of_another_user(prefix: Path) -> None:
    with PluginServerProcess(prefix=prefix) as server, kong_in(prefix, server.path, user=_STRANGER):
        assert "run as another user" in advice(_NOT_REACHED, typed("health", "-p", prefix))


def conf(directory: Path, *, plugins: str = "bundled,metering-and-billing", socket: str = "/p/metering.sock") -> Path:
    path = directory / "kong.conf"
    program = f"/opt/kong-metering/bin/{_SERVER} --kong-prefix /p --socket /p/metering.sock"
    lines = [
        f"plugins = {plugins}",
        "pluginserver_names = metering",
        f"pluginserver_metering_socket = {socket}",
        f"pluginserver_metering_start_cmd = {program}",
        f"pluginserver_metering_query_cmd = {program} --dump",
        "prefix = /p",
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_name_that_is_not_in_plugins(tmp_path: Path) -> None:
    answer = typed("check", "--kong-conf", conf(tmp_path, plugins="bundled"))
    assert "does not have the plugin" in advice("Kong does not start, or does not know the plugin", answer)
    assert "write `plugins = bundled,metering-and-billing`" in answer


def test_a_socket_that_the_server_makes_elsewhere(tmp_path: Path) -> None:
    answer = typed("check", "--kong-conf", conf(tmp_path, socket="/p/other.sock"))
    assert "the server makes another one" in advice(_NOT_REACHED, answer)


def test_a_server_that_kong_starts_while_deck_is_used(tmp_path: Path) -> None:
    answer = typed("check", "--kong-conf", conf(tmp_path))
    section = "The Admin API answers 500, decK and the ingress controller fail"
    assert "Kong itself starts the plugin server" in advice(section, answer)


def test_an_event_that_the_endpoint_refuses(metered: Metered, prefix: Path, openmeter: CollectorProcess) -> None:
    openmeter.client.faults(FaultRule(match=FaultMatch(subject="initech"), status=400))
    server = metered(openmeter.ingest_v3, subject="initech", api_token=TOKEN)
    client = KongClient(server.path)
    instance = client.start_instance(header_config(openmeter.ingest_v3, api_token=TOKEN))

    def is_found() -> bool:
        # What others send shows that the endpoint takes others.
        client.run_phases(instance, KongRequest(answers("acme", next(numbers))))
        return "refuses this event" in advice("Dead letters", typed("spool", "list", "--dead-letters", "-p", prefix))

    numbers = count(1)
    wait_until(is_found, "a dead letter", _PATIENCE)


@pytest.fixture(scope="module")
def openmeter() -> Iterator[CollectorProcess]:
    with CollectorProcess(tokens=[TOKEN]) as running:
        yield running


@pytest.fixture(autouse=True)
def _well(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "openmeter" in request.fixturenames:
        request.getfixturevalue("openmeter").client.clear_faults()


def verified(openmeter: CollectorProcess, directory: Path, kept: bytes) -> str:
    keep(directory / "metering-spool", openmeter.ingest_v3, kept)
    token = directory / "token"
    token.write_text(TOKEN)
    return typed("verify", "-p", directory, "--token-file", token, "--settle", "1s")


def test_an_event_that_is_gone_after_a_2xx(openmeter: CollectorProcess, tmp_path: Path) -> None:
    assert "does not have them" in advice(_NO_INVOICE, verified(openmeter, tmp_path, event(1_000_001)))


def test_a_subject_without_a_customer(openmeter: CollectorProcess, tmp_path: Path) -> None:
    stranger = event(1_000_002, subject="stranger")
    post(openmeter.ingest_v3, stranger)
    assert "no customer's" in advice(_NO_INVOICE, verified(openmeter, tmp_path, stranger))
    answer = typed("customers", "-p", tmp_path, "--token-file", tmp_path / "token")
    assert "no customer's" in advice(_NO_INVOICE, answer)
