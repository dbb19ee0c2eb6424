"""`kong-metering health`: what a probe is told, by a real server and by one that is ill."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from tests.support.ingest import IngestServer
from tests.support.kongs import kong_in
from tests.support.plugin_server import BIN, PluginServerProcess
from tests.support.rpc import KongClient, KongRequest
from tests.unit.commands.helpers import answering
from tests.unit.host.conftest import answers, header_config

pytestmark = pytest.mark.slow

STRANGER = 54_321
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be several users")


# Imports first: another user may not read what this one has installed.
_AS_STRANGER = """
import os, sys
from pathlib import Path
from kong_metering.commands.health import judged
user, path = int(sys.argv[1]), sys.argv[2]
os.setgroups([]); os.setgid(user); os.setuid(user)
verdict = judged(Path(path), 5.0)
print(verdict.status, verdict.line)
"""


def health(*flags: str, **environment: str) -> tuple[int, str]:
    """Give the exit status of the probe, and its line."""
    command = [str(BIN / "kong-metering"), "health", *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == ""
    assert done.stdout.count("\n") == 1, done.stdout
    return done.returncode, done.stdout.removesuffix("\n")


def test_a_server_that_serves_is_well_before_kong_comes_and_afterwards(prefix: Path) -> None:
    with IngestServer() as ingest, PluginServerProcess(prefix=prefix) as server:
        pid = server.server_pid
        ok = f"ok: process {pid} serves on {server.path}; "
        told = "; 0 events wait; 0 dead letters in this server's life"
        assert health("-p", str(prefix)) == (0, f"{ok}Kong has not come yet{told}")
        KongClient(server.path).start_instance(header_config(ingest.url))
        assert health("--socket", str(server.path)) == (0, f"{ok}Kong has started 1 instance{told}")


def test_the_environment_of_a_container_is_enough(prefix: Path) -> None:
    with PluginServerProcess("--plugin-name", "api-usage", prefix=prefix):
        assert health(KONG_METERING_KONG_PREFIX=str(prefix), KONG_METERING_PLUGIN_NAME="api-usage")[0] == 0
        assert health(KONG_METERING_SOCKET=str(prefix / "api-usage.sock"))[0] == 0


def test_events_that_wait_for_an_endpoint_that_fails_are_told_and_no_illness(prefix: Path) -> None:
    with PluginServerProcess(prefix=prefix) as server:
        client = KongClient(server.path)
        instance = client.start_instance(header_config("http://127.0.0.1:9/"))
        client.run_phases(instance, KongRequest(answers("acme")))
        status, line = health("-p", str(prefix))
    assert status == 0
    assert "; 1 event waits; " in line


def test_no_server_is_said(prefix: Path) -> None:
    path = prefix / "metering-and-billing.sock"
    remedy = "was a server started there? -p, --socket-name and --socket name another place"
    assert health("-p", str(prefix)) == (1, f"does not serve: {path}: there is no socket; {remedy}")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    assert health("-p", str(prefix)) == (
        1,
        f"does not serve: {path}: nobody listens; the server has ended, and its log says why",
    )


def test_a_server_that_stands_still_is_said(prefix: Path) -> None:
    with PluginServerProcess(prefix=prefix) as server:
        pids = [server.pid, server.server_pid]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            status, line = health("-p", str(prefix), "--timeout", "0.2", "--serving")
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
    assert (status, line) == (1, f"does not serve: {server.path}: no answer within 0.2 s")


@needs_root
def test_a_user_who_may_not_connect_is_told_so(prefix: Path) -> None:
    prefix.chmod(0o755)
    with PluginServerProcess(prefix=prefix) as server:
        command = [str(BIN / "python"), "-c", _AS_STRANGER, str(STRANGER), str(server.path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    told = "this user may not connect; ask as the server's user, or as root"
    assert done.stdout == f"1 does not serve: {server.path}: {told}\n"


# A delivery that is not alive, as the server tells it


def test_a_delivery_that_is_not_alive_has_a_status_of_its_own(prefix: Path) -> None:
    path = prefix / "plugin.sock"
    figures = {
        "stalled": {"writer": 1, "janitor": 0, "couriers": 1},
        "waiting": 12,
        "instances_started": 2,
        "dead_letters": {"rejected": 1, "ambiguous": 2},
    }
    with answering(path, figures):
        status, line = health("--socket", str(path))
        assert status == 3
        assert line == (
            "serves, and delivery is not alive: writer, couriers stalled for two minutes; "
            "Kong has started 2 instances; 12 events wait; 3 dead letters in this server's life"
        )
        assert health("--socket", str(path), "--serving")[0] == 0


def test_what_waits_for_a_plugin_that_kong_has_not_started_is_told_by_each_command(prefix: Path) -> None:
    """As after a restart: nothing waits in a queue, for there is none yet, and all of it on disk."""
    path = prefix / "plugin.sock"
    figures = {"waiting": 0, "waiting_for_instances": {"orders for https://openmeter.example": 2}}
    waits = "0 events wait, and 2 on disk until Kong starts their plugin"
    with answering(path, figures | {"servers": [figures | {"pid": 7, "version": "1"}]}):
        status, line = health("--socket", str(path))
        assert (status, line.partition("; ")[2]) == (
            0,
            f"Kong has not come yet; {waits}; 0 dead letters in this server's life",
        )
        command = [str(BIN / "kong-metering"), "status", "--socket", str(path)]
        shown = subprocess.run(command, env={}, capture_output=True, text=True, timeout=60, check=True).stdout
        assert f"; {waits}\n" in shown
        assert "2 events of orders for https://openmeter.example wait on disk until Kong starts the plugin" in shown


# A Kong that may not connect


@needs_root
@pytest.mark.parametrize("is_configured", [True, False])
def test_workers_of_another_user_are_seen(prefix: Path, is_configured: bool) -> None:  # noqa: FBT001 - of a table
    prefix.chmod(0o755)
    with PluginServerProcess(prefix=prefix) as server:
        path = server.path if is_configured else prefix / "another.sock"
        with kong_in(prefix, path, user=STRANGER):
            status, line = health("-p", str(prefix))
    if is_configured:
        assert status == 1
        assert line == (
            f"nothing is metered: Kong's workers (prefix {prefix}) run as user {STRANGER}, and cannot connect to "
            f"{path}: it is open to user root only; run the plugin server as that user, or see --socket-group"
        )
    else:
        assert status == 0


@needs_root
def test_workers_of_another_user_in_the_sockets_group_may_connect(prefix: Path) -> None:
    prefix.chmod(0o755)
    server = PluginServerProcess("--socket-group", str(STRANGER), prefix=prefix)
    with server, kong_in(prefix, server.path, user=STRANGER):
        assert health("-p", str(prefix))[0] == 0


def test_workers_of_the_same_user_may_connect(prefix: Path) -> None:
    with PluginServerProcess(prefix=prefix) as server, kong_in(prefix, server.path):
        assert health("-p", str(prefix))[0] == 0
