"""The supervisor and its servers: whoever dies, or does not go on, is replaced, and nobody is left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kong_metering.eventlog.log import EventLog
from kong_metering.spool.directory import survey
from tests.support import odd_host
from tests.support.ingest import IngestServer
from tests.support.plugin_server import PluginServerProcess, ServerProcess, script_command
from tests.support.rpc import Connection, KongClient, KongRequest, request_frame
from tests.support.waiting import wait_until
from tests.unit.host.conftest import answers, header_config

if TYPE_CHECKING:
    from tests.support.posts import Post

pytestmark = pytest.mark.slow
Launch = Callable[..., PluginServerProcess]


class HeldIngest(IngestServer):
    """An endpoint that answers nobody until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.is_open = threading.Event()

    def take(self, post: Post) -> int:
        self.is_open.wait()
        return super().take(post)


@pytest.fixture
def held() -> Iterator[HeldIngest]:
    with HeldIngest() as server:
        yield server
        server.is_open.set()


GET_STATUS = request_frame(7, "GetStatus").data
PATIENT = {"max_batch_size": 1000, "max_coalescing_delay": 3600}


def has_ended(pid: int) -> bool:
    """Whether a process is gone, or only waits for its exit status to be read."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):  # before the file is opened, or before it is read
        return True


def name_of(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text(encoding="utf-8").strip()


def pid_over(connection: Connection) -> int:
    connection.send(GET_STATUS)
    return int(connection.receive().result["Pid"])


def wait_for_another(server: ServerProcess, *known: int) -> int:
    """Wait until the one server is another process, and give it."""

    def other() -> int | None:
        pids = server.server_pids()
        return pids[0] if len(pids) == 1 and pids[0] not in known else None

    return wait_until(other, "another server")


def meter(server: ServerProcess, endpoint: str, requests: int) -> None:
    client = KongClient(server.path)
    instance = client.start_instance(header_config(endpoint, queue=PATIENT))
    for number in range(requests):
        client.run_phases(instance, KongRequest(answers("acme", number)))


def waiting_in(spool: Path) -> int:
    waiting = 0
    for found in survey(spool):
        with closing(EventLog.view(found.directory)) as log:
            waiting += log.waiting
    return waiting


# A server that dies


def test_what_kong_starts_is_a_supervisor_with_one_server(launch: Launch) -> None:
    server = launch().start()
    assert name_of(server.pid) == "metering-super"
    assert name_of(server.server_pid) == "metering-server"
    assert len(list(Path(f"/proc/{server.pid}/task").iterdir())) == 1, "it has no threads"
    assert server.stop() == 0


def test_connections_wait_while_a_server_that_was_killed_is_replaced(launch: Launch) -> None:
    """The supervisor is held meanwhile: nobody serves, and nobody is refused."""
    server = launch().start()
    first, inode = server.server_pid, server.path.stat().st_ino
    os.kill(server.pid, signal.SIGSTOP)
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: has_ended(first), "the end of the server")
    with Connection(server.path) as one, Connection(server.path) as other:
        one.send(GET_STATUS)
        os.kill(server.pid, signal.SIGCONT)
        second = int(one.receive().result["Pid"])
        assert pid_over(other) == second
    assert (second, server.path.stat().st_ino) == (server.server_pid, inode)
    assert server.stop() == 0
    assert [line.partition(" after ")[0] for line in server.complaints()] == [
        f"warning: server {first} was ended by SIGKILL"
    ]


def test_what_the_supervisor_says_the_next_server_says_through_kong(launch: Launch, ingest: IngestServer) -> None:
    server = launch().start()
    os.kill(server.server_pid, signal.SIGKILL)
    server.wait_for_log("was ended by SIGKILL")
    client = KongClient(server.path)
    instance = client.start_instance(header_config(ingest.url))
    requests = [KongRequest(answers("acme", number)) for number in range(2)]
    for request in requests:
        client.run_phases(instance, request)
    assert ["was ended by SIGKILL" in line for line in requests[0].said] == [True]
    assert requests[1].said == []


def test_the_next_server_knows_none_of_the_ids_of_the_one_before(launch: Launch) -> None:
    server = launch().start()
    config = header_config("http://127.0.0.1:1")
    old = {KongClient(server.path).start_instance(config) for _ in range(20)}
    os.kill(server.server_pid, signal.SIGKILL)
    assert not old & {KongClient(server.path).start_instance(config) for _ in range(20)}


def test_what_a_server_that_was_killed_has_on_disk_the_next_one_delivers(launch: Launch, ingest: IngestServer) -> None:
    server = launch().start()
    meter(server, ingest.url, 20)
    wait_until(lambda: waiting_in(server.prefix / "metering-spool") == 20, "all to be on disk")
    os.kill(server.server_pid, signal.SIGKILL)
    KongClient(server.path).start_instance(header_config(ingest.url, queue={"max_batch_size": 100}))
    ingest.wait_for_events(20)
    assert server.stop() == 0


def test_servers_that_die_at_once_are_started_less_and_less_often_and_the_log_says_why(prefix: Path) -> None:
    command = script_command(Path(odd_host.__file__), prefix, "crash")
    server = ServerProcess(command, prefix / "odd.sock").launch()

    def deaths() -> int:
        return sum("the server failed: LookupError: this server never works" in line for line in list(server.log))

    try:
        wait_until(lambda: deaths() >= 6, "some deaths")
        # Whoever connects waits meanwhile.
        Connection(server.path).close()
    finally:
        assert server.stop() == 0
    said = [line.partition(", as did ")[2] for line in server.complaints() if "ended with status 1 after 0." in line]
    assert "2 before it in a row; the next one starts in 0.1 s" in said
    before = int(said[-1].split()[0])
    assert before >= 4
    assert f"; the next one starts in {0.1 * 2 ** (before - 2):g} s" in said[-1]


def test_a_server_that_is_told_to_end_alone_delivers_what_it_has_while_the_next_one_serves(
    launch: Launch, ingest: IngestServer
) -> None:
    server = launch().start()
    meter(server, ingest.url, 20)
    told = server.server_pid
    os.kill(told, signal.SIGTERM)

    def the_next_one_serves() -> bool:
        with Connection(server.path) as connection:
            return pid_over(connection) != told

    # The signal may take a moment to reach it.
    wait_until(the_next_one_serves, "the next server")
    ingest.wait_for_events(20)
    wait_until(lambda: has_ended(told), "the end of the server")
    assert server.stop() == 0
    assert server.complaints() == []


# A server that does not go on


def test_a_server_that_does_not_go_on_while_a_connection_waits_is_replaced(launch: Launch) -> None:
    server = launch().start()
    stuck = server.server_pid
    os.kill(stuck, signal.SIGSTOP)
    with Connection(server.path) as connection:
        assert pid_over(connection) != stuck
    assert has_ended(stuck)
    assert server.stop() == 0
    assert f"server {stuck} is stuck while connections wait, and is killed" in server.complaints()[0]


# The end


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_every_process_ends_them_in_order_and_a_second_one_changes_nothing(
    number: signal.Signals, launch: Launch, held: HeldIngest
) -> None:
    """As systemd and Ctrl-C do it."""
    server = launch().start()
    meter(server, held.url, 20)
    pids = (server.server_pid, server.pid)
    for _ in range(3):
        for pid in pids:
            os.kill(pid, number)
        server.wait_for_log("ending: ")
    held.is_open.set()
    assert server.wait() == 0
    assert all(map(has_ended, pids))
    assert len(held.events()) == 20
    assert server.complaints() == []


def test_kongs_sigkill_does_not_end_the_server_that_delivers(launch: Launch, held: HeldIngest) -> None:
    """Kong sends SIGTERM, and SIGKILL 30 ms later, to the process that it has started."""
    server = launch().start()
    meter(server, held.url, 20)
    pid = server.server_pid
    server.process.terminate()
    server.wait_for_log("ending: SIGTERM")
    server.process.kill()
    held.is_open.set()
    assert server.wait() == -signal.SIGKILL
    held.wait_for_events(20)
    wait_until(lambda: has_ended(pid), "the end of the server")


def test_a_server_that_does_not_end_is_killed(launch: Launch) -> None:
    server = launch("--stop-timeout 0.1").start()
    pid = server.server_pid
    os.kill(pid, signal.SIGSTOP)
    assert server.stop() == 0
    assert has_ended(pid)
    assert "did not end in time, and is killed" in server.complaints()[0]


# A supervisor that dies


def test_when_the_supervisor_is_killed_the_server_goes_on_and_the_next_supervisor_takes_over(launch: Launch) -> None:
    old = launch().start()
    serving = old.server_pid
    with Connection(old.path) as kept:
        assert pid_over(kept) == serving
        old.process.kill()
        # Kong waits for the end of the pipe before it starts the next one.
        assert old.wait() == -signal.SIGKILL
        assert pid_over(kept) == serving
        new = launch().start()
        assert pid_over(kept) == new.server_pid
    wait_until(lambda: has_ended(serving), "the end of the old server")
    assert new.stop() == 0
    assert new.complaints() == []


def test_a_server_without_a_supervisor_that_nobody_takes_over_from_ends(launch: Launch, ingest: IngestServer) -> None:
    server = launch().start()
    meter(server, ingest.url, 20)
    pid = server.server_pid
    server.process.kill()
    wait_until(lambda: has_ended(pid), "the end of the server")
    assert len(ingest.events()) == 20


def test_a_server_without_a_supervisor_ends_when_it_is_told_to(launch: Launch) -> None:
    server = launch().start()
    pid = server.server_pid
    server.process.kill()
    os.kill(pid, signal.SIGTERM)
    wait_until(lambda: has_ended(pid), "the end of the server")


# A Kong whose worker, which has started the supervisor, ends while Kong goes on: a reload, or a worker that crashed

NGINX = "nginx: master process /usr/local/openresty/nginx/sbin/nginx -p {} -c nginx.conf"
# What the worker of such a master does: start the plugin server, tell its process id, and wait for it.
WORKER = "import subprocess, sys; subprocess.run(['/bin/sh', '-c', sys.argv[1]])"


@contextlib.contextmanager
def kong_with(server: PluginServerProcess) -> Iterator[tuple[subprocess.Popen[str], int, int]]:
    """Have a plugin server started by the worker of a Kong; gives Kong's master, and the ids of worker and server."""
    title = NGINX.format(server.prefix)
    command = f"{server.command} >/dev/null 2>&1 & echo $$ $!; wait"
    with subprocess.Popen(
        [title, "-c", WORKER, command], executable=sys.executable, stdout=subprocess.PIPE, text=True, env={}
    ) as master:
        try:
            assert master.stdout
            worker, supervisor = map(int, master.stdout.readline().split())
            wait_until(server.path.exists, "a socket")
            yield master, worker, supervisor
        finally:
            master.kill()


