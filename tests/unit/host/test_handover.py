"""A plugin server takes the place of another one, as at a reload: over real sockets, from one process to the next."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kong_metering.host.channels import Channel, Kind
from kong_metering.host.handover import Predecessor, Sockets
from tests.support import odd_host
from tests.support.plugin_server import PluginServerProcess, ServerProcess, script_command
from tests.support.rpc import Connection, KongClient, KongRequest, PhaseRun, RPCFailedError, request_frame
from tests.support.waiting import wait_until
from tests.unit.host.conftest import answers, header_config

if TYPE_CHECKING:
    from tests.support.ingest import IngestServer

pytestmark = pytest.mark.slow
Launch = Callable[..., PluginServerProcess]

# What version 0.1.0 of October 2026 answers, recorded.
UNKNOWN_TO_VERSION_0 = b"\x94\x01\x01\xd90RPC method plugin.ShareListener is not supported\xc0"
# No two requests have the same id, whichever worker they are in.
_REQUESTS = itertools.count()
GET_STATUS = request_frame(1, "GetStatus", None).data


def pid_over(connection: Connection) -> int:
    connection.send(GET_STATUS)
    return int(connection.receive().result["Pid"])


class Worker:
    """One of Kong's workers: it sends requests over a pool of connections, and starts its instance when told to."""

    def __init__(self, name: str, path: Path, config: dict[str, object]) -> None:
        self.requests = 0
        self.failures: list[Exception] = []
        self._name = name
        self._config = config
        self._pool = [Connection(path) for _ in range(3)]
        self._client = KongClient(path, self._pool)
        self._instance = self._client.start_instance(config)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, name=name)
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join()
        for connection in self._pool:
            connection.close()

    def _work(self) -> None:
        while not self._over.is_set():
            request = KongRequest(answers(self._name, next(_REQUESTS)))
            try:
                for phase in ("access", "log"):
                    self._run(phase, request)
            except Exception as error:  # noqa: BLE001 - the test looks at it
                self.failures.append(error)
            self.requests += 1

    def _run(self, phase: str, request: KongRequest) -> None:
        try:
            self._client.run(PhaseRun(self._instance, phase, request))
        except RPCFailedError as error:
            if "no plugin instance" not in str(error):
                raise
            self._instance = self._client.start_instance(self._config)
            self._client.run(PhaseRun(self._instance, phase, request))


@contextmanager
def workers(path: Path, config: dict[str, object], count: int) -> Iterator[list[Worker]]:
    started = [Worker(f"worker-{number}", path, config) for number in range(count)]
    yield started
    for worker in started:
        worker.stop()


def wait_for_more(started: list[Worker]) -> None:
    before = [worker.requests for worker in started]
    wait_until(lambda: all(one.requests > seen for one, seen in zip(started, before, strict=True)), "more requests")


def test_no_request_under_load_notices_that_another_process_took_over(launch: Launch, ingest: IngestServer) -> None:
    servers = [launch().start()]
    config = header_config(ingest.url, queue={"max_batch_size": 100, "max_coalescing_delay": 0.1})
    with workers(servers[0].path, config, 4) as started:
        for _ in range(3):
            wait_for_more(started)
            servers.append(launch().start())
            assert servers[-2].stop() == 0
            wait_for_more(started)
    assert [worker.failures for worker in started] == [[]] * 4
    assert servers[-1].stop() == 0
    expected = {worker._name: worker.requests for worker in started}
    ids = [(event["subject"], event["id"]) for event in ingest.events()]
    assert {name: sum(subject == name for subject, _ in set(ids)) for name in expected} == expected
    assert [server.complaints() for server in servers] == [[]] * 4


def test_a_connection_that_is_open_goes_on_with_the_next_process(launch: Launch) -> None:
    old = launch().start()
    with Connection(old.path) as kept, Connection(old.path) as never_used:
        assert pid_over(kept) == old.server_pid
        new = launch().start()
        assert [pid_over(kept), pid_over(never_used)] == [new.server_pid] * 2
        assert old.stop() == 0
        assert pid_over(kept) == new.server_pid
        with Connection(new.path) as fresh:
            assert pid_over(fresh) == new.server_pid
    assert new.stop() == 0


