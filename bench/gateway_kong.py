"""One real Kong of the benchmark: one nginx worker, db-less, with a prefix and ports of its own.

All candidates run on Kongs that differ in their plugin only. nginx itself counts the requests that it has read, on a
port of its own (`stub_status`), also those that are under way when a client goes away: an exact account needs that.

The route answers by itself (Kong's `request-termination`, which runs after ours in access, and ends access only; log
phases run as ever). That is the cheapest service there is, and costs all the same: an upstream would add to every
figure what none of them is to blame for, and so make the differences look smaller.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from gateway_processes import Cost, cost_below, plugin_processes

from kong_metering_sandbox.gateways import free_port, run_kong, wait_for

if TYPE_CHECKING:
    from typing_extensions import Self

_STOP_SECONDS = 20.0
_QUIET_SECONDS = 1.0
_LAST_LINES = 3000
_REQUESTS_HANDLED = re.compile(r"^ \d+ \d+ (\d+) $", re.MULTILINE)
ROUTE = "/orders"
SUBJECT_HEADER = "x-tenant-id"
# The same for all, so that the log records are of one size.
HEADERS = {SUBJECT_HEADER: "acme", "apikey": "key-of-alice"}


@dataclass(frozen=True)
class PluginServer:
    """A plugin server: the plugin's name, its socket, and the lines of kong.conf that load it."""

    plugin: str
    socket: Path
    settings: Mapping[str, str]


class Kong:
    """A Kong with `plugins` on its route, or on everything if `is_global`; a context manager that ends it.

    `with_consumer` puts key-auth on the route, too. The route answers by itself, with `request-termination`.
    """

    def __init__(
        self,
        prefix: Path,
        plugins: list[dict[str, Any]],
        server: PluginServer | None,
        *,
        with_consumer: bool = False,
        is_global: bool = False,
    ) -> None:
        self._prefix = prefix
        self._server = server
        self._port, self._status_port = free_port(), free_port()
        self._polls = 0
        self._master = 0
        prefix.mkdir(parents=True, exist_ok=True)
        own = [*plugins, *([{"name": "key-auth"}] if with_consumer else [])]
        configuration = _declarative(own, is_global=is_global)
        self._path("kong.yaml").write_text(yaml.safe_dump(configuration), encoding="utf-8")
        self._path("status.conf").write_text(_status_server(self._status_port), encoding="utf-8")
        lines = self._settings() | dict(server.settings if server else {})
        self._path("kong.conf").write_text("".join(f"{name} = {value}\n" for name, value in lines.items()))

    def __enter__(self) -> Self:
        try:
            run_kong("start", "-c", str(self._path("kong.conf")), directory=self._prefix, said=self._said)
            self._master = int(self._path("pids/nginx.pid").read_text())
            wait_for(self._listens, "Kong and its plugin server listen", self._said)
            wait_for(self._is_quiet, "Kong asks itself nothing more", self._said)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    @property
    def master(self) -> int:
        """The process id of nginx's master."""
        return self._master

    @property
    def port(self) -> int:
        """The loopback port that clients call."""
        return self._port

    @property
    def url(self) -> str:
        """Where the route is."""
        return f"http://127.0.0.1:{self._port}{ROUTE}"

    @property
    def error_log(self) -> str:
        """What Kong and the plugin server have logged so far."""
        return self._path("logs/error.log").read_text(encoding="utf-8", errors="replace")

    def requests(self) -> int:
        """Count the requests that clients have sent so far."""
        self._polls += 1  # nginx counts this one, too
        with urllib.request.urlopen(f"http://127.0.0.1:{self._status_port}/", timeout=10) as response:
            text = response.read().decode()
        found = _REQUESTS_HANDLED.search(text)
        if found is None:
            raise ValueError(f"nginx's status is not what it was: {text}")
        return int(found[1]) - self._polls

    def cost(self) -> Cost:
        """Tell what Kong and its plugin server have used of the CPU."""
        return cost_below(self._master)

    def _settings(self) -> dict[str, str]:
        settings = {
            "prefix": str(self._prefix),
            "database": "off",
            "declarative_config": str(self._path("kong.yaml")),
            "proxy_listen": f"127.0.0.1:{self._port} backlog=4096",
            "admin_listen": "off",
            "admin_gui_listen": "off",
            "status_listen": "off",
            "nginx_worker_processes": "1",
            "nginx_http_include": str(self._path("status.conf")),
            "proxy_access_log": "off",
            "log_level": "notice",
            "anonymous_reports": "off",
        }
        if os.geteuid() == 0:
            # As root, Kong's worker would run as nobody, who may not write into this directory.
            settings["nginx_user"] = "root root"
        return settings

    def _is_quiet(self) -> bool:
        """Whether no request comes: Kong sends itself one when it starts, which would be taken for a client's."""
        before = self.requests()
        time.sleep(_QUIET_SECONDS)
        return self.requests() == before

    def _listens(self) -> bool:
        status = ("127.0.0.1", self._status_port)
        return _accepts(socket.AF_INET, status) and (
            self._server is None or _accepts(socket.AF_UNIX, str(self._server.socket))
        )

    def _stop(self) -> None:
        """End Kong as `kong stop` does; what has not ended in time is killed."""
        if not self._master:
            return
        left = {self._master} | plugin_processes(self._master)
        os.kill(self._master, signal.SIGTERM)
        self._master = 0
        try:
            wait_for(lambda: not _living(left), "Kong ends", timeout=_STOP_SECONDS)
        finally:
            for pid in _living(left):
                os.kill(pid, signal.SIGKILL)

    def _path(self, name: str) -> Path:
        return self._prefix / name

    def _said(self) -> str:
        return self.error_log[-_LAST_LINES:] if self._path("logs/error.log").exists() else ""


def _declarative(plugins: list[dict[str, Any]], *, is_global: bool) -> dict[str, Any]:
    answer = {"name": "request-termination", "config": {"status_code": 200, "message": "ok"}}
    route: dict[str, Any] = {"name": "orders", "paths": [ROUTE], "plugins": [answer]}
    if not is_global:
        route["plugins"] += plugins
    return {
        "_format_version": "3.0",
        # Nobody is asked there: the route answers.
        "services": [{"name": "orders", "url": "http://127.0.0.1:9", "routes": [route]}],
        "consumers": [{"username": "alice", "keyauth_credentials": [{"key": HEADERS["apikey"]}]}],
        "plugins": plugins if is_global else [],
    }


def _status_server(port: int) -> str:
    return f"server {{ listen 127.0.0.1:{port}; access_log off; location / {{ stub_status; }} }}\n"


def _accepts(family: socket.AddressFamily, address: tuple[str, int] | str) -> bool:
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        return probe.connect_ex(address) == 0


def _living(pids: set[int]) -> set[int]:
    return {pid for pid in pids if Path(f"/proc/{pid}").exists()}
