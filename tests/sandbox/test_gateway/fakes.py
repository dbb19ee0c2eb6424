"""What the gateway's tests share: a running gateway with a service behind it and the fake plugin server beside it."""

from __future__ import annotations

import ast
import json
import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import requests

from kong_metering_sandbox.gateway import READY_FILE, command

from . import fake_plugin_server
from .fake_plugin_server import NAME

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DEADLINE = 60.0
PROGRAM = f"{sys.executable} {Path(fake_plugin_server.__file__)}"
# A metered route that answers by itself. The tests send no subject, so no endpoint is needed; the phases run all the
# same.
METERED_ECHO = """
_format_version: "3.0"
routes:
- {name: echo, paths: [/echo]}
plugins:
- {name: request-termination, config: {status_code: 200, message: hello}}
- name: metering-and-billing
  config: {ingest_endpoint: "http://127.0.0.1:1", api_token: t, subject: {look_up_value_in: header, field: x-tenant-id}}
"""
DUMP_COMMAND = f"{sys.executable} {Path(fake_plugin_server.__file__)} --dump"
MESSAGEPACK, PROTOBUF = "MsgPack:1", "ProtoBuf:1"
both_protocols = pytest.mark.parametrize("protocol", [MESSAGEPACK, PROTOBUF])


@dataclass
class Gateway:
    """A running gateway and the journal of its plugin server."""

    prefix: Path
    process: subprocess.Popen[bytes]
    urls: dict[str, Any]
    _entries: list[tuple[str, Any]] = field(default_factory=list)
    _offset: int = 0

    @property
    def proxy(self) -> str:
        return str(self.urls["proxy_url"])

    @property
    def admin(self) -> str:
        return str(self.urls["admin_url"])

    def address(self) -> tuple[str, int]:
        host, _, port = self.proxy.removeprefix("http://").rpartition(":")
        return host, int(port)

    def script(self, **script: Any) -> None:
        write_script(self.prefix, **script)

    def journal(self) -> list[tuple[str, Any]]:
        """Return what the plugin server has noted so far; every line is read once."""
        path = self.prefix / "journal"
        if not path.exists():
            self._entries.clear()
            self._offset = 0
            return []
        with path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if line.endswith(b"\n"):
                    self._offset += len(line)
                    self._entries.append(ast.literal_eval(line.decode()))
        return self._entries

    def calls(self, method: str | None = None) -> list[Any]:
        found = [entry[1] for entry in self.journal() if entry[0] == "rpc"]
        return [message for message in found if method is None or message[2] == method.encode()]

    def starts(self) -> list[dict[str, Any]]:
        return [entry[1] for entry in self.journal() if entry[0] == "start"]

    def log_text(self) -> str:
        return (self.prefix / "logs" / "error.log").read_text(encoding="utf-8")

    def records(self) -> list[dict[str, Any]]:
        """Return the records that log phases got, in their order."""
        texts = [message[3][0].get(b"Data") for message in self.calls("plugin.Step")]
        return [
            json.loads(text.decode("utf-8", "surrogateescape"))
            for text in texts
            if isinstance(text, bytes) and text.startswith(b'{"request"')
        ]

    def record(self, key: requests.Response | bytes | str) -> dict[str, Any]:
        """Wait for the record of a request: by its response, by its raw response, or by its URI."""
        if isinstance(key, requests.Response):
            key = key.headers["X-Kong-Request-Id"]
        if isinstance(key, bytes):
            key = key.partition(b"X-Kong-Request-Id: ")[2][:32].decode()

        def found() -> list[dict[str, Any]]:
            return [one for one in self.records() if key in (one["request"]["id"], one["request"]["uri"])]

        wait_for(found)
        return found()[0]

    def frames(self) -> list[bytes]:
        """Return the frames that Kong sent in ProtoBuf as answers to PDK calls."""
        return [entry[1] for entry in self.journal() if entry[0] == "frame"]

    def closed(self) -> int:
        """Count the connections to the plugin server that have been closed."""
        return sum(entry[0] == "closed" for entry in self.journal())

    def connections(self) -> int:
        """Count the connections to the plugin server that are open."""
        return sum(entry[0] == "opened" for entry in self.journal()) - self.closed()

    def wait_for_log_events(self, count: int = 1) -> None:
        wait_for(lambda: len(self.log_events()) >= count)

    def log_events(self) -> list[Any]:
        return [message for message in self.calls("plugin.HandleEvent") if message[3][0][b"EventName"] == b"log"]


