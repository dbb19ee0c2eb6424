"""Hybrid mode on real Kongs: a control plane that only knows the schema, and a data plane that meters."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import requests

import kong_metering
from kong_metering.plugin_identity import PRIORITY
from kong_metering_sandbox.gateways import free_port, run_kong
from tests.e2e.declarative import document, metering
from tests.e2e.traffic import get
from tests.examples.conftest import TOKEN
from tests.examples.kongs import ControlPlane, DataPlane
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from kong_metering_sandbox.collector.process import CollectorProcess
    from kong_metering_sandbox.upstream_process import UpstreamProcess
    from tests.support.postgres import Cluster

HYBRID = Path(__file__).parents[2] / "examples" / "hybrid"
HANDLER = HYBRID / "lua" / "kong" / "plugins" / "metering-and-billing" / "handler.lua"
# A data plane asks its control plane anew after some seconds.
_PATIENCE = 60.0


def lines(name: str) -> dict[str, str]:
    """Read the settings of an example."""
    text = (HYBRID / name).read_text(encoding="utf-8")
    pairs = [line.partition(" = ") for line in text.splitlines() if line and not line.startswith("#")]
    return {key: value for key, _, value in pairs}


def test_the_handler_in_lua_says_what_the_plugin_says() -> None:
    said = HANDLER.read_text(encoding="utf-8")
    assert f'PRIORITY = {PRIORITY}, VERSION = "{kong_metering.__version__}"' in said


@pytest.mark.parametrize("name", ["control-plane.conf", "control-plane-lua.conf"])
def test_a_data_plane_meters_by_a_control_plane_that_knows_the_schema_only(  # noqa: PLR0913, PLR0917 - fixtures
    name: str,
    request: pytest.FixtureRequest,
    upstream: UpstreamProcess,
    collector: CollectorProcess,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if request.config.getoption("--gateway") != "kong":
        pytest.skip("hybrid mode is the real Kong's: --gateway=kong")
    cluster: Cluster = request.getfixturevalue("cluster")
    run_kong("hybrid", "gen_cert", str(tmp_path / "cluster.crt"), str(tmp_path / "cluster.key"), directory=tmp_path)
    shutil.copytree(HYBRID / "lua", tmp_path / "lua")
    address = f"127.0.0.1:{free_port()}"
    ours = {"cluster_listen": address, "cluster_telemetry_listen": "off", **cluster.database()}
    control = settings(name, tmp_path, tmp_path / "control" / "dump.json") | ours
    if "lua" in name:
        control |= {"pluginserver_names": "", "pluginserver_metering_query_cmd": "", "pluginserver_metering_socket": ""}
    # The data plane resolves the reference; the control plane has no such variable.
    monkeypatch.delenv("OM_TOKEN", raising=False)
    with ControlPlane(tmp_path / "control", document(), settings=control) as plane:
        for path, body in (
            ("services/orders", {"url": upstream.url}),
            ("services/orders/routes/orders", {"paths": ["/orders"]}),
            ("plugins", metering(collector.ingest_v3, api_token="{vault://env/om-token}")),
        ):
            method = "POST" if path == "plugins" else "PUT"
            requests.request(method, f"{plane.admin_url}/{path}", json=body, timeout=20).raise_for_status()
        monkeypatch.setenv("OM_TOKEN", TOKEN)
        data = settings("data-plane.conf", tmp_path, tmp_path / "data" / "dump.json")
        data |= {"cluster_control_plane": address, "declarative_config": ""}
        data.pop("pluginserver_metering_socket")
        with DataPlane(tmp_path / "data", document(), settings=data) as gateway:
            answers = lambda: get(gateway.proxy_port, "/orders/1", ("X-Tenant-Id", "acme")) == 200  # noqa: E731
            wait_until(answers, "the data plane has its configuration", _PATIENCE, pause=0.2)
            collector.client.wait_for_events(1)
        assert {event.subject for event in collector.client.events()} == {"acme"}
        assert not re.search(r"plugin_version_incompatible", plane.error_log)


def settings(name: str, directory: Path, dump: Path) -> dict[str, str]:
    """Give an example's settings with the paths of a test in place of those of a host."""
    places = {
        "/etc/kong/metering-dump.json": str(dump),
        "/run/kong-metering/dump.json": str(dump),
        "/etc/kong/": f"{directory}/",
    }
    read = lines(name)
    for before, after in places.items():
        read = {key: value.replace(before, after) for key, value in read.items()}
    return read