def is_served(path: Path) -> int:
    with Connection(path) as connection:
        return pid_over(connection)


@pytest.mark.parametrize("how", ["as Kong ends it", "its worker crashes"])
def test_while_kong_goes_on_the_servers_are_left_to_the_next_plugin_server(
    launch: Launch, prefix: Path, how: str
) -> None:
    old = PluginServerProcess(prefix=prefix)
    with kong_with(old) as (_, worker, supervisor):
        serving = is_served(old.path)
        if how == "as Kong ends it":
            os.kill(supervisor, signal.SIGTERM)
        else:
            os.kill(worker, signal.SIGKILL)
        wait_until(lambda: has_ended(supervisor), "the end of the supervisor")
        assert is_served(old.path) == serving
        new = launch().start()
        wait_until(lambda: has_ended(serving), "the end of the old server")
        assert is_served(old.path) == new.server_pid
    assert new.complaints() == []


def test_when_kong_is_gone_as_well_nobody_stays_behind(prefix: Path, ingest: IngestServer) -> None:
    server = PluginServerProcess(prefix=prefix)
    with kong_with(server) as (kong, worker, supervisor):
        serving = is_served(server.path)
        meter(server, ingest.url, 20)
        os.kill(supervisor, signal.SIGTERM)
        os.kill(worker, signal.SIGTERM)
        wait_until(lambda: has_ended(supervisor), "the end of the supervisor")
        assert not has_ended(serving)
        kong.kill()
        kong.wait()
        wait_until(lambda: has_ended(serving), "the end of the server")
    ingest.wait_for_events(20)
    assert len(ingest.events()) == 20


