"""What processes cost: /proc as it is, and the CPU of a tree in which processes end."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from gateway_processes import (
    Found,
    children,
    cost_below,
    descendants,
    parse_stat,
    plugin_processes,
    serving_processes,
)

TREE = {
    1: Found(0, 0.0),
    10: Found(1, 0.0),
    20: Found(10, 0.0),
    21: Found(10, 0.0),
    30: Found(20, 0.0),
    40: Found(30, 0.0),
    99: Found(1, 0.0),
}
# As Kong's processes are: a master, its worker, a supervisor, and a server that has forked. All wait for a line, in the
# order of their depth from the end; then the one that waits for it ends.
NESTED = """
import os, sys, time
def busy():
    until = time.process_time() + 0.2
    while time.process_time() < until: pass
def fork(inner):
    pid = os.fork()
    if pid == 0:
        inner()
        os._exit(0)
    return pid
def server():
    busy()
    print("busy", flush=True)
    sys.stdin.readline()
def supervisor():
    os.waitpid(fork(server), 0)
    print("waited", flush=True)
    sys.stdin.readline()
def worker():
    os.waitpid(fork(supervisor), 0)
os.waitpid(fork(worker), 0)
"""


@contextmanager
def nested() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-u", "-c", NESTED]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "busy\n"
        yield process
        process.stdin.close()
        assert process.wait() == 0


def tell(process: subprocess.Popen[str]) -> str:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n")
    return process.stdout.readline()


def test_reads_parent_and_ended_children_behind_any_name() -> None:
    ticks = os.sysconf("SC_CLK_TCK")
    times = f"1 2 {3 * ticks} {4 * ticks}"
    text = f"7 (nginx: (a) b) S 5 7 7 0 -1 4194560 1 2 3 4 {times} 20 0 1 0 100 1 1"
    assert parse_stat(text.encode()) == Found(parent=5, waited_for=7.0)


def test_finds_children_and_all_below() -> None:
    assert children(TREE, {10}) == {20, 21}
    assert descendants(TREE, {10}) == {20, 21, 30, 40}


def test_knows_which_process_serves_under_a_supervisor() -> None:
    with nested() as process:
        tree = plugin_processes(process.pid)
        serving = serving_processes(process.pid)
        assert len(tree) == 2
        assert len(serving) == 1
        assert serving < tree


def test_counts_a_server_that_has_ended_as_part_of_the_plugin() -> None:
    with nested() as process:
        alive = cost_below(process.pid)
        assert alive.plugin >= 0.2
        assert tell(process) == "waited\n"
        ended = cost_below(process.pid)
        # The clock of an ended process goes in steps of a tick.
        assert ended.plugin >= 0.2 - 1 / os.sysconf("SC_CLK_TCK")
        assert len(plugin_processes(process.pid)) == 1
        assert ended.since(alive).kong < 0.2
