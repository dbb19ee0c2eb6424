"""A plugin server takes the place of another one, as at a reload: over real sockets, from one process to the next."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.plugin_server import PluginServerProcess
from tests.support.rpc import Connection, KongClient, KongRequest, PhaseRun, RPCFailedError, request_frame
from tests.support.waiting import wait_until
from tests.unit.host.conftest import answers, header_config

if TYPE_CHECKING:
    from tests.support.ingest import IngestServer

Launch = Callable[..., PluginServerProcess]

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
            request = KongRequest(answers(self._name, self.requests))
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
        assert pid_over(kept) == old.pid
        new = launch().start()
        assert [pid_over(kept), pid_over(never_used)] == [new.pid] * 2
        assert old.stop() == 0
        assert pid_over(kept) == new.pid
        with Connection(new.path) as fresh:
            assert pid_over(fresh) == new.pid
    assert new.stop() == 0
    assert not new.path.exists()


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
        assert pid_over(connection) == new.pid
        with pytest.raises(RPCFailedError, match=r"event id \d+ not found"):
            client.run(access)
    assert new.stop() == 0
    assert old.stop() == 0


def test_a_connection_amid_a_frame_stays_where_it_is(launch: Launch) -> None:
    old = launch().start()
    with Connection(old.path) as connection:
        assert pid_over(connection) == old.pid
        connection.send(GET_STATUS[:7])
        wait_until(lambda: len(KongClient(old.path).call("GetStatus")["Plugins"]) == 1, "the bytes to be read")
        new = launch().start()
        connection.send(GET_STATUS[7:])
        assert connection.receive().result["Pid"] == old.pid
    assert old.stop() == 0
    assert new.stop() == 0


def test_nobody_reads_from_a_connection_that_may_have_been_handed_over(launch: Launch) -> None:
    old = launch().start()
    with ExitStack() as stack:
        # More than fit into the socket of one who asks for them and does not take them.
        connections = [stack.enter_context(Connection(old.path)) for _ in range(400)]
        assert pid_over(connections[-1]) == old.pid
        other = stack.enter_context(Connection(old.path))
        other.send(request_frame(1, "HandOver", None).data)
        old.wait_for_log("broke off handing 400 connections over")
        # Those that had arrived there end with it.
        other.close()
        for connection in connections:
            assert connection.is_ended()
    assert old.stop() == 0


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
            assert pid_over(connection) == server.pid
        for connection_to_other in served:
            connection_to_other.close()
    assert server.stop() == 0
    assert server.complaints() == []
    assert prefix.is_dir()
