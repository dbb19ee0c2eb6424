"""Who may connect to the socket, and what Kong reads that does not run the program: as Kong and its user meet them."""

from __future__ import annotations

import grp
import json
import os
import pwd
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kong_metering import information
from kong_metering.host.admission import Party, obstacle
from kong_metering.plugin_identity import PluginIdentity
from tests.support.plugin_server import PluginServerProcess
from tests.support.rpc import PLUGIN, KongClient, KongRequest
from tests.unit.host.conftest import answers, header_config

if TYPE_CHECKING:
    from tests.support.ingest import IngestServer

pytestmark = pytest.mark.slow

Launch = Callable[..., PluginServerProcess]
# Nobody's, whatever machine this is.
STRANGER, GROUP, OTHER_GROUP = 54_321, 54_322, 54_323
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be several users")

_CONNECT = """
import os, socket, sys
user, group, path = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
os.setgroups([]); os.setgid(group); os.setuid(user)
with socket.socket(socket.AF_UNIX) as kong:
    print(kong.connect_ex(path))
"""


def connects(path: Path, user: int, group: int) -> bool:
    """Tell whether a process of this user and group is let in."""
    command = [sys.executable, "-c", _CONNECT, str(user), str(group), str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout == "0\n"


def meter_one(path: Path, plugin: str, ingest: IngestServer) -> None:
    """Have a request metered as Kong does, of whose plugin this is the name."""
    client = KongClient(path)
    instance = client.start_instance(header_config(ingest.url), plugin)
    client.run_phases(instance, KongRequest(answers("acme")))
    ingest.wait_for_events(1)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_socket_is_its_users_only_unless_a_group_is_named(launch: Launch) -> None:
    with launch() as server:
        assert mode_of(server.path) == 0o600


def test_a_group_may_connect_that_is_named(launch: Launch) -> None:
    own = os.getegid()
    with launch("--socket-group", str(own)) as server:
        assert mode_of(server.path) == 0o660
        assert server.path.stat().st_gid == own


@needs_root
def test_kongs_user_connects_by_the_group_and_nobody_else_does(launch: Launch, prefix: Path) -> None:
    prefix.chmod(0o755)
    with launch("--socket-group", str(GROUP)) as server:
        assert connects(server.path, STRANGER, GROUP)
        assert not connects(server.path, STRANGER, OTHER_GROUP)


@needs_root
def test_the_next_plugin_server_opens_the_socket_that_it_takes_over_to_its_own_group(
    launch: Launch, prefix: Path
) -> None:
    prefix.chmod(0o755)
    with launch("--socket-group", str(GROUP)) as first:
        assert connects(first.path, STRANGER, GROUP)
        with launch("--socket-group", str(OTHER_GROUP)) as second:
            assert connects(second.path, STRANGER, OTHER_GROUP)
            assert not connects(second.path, STRANGER, GROUP)


@needs_root
def test_a_socket_that_was_removed_is_open_to_the_group_again(launch: Launch) -> None:
    with launch("--socket-group", str(GROUP)) as server:
        server.path.unlink()
        server.wait_for_log("it is there again")
        assert (mode_of(server.path), server.path.stat().st_gid) == (0o660, GROUP)


def test_a_group_that_is_not_there_keeps_the_server_from_starting(launch: Launch) -> None:
    server = launch("--socket-group", "no-such-group").launch()
    assert server.wait() == 1
    assert server.log == ["critical: cannot start: there is no group no-such-group, which --socket-group names"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may give a file to any group")
def test_a_group_that_the_user_is_not_in_keeps_the_server_from_starting(launch: Launch) -> None:
    server = launch("--socket-group", str(GROUP)).launch()
    assert server.wait() == 1
    assert f"cannot give it to the group {GROUP}, which --socket-group names: make that user a member" in server.log[0]


def test_a_directory_that_the_group_may_not_pass_is_said_at_the_start(launch: Launch, prefix: Path) -> None:
    prefix.chmod(0o700)
    with launch("--socket-group", str(os.getegid())) as server:
        said = server.wait_for_log("who is in the group that --socket-group names cannot connect to")
        assert said.startswith(f"error: who is in the group that --socket-group names cannot connect to {server.path}")
        assert said.endswith(f"{prefix} may not be passed by that user")


@pytest.mark.parametrize(
    ("mode", "party", "told"),
    [
        (0o600, Party(STRANGER, frozenset([GROUP])), "it is open to user {owner} only"),
        (0o660, Party(STRANGER, frozenset([GROUP])), "it is open to user {owner} and group {group} only"),
        (0o666, Party(STRANGER, frozenset([GROUP])), None),
        (0o600, Party(0, frozenset([0])), None),
    ],
)
def test_what_keeps_somebody_from_connecting_can_be_told(
    mode: int, party: Party, told: str | None, prefix: Path
) -> None:
    prefix.chmod(0o755)
    path = prefix / "plugin.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        path.chmod(mode)
        words = obstacle(path, party)
    if told is None or words is None:
        assert words == told
    else:
        owner, group = pwd.getpwuid(os.geteuid()).pw_name, grp.getgrgid(os.getegid()).gr_name
        assert words == told.format(owner=owner, group=group)


# What Kong reads


def dumped(path: Path) -> object:
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_dump_is_written_at_the_start_for_every_user_to_read(launch: Launch, prefix: Path) -> None:
    path = prefix / "dump.json"
    with launch("--dump-file", str(path)):
        assert mode_of(path) == 0o644
        assert dumped(path) == json.loads(json.dumps(information.dump("protobuf")))
        assert [one.name for one in prefix.iterdir() if one.name.startswith(".")] == []


def test_a_dump_of_another_version_is_replaced(launch: Launch, prefix: Path) -> None:
    path = prefix / "dump.json"
    path.write_text("[]", encoding="utf-8")
    with launch("--dump-file", str(path), "--protocol", "msgpack", "--priority", "16"):
        assert dumped(path) == json.loads(json.dumps(information.dump("msgpack", PluginIdentity(priority=16))))


def test_a_dump_that_cannot_be_written_is_said_and_the_server_serves(launch: Launch, prefix: Path) -> None:
    path = prefix / "gone" / "dump.json"
    with launch("--dump-file", str(path)) as server:
        said = server.wait_for_log("dump.json cannot be written")
        assert said.startswith(f"error: {path} cannot be written, which Kong is to read: No such file or directory; ")


def test_the_socket_can_be_anywhere_without_kongs_prefix(prefix: Path, ingest: IngestServer) -> None:
    path, spool = prefix / "elsewhere.sock", prefix / "spool"
    flags = ("--kong-prefix", "/nowhere", "--socket", str(path), "--spool-dir", str(spool))
    with PluginServerProcess(*flags, prefix=prefix) as server:
        meter_one(path, PLUGIN, ingest)
        assert server.complaints() == []
    assert not (prefix / "metering-spool").exists()


# The plugin's name


def test_everything_follows_the_plugins_name(launch: Launch, prefix: Path, ingest: IngestServer) -> None:
    with launch("--plugin-name", "api-usage", "--priority", "16", "--dump-file", str(prefix / "dump.json")) as server:
        meter_one(prefix / "api-usage.sock", "api-usage", ingest)
        assert list(KongClient(prefix / "api-usage.sock").call("GetStatus")["Plugins"]) == ["api-usage"]
        assert not server.path.exists()
        information = dumped(prefix / "dump.json")
        assert isinstance(information, dict)
        (plugin,) = information["Plugins"]
        assert (plugin["Name"], plugin["Priority"], plugin["Schema"]["name"]) == ("api-usage", 16, "api-usage")
