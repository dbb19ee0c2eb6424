"""Standard error that nobody reads, in a real process: lines are lost, and Kong gets its answers."""

from __future__ import annotations

import os
import pty
import socket
import subprocess
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

import pytest

from tests.support.plugin_server import BIN
from tests.support.rpc import PLUGIN, KongClient
from tests.support.waiting import wait_until
from tests.unit.host.conftest import header_config

pytestmark = pytest.mark.slow

PROGRAM = str(BIN / "kong-metering-plugin-server")
# What may be in a socket's buffer, several times.
MANY = 500


def pipe() -> tuple[int, int]:
    return os.pipe()


def journald() -> tuple[int, int]:
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    return ours.detach(), its.detach()


def terminal() -> tuple[int, int]:
    return pty.openpty()


def check_it_answers(process: subprocess.Popen[bytes], path: Path, errors: int = MANY) -> None:
    wait_until(path.exists, "a socket")
    client = KongClient(path)
    for number in range(errors):
        # Each is another plugin: the same trouble would be said once.
        client.start_instance(header_config("not a URL", __plugin_id=f"{number:04}", plugin_instance_name="x" * 2000))
    assert client.status()
    process.terminate()
    assert process.wait(30) == 0


@pytest.mark.parametrize("make", [pipe, journald, terminal])
def test_a_log_that_nobody_reads_does_not_hold_up_an_answer(prefix: Path, make: Callable[[], tuple[int, int]]) -> None:
    reading, writing = make()
    process = started(prefix, writing)
    try:
        assert os.get_blocking(writing)
        check_it_answers(process, prefix / f"{PLUGIN}.sock")
        assert os.get_blocking(writing)
    finally:
        process.kill()
        process.wait()
        os.close(writing)
        os.close(reading)


def started(prefix: Path, stderr: int | IO[bytes]) -> subprocess.Popen[bytes]:
    command = [PROGRAM, "-v", "--kong-prefix", str(prefix), "--no-spool"]
    return subprocess.Popen(command, env={}, stdout=subprocess.DEVNULL, stderr=stderr)


def test_a_log_that_is_read_again_tells_how_much_was_lost(prefix: Path) -> None:
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    found: list[bytes] = []

    def read() -> None:
        with ours, suppress(OSError):
            while chunk := ours.recv(65536):
                found.append(chunk)

    with its:
        process = started(prefix, its.fileno())
    reader = threading.Thread(target=read)
    try:
        path = prefix / f"{PLUGIN}.sock"
        wait_until(path.exists, "a socket")
        client = KongClient(path)
        for _ in range(MANY):
            client.start_instance(header_config("not a URL", plugin_instance_name="x" * 2000))
        reader.start()
        wait_until(lambda: len(b"".join(found)) > 1000, "what was kept")
        client.start_instance(header_config("not a URL"))
        process.terminate()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        if reader.ident is None:
            ours.close()
        else:
            reader.join(30)
    said = b"".join(found).decode()
    assert "log lines were lost before this one)" in said
    assert "info: ended: " in said


@pytest.mark.parametrize("closed", ["2>&-", "<&- >&- 2>&-"])
def test_descriptors_that_are_closed_are_nobodys_way_into_a_socket(prefix: Path, closed: str) -> None:
    """What is opened first would be standard error, where Python and others print to."""
    command = f"exec {PROGRAM} -v --kong-prefix {prefix} --no-spool {closed}"
    process = subprocess.Popen(["/bin/sh", "-c", command], env={})
    try:
        path = prefix / f"{PLUGIN}.sock"
        wait_until(path.exists, "a socket")
        assert KongClient(path).status()
        assert str(Path(f"/proc/{process.pid}/fd/2").readlink()) == os.devnull
        process.terminate()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()


def test_a_file_has_all_lines_at_the_end(prefix: Path) -> None:
    with (prefix / "log").open("wb") as file:
        process = started(prefix, file)
    try:
        check_it_answers(process, prefix / f"{PLUGIN}.sock", 100)
    finally:
        process.kill()
        process.wait()
    lines = (prefix / "log").read_text().splitlines()
    assert sum(line.startswith("error: plugin ") for line in lines) == 100
    assert any(line.startswith("info: ended: ") for line in lines)
