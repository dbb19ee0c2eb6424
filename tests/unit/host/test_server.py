"""The process as Kong starts it: its socket, its connections, and its end."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import msgpack
import pytest

from kong_metering.errors import StartupError
from kong_metering.host.opening import Place, listen
from tests.support.plugin_server import PluginServerProcess
from tests.support.rpc import Connection, KongClient, KongRequest, PhaseRun, RPCFailedError, pack, request_frame
from tests.support.waiting import wait_until
from tests.unit.host.conftest import answers, header_config

if TYPE_CHECKING:
    from typing_extensions import Self

    from tests.support.ingest import IngestServer

pytestmark = pytest.mark.slow
Launch = Callable[..., PluginServerProcess]

GET_STATUS = request_frame(7, "GetStatus").data


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def pid_at(path: Path) -> int:
    return int(KongClient(path).call("GetStatus")["Pid"])


# The socket


def test_the_socket_is_for_its_owner_only_and_stays_in_its_place(launch: Launch, prefix: Path) -> None:
    """Kong starts it with umask 0; the next process may be there already when the last one ends."""
    server = launch().start()
    assert stat.S_IMODE(server.path.stat().st_mode) == 0o600
    assert names_in(prefix) == [server.path.name, "metering-spool"]
    assert server.stop() == 0
    assert names_in(prefix) == [server.path.name, "metering-spool"]
    with pytest.raises(ConnectionRefusedError):
        Connection(server.path)
    assert server.complaints() == []


def test_the_next_process_takes_the_place_of_one_that_was_killed_and_knows_none_of_its_ids(launch: Launch) -> None:
    """Kong, told so, starts its instances again; no event runs with another route's configuration."""
    config = header_config("http://127.0.0.1:1")
    first = launch().start()
    old = [KongClient(first.path).start_instance(config) for _ in range(20)]
    first.kill()
    assert stat.S_ISSOCK(first.path.stat().st_mode)
    second = launch().start()
    client = KongClient(second.path)
    assert pid_at(second.path) == second.server_pid
    assert not set(old) & {client.start_instance(config) for _ in range(20)}
    for instance in old:
        with pytest.raises(RPCFailedError, match=r"^no plugin instance"):
            client.call("HandleEvent", {"InstanceId": instance, "EventName": "log"})


class Visitor:
    """Asks whoever serves at a path for its process id, over a new connection each time, until it is told to stop."""

    def __init__(self, path: Path) -> None:
        self.met: list[int] = []
        self.failures: list[Exception] = []
        self._path = path
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._visit, name="visitor")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _visit(self) -> None:
        while not self._over.is_set():
            try:
                self.met.append(pid_at(self._path))
            except OSError as error:
                self.failures.append(error)


def test_a_new_process_takes_the_socket_over_without_a_moment_without_one(launch: Launch) -> None:
    """At a reload Kong starts the new process while the old one still serves, for 10 s more."""
    old = launch().start()
    with Connection(old.path) as kept, Visitor(old.path) as visitor:
        serving = [old.server_pid]
        wait_until(lambda: serving[0] in visitor.met, "visits to the old process")
        new = launch().start()
        serving.append(new.server_pid)
        wait_until(lambda: serving[1] in visitor.met, "visits to the new process")
        kept.send(GET_STATUS)
        assert kept.receive().result["Pid"] == serving[1]
        assert old.stop() == 0
        seen = len(visitor.met)
        wait_until(lambda: len(visitor.met) > seen + 10, "visits after the end of the old process")
    assert visitor.failures == []
    assert set(visitor.met) == set(serving)
    assert new.stop() == 0


def a_file(path: Path) -> None:
    path.write_text("precious")


def a_directory(path: Path) -> None:
    path.mkdir()
    (path / "precious").touch()


def a_fifo(path: Path) -> None:
    os.mkfifo(path)


def a_link(path: Path) -> None:
    path.with_name("target").write_text("precious")
    path.symlink_to("target")


def a_link_to_nothing(path: Path) -> None:
    path.symlink_to("nothing")


@pytest.mark.parametrize("make", [a_file, a_directory, a_fifo, a_link, a_link_to_nothing])
def test_anything_else_than_a_socket_in_its_place_is_left_alone(make: Callable[[Path], None], prefix: Path) -> None:
    path = prefix / "plugin.sock"
    make(path)
    before = (names_in(prefix), path.lstat())
    with pytest.raises(StartupError, match=f"^{path} exists and is not a socket; move it away"):
        listen(Place(path))
    assert (names_in(prefix), path.lstat()) == before


def test_a_socket_is_made_where_nothing_is(prefix: Path) -> None:
    with listen(Place(prefix / "plugin.sock")).socket, Connection(prefix / "plugin.sock"):
        assert names_in(prefix) == ["plugin.sock"]


def test_a_name_that_is_too_long_for_a_file_is_refused(prefix: Path) -> None:
    with pytest.raises(StartupError, match="File name too long"):
        listen(Place(prefix / ("x" * 300)))
    assert names_in(prefix) == []