def test_a_phase_that_is_under_way_ends_where_it_began_and_new_ones_wait(launch: Launch, ingest: IngestServer) -> None:
    old = launch().start()
    with Connection(old.path) as first, Connection(old.path) as second:
        client = KongClient(old.path, [first])
        instance = client.start_instance(header_config(ingest.url))
        access = PhaseRun(instance, "access", KongRequest(answers("acme")))
        access.take(client.answer_to(access.next_frame(1)))
        new = launch().launch()
        # It asks for the sockets as soon as it is up; the phase goes on meanwhile, a new one waits.
        late = PhaseRun(instance, "access", KongRequest(answers("acme", 1)))
        wait_until(lambda: any("serving" in line for line in new.log) or access.is_over or _go_on(access, client), "it")
        second.send(late.next_frame(2))
        answer = second.receive()
        wait_until(lambda: any("taken over" in line for line in new.log), "the new process")
        assert access.is_over
        assert answer.error is None or "no plugin instance" in answer.error
    assert new.stop() == 0
    assert old.stop() == 0


def _go_on(run: PhaseRun, client: KongClient) -> bool:
    while not run.is_over:
        run.take(client.answer_to(run.next_frame(1)))
    return True


def test_a_phase_that_never_goes_on_does_not_hold_the_next_process(launch: Launch, ingest: IngestServer) -> None:
    old = launch().start()
    with Connection(old.path) as connection:
        client = KongClient(old.path, [connection])
        instance = client.start_instance(header_config(ingest.url))
        access = PhaseRun(instance, "access", KongRequest(answers("acme")))
        access.take(client.answer_to(access.next_frame(1)))
        new = launch().start()
        assert pid_over(connection) == new.server_pid
        with pytest.raises(RPCFailedError, match=r"event id \d+ not found"):
            client.run(access)
    assert new.stop() == 0
    assert old.stop() == 0


def test_a_connection_amid_a_frame_stays_where_it_is(launch: Launch) -> None:
    old = launch().start()
    with Connection(old.path) as connection:
        assert pid_over(connection) == old.server_pid
        connection.send(GET_STATUS[:7])
        wait_until(lambda: len(KongClient(old.path).call("GetStatus")["Plugins"]) == 1, "the bytes to be read")
        new = launch().start()
        connection.send(GET_STATUS[7:])
        assert connection.receive().result["Pid"] == old.server_pid
    assert old.stop() == 0
    assert new.stop() == 0


def test_nobody_reads_from_a_connection_that_may_have_been_handed_over(launch: Launch) -> None:
    old = launch().start()
    with ExitStack() as stack:
        # More than fit into the socket of one who asks for them and does not take them.
        connections = [stack.enter_context(Connection(old.path)) for _ in range(400)]
        assert pid_over(connections[-1]) == old.server_pid
        shared = stack.enter_context(shared_sockets(old.path))
        ours, theirs = socket.socketpair()
        with ours, theirs:
            shared.servers[0].send(Kind.PART, theirs.fileno())
            old.wait_for_log("broke off handing over")
        # Those that had arrived there end with it.
        for connection in connections:
            assert connection.is_ended()
    assert old.stop() == 0


@contextmanager
def shared_sockets(path: Path) -> Iterator[Sockets]:
    """Ask for the socket that listens and the channels, as the next plugin server does."""
    predecessor = Predecessor.find(path)
    assert predecessor is not None
    assert predecessor._sockets is not None
    try:
        yield predecessor._sockets
    finally:
        predecessor.release()
        predecessor._sockets.listener.close()


def test_a_supervisor_that_was_taken_over_from_starts_no_more_servers(launch: Launch) -> None:
    old = launch().start()
    new = launch().start()
    old.wait_for_log("has taken over")
    os.kill(old.server_pid, signal.SIGKILL)
    wait_until(lambda: old.server_pids() == [], "the end of the old server")
    os.kill(new.server_pid, signal.SIGKILL)
    with Connection(new.path) as connection:
        assert pid_over(connection) == new.server_pid
    assert old.server_pids() == []
    assert old.stop() == 0
    assert old.complaints() == []
    assert new.stop() == 0


