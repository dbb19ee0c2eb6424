"""What runs on the route of each Kong that is compared."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gateway_kong import SUBJECT_HEADER, Kong, PluginServer
from pdk_small import NAME as PDK_PLUGIN
from processes import BENCH

from kong_metering import PLUGIN_NAME
from kong_metering_sandbox.conf import read_example
from kong_metering_sandbox.gateways import GatewayError

PROTOCOLS = ("protobuf", "msgpack")
FLOOR = "floor"
_GO_PLUGIN = "bench-go"
_FLOOR_PLUGIN = "bench-floor"
_GO_BUILD_SECONDS = 600
# Batches that do not leave as fast as requests come must not be dropped: each request is to have its event.
_QUEUE = {"max_entries": 1_000_000}


@dataclass(frozen=True)
class Candidate:
    """One Kong to measure.

    `name` is how --only calls it. `plugins` are on its route, for the URL of its collector; `server` gives its plugin
    server, for Kong's prefix. `delivers`: the collector gets one event for each request.
    """

    name: str
    title: str
    plugins: Callable[[str], list[dict[str, Any]]] = lambda _: []
    server: Callable[[Path], PluginServer] | None = None
    delivers: bool = False
    with_consumer: bool = False

    def kong(self, directory: Path, collector_url: str, *, is_global: bool = False) -> Kong:
        """Make its Kong, in a directory of its own."""
        prefix = directory / self.name
        server = self.server(prefix) if self.server else None
        plugins = self.plugins(collector_url)
        return Kong(prefix, plugins, server, with_consumer=self.with_consumer, is_global=is_global)


def nothing() -> Candidate:
    """Have nothing on the route but its answer."""
    return Candidate("nothing", "nothing")


def key_auth() -> Candidate:
    """Have on the route what one with consumers has anyway."""
    return Candidate("key-auth", "key-auth only", with_consumer=True)


def http_log(batch: int = 100) -> Candidate:
    """Have Kong's own logging plugin, in Lua."""

    def plugins(url: str) -> list[dict[str, Any]]:
        queue = {**_QUEUE, "max_batch_size": batch}
        return [{"name": "http-log", "config": {"http_endpoint": f"{url}/records", "queue": queue}}]

    return Candidate(f"http-log-{batch}", f"bundled http-log, batches of {batch}", plugins, delivers=True)


def pdk_gevent() -> Candidate:
    """Have a small plugin on kong-pdk's own server."""

    def server(prefix: Path) -> PluginServer:
        program = f"{sys.executable} {BENCH / 'pdk_small.py'} --no-lua-style"
        socket = prefix / f"{PDK_PLUGIN}.sock"
        return _plugin_server(PDK_PLUGIN, socket, f"{program} -g -p {prefix}", f"{program} --dump")

    return Candidate("kong-pdk", "kong-pdk's server, gevent", lambda _: [_small(PDK_PLUGIN)], server)


def go_plugin(directory: Path) -> Candidate:
    """Have the same small plugin on Kong's Go PDK; builds it into a directory, with `go` and its module proxy.

    Raises `GatewayError` if there is no `go`, or it cannot build.
    """
    return _built("go", "Go plugin on go-pdk", _go_build(directory, BENCH / "goplugin", _GO_PLUGIN))


def floor(directory: Path) -> Candidate:
    """Have a plugin server that asks Kong what ours asks with a subject by header, and does nothing with the answers.

    It is built with `go`, as the Go plugin is, but needs nothing that is not here. Raises `GatewayError` as that does.
    """
    title = "the floor: the same questions, nothing done"
    return _built(FLOOR, title, _go_build(directory, BENCH / "floor", _FLOOR_PLUGIN))


