"""The plugin server's life: how it is started, watched, called, reloaded and stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from typing import TYPE_CHECKING

import pytest

from kong_metering_sandbox.gateway import READY_FILE, command

from .fakes import (
    DEADLINE,
    DUMP_COMMAND,
    MESSAGEPACK,
    METERED_ECHO,
    PROTOBUF,
    Gateway,
    check_unexpected_error,
    get,
    running_gateway,
    serves,
    wait_for,
    write_conf,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(params=[MESSAGEPACK, PROTOBUF])
def protocol(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def gateway(tmp_path: Path, protocol: str) -> Iterator[Gateway]:
    settings = {"nginx_worker_processes": "1", "standin_reload_linger": "2"}
    with running_gateway(tmp_path, METERED_ECHO, protocol=protocol, **settings) as gateway:
        yield gateway


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_it_starts_with_no_environment_umask_0_and_foreign_descriptors(gateway: Gateway) -> None:
    start = gateway.starts()[0]
    assert (start["environment"], start["umask"], start["stdin"]) == ({}, 0, "/dev/null")
    assert len(start["sockets"]) == 2
    wait_for(lambda: "the fake plugin server starts" in gateway.log_text())
    line = next(line for line in gateway.log_text().splitlines() if "the fake plugin server starts" in line)
    assert f"[info] {gateway.process.pid}#0: [metering:{start['pid']}] the fake plugin server starts" in line


def test_pid_and_ready_file_are_there_while_it_runs_and_gone_afterwards(gateway: Gateway) -> None:
    pid_file = gateway.prefix / "pids" / "nginx.pid"
    assert int(pid_file.read_text()) == gateway.urls["pid"] == gateway.process.pid
    gateway.process.terminate()
    assert gateway.process.wait(DEADLINE) == 0
    assert not pid_file.exists()
    assert not (gateway.prefix / READY_FILE).exists()


def test_it_is_respawned_not_sooner_than_a_second_after_its_start(gateway: Gateway, protocol: str) -> None:
    get(gateway, "/echo")
    gateway.wait_for_log_events()
    first = gateway.starts()[0]["pid"]
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: not is_alive(first))
    # An instance is known: with MessagePack the request passes, without the plugin.
    assert get(gateway, "/echo").status_code == (200 if protocol == MESSAGEPACK else 500)
    wait_for(lambda: len(gateway.starts()) == 2 and serves(gateway.prefix / "plugin.socket"))
    # The new process does not know the instance: Kong starts one and sends the event again.
    before = len(gateway.log_events())
    assert get(gateway, "/echo").status_code == 200
    gateway.wait_for_log_events(before + 1)
    assert len(gateway.calls("plugin.StartInstance")) == 2
    text = gateway.log_text()
    assert "trying to connect: connection refused" in text
    said = "mp_rpc.lua: No plugin instance" if protocol == MESSAGEPACK else "pb_rpc.lua: closed"
    assert f"[kong] {said}" in text


def test_without_an_instance_a_dead_plugin_server_makes_a_500(gateway: Gateway) -> None:
    os.kill(gateway.starts()[0]["pid"], signal.SIGKILL)
    wait_for(lambda: not serves(gateway.prefix / "plugin.socket"))
    check_unexpected_error(get(gateway, "/echo"))
    assert "starting instance: connection refused" in gateway.log_text()


def test_concurrent_first_requests_share_one_instance_per_worker(tmp_path: Path, protocol: str) -> None:
    with running_gateway(tmp_path, METERED_ECHO, protocol=protocol, nginx_worker_processes="3") as gateway:
        threads = [threading.Thread(target=get, args=(gateway, "/echo")) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        gateway.wait_for_log_events(12)
        assert len(gateway.calls("plugin.StartInstance")) == 3
        sequences = {json.loads(call[3][0][b"Config"])["__seq__"] for call in gateway.calls("plugin.StartInstance")}
        assert len(sequences) == 3


def test_a_stop_waits_for_requests_and_their_log_phases_and_then_terminates(gateway: Gateway) -> None:
    gateway.script(slow=0.3, log=[["kong.log.serialize"]])
    answers: list[int] = []
    client = threading.Thread(target=lambda: answers.append(get(gateway, "/echo").status_code))
    client.start()
    wait_for(lambda: gateway.calls("plugin.HandleEvent"))
    gateway.process.terminate()
    client.join()
    assert gateway.process.wait(DEADLINE) == 0
    assert answers == [200]
    assert gateway.records()[0]["response"]["status"] == 200
    assert gateway.journal()[-1] == ("signal", "SIGTERM")
    assert not is_alive(gateway.starts()[0]["pid"])


def test_a_plugin_server_that_ignores_sigterm_is_killed_at_once(gateway: Gateway) -> None:
    gateway.script(ignore_sigterm=True)
    pid = gateway.starts()[0]["pid"]
    gateway.process.terminate()
    started = time.monotonic()
    wait_for(lambda: gateway.journal()[-1] == ("signal", "SIGTERM"))
    wait_for(lambda: not is_alive(pid))
    assert time.monotonic() - started < 30


def test_a_reload_starts_a_new_server_at_once_and_ends_the_old_one_later(gateway: Gateway) -> None:
    get(gateway, "/echo")
    gateway.wait_for_log_events()
    kong_yaml = gateway.prefix / "kong.yaml"
    kong_yaml.write_text(kong_yaml.read_text().replace("/echo]", "/renamed]"))
    gateway.process.send_signal(signal.SIGHUP)
    wait_for(lambda: get(gateway, "/renamed").status_code == 200)
    assert get(gateway, "/echo").status_code == 404
    wait_for(lambda: ("signal", "SIGTERM") in gateway.journal())
    events = [entry[0] for entry in gateway.journal() if entry[0] in ("start", "signal")]
    assert events == ["start", "start", "signal"]
    old, new = (start["pid"] for start in gateway.starts())
    wait_for(lambda: not is_alive(old))
    assert is_alive(new)
    assert gateway.process.poll() is None


def test_a_reload_with_a_broken_configuration_changes_nothing(gateway: Gateway) -> None:
    (gateway.prefix / "kong.yaml").write_text("services: [")
    gateway.process.send_signal(signal.SIGHUP)
    wait_for(lambda: "[emerg]" in gateway.log_text())
    assert get(gateway, "/echo").status_code == 200
    assert len(gateway.starts()) == 1


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"pluginserver_metering_query_cmd": "echo no json"}, "failed decoding plugin info"),
        ({"pluginserver_metering_query_cmd": "echo []"}, "not a plugin info table"),
        ({"pluginserver_metering_query_cmd": f"{DUMP_COMMAND} JSON:1"}, "unknown protocol implementation: JSON:1"),
        ({"plugins": "bundled,other"}, "other plugin is enabled but not installed"),
    ],
)
def test_it_does_not_start_with_what_it_cannot_use(tmp_path: Path, keys: dict[str, str], message: str) -> None:
    (tmp_path / "kong.yaml").write_text("_format_version: '3.0'")
    write_conf(tmp_path, "off", keys)
    process = subprocess.run(command(tmp_path / "kong.conf"), capture_output=True, check=False, timeout=DEADLINE)
    assert process.returncode == 1
    assert message in process.stderr.decode()


def test_it_does_not_start_with_an_invalid_declarative_file(tmp_path: Path) -> None:
    (tmp_path / "kong.yaml").write_text("_format_version: '3.0'\nplugins: [{name: metering-and-billing}]")
    write_conf(tmp_path, "off", {})
    process = subprocess.run(command(tmp_path / "kong.conf"), capture_output=True, check=False, timeout=DEADLINE)
    assert process.returncode == 1
    assert "error parsing declarative config file" in process.stderr.decode()
    assert "in 'api_token': required field missing" in process.stderr.decode()


def test_a_command_that_does_not_exist_is_logged(tmp_path: Path) -> None:
    (tmp_path / "kong.yaml").write_text("_format_version: '3.0'")
    write_conf(tmp_path, "off", {"pluginserver_metering_start_cmd": "/no/such/program"})
    process = subprocess.Popen(command(tmp_path / "kong.conf", tmp_path), stderr=subprocess.DEVNULL)
    try:
        log = tmp_path / "logs" / "error.log"
        wait_for(lambda: log.exists() and 'exited with "command not found"' in log.read_text())
        wait_for((tmp_path / READY_FILE).exists)
    finally:
        process.terminate()
        process.wait(DEADLINE)
