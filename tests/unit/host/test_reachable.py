"""A plugin server that lives can be reached, whatever becomes of its socket's path, and of its descriptors."""

from __future__ import annotations

import os
import resource
import select
import signal
import socket
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.plugin_server import BIN, PluginServerProcess, ServerProcess
from tests.support.rpc import PLUGIN, Connection, KongClient, KongRequest, request_frame
from tests.support.waiting import wait_until
from tests.unit.host.conftest import answers, header_config

if TYPE_CHECKING:
    from tests.support.ingest import IngestServer

pytestmark = pytest.mark.slow
Launch = Callable[..., PluginServerProcess]
GET_STATUS = request_frame(7, "GetStatus").data
PROGRAM = str(BIN / "kong-metering-plugin-server")
NOBODY = 65_534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def pid_at(path: Path) -> int:
    """Give the process that serves at a path; 0 if nobody answers there."""
    try:
        with Connection(path) as connection:
            connection.send(GET_STATUS)
            return int(connection.receive().result["Pid"])
    except (OSError, EOFError):
        return 0


def remove(path: Path) -> None:
    path.unlink()


def replace_by_dead_socket(path: Path) -> None:
    path.unlink()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))


def replace_by_file(path: Path) -> None:
    path.unlink()
    path.write_text("somebody's", encoding="utf-8")


def replace_by_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


@contextmanager
def a_disk_at(prefix: Path) -> Iterator[Callable[[str], object]]:
    """Mount a file system, which the call that is given mounts anew with other options."""

    def mount(*arguments: str) -> int:
        return subprocess.run(["/bin/mount", *arguments, str(prefix)], check=False).returncode

    if mount("-t", "tmpfs", "none"):
        pytest.skip("this root may not mount anything")

    def remount(options: str) -> None:
        # The server may be writing in this moment.
        wait_until(lambda: mount("-o", f"remount,{options}") == 0, f"a disk with {options}")

    try:
        yield remount
    finally:
        subprocess.run(["/bin/umount", "-l", str(prefix)], check=True)


def take_all_files(prefix: Path) -> None:
    for number in range(100):
        (prefix / f"taken-{number}").touch()


# The path


@pytest.mark.parametrize("servers", [1, 2])
@pytest.mark.parametrize("harm", [remove, replace_by_dead_socket, replace_by_file, replace_by_directory])
def test_a_path_that_somebody_removed_or_replaced_leads_to_the_server_again(
    harm: Callable[[Path], None], servers: int, launch: Launch, ingest: IngestServer
) -> None:
    server = launch(f"--servers {servers}").start()
    pids = server.server_pids()
    with Connection(server.path) as kept:
        harm(server.path)
        wait_until(lambda: server.path.exists() and stat.S_ISSOCK(server.path.stat().st_mode), "a socket")
        assert wait_until(lambda: pid_at(server.path), "an answer") in pids
        assert stat.S_IMODE(server.path.stat().st_mode) == 0o600
        kept.send(GET_STATUS)
        assert kept.receive().result["Pid"] in pids
    client = KongClient(server.path)
    instance = client.start_instance(header_config(ingest.url))
    request = KongRequest(answers("acme"))
    client.run_phases(instance, request)
    assert ["it is there again" in line for line in request.said] == [True], "Kong's own log has it"
    kept_files = [path for path in server.prefix.iterdir() if "moved-aside" in path.name]
    assert len(kept_files) == (harm in (replace_by_file, replace_by_directory))
    # The next one takes over by the new socket.
    new = launch(f"--servers {servers}").start()
    assert pid_at(server.path) in new.server_pids()
    assert server.stop() == 0
    assert pid_at(server.path) in new.server_pids()


def test_a_path_that_leads_to_somebody_who_is_no_plugin_server_leads_to_ours_again(launch: Launch) -> None:
    server = launch().start()
    server.path.unlink()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(server.path))
        other.listen()
        server.wait_for_log("it is there again")
        assert pid_at(server.path) == server.server_pid