def test_a_prefix_that_is_gone_is_refused(prefix: Path) -> None:
    with pytest.raises(StartupError, match="No such file or directory; see -p/--kong-prefix"):
        listen(Place(prefix / "gone" / "plugin.sock"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_prefix_that_cannot_be_written_is_refused(prefix: Path) -> None:
    prefix.chmod(0o500)
    with pytest.raises(StartupError, match="Permission denied; see -p/--kong-prefix"):
        listen(Place(prefix / "plugin.sock"))
    prefix.chmod(0o700)


def test_a_process_that_cannot_start_says_why_in_one_line_and_fails(launch: Launch) -> None:
    server = launch()
    a_file(server.path)
    assert server.launch().wait() == 1
    (line,) = server.log
    assert line.startswith(f"critical: cannot start: {server.path} exists and is not a socket; move it away, or choose")


# Connections


@pytest.fixture(scope="module")
def shared() -> Iterator[PluginServerProcess]:
    """Start a server for tests that must not do it any harm."""
    with PluginServerProcess() as server:
        yield server
    assert [line for line in server.complaints() if "a connection was closed" not in line] == []


def garbage() -> dict[str, bytes]:
    head = b"\x94\x00\x01\xa1x\x91"
    return {
        "HTTP": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 64,
        "a type that does not exist": b"\xc1\xc1\xc1\xc1",
        "zeros": b"\x00" * 1000,
        "an answer": pack([1, 7, None, {}]),
        "a notification": pack([2, "serverPid", 7]),
        "a call that does not exist": b"\x04\x00\x00\x00\x08\x01\x52\x00",
        "a frame that is too large": b"\xff\xff\xff\xff",
        "four billion members": head + b"\xdd\xff\xff\xff\xff",
        "too deep": head + b"\x91" * 100_000,
        "a key that cannot be one": head + b"\x81\x90\x01",
        "too large": msgpack.packb([0, 1, "plugin.Step", [b"x" * (17 * 1024 * 1024)]]),
        "too large, in parts": pack([0, 1, "plugin.Step", [["x" * 1024 * 1024] * 17]]),
        "a good frame first": GET_STATUS + b"\xc1",
    }


@pytest.mark.parametrize("name", garbage())
def test_what_is_not_the_protocol_costs_its_sender_the_connection_and_nobody_else_anything(
    name: str, shared: PluginServerProcess
) -> None:
    client = KongClient(shared.path)
    instance = client.start_instance(header_config("http://127.0.0.1:1"))
    event = PhaseRun(instance, "access", KongRequest())
    event.take(client.answer_to(event.next_frame(1)))
    with Connection(shared.path) as good, Connection(shared.path) as bad:
        good.send(GET_STATUS[:9])
        try:
            bad.send(garbage()[name])
        except ConnectionError:
            pass
        else:
            wait_until(bad.is_ended, "the end of the connection")
        good.send(GET_STATUS[9:])
        assert good.receive().result["Pid"] == shared.server_pid
    client.run(event)
    client.close_instance(instance)


def test_connections_that_end_at_any_moment_do_no_harm(shared: PluginServerProcess) -> None:
    for end in range(0, len(GET_STATUS) + 1, 3):
        with Connection(shared.path) as connection:
            connection.send(GET_STATUS[:end])
    with Connection(shared.path) as connection:
        connection.send(GET_STATUS * 1000)
    assert pid_at(shared.path) == shared.server_pid


def test_the_answers_to_a_sender_that_is_done_sending_still_arrive(shared: PluginServerProcess) -> None:
    with Connection(shared.path) as connection:
        connection.send(GET_STATUS * 3)
        connection.socket.shutdown(socket.SHUT_WR)
        assert [connection.receive().id for _ in range(3)] == [7, 7, 7]
        assert connection.is_ended()


def test_five_hundred_connections_are_served_at_once(shared: PluginServerProcess) -> None:
    with ExitStack() as stack:
        connections = [stack.enter_context(Connection(shared.path)) for _ in range(500)]
        for connection in connections:
            connection.send(GET_STATUS)
        for connection in reversed(connections):
            assert connection.receive().result["Pid"] == shared.server_pid


def send_for_ever(connection: Connection, data: bytes) -> NoReturn:
    while True:
        connection.send(data)


def test_a_client_that_never_reads_is_cut_off_and_others_are_served(launch: Launch) -> None:
    """Its answers are not kept for ever, and the log does not tell of each."""
    server = launch().start()
    before = server.resident_bytes()
    client = KongClient(server.path)
    with Connection(server.path) as deaf:
        deaf.socket.settimeout(60)
        with pytest.raises(ConnectionError):
            send_for_ever(deaf, GET_STATUS * 5000)
        assert client.status()
    assert server.resident_bytes() - before < 32 * 1024 * 1024
    assert server.stop() == 0
    assert len(server.complaints()) <= 3
    assert "did not read its answers" in server.complaints()[0]


def test_a_client_that_reads_late_gets_all_its_answers(shared: PluginServerProcess) -> None:
    """Half a megabyte of answers is more than the kernel keeps, and less than what is too much."""
    with Connection(shared.path) as slow:
        frame = request_frame(7, "GetPluginInfo", "metering-and-billing").data
        count = 500_000 // len(pack(KongClient(shared.path).answer_to(frame).result))
        slow.send(frame * count)
        assert pid_at(shared.path) == shared.server_pid
        assert [slow.receive().id for _ in range(count)] == [7] * count


# The end


def test_what_has_arrived_when_the_process_is_told_to_end_is_answered(launch: Launch) -> None:
    """The process is held while a step of an event, and a new connection with a request, come in; then SIGTERM."""
    server = launch().start()
    client = KongClient(server.path)
    instance = client.start_instance(header_config("http://127.0.0.1:1"))
    event = PhaseRun(instance, "access", KongRequest({"kong.request.get_header": "acme"}))
    event.take(client.answer_to(event.next_frame(1)))
    with Connection(server.path) as known:
        known.send(GET_STATUS)
        known.receive()
        os.kill(server.server_pid, signal.SIGSTOP)
        known.send(event.next_frame(2))
        with Connection(server.path) as new:
            new.send(GET_STATUS)
            pid = server.server_pid
            os.kill(pid, signal.SIGTERM)
            server.process.terminate()
            os.kill(pid, signal.SIGCONT)
            event.take(known.receive())
            assert new.receive().result["Pid"] == pid
            assert known.is_ended()
            assert new.is_ended()
    assert server.wait() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_waits_for_delivery_is_delivered_before_the_end(
    number: signal.Signals, launch: Launch, ingest: IngestServer
) -> None:
    server = launch().start()
    client = KongClient(server.path)
    patient = {"max_batch_size": 1000, "max_coalescing_delay": 3600}
    instance = client.start_instance(header_config(ingest.url, queue=patient))
    for index in range(20):
        client.run_phases(instance, KongRequest(answers("acme", index)))
    assert ingest.requests() == []
    assert server.stop(number) == 0
    assert [event["subject"] for event in ingest.events()] == ["acme"] * 20
    assert server.complaints() == []
    assert "20 events accepted, 0 adopted, 20 delivered, 0 left on disk" in server.log[-1]


def test_the_end_does_not_wait_longer_than_told_for_an_endpoint_that_does_not_answer(launch: Launch) -> None:
    """And what is left is said."""
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        server = launch("--stop-timeout 0.2").start()
        client = KongClient(server.path)
        instance = client.start_instance(header_config(f"http://127.0.0.1:{deaf.getsockname()[1]}"))
        client.run_phases(instance, KongRequest(answers("acme")))
        began = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - began < 30
    assert "1 event accepted, 0 adopted, 0 delivered, 1 left on disk" in server.log[-1]


def orphan(prefix: Path, *flags: str) -> tuple[subprocess.Popen[bytes], PluginServerProcess]:
    """Start a plugin server from a process in between, which is what Kong's worker is to it."""
    server = PluginServerProcess(*flags, prefix=prefix)
    between = subprocess.Popen(
        ["/bin/sh", "-c", f"{server.command} & wait"], env={}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_until(server.path.exists, "a socket")
    return between, server


def has_ended(pid: int) -> bool:
    """Whether a process that is nobody's child here is gone, or only waits for its exit status to be read."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])


def test_the_process_ends_when_the_one_that_started_it_is_gone(prefix: Path) -> None:
    between, server = orphan(prefix)
    pid = pid_at(server.path)
    between.kill()
    between.wait()
    wait_until(lambda: has_ended(pid), "the end of the plugin server")
    assert names_in(prefix) == [server.path.name, "metering-spool"]


def test_a_process_that_is_told_so_goes_on_without_the_one_that_started_it(prefix: Path) -> None:
    """Its housekeeping, which looks for the parent, has been done since: an abandoned event was forgotten."""
    between, server = orphan(prefix, "--parent ignore --phase-timeout 0.01")
    pid = pid_at(server.path)
    supervisor = parent_of(pid)
    try:
        between.kill()
        between.wait()
        client = KongClient(server.path)
        event = PhaseRun(client.start_instance(header_config("http://127.0.0.1:1")), "access", KongRequest())
        event.take(client.answer_to(event.next_frame(1)))
        wait_until(lambda: client.status()["Events"] == 0, "the event to be forgotten")
        assert pid_at(server.path) == pid
    finally:
        os.kill(supervisor, signal.SIGTERM)
    wait_until(lambda: has_ended(pid) and has_ended(supervisor), "the end of the plugin server")


# What Kong gives it and it must not use


def test_inherited_descriptors_are_closed(prefix: Path) -> None:
    """Kong's workers have listening sockets and logs open; kept open, they could not be freed by Kong."""
    reading, writing = os.pipe()
    with socket.create_server(("127.0.0.1", 0)) as listener, (prefix / "access.log").open("w") as log:
        inherited = (writing, listener.fileno(), log.fileno())
        kept = {str(Path(f"/proc/self/fd/{number}").readlink()) for number in inherited}
        server = PluginServerProcess(prefix=prefix, inherited=inherited).start()
        os.close(writing)
        assert os.read(reading, 1) == b""
        assert not kept & set(server.open_files())
        os.close(reading)
        server.stop()
