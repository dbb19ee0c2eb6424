"""A real Prometheus on a free port, with our alerts, and a scrape each second."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import yaml

from tests.support.plugin_server import ROOT, short_directory

MONITORING = ROOT / "monitoring"
_STOP_SECONDS = 20.0


def needs(program: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"{program} is not installed")


def dashboard_queries() -> list[str]:
    dashboard = json.loads((MONITORING / "dashboard.json").read_text())
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


class Prometheus:
    """What can be asked of it; while it is just being started, it has nothing."""

    def __init__(self, port: int) -> None:
        self._port = port

    def query(self, expression: str) -> list[Any]:
        """Evaluate an expression now."""
        result: list[Any] = self._asked(f"query?{urllib.parse.urlencode({'query': expression})}").get("result", [])
        return result

    def panel(self, expression: str) -> list[Any]:
        """Evaluate an expression of the dashboard, with its variables filled in; what is no number is no data."""
        found = self.query(expression.replace("$__rate_interval", "10s").replace("$instance", ".*"))
        return [series for series in found if series["value"][1] != "NaN"]

    def alerts(self) -> set[str]:
        """Name the alerts that are pending, or go off."""
        return {alert["labels"]["alertname"] for alert in self._asked("alerts").get("alerts", [])}

    def _asked(self, path: str) -> dict[str, Any]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/api/v1/{path}", timeout=10) as response:
                data: dict[str, Any] = json.load(response)["data"]
        except OSError:
            return {}
        return data


@contextmanager
def prometheus(targets: Mapping[str, int]) -> Iterator[Prometheus]:
    """Run one that scrapes ports of this machine, by the name of their job."""
    directory = short_directory()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    configuration = directory / "prometheus.yml"
    configuration.write_text(
        yaml.safe_dump(
            {
                "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
                "rule_files": [str(MONITORING / "alerts.yaml")],
                "scrape_configs": [
                    {"job_name": job, "static_configs": [{"targets": [f"127.0.0.1:{target}"]}]}
                    for job, target in targets.items()
                ],
            }
        )
    )
    command = [
        "prometheus",
        f"--config.file={configuration}",
        f"--storage.tsdb.path={directory}/data",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield Prometheus(port)
    finally:
        process.terminate()
        process.wait(_STOP_SECONDS)
        shutil.rmtree(directory)
