"""The alerts and the dashboard, by Prometheus' own tools and by what a real plugin server gives."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import yaml

from tests.support.ingest import IngestServer
from tests.support.plugin_server import ROOT, PluginServerProcess, short_directory
from tests.support.rpc import KongClient, KongRequest
from tests.support.waiting import wait_until
from tests.unit.host.conftest import answers, header_config

pytestmark = pytest.mark.slow

MONITORING = ROOT / "monitoring"
# Of Kong's own plugin, and of Prometheus.
_FOREIGN = {"kong_http_requests_total", "up"}


def needs(program: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"{program} is not installed")


def alerts() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"]
    rules: list[dict[str, Any]] = group["rules"]
    return rules


def queries() -> list[str]:
    dashboard = json.loads((MONITORING / "dashboard.json").read_text())
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


@pytest.fixture(scope="module")
def metrics_port() -> Iterator[int]:
    """Serve the metrics of a plugin server that has delivered, refused, and been kept waiting, at a port."""
    with IngestServer() as ingest:
        server = PluginServerProcess("--metrics-listen 127.0.0.1:0")
        with server:
            port = int(server.wait_for_log("status page at http://127.0.0.1:").rpartition(":")[2].partition("/")[0])
            client = KongClient(server.path)
            instance = client.start_instance(header_config(ingest.url))
            for number, subject in enumerate(["acme"] * 5 + [None]):
                client.run_phases(instance, KongRequest(answers(subject, number)))
            ingest.wait_for_events(5)
            yield port


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
        for expression in (*queries(), *(rule["expr"] for rule in alerts()))
        for name in re.findall(r"\b(?:kong_\w+|up)(?=[{\s\[]|$)", expression)
    } - {"kong_metering_endpoint_condition"}
    missing = {name for name in asked - _FOREIGN if name.removesuffix("_bucket") not in given}
    assert missing == set()


def given_metrics(port: int) -> set[str]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
        return set(re.findall(r"^# TYPE (\S+)", response.read().decode(), re.MULTILINE))


@needs("prometheus")
def test_each_query_of_the_dashboard_returns_data(metrics_port: int) -> None:
    directory = short_directory()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    scrape = {
        "global": {"scrape_interval": "1s"},
        "scrape_configs": [
            {"job_name": "kong-metering", "static_configs": [{"targets": [f"127.0.0.1:{metrics_port}"]}]}
        ],
    }
    configuration = directory / "prometheus.yml"
    configuration.write_text(yaml.safe_dump(scrape))
    command = [
        "prometheus",
        f"--config.file={configuration}",
        f"--storage.tsdb.path={directory}/data",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    prometheus = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for query in queries():
            if '!="works"' in query:
                continue  # has data while an endpoint fails
            asked = query.replace("$__rate_interval", "10s").replace("$instance", ".*")
            wait_until(partial(_asked, port, asked), f"data for {asked}", seconds=60)
    finally:
        prometheus.terminate()
        prometheus.wait(20)
        shutil.rmtree(directory)


def _asked(port: int, query: str) -> list[Any]:
    url = f"http://127.0.0.1:{port}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
    try:
        with urllib.request.urlopen(url, timeout=10) as response:
            result: list[Any] = json.load(response)["data"]["result"]
    except OSError:
        return []
    return result
