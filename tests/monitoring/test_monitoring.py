"""The alerts and the dashboard, by Prometheus' own tools and by what a real plugin server gives."""

from __future__ import annotations

import itertools
import re
import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.ingest import IngestServer
from tests.support.plugin_server import ROOT, PluginServerProcess
from tests.support.prometheus import MONITORING, dashboard_queries, needs, prometheus
from tests.support.rpc import KongClient, KongRequest
from tests.support.waiting import wait_until
from tests.unit.host.conftest import answers, header_config

pytestmark = pytest.mark.slow

# Of Kong's own plugin, and of Prometheus.
_FOREIGN = {"kong_http_requests_total", "up"}


def alerts() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"]
    rules: list[dict[str, Any]] = group["rules"]
    return rules


@pytest.fixture(scope="module")
def metrics_port() -> Iterator[int]:
    """Serve the metrics of a plugin server that delivers and refuses all the time, at a port."""
    with IngestServer() as ingest:
        server = PluginServerProcess("--metrics-listen 127.0.0.1:0")
        with server:
            port = int(server.wait_for_log("status page at http://127.0.0.1:").rpartition(":")[2].partition("/")[0])
            client = KongClient(server.path)
            instance = client.start_instance(header_config(ingest.url))
            for number, subject in enumerate(["acme"] * 5 + [None]):
                client.run_phases(instance, KongRequest(answers(subject, number)))
            ingest.wait_for_events(5)
            is_over = threading.Event()
            traffic = threading.Thread(target=meter_until, args=(is_over, server.path, ingest.url))
            traffic.start()
            yield port
            is_over.set()
            traffic.join()


def meter_until(is_over: threading.Event, path: Path, endpoint: str) -> None:
    """Meter a request now and then: a rate is of what comes while Prometheus looks."""
    client = KongClient(path)
    instance = client.start_instance(header_config(endpoint))
    for number in itertools.count(10):
        if is_over.wait(0.1):
            return
        client.run_phases(instance, KongRequest(answers("acme", number)))


@needs("promtool")
@pytest.mark.parametrize(
    "arguments",
    [("check", "rules", "monitoring/alerts.yaml"), ("test", "rules", "tests/monitoring/alerts.test.yaml")],
)
def test_promtool_takes_the_alerts(arguments: tuple[str, ...]) -> None:
    command = ["promtool", *arguments]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def test_each_alert_is_tested_and_has_a_runbook() -> None:
    tested = (ROOT / "tests/monitoring/alerts.test.yaml").read_text()
    headings = {
        line[4:].strip().lower()
        for line in (ROOT / "docs/monitoring.md").read_text().splitlines()
        if line.startswith("### ")
    }
    for rule in alerts():
        page, anchor = rule["annotations"]["runbook"].split("#")
        assert page == "docs/monitoring.md"
        assert anchor in headings
        assert re.search(rf"alertname: {rule['alert']}\n.*\n\s+exp_alerts: \[\{{", tested), rule["alert"]


def test_what_alerts_and_dashboard_ask_for_is_there(metrics_port: int) -> None:
    wait_until(lambda: "kong_metering_spool_bytes" in given_metrics(metrics_port), "a look at the disk")
    given = given_metrics(metrics_port)
    asked = {
        name
        for expression in (*dashboard_queries(), *(rule["expr"] for rule in alerts()))
        for name in re.findall(r"\b(?:kong_\w+|up)(?=[{\s\[]|$)", expression)
    } - {"kong_metering_endpoint_condition"}
    missing = {name for name in asked - _FOREIGN if name.removesuffix("_bucket") not in given}
    assert missing == set()


def given_metrics(port: int) -> set[str]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
        return set(re.findall(r"^# TYPE (\S+)", response.read().decode(), re.MULTILINE))


@needs("prometheus")
def test_each_query_of_the_dashboard_returns_data(metrics_port: int) -> None:
    with prometheus({"kong-metering": metrics_port}) as running:
        for query in dashboard_queries():
            if '!="works"' in query:
                continue  # has data while an endpoint fails
            wait_until(partial(running.panel, query), f"data for {query}", seconds=60)