def test_a_server_goes_on_when_the_one_that_was_to_take_over_dies_before(launch: Launch) -> None:
    old = launch().start()
    serving = old.server_pid
    with Connection(old.path) as kept:
        for end in (signal.SIGKILL, signal.SIGTERM):
            new = launch().launch()
            old.wait_for_log(f"process {new.pid} is going to take over")
            new.process.send_signal(end)
            assert new.wait() == -end
            assert pid_over(kept) == serving
    with Connection(old.path) as fresh:
        assert pid_over(fresh) == serving
    assert old.stop() == 0
    assert old.complaints() == []


def test_another_server_serves_when_the_one_that_took_over_dies_with_all_connections(launch: Launch) -> None:
    old = launch().start()
    parted = old.server_pid
    with Connection(old.path) as lost:
        assert pid_over(lost) == parted
        with shared_sockets(old.path) as shared:
            assert shared.supervisor is not None
            to_supervisor, to_server = (
                asking(shared.supervisor, Kind.RETIRE),
                asking(shared.servers[0], Kind.PART),
            )
            with to_supervisor, to_server:
                assert to_supervisor.recv(1)
                while to_server.recv(4096):
                    pass
        with Connection(old.path) as connection:
            assert pid_over(connection) != parted
        assert lost.is_ended()
    assert old.stop() == 0
    assert ["did not take over after all" in line for line in old.complaints()] == [True]


def asking(channel: Channel, kind: Kind) -> socket.socket:
    ours, theirs = socket.socketpair()
    ours.settimeout(10)
    with theirs:
        channel.send(kind, theirs.fileno())
    return ours


def test_two_processes_that_start_at_once_take_turns(launch: Launch) -> None:
    servers = [launch().launch() for _ in range(3)]
    for server in servers:
        server.wait_until_it_serves()
    taken = [any("taken over from the previous process" in line for line in server.log) for server in servers]
    assert sorted(taken) == [False, True, True]
    with Connection(servers[0].path) as connection:
        pid = pid_over(connection)
    assert [pid in server.server_pids() for server in servers].count(True) == 1
    # Who serves ends last: the others would serve again.
    with Connection(servers[0].path) as connection:
        serving = pid_over(connection)
    in_turn = sorted(servers, key=lambda one: serving in one.server_pids())
    assert [server.stop() for server in in_turn] == [0] * 3
    assert [server.complaints() for server in servers] == [[]] * 3


def test_what_a_server_kept_for_its_requests_arrives_at_the_next_one(prefix: Path) -> None:
    command = script_command(Path(odd_host.__file__), prefix, "keep")
    with ServerProcess(command, prefix / "odd.sock") as old, ServerProcess(command, prefix / "odd.sock") as new:
        assert new.log[0] == f"info: arrived: kept by {old.server_pid}"


def test_a_plugin_server_of_the_version_before_is_taken_over_from_at_once(launch: Launch) -> None:
    """It does not know how to share its socket, and hands everything over when it is asked the old way."""
    server = launch()
    with ExitStack() as stack:
        other = stack.enter_context(socket.socket(socket.AF_UNIX))
        other.bind(str(server.path))
        other.listen()
        with_unread = stack.enter_context(Connection(server.path))
        its_end = stack.enter_context(other.accept()[0])
        answered: list[bytes] = []

        def serve() -> None:
            asked = other.accept()[0]
            answered.append(asked.recv(4096))
            asked.sendall(UNKNOWN_TO_VERSION_0)
            answered.append(asked.recv(4096))
            asked.sendall(b"kong-metering-handover-1\n\x01\x00\x00\x00")
            socket.send_fds(asked, [b"\x00\x00\x00\x00"], [other.fileno()])
            socket.send_fds(asked, [struct.pack("<I", len(GET_STATUS))], [its_end.fileno()])
            asked.sendall(GET_STATUS)
            asked.close()

        thread = threading.Thread(target=serve)
        thread.start()
        server.launch()
        wait_until(lambda: len(answered) == 1, "the first question")
        # In the backlog of the one before, when the path is not its own any more.
        waiting = stack.enter_context(Connection(server.path))
        server.wait_until_it_serves()
        thread.join()
        assert with_unread.receive().result["Pid"] == server.server_pid
        assert pid_over(waiting) == server.server_pid
        with Connection(server.path) as fresh:
            assert pid_over(fresh) == server.server_pid
    assert answered == [request_frame(1, "ShareListener", None).data, request_frame(1, "HandOver", None).data]
    server.wait_for_log("taken over from the previous process")
    assert server.stop() == 0
    assert server.complaints() == []