@needs_root
def test_a_directory_that_is_read_only_is_said_and_mended_when_it_is_writable(launch: Launch, prefix: Path) -> None:
    with a_disk_at(prefix) as remount:
        server = launch("--no-spool").start()
        server.path.unlink()
        remount("bind,ro")
        server.wait_for_log("and it cannot be mended")
        remount("bind,rw")
        server.wait_for_log("it is there again")
        assert pid_at(server.path) == server.server_pid
        assert server.stop() == 0


@needs_root
@pytest.mark.parametrize("harm", ["bind,ro", "inodes"])
def test_a_reload_on_a_disk_that_takes_no_files_keeps_the_socket(launch: Launch, prefix: Path, harm: str) -> None:
    with a_disk_at(prefix) as remount:
        old = launch().start()
        wait_until(lambda: pid_at(old.path), "an answer")
        if harm == "inodes":
            remount("nr_inodes=100")
            with pytest.raises(OSError, match="No space left"):
                take_all_files(prefix)
        else:
            remount(harm)
        new = launch().start()
        wait_until(lambda: pid_at(old.path) == new.server_pid, "the next one")
        assert old.stop() == 0
        assert pid_at(old.path) == new.server_pid
        new.kill()
        if harm == "inodes":
            third = launch().start()
            assert wait_until(lambda: pid_at(old.path), "an answer") == third.server_pid


# A second one, by hand


def test_a_second_one_that_is_ended_gives_the_socket_back(launch: Launch) -> None:
    first = launch().start()
    former = first.server_pid
    second = launch().start()
    assert pid_at(first.path) == second.server_pid
    assert second.stop(signal.SIGINT) == 0
    serving = pid_at(first.path)
    assert serving in first.server_pids()
    assert serving != former
    first.wait_for_log("which had taken over, ends; this one")
    # And once more, the other way round.
    third = launch().start()
    assert pid_at(first.path) == third.server_pid
    assert first.stop() == 0
    assert pid_at(first.path) == third.server_pid


def test_a_second_one_that_is_killed_leaves_the_first_one_to_serve(launch: Launch) -> None:
    first = launch().start()
    second = launch().start()
    orphan = second.server_pid
    assert pid_at(first.path) == orphan
    second.process.kill()
    os.kill(orphan, signal.SIGKILL)
    first.wait_for_log("nobody serves on")
    assert wait_until(lambda: pid_at(first.path), "an answer") in first.server_pids()


def test_one_that_has_handed_over_stays_out_of_it_while_its_successor_serves(launch: Launch) -> None:
    servers = [launch().start() for _ in range(3)]
    assert pid_at(servers[0].path) == servers[2].server_pid
    assert servers[1].stop() == 0
    assert pid_at(servers[0].path) == servers[2].server_pid
    assert servers[0].stop() == 0
    assert pid_at(servers[2].path) == servers[2].server_pid
    assert not any("serves again" in line for line in servers[0].log)


