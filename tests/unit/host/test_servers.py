"""More than one server: each of Kong's workers keeps to one of them, whatever happens to these."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kong_metering.host.figures import added
from kong_metering.host.load import Load
from kong_metering.host.workers import Workers
from tests.support.clock import FakeClock
from tests.support.plugin_server import PluginServerProcess
from tests.support.rpc import Connection, KongClient
from tests.support.waiting import wait_until
from tests.support.worker import WorkerProcess
from tests.unit.host.conftest import answers, header_config

if TYPE_CHECKING:
    from tests.support.ingest import IngestServer

pytestmark = pytest.mark.slow
Launch = Callable[..., PluginServerProcess]
NewWorker = Callable[[Path, int], WorkerProcess]


@pytest.fixture
def new_worker() -> Iterator[NewWorker]:
    with ExitStack() as stack:

        def start(path: Path, connections: int) -> WorkerProcess:
            worker = stack.enter_context(WorkerProcess(path))
            worker.open(connections)
            return worker

        yield start


def the_one(pids: list[int]) -> int:
    (pid,) = set(pids)
    return pid


def has_ended(pid: int) -> bool:
    return not Path(f"/proc/{pid}/cmdline").exists() or not Path(f"/proc/{pid}/cmdline").read_bytes()


def wait_for_servers(server: PluginServerProcess, count: int, without: int = 0) -> None:
    wait_until(lambda: len(server.server_pids()) == count and without not in server.server_pids(), "the servers")


# Which server a worker has


def test_all_connections_of_a_worker_go_to_one_server_and_workers_to_different_ones(
    launch: Launch, new_worker: NewWorker
) -> None:
    server = launch("--servers 2").start()
    workers = [new_worker(server.path, 8) for _ in range(4)]
    served_by = [the_one(worker.ask()) for worker in workers]
    assert sorted(served_by) == sorted(server.server_pids() * 2)
    for worker, pid in zip(workers, served_by, strict=True):
        worker.open(8)
        assert the_one(worker.ask()) == pid
    assert server.stop() == 0
    assert server.complaints() == []


def test_a_worker_keeps_to_one_server_when_its_server_is_killed(launch: Launch, new_worker: NewWorker) -> None:
    server = launch("--servers 2").start()
    first, second = (new_worker(server.path, 8) for _ in range(2))
    killed, other = the_one(first.ask()), the_one(second.ask())
    os.kill(killed, signal.SIGKILL)
    assert the_one(first.ask()) not in (killed, other)
    assert the_one(second.ask()) == other
    assert server.stop() == 0


def test_a_worker_that_is_gone_is_forgotten(launch: Launch, new_worker: NewWorker) -> None:
    server = launch("--servers 2").start()
    first, second = (new_worker(server.path, 1) for _ in range(2))
    left = the_one(first.ask())
    second.ask()
    first.stop()
    assert the_one(new_worker(server.path, 4).ask()) == left
    assert server.stop() == 0


def test_connections_wait_for_a_server_that_has_no_room_for_them(launch: Launch, new_worker: NewWorker) -> None:
    """It is held, so that hundreds have to be passed on to it; none goes to the other server."""
    server = launch("--servers 2").start()
    first, second = (new_worker(server.path, 1) for _ in range(2))
    held, other = the_one(first.ask()), the_one(second.ask())
    os.kill(held, signal.SIGSTOP)
    first.open(700)
    assert the_one(second.ask()) == other
    os.kill(held, signal.SIGCONT)
    assert the_one(first.ask()) == held
    assert server.stop() == 0
    assert server.complaints() == []


def test_a_connection_that_was_passed_on_to_a_server_that_dies_is_served_by_the_next_one(
    launch: Launch, new_worker: NewWorker
) -> None:
    server = launch("--servers 2").start()
    first, second = (new_worker(server.path, 1) for _ in range(2))
    held, other = the_one(first.ask()), the_one(second.ask())
    os.kill(held, signal.SIGSTOP)
    first.open(5)
    assert the_one(second.ask()) == other
    os.kill(held, signal.SIGKILL)
    assert the_one(first.ask()[1:]) not in (held, other)
    assert server.stop() == 0


def test_where_workers_are_not_known_all_go_to_the_first_server(launch: Launch) -> None:
    """As in another namespace of processes; it is said once."""
    unshared = ["unshare", "--fork", "--pid"]
    if subprocess.run([*unshared, "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs leave to make a namespace of processes")
    server = launch("--servers 2")
    server.command = f"{' '.join(unshared)} --kill-child {server.command} --parent ignore"
    server.start()
    with ExitStack() as stack:
        connections = [stack.enter_context(Connection(server.path)) for _ in range(20)]
        pids = {KongClient(server.path, [connection]).call("GetStatus")["Pid"] for connection in connections}
    assert len(pids) == 1
    assert ["all connections go to the first of 2 servers" in line for line in server.complaints()] == [True]


# Figures


def billed(worker: WorkerProcess, endpoint: str, numbers: range) -> None:
    queue = {"max_batch_size": 100, "max_coalescing_delay": 0.05}
    requests = [answers("acme", number) for number in numbers]
    worker.begin("bill " + json.dumps({"config": header_config(endpoint, queue=queue), "answers": requests}))


def test_the_status_adds_up_over_all_servers(launch: Launch, ingest: IngestServer, new_worker: NewWorker) -> None:
    server = launch("--servers 2").start()
    workers = [new_worker(server.path, 3) for _ in range(2)]
    for number, worker in enumerate(workers):
        billed(worker, ingest.url, range(number * 1000, number * 1000 + 30 + number))
    assert [worker.result() for worker in workers] == [30, 31]

    def status() -> dict[str, Any]:
        told: dict[str, Any] = KongClient(server.path).status()["Status"]
        return told

    wait_until(lambda: status()["delivered"] == 61, "all to be delivered and told")
    told = status()
    assert (told["accepted"], told["waiting"], set(told["queues"].values())) == (61, 0, {0})
    assert sorted(each["delivered"] for each in told["servers"]) == [30, 31]
    assert sorted(each["pid"] for each in told["servers"]) == sorted(server.server_pids())
    assert sum(each["workers"] for each in told["servers"]) >= 2
    assert server.stop() == 0
    assert sorted("31 events accepted" in line for line in server.log if "info: ended: " in line) == [False, True]


def test_one_server_tells_of_itself_in_the_same_way(launch: Launch) -> None:
    server = launch().start()
    told = KongClient(server.path).status()["Status"]
    (only,) = told.pop("servers")
    assert only.pop("pid") == server.server_pid
    assert told.items() <= only.items()
    assert set(only) - set(told) == {"version", "plugins", "queue_details", "timings", "spool"}
    assert server.stop() == 0


def test_figures_are_added_name_by_name() -> None:
    one = {"accepted": 3, "queues": {"a": 1, "b": 2}, "seen": {"x": 5}}
    other = {"accepted": 4, "queues": {"b": 5}, "seen": {"x": 4, "y": 1}}
    assert added([one, other, {}], alike=["seen"]) == {
        "accepted": 7,
        "queues": {"a": 1, "b": 7},
        "seen": {"x": 5, "y": 1},
    }


def test_a_loop_that_takes_nearly_a_core_for_half_a_minute_is_told_of_once_an_hour() -> None:
    clock, taken = FakeClock(), [0.0]
    load = Load(clock, lambda: taken[0])
    said = []
    for second in range(1, 7200):
        clock.advance(1)
        taken[0] += 0.95 if second > 40 else 0.5
        if (trouble := load.trouble()) is not None:
            said.append((second, trouble))
    assert [second for second, _ in said] == [90, 3690]
    assert said[0][1] == "took 95% of a core for 30 s"


def test_a_table_of_workers_forgets_the_dead_and_evens_out() -> None:
    """With processes of its own, some of which have ended."""
    workers = Workers(3)
    living = [subprocess.Popen(["/bin/sleep", "60"]) for _ in range(6)]
    try:
        assert [workers.server_of(one.pid) for one in living] == [0, 1, 2, 0, 1, 2]
        for one in (living[1], living[4]):
            one.kill()
            one.wait()
        assert workers.of(1) == []
        assert workers.server_of(os.getpid()) == 1
        assert [workers.server_of(one.pid) for one in (living[0], living[5])] == [0, 2]
        assert [workers.server_of(0), workers.meets_unknown(), workers.meets_unknown()] == [0, True, False]
    finally:
        for one in living:
            one.kill()
            one.wait()


# Hand-over


# So many that a worker is at it for longer than a plugin server takes to start.
REQUESTS = 6000


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 2), (2, 3)])
def test_any_number_of_servers_takes_over_from_any_other(
    before: int, after: int, launch: Launch, ingest: IngestServer, new_worker: NewWorker
) -> None:
    old = launch(f"--servers {before}").start()
    workers = [new_worker(old.path, 4) for _ in range(2)]
    assert {the_one(worker.ask()) for worker in workers} == set(old.server_pids())
    for number, worker in enumerate(workers):
        billed(worker, ingest.url, range(number * 10_000, number * 10_000 + REQUESTS))
    wait_until(ingest.events, "events from the old servers")
    new = launch(f"--servers {after}").start()
    wait_for_servers(new, after)
    assert [worker.result() for worker in workers] == [REQUESTS] * 2
    assert {the_one(worker.ask()) for worker in workers} <= set(new.server_pids())
    assert [old.stop(), new.stop()] == [0, 0]
    assert len({event["id"] for event in ingest.events()}) == 2 * REQUESTS
    accepted = [
        sum(int(line.split()[4]) for line in server.log if line.startswith("info: ended: ")) for server in (old, new)
    ]
    assert sum(accepted) == 2 * REQUESTS
    assert min(accepted) > 0, "both had a part"
    assert [old.complaints(), new.complaints()] == [[], []]


def test_servers_without_a_supervisor_go_on_and_are_taken_over_from(launch: Launch, new_worker: NewWorker) -> None:
    old = launch("--servers 2").start()
    workers = [new_worker(old.path, 4) for _ in range(2)]
    served_by, serving = [the_one(worker.ask()) for worker in workers], old.server_pids()
    old.process.kill()
    assert old.wait() == -signal.SIGKILL
    for worker, pid in zip(workers, served_by, strict=True):
        worker.open(4)
        assert the_one(worker.ask()) == pid
    new = launch("--servers 2").start()
    wait_for_servers(new, 2)
    assert {the_one(worker.ask()) for worker in workers} == set(new.server_pids())
    wait_until(lambda: all(map(has_ended, serving)), "the end of the old servers")
    assert new.stop() == 0
