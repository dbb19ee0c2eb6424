"""What runs contained leaves no process and no file behind, whatever ends it; the demo and the sandbox do."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.plugin_server import ROOT, children_of
from tests.support.waiting import wait_until

CONTAINED = [sys.executable, "-m", "kong_metering_sandbox.contained"]
DEMO = [sys.executable, "-m", "kong_metering_sandbox.demo"]
DAEMON = """
import os, pathlib, sys, tempfile, time
if os.fork() == 0:
    os.setsid()
    if os.fork():
        os._exit(0)
    time.sleep(600)
os.wait()
print(tempfile.mkdtemp(), flush=True)
"""
LEAVES_A_RING = """
import os, tempfile
from pathlib import Path
from kong_metering.inbox.place import Place
from kong_metering.spool.options import INBOX_DIRECTORY
spool = Path(tempfile.mkdtemp())
place = Place(INBOX_DIRECTORY, spool)
place.create()
print(place.path, flush=True)
os._exit(0)
"""
WAITS = "time.sleep(600)"
SIZES = (1, 2, 4, 6)


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, env=os.environ | environment
    )


def descendants(pid: int) -> list[int]:
    return [one for child in children_of(pid) for one in (child, *descendants(child))]


def is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_the_exit_status_is_that_of_the_command() -> None:
    assert run(*CONTAINED, "sh", "-c", "exit 7").returncode == 7


def test_a_daemon_that_is_left_behind_is_told_ended_and_a_failure() -> None:
    done = run(*CONTAINED, sys.executable, "-c", DAEMON)
    (pid,) = re.findall(r"^left behind: process (\d+): .*python", done.stderr, re.MULTILINE)
    assert done.returncode == 1
    assert not is_alive(int(pid))
    assert not Path(done.stdout.strip()).exists()


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="there is no shared memory")  # noqa: S108
def test_what_a_dead_server_has_in_shared_memory_is_removed_with_its_spool() -> None:
    done = run(*CONTAINED, sys.executable, "-c", LEAVES_A_RING)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("/dev/shm/kong-metering-")  # noqa: S108
    assert not Path(done.stdout.strip()).exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_the_command_and_all_that_it_has_started(number: int) -> None:
    # A shell has what it runs in the background ignore some signals, and the tests may be run so.
    command = ["env", "--default-signal=INT,HUP", *CONTAINED, sys.executable, "-c", DAEMON + WAITS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        directory = Path(process.stdout.readline().strip())
        wait_until(lambda: len(descendants(process.pid)) == 2, "the command and its daemon")
        below = descendants(process.pid)
        process.send_signal(number)
        status = process.wait(30)
    assert status == 128 + number
    assert not any(map(is_alive, below))
    assert not directory.parent.exists()


COUNTS = """
import signal, sys
interrupts = []
signal.signal(signal.SIGINT, lambda *_: (interrupts.append(1), print("interrupted", flush=True)))
signal.signal(signal.SIGTERM, lambda *_: sys.exit(print("interrupts:", len(interrupts), flush=True)))
print("ready", flush=True)
while True:
    signal.pause()
"""


def test_a_terminals_interrupt_reaches_the_command_once() -> None:
    in_a_terminal = [sys.executable, "-c", "import pty, sys; pty.spawn(sys.argv[1:])", *CONTAINED]
    command = [*in_a_terminal, sys.executable, "-c", COUNTS]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline().strip() == b"ready"
        (container,) = children_of(process.pid)
        process.stdin.write(b"\x03")
        assert process.stdout.readline().strip() == b"^Cinterrupted"
        os.kill(container, signal.SIGTERM)
        assert process.stdout.readline().strip() == b"interrupts: 1"


@contextmanager
def watched(*command: str) -> Iterator[subprocess.Popen[str]]:
    """Run a command so that what it leaves behind is told: processes, and the names of files, after its status."""
    script = '"$@" & echo $!; wait $!; echo "status $?"; ls -A "$TMPDIR"'
    watching = [*CONTAINED, "sh", "-c", script, "sh", *command]
    with subprocess.Popen(watching, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.terminate()


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def until_it_has(count: int) -> Callable[[int, subprocess.Popen[str]], object]:
    what = f"{count} processes of the sandbox"
    return lambda pid, _: wait_until(lambda: len(descendants(pid)) >= count, what, seconds=60, pause=0.01)


def until_it_runs(_: int, process: subprocess.Popen[str]) -> object:
    assert process.stdout is not None
    return next(line for line in process.stdout if "Ctrl-C" in line)


@pytest.mark.parametrize(
    "moment", [*map(until_it_has, SIZES), until_it_runs], ids=[*(f"{size} processes" for size in SIZES), "it runs"]
)
def test_a_sandbox_that_is_told_to_end_leaves_nothing_whenever_that_is(
    moment: Callable[[int, subprocess.Popen[str]], object],
) -> None:
    with watched(*DEMO, "--keep") as process:
        pid = int(first_line(process))
        moment(pid, process)
        os.kill(pid, signal.SIGTERM)
        said, errors = process.communicate(timeout=60)
    assert re.search(r"^status (143|0)$\n\Z", said, re.MULTILINE), said
    assert "left behind" not in errors
    assert process.returncode == 0


def test_a_demo_that_cannot_start_leaves_nothing() -> None:
    there_is_no_kong = f"PATH={Path(sys.executable).parent}"
    with watched("env", there_is_no_kong, *DEMO, "--gateway", "kong") as process:
        said, errors = process.communicate(timeout=60)
    assert "The demo cannot run" in said
    assert said.endswith("status 1\n")
    assert "left behind" not in errors


def test_the_demo_runs_where_the_temporary_directory_has_a_long_name(tmp_path: Path) -> None:
    directory = tmp_path / ("x" * 150)
    directory.mkdir()
    done = run(*DEMO, "--requests", "50", TMPDIR=str(directory))
    assert "It all adds up." in done.stdout, done.stdout + done.stderr
    assert list(directory.iterdir()) == []


NEEDS_A_SOCKET = """
import socket
import pytest
def test_it(tmp_path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "gateway" / "prefix" / ("s" * 24)))
@pytest.fixture(autouse=True)
def prefix(tmp_path):
    (tmp_path / "gateway" / "prefix").mkdir(parents=True)
"""


def test_the_tests_run_where_the_temporary_directory_has_a_long_name(tmp_path: Path) -> None:
    directory = tmp_path / ("x" * 150)
    directory.mkdir()
    module = tmp_path / "test_it.py"
    module.write_text(NEEDS_A_SOCKET, encoding="utf-8")
    pytest_alone = [sys.executable, "-m", "pytest", "-q", "-p", "tests.conftest", "-p", "no:cacheprovider"]
    done = run(*pytest_alone, "--rootdir", str(tmp_path), str(module), TMPDIR=str(directory), PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(directory.iterdir()) == []