def wait_for(condition: Callable[[], object], within: float = DEADLINE) -> None:
    """Poll until the condition holds; fail when it does not within the deadline."""
    deadline = time.monotonic() + within
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError("the deadline has passed")
        time.sleep(0.01)


def write_script(prefix: Path, **script: Any) -> None:
    draft = prefix / "script.tmp"
    draft.write_text(json.dumps(script))
    draft.replace(prefix / "script.json")


def start_upstream() -> tuple[subprocess.Popen[bytes], str]:
    """Start the stand-in service on a free port; return its process and its URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    line = [sys.executable, "-m", "kong_metering_sandbox.upstream", "--port", str(port)]
    return subprocess.Popen(line, stderr=subprocess.DEVNULL), f"http://127.0.0.1:{port}"


def is_open(url: str) -> bool:
    """Tell whether somebody listens at a URL with a port."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", int(url.rpartition(":")[2]))) == 0


def serves(path: Path) -> bool:
    """Tell whether somebody listens on a Unix socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


@contextmanager
def running_gateway(
    prefix: Path, config: str, *, database: str = "off", protocol: str = MESSAGEPACK, **keys: str
) -> Iterator[Gateway]:
    """Run a gateway with the fake plugin server; `config` is the declarative file, with @UPSTREAM@ in it."""
    prefix.mkdir(parents=True, exist_ok=True)
    if not (prefix / "script.json").exists():
        write_script(prefix, log=[["kong.log.serialize"]])
    upstream, upstream_url = start_upstream() if "@UPSTREAM@" in config else (None, "")
    (prefix / "kong.yaml").write_text(config.replace("@UPSTREAM@", upstream_url), encoding="utf-8")
    write_conf(prefix, database, {"pluginserver_metering_query_cmd": f"{DUMP_COMMAND} {protocol}", **keys})
    environment = {
        **os.environ,
        "OM_TOKEN": "om_secret",
        "DECK_AUTH_TOKEN": "spat_x",
        "DECK_SUBJECT_HEADER": "x-tenant-id",
    }
    log = (prefix / "stderr.log").open("wb")
    process = subprocess.Popen(command(prefix / "kong.conf"), env=environment, stderr=log)
    try:
        wait_for(lambda: (prefix / READY_FILE).exists() or process.poll() is not None)
        assert process.poll() is None, (prefix / "stderr.log").read_text()
        gateway = Gateway(prefix, process, json.loads((prefix / READY_FILE).read_text()))
        wait_for(lambda: serves(prefix / "plugin.socket") and (upstream is None or is_open(upstream_url)))
        yield gateway
    finally:
        log.close()
        process.terminate()
        process.wait(DEADLINE)
        if upstream is not None:
            upstream.kill()  # it would wait for its slow answers
            upstream.wait(DEADLINE)


def write_conf(prefix: Path, database: str, keys: dict[str, str]) -> None:
    conf = {
        "prefix": str(prefix),
        "proxy_listen": "127.0.0.1:0",
        "admin_listen": "127.0.0.1:0",
        "database": database,
        "declarative_config": str(prefix / "kong.yaml"),
        "plugins": f"bundled,{NAME}",
        "pluginserver_names": "metering",
        "pluginserver_metering_socket": str(prefix / "plugin.socket"),
        "pluginserver_metering_start_cmd": f"{PROGRAM} {prefix}/plugin.socket {prefix}/script.json {prefix}/journal",
        "pluginserver_metering_query_cmd": DUMP_COMMAND,
        **keys,
    }
    (prefix / "kong.conf").write_text("".join(f"{key} = {value}\n" for key, value in conf.items()))


def raw_exchange(gateway: Gateway, request: bytes) -> bytes:
    """Send bytes to the proxy and return everything that comes back until it closes the connection."""
    with socket.create_connection(gateway.address(), timeout=DEADLINE) as client:
        client.sendall(request)
        received = b""
        while data := client.recv(65536):
            received += data
    return received


def check_unexpected_error(response: requests.Response) -> None:
    """Check that a response is what Kong answers when a plugin fails, as a real 3.9.3 does it."""
    assert response.status_code == 500
    request_id = response.headers["X-Kong-Request-Id"]
    assert response.headers["Content-Type"] == "application/json; charset=utf-8"
    assert response.text == f'{{\n  "message":"An unexpected error occurred",\n  "request_id":"{request_id}"\n}}'


def get(gateway: Gateway, path: str, **arguments: Any) -> requests.Response:
    return requests.get(gateway.proxy + path, timeout=DEADLINE, **arguments)