@needs_root
def test_a_second_one_of_another_user_is_refused_and_the_first_one_serves(prefix: Path) -> None:
    path = prefix / f"{PLUGIN}.sock"
    prefix.chmod(0o777)
    with socket.socket(socket.AF_UNIX) as theirs:
        os.seteuid(NOBODY)
        try:
            theirs.bind(str(path))
            theirs.listen()
        finally:
            os.seteuid(0)
        theirs_is = path.stat().st_ino
        done = subprocess.run([PROGRAM, "-p", str(prefix)], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1
    assert f"user {NOBODY} serves on {path}; end that one first, or start this one as that user" in done.stderr
    assert path.stat().st_ino == theirs_is


# A long path


def test_a_prefix_with_a_long_name_is_no_hindrance(prefix: Path) -> None:
    """Kong goes by a path that is short enough for it."""
    long = prefix / ("x" * 150)
    long.mkdir()
    short = prefix / "short"
    short.symlink_to(long)
    with ExitStack() as stack:
        servers = []
        for _ in range(2):
            command = f"{PROGRAM} -v --kong-prefix {long}"
            servers.append(stack.enter_context(ServerProcess(command, short / f"{PLUGIN}.sock")))
            assert pid_at(servers[-1].path) == servers[-1].server_pid
        assert not any("cannot start" in line for line in servers[0].log)
        (long / f"{PLUGIN}.sock").unlink()
        servers[-1].wait_for_log("it is there again")
        assert pid_at(servers[-1].path) == servers[-1].server_pid


# Descriptors


@pytest.mark.parametrize("servers", [1, 2])
def test_connections_that_kong_keeps_and_does_not_use_make_room_for_those_who_wait(
    launch: Launch, servers: int
) -> None:
    """Each worker of Kong keeps up to 256 of them, for a minute."""
    server = launch(f"--servers {servers}").start()
    limit = 200
    for pid in server.server_pids():
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (limit, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    with ExitStack() as stack:
        kept = [stack.enter_context(Connection(server.path)) for _ in range(3 * limit)]
        for connection in kept:
            connection.send(GET_STATUS)
        for connection in kept:
            assert connection.receive().result["Pid"] in server.server_pids()
        ended, _, _ = select.select([connection.socket for connection in kept], [], [], 0)
        assert 2 * limit <= len(ended) < 3 * limit, "no more were closed than were in the way"
        for pid in server.server_pids():
            assert len(list(Path(f"/proc/{pid}/fd").iterdir())) <= limit - 9, "delivery has some left"
    assert pid_at(server.path) in server.server_pids()


def is_socket(descriptor: Path) -> bool:
    try:
        return str(descriptor.readlink()).startswith("socket:")
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("servers", [1, 2])
def test_connections_in_use_leave_descriptors_to_delivery(launch: Launch, servers: int) -> None:
    """Those that another server has accepted and passed on do too."""
    server = launch(f"--servers {servers}").start()
    limit = 200
    for pid in server.server_pids():
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (limit, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    with ExitStack() as stack:
        for _ in range(3 * limit):
            # Half an RPC: none of these is idle.
            stack.enter_context(Connection(server.path)).send(GET_STATUS[:-1])
        server.wait_for_log("connections wait, none can be accepted")
        open_files = [list(Path(f"/proc/{pid}/fd").iterdir()) for pid in server.server_pids()]
        assert max(map(len, open_files)) > limit - 20
        left = [file for files in open_files for file in files if int(file.name) >= limit - 9]
        assert not any(is_socket(file) for file in left)


def test_a_server_whose_connections_are_all_in_use_hands_over(launch: Launch) -> None:
    server, following = launch().start(), launch()
    with ExitStack() as stack:
        following.launch()
        server.wait_for_log("is going to take over")
        limit = 200
        resource.prlimit(
            server.server_pid, resource.RLIMIT_NOFILE, (limit, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
        )
        for _ in range(limit + 40):
            stack.enter_context(Connection(server.path)).send(GET_STATUS[:-1])
        following.wait_until_it_serves()
        server.wait_for_log("handed over to process")
        assert not any("did not hand over" in line for line in server.log)


@pytest.mark.parametrize("servers", [1, 2])
def test_without_descriptors_connections_wait_and_are_served_once_there_are_some(launch: Launch, servers: int) -> None:
    server = launch(f"--servers {servers}").start()
    pids = server.server_pids()
    for pid in pids:
        used = len(list(Path(f"/proc/{pid}/fd").iterdir()))
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (used + 3, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    with ExitStack() as stack:
        many = [stack.enter_context(Connection(server.path)) for _ in range(60)]
        for connection in many:
            connection.send(GET_STATUS)
        server.wait_for_log("connections wait, none can be accepted")
        # Each one that is answered and ends makes room for another one.
        while many:
            readable, _, _ = select.select([one.socket for one in many], [], [], 20)
            assert readable, f"{len(many)} were never served"
            for connection in [one for one in many if one.socket in readable]:
                assert connection.receive().result["Pid"] in pids
                connection.close()
                many.remove(connection)
    assert pid_at(server.path) in pids
    assert server.stop() == 0
    assert sum("connections wait" in line for line in server.log) <= 2 * servers
    assert sum("accepted again" in line for line in server.log) <= 2 * servers