# Descriptors


def sockets_of(pid: int) -> set[str]:
    links: set[str] = set()
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # it is closed just now
            links.add(str(path.readlink()))
    return {link for link in links if link.startswith("socket:")}


def test_a_server_has_only_what_it_needs_of_the_supervisors_sockets(launch: Launch) -> None:
    """The one that listens, and both ends of two channels; also when it is not the first one."""
    server = launch().start()
    killed = server.server_pid
    os.kill(killed, signal.SIGKILL)
    second = wait_for_another(server, killed)
    with Connection(server.path) as connection:
        assert pid_over(connection) == second
        assert len(sockets_of(server.pid) & sockets_of(second)) == 5


def test_the_supervisor_keeps_no_connection_that_it_has_taken_over(launch: Launch) -> None:
    old = launch().start()
    with Connection(old.path) as one, Connection(old.path) as other:
        assert pid_over(one) == pid_over(other)
        before = len(sockets_of(old.pid))
        new = launch().start()
        assert pid_over(one) == new.server_pid
        assert old.stop() == 0
        wait_until(lambda: len(sockets_of(new.pid)) == before, "the supervisor to have its own sockets only")
        assert len(sockets_of(new.pid) & sockets_of(new.server_pid)) == 5
        # Nobody else has it: the server's end is the connection's.
        new.kill()
        assert one.is_ended()