def ours(  # noqa: PLR0913 - each of them is one thing that is compared
    protocol: str,
    batch: int = 100,
    *,
    by_consumer: bool = False,
    path: str = "events",
    interpreter: str = "",
    bin_directory: Path = Path(sys.executable).parent,
) -> Candidate:
    """Have kong-metering with its spool and delivery, as kong.conf.example loads it.

    `path` is where its events go at the collector; `bin_directory` has its programs, for the version `interpreter`.
    """

    def server(prefix: Path) -> PluginServer:
        lines = read_example(bin_directory=bin_directory, prefix=prefix)
        lines["pluginserver_metering_query_cmd"] += f" --protocol {protocol}"
        _check_protocol(lines["pluginserver_metering_query_cmd"], protocol)
        return PluginServer(PLUGIN_NAME, Path(lines["pluginserver_metering_socket"]), lines)

    def plugins(url: str) -> list[dict[str, Any]]:
        by_header = {"look_up_value_in": "header", "field": SUBJECT_HEADER}
        config = {
            "ingest_endpoint": f"{url}/{path}",
            "api_token": "bench",
            "subject": {"look_up_value_in": "consumer"} if by_consumer else by_header,
            "queue": {**_QUEUE, "max_batch_size": batch},
        }
        return [{"name": PLUGIN_NAME, "config": config}]

    name = f"ours-{protocol}-{batch}" + ("-consumer" if by_consumer else "")
    title = f"kong-metering, {_PROTOCOL_NAMES[protocol]}, batches of {batch}" + (", by consumer" if by_consumer else "")
    if interpreter:
        name, title = f"{name}-{interpreter}", f"Python {interpreter}"
    return Candidate(name, title, plugins, server, delivers=True, with_consumer=by_consumer)


def _check_protocol(query: str, protocol: str) -> None:
    """Make sure that Kong will speak what is measured; raises `GatewayError` if the dump says otherwise."""
    done = subprocess.run(shlex.split(query), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise GatewayError(f"{query}: {done.stdout}{done.stderr}")
    dump = json.loads(done.stdout)
    # A list of plugins alone is the older form, which says MessagePack.
    spoken = dump.get("Protocol", _SPOKEN["msgpack"]) if isinstance(dump, dict) else _SPOKEN["msgpack"]
    if spoken != _SPOKEN[protocol]:
        raise GatewayError(f"{query} makes Kong speak {spoken}, not {_SPOKEN[protocol]}")


def judged(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Pick those that the targets are held against, in their order.

    They are ours, with each protocol, and the floor: a target that not even the floor meets is out of reach for
    whatever asks Kong the same over the same protocol.
    """
    wanted = {FLOOR, *(f"ours-{protocol}-100" for protocol in PROTOCOLS)}
    return [candidate for candidate in candidates if candidate.name in wanted]


def _go_build(directory: Path, source: Path, plugin: str) -> Path:
    go = shutil.which("go")
    if go is None:
        raise GatewayError("there is no `go` on the PATH; see https://go.dev/doc/install, or leave it out with --only")
    program = directory / plugin
    done = subprocess.run(
        [go, "build", "-o", str(program), "."],
        cwd=source,
        capture_output=True,
        text=True,
        timeout=_GO_BUILD_SECONDS,
        check=False,
    )
    if done.returncode != 0:
        raise GatewayError(f"{plugin} cannot be built: {done.stderr}")
    return program


def _built(name: str, title: str, program: Path) -> Candidate:
    """Have a small plugin that is a program of its own, with the flags of those on go-pdk."""
    plugin = program.name

    def server(prefix: Path) -> PluginServer:
        socket = prefix / f"{plugin}.socket"
        return _plugin_server(plugin, socket, f"{program} -kong-prefix {prefix}", f"{program} -dump")

    return Candidate(name, title, lambda _: [_small(plugin)], server)


_PROTOCOL_NAMES = {"protobuf": "ProtoBuf", "msgpack": "MessagePack"}
_SPOKEN = {"protobuf": "ProtoBuf:1", "msgpack": "MsgPack:1"}


def _small(plugin: str) -> dict[str, Any]:
    return {"name": plugin, "config": {"header": SUBJECT_HEADER}}


def _plugin_server(plugin: str, socket: Path, start: str, query: str) -> PluginServer:
    settings = {
        "plugins": f"bundled,{plugin}",
        "pluginserver_names": "bench",
        "pluginserver_bench_socket": str(socket),
        "pluginserver_bench_start_cmd": start,
        "pluginserver_bench_query_cmd": query,
    }
    return PluginServer(plugin, socket, settings)