def answer_nothing(connection: socket.socket) -> None:
    connection.recv(4096)


def end(connection: socket.socket) -> None:
    connection.close()


def answer_an_error(connection: socket.socket) -> None:
    connection.recv(4096)
    connection.sendall(b"\x94\x01\x01\xd9\x2aRPC method plugin.HandOver not supported..\xc0")


@pytest.mark.parametrize("behave", [answer_nothing, end, answer_an_error])
def test_a_server_that_does_not_know_of_it_is_replaced_on_the_path(
    behave: Callable[[socket.socket], None], launch: Launch, prefix: Path
) -> None:
    server = launch()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(server.path))
        other.listen()

        def serve() -> None:
            connection, _ = other.accept()
            behave(connection)
            served.append(connection)

        served: list[socket.socket] = []
        thread = threading.Thread(target=serve)
        thread.start()
        server.start()
        thread.join()
        with Connection(server.path) as connection:
            assert pid_over(connection) == server.server_pid
        for connection_to_other in served:
            connection_to_other.close()
    assert server.stop() == 0
    assert server.complaints() == []
    assert prefix.is_dir()


# The program started anew in place, with SIGHUP


@pytest.mark.parametrize("flags", ["", "--servers 2"])
def test_a_planned_restart_costs_no_request(flags: str, launch: Launch, ingest: IngestServer) -> None:
    server = launch(flags).start()
    config = header_config(ingest.url, queue={"max_batch_size": 100, "max_coalescing_delay": 0.1})
    inode = server.path.stat().st_ino
    with workers(server.path, config, 4) as started:
        for _ in range(2):
            wait_for_more(started)
            start_anew(server)
            wait_for_more(started)
    assert [worker.failures for worker in started] == [[]] * 4
    assert server.path.stat().st_ino == inode
    assert server.stop() == 0
    expected = {worker._name: worker.requests for worker in started}
    ids = {(event["subject"], event["id"]) for event in ingest.events()}
    assert {name: sum(subject == name for subject, _ in ids) for name in expected} == expected
    assert server.complaints() == []


def start_anew(server: PluginServerProcess) -> None:
    """Tell it to, and wait until all servers are others."""
    before = server.server_pids()
    server.process.send_signal(signal.SIGHUP)

    def are_others() -> bool:
        now = server.server_pids()
        return len(now) == len(before) and set(now).isdisjoint(before)

    wait_until(are_others, "other servers")


def test_a_program_that_could_not_be_started_anew_goes_on(prefix: Path) -> None:
    program = prefix / "program.py"
    shutil.copy(odd_host.__file__, program)
    with ServerProcess(script_command(program, prefix, "keep"), prefix / "odd.sock") as server:
        serving = server.server_pid
        program.write_text("raise SystemExit(3)")
        server.process.send_signal(signal.SIGHUP)
        line = server.wait_for_log("cannot be restarted")
        assert line == "error: the program cannot be restarted, it ended with status 3; this one keeps running"
        with Connection(server.path) as connection:
            assert pid_over(connection) == serving


def test_a_program_that_is_told_to_end_while_it_starts_anew_ends_in_order(launch: Launch) -> None:
    server = launch().start()
    serving = server.server_pid
    server.process.send_signal(signal.SIGHUP)
    server.wait_for_log("restarting")
    assert server.stop() == 0
    assert not Path(f"/proc/{serving}").exists()
    assert server.complaints() == []


def test_a_server_that_does_not_hand_over_at_a_restart_is_killed(launch: Launch) -> None:
    server = launch().start()
    stuck = server.server_pid
    server.process.send_signal(signal.SIGHUP)
    server.wait_for_log("restarting")
    os.kill(stuck, signal.SIGSTOP)
    with Connection(server.path) as connection:
        assert pid_over(connection) != stuck
    wait_until(lambda: stuck not in server.server_pids(), "its end")
    assert server.stop() == 0
