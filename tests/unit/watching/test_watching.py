"""Metrics, health and the status page, of a real plugin server, over real HTTP."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from prometheus_client.parser import text_string_to_metric_families as older_families

from tests.support.ingest import IngestServer
from tests.support.kongs import kong_in
from tests.support.plugin_server import BIN, PluginServerProcess
from tests.support.rpc import KongClient, KongRequest
from tests.support.waiting import wait_until
from tests.unit.host.conftest import answers, header_config

pytestmark = pytest.mark.slow

OPENMETRICS = "application/openmetrics-text; version=1.0.0"
PLUGIN_ID = "878715eb-ff5f-4bc3-b2ce-a52b1cd3b907"
STRANGER = 54_321
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=10)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(10)
        self.sock.connect(str(self._path))


class Watched:
    """A plugin server with its metrics on a Unix socket, and an instance of the plugin on it."""

    def __init__(self, server: PluginServerProcess) -> None:
        self.server = server
        self.client = KongClient(server.path)
        self.socket = server.prefix / "metrics.sock"
        self._numbers = iter(range(1_000_000))

    def get(self, path: str, accept: str = "*/*") -> tuple[int, str, str]:
        """Return status, content type and text."""
        connection = _UnixConnection(self.socket)
        try:
            connection.request("GET", path, headers={"Accept": accept})
            response = connection.getresponse()
            return response.status, response.headers["Content-Type"], response.read().decode()
        finally:
            connection.close()

    def samples(self) -> Samples:
        text = self.get("/metrics", OPENMETRICS)[2]
        return {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)  # type: ignore[no-untyped-call]
            for sample in family.samples
        }

    def value(self, name: str, **labels: str) -> float:
        """Add up the samples of a metric that have these labels."""
        return sum(
            value
            for (found, has), value in self.samples().items()
            if found == name and labels.items() <= dict(has).items()
        )

    def wait_for(self, wanted: float, name: str, **labels: str) -> None:
        wait_until(lambda: self.value(name, **labels) == wanted, f"{name}{labels} to be {wanted}")

    def request(self, instance: int, subject: str | None) -> None:
        self.client.run_phases(instance, KongRequest(answers(subject, next(self._numbers))))


@contextmanager
def watched(*flags: str) -> Iterator[Watched]:
    server = PluginServerProcess(*flags)
    server.command += f" --metrics-listen unix:{server.prefix}/metrics.sock"
    with server:
        server.wait_for_log("metrics and status page at unix:")
        yield Watched(server)


@pytest.fixture
def ingest() -> Iterator[IngestServer]:
    with IngestServer() as server:
        yield server


def test_what_becomes_of_requests_and_events_is_counted(ingest: IngestServer) -> None:
    with watched() as one:
        instance = one.client.start_instance(header_config(ingest.url, plugin_instance_name="billing"))
        for subject in ("acme", "acme", None):
            one.request(instance, subject)
        ingest.wait_for_events(2)
        one.wait_for(2, "kong_metering_delivered_total", plugin_id=PLUGIN_ID, endpoint=ingest.url)
        assert one.value("kong_metering_requests_total", plugin=f"billing ({PLUGIN_ID})", outcome="metered") == 2
        assert one.value("kong_metering_requests_total", plugin_id=PLUGIN_ID, outcome="no_subject") == 1
        assert one.value("kong_metering_events_total", type="kong.api_request") == 2
        assert one.value("kong_metering_deliveries_total", status="2xx") >= 1
        assert one.value("kong_metering_phase_seconds_count", phase="access") == 3
        assert one.value("kong_metering_phase_seconds_count", phase="log") == 3
        assert one.value("kong_metering_disk_write_seconds_count") >= 1
        assert one.value("kong_metering_servers") == one.value("kong_metering_servers_expected") == 1
        assert one.value("kong_metering_endpoint_condition", kong_metering_endpoint_condition="works") == 1
        assert "acme" not in one.get("/metrics")[2]
        assert one.get("/metrics")[1].startswith("text/plain; version=0.0.4")
        assert list(older_families(one.get("/metrics")[2]))
        assert one.get("/healthz") == (200, "text/plain; charset=utf-8", "ok\n")
        assert one.get("/readyz")[0] == 200
        assert one.get("/nothing")[0] == 404


def test_what_waits_and_why_is_shown_by_metrics_page_and_command(ingest: IngestServer) -> None:
    ingest.answer_next(*[503] * 1000)
    with watched() as one:
        queue = {"initial_retry_delay": 30, "max_retry_delay": 30}
        name = "<script>alert(1)</script>"
        instance = one.client.start_instance(header_config(ingest.url, queue=queue, plugin_instance_name=name))
        one.request(instance, "acme")
        one.wait_for(1, "kong_metering_deliveries_total", status="503")
        one.wait_for(1, "kong_metering_waiting")
        assert one.value("kong_metering_next_try_seconds") > 1
        wait_until(lambda: one.value("kong_metering_oldest_waiting_seconds") > 0, "an age")
        page = one.get("/")[2]
        assert "503" in page
        assert "1 of 1 server serves" in page
        assert "&lt;script&gt;alert" in page
        assert "<script>alert" not in page
        shown = command_line("status", "--socket", str(one.server.path), COLUMNS="240")
        assert "503" in shown.stdout
        assert "next try in" in shown.stdout
        assert "1 event waits" in shown.stdout


def test_counts_go_on_when_a_server_is_killed(ingest: IngestServer) -> None:
    with watched("--servers 2") as one:
        watcher = next(pid for pid in one.server.server_pids() if _name(pid) == "metering-watch")
        instance = one.client.start_instance(header_config(ingest.url))
        one.request(instance, "acme")
        one.wait_for(1, "kong_metering_delivered_total")
        for pid in set(one.server.server_pids()) - {watcher}:
            os.kill(pid, signal.SIGKILL)
        one.wait_for(2, "kong_metering_server_deaths_total")
        wait_until(lambda: one.get("/readyz")[0] == 200, "the next servers")
        assert one.value("kong_metering_delivered_total") == 1
        assert one.value("kong_metering_phase_seconds_count", phase="log") == 1


def test_a_watcher_that_dies_is_replaced_and_ends_with_the_plugin_server(ingest: IngestServer) -> None:
    with watched() as one:
        watcher = next(pid for pid in one.server.server_pids() if _name(pid) == "metering-watch")
        os.kill(watcher, signal.SIGKILL)
        one.server.wait_for_log("the process that serves metrics ended")
        wait_until(lambda: _answers(one), "the next one")
        instance = one.client.start_instance(header_config(ingest.url))
        one.request(instance, "acme")
        ingest.wait_for_events(1)
        assert one.server.stop() == 0


def test_an_address_that_is_taken_is_tried_again(ingest: IngestServer) -> None:
    server = PluginServerProcess()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        server.command += f" --metrics-listen 127.0.0.1:{port}"
        server.start()
        server.wait_for_log(f"metrics cannot be served at 127.0.0.1:{port}, for now")
        instance = KongClient(server.path).start_instance(header_config(ingest.url))
        KongClient(server.path).run_phases(instance, KongRequest(answers("acme")))
        ingest.wait_for_events(1)
    with server:
        server.wait_for_log(f"metrics and status page at http://127.0.0.1:{port}/")


def test_a_client_that_says_nothing_holds_nobody_up(ingest: IngestServer) -> None:
    with watched() as one, socket.socket(socket.AF_UNIX) as idle:
        idle.connect(str(one.socket))
        assert one.get("/healthz")[0] == 200
        assert ingest.requests() == []


def test_clients_that_say_nothing_make_room_for_one_that_asks(ingest: IngestServer) -> None:
    with watched() as one, ExitStack() as stack:
        idle = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(100)]
        for client in idle:
            client.connect(str(one.socket))
        for _ in range(20):
            assert one.get("/healthz")[0] == 200
        assert ingest.requests() == []


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be several users")
def test_health_over_http_is_that_of_the_command(ingest: IngestServer) -> None:
    with watched() as one:
        assert one.get("/healthz")[0] == 200
        one.server.prefix.chmod(0o755)
        with kong_in(one.server.prefix, one.server.path, user=STRANGER):
            status, _, why = one.get("/healthz")
            told = command_line("health", "--serving", "--socket", str(one.server.path))
        assert (status, told.returncode) == (503, 1)
        assert f"run as user {STRANGER}, and cannot connect" in why
        assert told.stdout == why
        assert ingest.requests() == []


def test_the_command_says_what_to_do_where_nobody_serves(tmp_path: Path) -> None:
    asked = command_line("status", "-p", str(tmp_path))
    assert asked.returncode == 1
    assert "there is no socket" in asked.stderr


def command_line(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(BIN / "kong-metering"), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def _name(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text(encoding="ascii").strip()


def _answers(one: Watched) -> bool:
    try:
        return one.get("/healthz")[0] == 200
    except OSError:
        return False
