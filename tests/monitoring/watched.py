"""A gateway with traffic, its plugin server, whose disk can fail, and a collector; and what can be seen of them."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import requests
from prometheus_client.parser import text_string_to_metric_families

from kong_metering_sandbox.collector.process import CollectorProcess
from kong_metering_sandbox.faulty_server import DiskFault, Faults
from kong_metering_sandbox.gateways import Gateway, StandIn
from kong_metering_sandbox.upstream_process import UpstreamProcess
from tests.e2e.declarative import document, metering, route, service
from tests.support.plugin_server import BIN
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from typing_extensions import Self

TOKEN = "om_token"
_REQUEST_SECONDS = 0.05
_STATUS_PAGE = "status page at http://127.0.0.1:"


class Traffic:
    """Sends requests to the gateway while its context lasts; `answered` is how many had an answer."""

    def __init__(self, url: str) -> None:
        self.answered = 0
        self._url = url
        self._flows = threading.Event()
        self._flows.set()
        self._is_ending = threading.Event()
        self._thread = threading.Thread(target=self._send, name="traffic")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_ending.set()
        self._flows.set()
        self._thread.join()

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Send nothing while the context lasts."""
        self._flows.clear()
        try:
            yield
        finally:
            self._flows.set()

    def _send(self) -> None:
        with requests.Session() as session:
            session.trust_env = False
            while not self._is_ending.wait(_REQUEST_SECONDS):
                self._flows.wait()
                session.get(self._url, headers={"x-tenant-id": "acme"}, timeout=30)
                self.answered += 1


class KongsMetrics:
    """Tells how many requests the gateway has answered, as Kong's own prometheus plugin does."""

    def __init__(self, traffic: Traffic) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = (
                    f"# TYPE kong_http_requests_total counter\nkong_http_requests_total {traffic.answered}\n".encode()
                )
                self.send_response(200)
                self.send_header("Content-Type", "text/plain; version=0.0.4")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                """Say nothing: it is asked each second."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_port

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, name="Kong's metrics", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class Watched:
    """What runs, what can befall it while a context lasts, and how it looks."""

    def __init__(
        self, gateway: Gateway, collector: CollectorProcess, upstream: UpstreamProcess, faults: Faults
    ) -> None:
        self._gateway = gateway
        self._collector = collector
        self._upstream = upstream
        self._faults = faults
        self.traffic = Traffic(f"{gateway.proxy_url}/echo")
        line = wait_until(lambda: _line(gateway.error_log, _STATUS_PAGE), "the address of the metrics", seconds=60)
        self.port = int(line.rpartition("127.0.0.1:")[2].partition("/")[0])

    # -- what can befall it -------------------------------------------------------------------------------------------

    @contextmanager
    def endpoint_killed(self) -> Iterator[None]:
        self._collector.pause()
        try:
            yield
        finally:
            self._collector.resume()

    @contextmanager
    def token_refused(self) -> Iterator[None]:
        self._collector.client.set_tokens(["another"])
        try:
            yield
        finally:
            self._collector.client.set_tokens([TOKEN])

    @contextmanager
    def disk(self, fault: DiskFault) -> Iterator[None]:
        self._faults.set_disk(fault)
        try:
            yield
        finally:
            self._faults.set_disk(None)

    @contextmanager
    def not_metered(self) -> Iterator[None]:
        """Have the gateway answer requests without the plugin."""
        self._gateway.configure(declarative(self._collector, self._upstream, is_metered=False))
        try:
            yield
        finally:
            self._gateway.configure(declarative(self._collector, self._upstream))

    # -- how it looks -------------------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """Return what `kong-metering status` tells of the one queue, and when the last request was."""
        command = [str(BIN / "kong-metering"), "status", "--json", "--socket", str(self._gateway.socket_path)]
        asked = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert asked.returncode == 0, asked.stderr
        told = json.loads(asked.stdout)
        (queue,), (plugin,) = told["queues"], told["plugins"]
        return {**queue, "last_request_at": plugin["last_request_at"]}

    def metrics(self) -> dict[str, float]:
        """Add up the samples of each metric by its name; of the endpoint's condition by that."""
        sums: dict[str, float] = {}
        for family in text_string_to_metric_families(self._get("/metrics")):
            for sample in family.samples:
                name = sample.labels.get("kong_metering_endpoint_condition", sample.name)
                sums[name] = sums.get(name, 0.0) + sample.value
        return sums

    def page(self) -> str:
        """Return the text of the status page, a line for each row of a table."""
        text = self._get("/").replace("</tr>", "\n").replace("</td>", " | ")
        return re.sub("<[^>]*>", "", text)

    def is_well(self) -> bool:
        """Whether all requests are metered, and their events written and delivered, as far as metrics tell."""
        told = self.metrics()
        return (
            told.get("works") == 1
            and told["kong_metering_disk_refuses"] == told["kong_metering_disk_hangs"] == 0
            and time.time() - told.get("kong_metering_last_request_timestamp_seconds", 0) < 5
        )

    def _get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as response:
            text: str = response.read().decode()
            return text


def declarative(collector: CollectorProcess, upstream: UpstreamProcess, *, is_metered: bool = True) -> str:
    queue = {"max_batch_size": 1, "max_retry_delay": 2}
    plugin = metering(collector.ingest_v3, api_token=TOKEN, queue=queue)
    return document(service(upstream.url, "echo", route("echo")), plugins=[plugin] if is_metered else [])


@contextmanager
def watched(directory: Path) -> Iterator[Watched]:
    """Start all of it."""
    with ExitStack() as running:
        upstream = running.enter_context(UpstreamProcess())
        collector = running.enter_context(CollectorProcess(tokens=[TOKEN]))
        faults, spool = Faults(directory / "control"), directory / "spool"
        command = [*faults.command(spool), "--kong-prefix", str(directory / "gateway" / "prefix")]
        command += ["--spool-dir", str(spool), "--metrics-listen", "127.0.0.1:0"]
        gateway = StandIn(
            directory / "gateway",
            declarative(collector, upstream),
            settings={"pluginserver_metering_start_cmd": shlex.join(command)},
        )
        running.enter_context(gateway)
        one = Watched(gateway, collector, upstream, faults)
        running.enter_context(one.traffic)
        yield one


def _line(log: str, part: str) -> str | None:
    return next((line for line in log.splitlines() if part in line), None)
