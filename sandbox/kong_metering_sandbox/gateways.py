"""Two gateways with one handle: the stand-in, and a real Kong found on the PATH.

Both are configured with the lines of kong.conf.example, a declarative configuration and free loopback ports; what a
test or the demo does with one, it can do with the other.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import msgpack
import requests

from kong_metering.host.names import SERVER_NAME
from kong_metering_sandbox.conf import read_example
from kong_metering_sandbox.ports import port_of, reserve_port

if TYPE_CHECKING:
    from typing_extensions import Self

_START_SECONDS = 60.0
_STOP_SECONDS = 20.0
_POLL_SECONDS = 0.02
# A condition that costs much, such as one that reads all events, leaves the core to those that it waits for.
_PAUSE_TO_COST = 4
_STATUS_SECONDS = 5.0
_DEAD = "ZX"
_DECK_VARIABLE = re.compile(r"\$\{\{\s*env\s+\"(DECK_[A-Za-z0-9_]+)\"\s*\}\}")


class GatewayError(Exception):
    """The gateway did not do what it was told; the text holds what it said."""


@dataclass(frozen=True)
class Beside:
    """A plugin server that the gateway does not start: its socket, and the file that describes the plugin."""

    socket: Path
    dump: Path


class Gateway(ABC):
    """A gateway with the plugin loaded, and its prefix directory; a context manager that stops it.

    `declarative` is a kong.yaml as text, with decK's `${{ env "DECK_X" }}` filled in from `environment`.
    `plugin_server_flags` are added to the start command of kong.conf.example; `settings` are further ones of kong.conf.
    With a plugin server `beside` it, the gateway starts none. `protocol` is what the gateway speaks with the plugin
    server that it starts; `patience` is how many seconds each step of a start or
    a stop may take before a `GatewayError` says that it did not happen.
    """

    protocol: ClassVar[str] = "protobuf"
    patience: ClassVar[float] = 60.0

    def __init__(  # noqa: PLR0913 - what a gateway is made of
        self,
        directory: Path,
        declarative: str,
        *,
        environment: Mapping[str, str] | None = None,
        plugin_server_flags: str = "",
        settings: Mapping[str, str] | None = None,
        beside: Beside | None = None,
    ) -> None:
        self._beside = beside
        self.prefix = directory / "prefix"
        self.prefix.mkdir(parents=True)
        self._environment = dict(environment or {})
        self._declarative = directory / "kong.yaml"
        self._conf = directory / "kong.conf"
        self._write_declarative(declarative)
        # Its own until the context ends, also while it does not run.
        self._reserved = reserve_port(), reserve_port()
        # One that is never entered lets go of them too.
        weakref.finalize(self, _close, self._reserved)
        proxy, admin = map(port_of, self._reserved)
        lines = self._example(plugin_server_flags)
        lines |= {
            "proxy_listen": f"127.0.0.1:{proxy}",
            "admin_listen": f"127.0.0.1:{admin}",
            "prefix": str(self.prefix),
            "database": "off",
            "declarative_config": str(self._declarative),
            "nginx_worker_processes": "2",
        }
        lines |= self._own_settings() | dict(settings or {})
        self._addresses = lines["proxy_listen"], lines["admin_listen"]
        self._conf.write_text("".join(f"{name} = {value}\n" for name, value in lines.items()), encoding="utf-8")

    def _example(self, flags: str) -> dict[str, str]:
        """Read the lines of the example, for the plugin server that is meant."""
        lines = read_example(
            bin_directory=Path(sys.executable).parent, prefix=self.prefix, starts_server=self._beside is None
        )
        if self._beside is None:
            lines["pluginserver_metering_start_cmd"] += f" {flags}" if flags else ""
            lines["pluginserver_metering_query_cmd"] += f" --protocol {self.protocol}"
        else:
            lines["pluginserver_metering_socket"] = str(self._beside.socket)
            lines["pluginserver_metering_query_cmd"] = f"cat {self._beside.dump}"
        return lines

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.stop()
        finally:
            _close(self._reserved)

    @property
    def proxy_port(self) -> int:
        """The loopback port that clients call."""
        return int(self._addresses[0].rpartition(":")[2])

    @property
    def proxy_url(self) -> str:
        """Where clients call, without a slash at the end."""
        return f"http://{self._addresses[0]}"

    @property
    def admin_url(self) -> str:
        """Where the Admin API is, without a slash at the end."""
        return f"http://{self._addresses[1]}"

    @property
    def socket_path(self) -> Path:
        """The plugin server's socket."""
        return self._beside.socket if self._beside is not None else self.prefix / "metering-and-billing.sock"

    @property
    def error_log(self) -> str:
        """What the gateway and the plugin server have logged so far."""
        path = self.prefix / "logs" / "error.log"
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def configure(self, declarative: str) -> None:
        """Replace the configuration while everything runs, by the Admin API; also for later starts and reloads."""
        self._write_declarative(declarative)
        text = self._declarative.read_text(encoding="utf-8")
        with requests.Session() as session:
            session.trust_env = False
            answer = session.post(f"{self.admin_url}/config", json={"config": text}, timeout=_START_SECONDS)
        if not answer.ok:
            raise GatewayError(f"the gateway refused the configuration: {answer.status_code} {answer.text}")

    def plugin_server_pids(self) -> list[int]:
        """List the processes that serve, or deliver what they have, the oldest first."""
        return [process.pid for process in self._processes() if process.name == SERVER_NAME]

    def supervisor_pids(self) -> list[int]:
        """List the processes that Kong has started, which keep those that serve, the oldest first."""
        return [process.pid for process in self._processes() if process.name != SERVER_NAME]

    def kill_plugin_server(self) -> int:
        """Kill the newest process that serves with SIGKILL, and give the process id that it had."""
        return self._kill(self.plugin_server_pids)

    def kill_supervisor(self) -> int:
        """Kill the newest supervisor with SIGKILL, and give the process id that it had."""
        return self._kill(self.supervisor_pids)

    def _kill(self, pids: Callable[[], list[int]]) -> int:
        # One may just have died, and the next one not be there yet.
        self._wait_for(pids, "there is a process to kill")
        pid = pids()[-1]
        os.kill(pid, signal.SIGKILL)
        # Until it is gone, what Kong sends it is lost with it.
        self._wait_for(lambda: not Path(f"/proc/{pid}").exists(), f"process {pid} is gone")
        return pid

    def _processes(self) -> list[_Process]:
        directories = [path for path in Path("/proc").iterdir() if path.name.isdigit()]
        found = [_process(path) for path in directories if _belongs_to(path, self.prefix)]
        # Not by their ids, which begin again from the start now and then.
        living = [process for process in found if process is not None]
        return sorted(living, key=lambda process: (process.started_at, process.pid))

    def start(self, declarative: str | None = None) -> None:
        """Start, with another configuration if given; return when the proxy answers and the plugin server serves."""
        if declarative is not None:
            self._write_declarative(declarative)
        self._start()
        self.wait_until_ready()

    def wait_until_ready(self) -> None:
        """Wait until the proxy answers and the plugin server can be reached."""
        self._wait_for(self._answers, "the gateway answers")
        self.wait_for_plugin_server()

    def _answers(self) -> bool:
        return _answers(self.admin_url) and _answers(self.proxy_url)

    def wait_for_plugin_server(self) -> None:
        """Wait until the plugin server answers; its socket is there before."""
        self._wait_for(self._serving_pid, "the plugin server serves")

    @abstractmethod
    def stop(self) -> None:
        """Stop gateway and plugin server, gracefully; nothing happens if they do not run."""

    @abstractmethod
    def reload(self, declarative: str | None = None) -> None:
        """Load the configuration again, another one if given; return when the new plugin server serves."""

    @abstractmethod
    def _start(self) -> None: ...

    @abstractmethod
    def _own_settings(self) -> dict[str, str]: ...

    def _write_declarative(self, text: str) -> None:
        self._declarative.write_text(fill_in(text, self._environment), encoding="utf-8")

    def _wait_for_another_plugin_server(self, before: list[int]) -> None:
        """Wait until a process serves that was not there before, and those that were have handed over to it.

        One beside the gateway stays.
        """
        if self._beside is None:
            self._wait_for(lambda: self._serving_pid() not in (0, *before), "the new plugin server serves")
        self.wait_until_ready()

    def _serving_pid(self) -> int:
        """Ask whoever serves for its process id; 0 when nobody does."""
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(_STATUS_SECONDS)
                connection.connect(str(self.socket_path))
                connection.sendall(msgpack.packb([0, 1, "plugin.GetStatus", [None]]))
                unpacker = msgpack.Unpacker()
                while data := connection.recv(65536):
                    unpacker.feed(data)
                    for answer in unpacker:
                        return int(answer[3]["Pid"])
        except OSError:
            pass
        return 0

    def _wait_for_the_end(self) -> None:
        """Wait until no process of the plugin server is left: Kong's SIGKILL ends the supervisor only."""
        try:
            self._wait_for(lambda: not self._processes(), "all processes of the plugin server have ended")
        except GatewayError:
            self._kill_all()
            raise

    def _kill_all(self) -> None:
        """Kill the plugin server's processes until none is left: a supervisor may just be starting one."""
        while processes := self._processes():
            for process in processes:
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)

    def _wait_for(self, condition: Callable[[], Any], what: str) -> None:
        wait_for(condition, what, self._said, self.patience)

    def _said(self) -> str:
        return self.error_log[-3000:]


class StandIn(Gateway):
    """The stand-in gateway of this package, in a process of its own, which gets `environment` added to its own."""

    _process: subprocess.Popen[bytes] | None = None

    def _own_settings(self) -> dict[str, str]:
        return {}

    def _start(self) -> None:
        command = [sys.executable, "-m", "kong_metering_sandbox.gateway", "-c", str(self._conf)]
        environment = os.environ | dict(self._environment)
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)

    def _answers(self) -> bool:
        if self._process is not None and self._process.poll() is not None:
            raise GatewayError(f"the stand-in has ended with status {self._process.returncode}: {self._said()}")
        return super()._answers()

    def stop(self) -> None:
        """Stop as `kong quit` does: requests end, their log phases run, then the plugin server is told to."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
                self._kill_all()
                raise GatewayError(f"the stand-in did not stop: {self._said()}") from None
            finally:
                self._process = None
            self._wait_for_the_end()

    def reload(self, declarative: str | None = None) -> None:
        """Reload as `kong reload` does; see the base class."""
        if self._process is None:
            raise GatewayError("the stand-in does not run")
        if declarative is not None:
            self._write_declarative(declarative)
        before = self.plugin_server_pids()
        self._process.send_signal(signal.SIGHUP)
        self._wait_for_another_plugin_server(before)


class RealKong(Gateway):
    """The Kong that is on the PATH."""

    _running = False

    def _own_settings(self) -> dict[str, str]:
        # Its status API would listen on a port that every Kong of this machine has by default.
        settings = {
            "admin_gui_listen": "off",
            "status_listen": "off",
            "log_level": "info",
            "anonymous_reports": "off",
        }
        if os.geteuid() == 0:
            # As root, Kong's workers would run as nobody, who may not write into the test's directory.
            settings["nginx_user"] = "root root"
        return settings

    def _start(self) -> None:
        self._kong("start", "-c", str(self._conf))
        self._running = True

    def stop(self) -> None:
        """Stop with `kong quit`: requests end, their log phases run, then the plugin server is told to."""
        if self._running:
            self._kong("quit", "-p", str(self.prefix), "-t", "30")
            self._running = False
            self._wait_for_the_end()

    def reload(self, declarative: str | None = None) -> None:
        """Reload with `kong reload`; see the base class."""
        if declarative is not None:
            self._write_declarative(declarative)
        before = self.plugin_server_pids()
        self._kong("reload", "-c", str(self._conf), "-p", str(self.prefix))
        self._wait_for_another_plugin_server(before)

    def _kong(self, *arguments: str) -> None:
        run_kong(*arguments, directory=self.prefix, said=self._said)


GATEWAYS: Mapping[str, type[Gateway]] = {"standin": StandIn, "kong": RealKong}


def fill_in(text: str, environment: Mapping[str, str]) -> str:
    """Fill in decK's variables, as `deck` does before it sends a file; raises `GatewayError` if one is not set."""

    def value(match: re.Match[str]) -> str:
        if match[1] not in environment:
            raise GatewayError(f"the declarative configuration needs the environment variable {match[1]}")
        return environment[match[1]]

    return _DECK_VARIABLE.sub(value, text)


def run_kong(*arguments: str, directory: Path, said: Callable[[], str] = str) -> str:
    """Run the `kong` on the PATH in a directory, without any setting from this environment, and give what it printed.

    Raises `GatewayError`, which holds what it and `said` said, if there is none or it fails.
    """
    program = shutil.which("kong")
    if program is None:
        raise GatewayError("there is no `kong` on the PATH; see https://developer.konghq.com/gateway/install/")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("KONG_")}
    done = subprocess.run(  # noqa: PLW1510 - the status is looked at below, with what was said
        [program, *arguments], env=environment, cwd=directory, capture_output=True, text=True, timeout=60
    )
    if done.returncode != 0:
        raise GatewayError(f"kong {' '.join(arguments)}: {done.stdout}{done.stderr}{said()}")
    return done.stdout


def free_port() -> int:
    """Find a loopback port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_for(
    condition: Callable[[], Any], what: str, said: Callable[[], str] = str, timeout: float = _START_SECONDS
) -> None:
    """Poll until a condition holds; raises `GatewayError` that tells what was waited for, and what was said."""
    deadline = time.monotonic() + timeout
    while True:
        begun = time.thread_time()
        if condition():
            return
        if time.monotonic() > deadline:
            raise GatewayError(f"waited {timeout:.0f} s in vain until {what}. {said()}")
        time.sleep(max(_POLL_SECONDS, _PAUSE_TO_COST * (time.thread_time() - begun)))


def _answers(url: str) -> bool:
    try:
        with requests.Session() as session:
            session.trust_env = False
            session.get(url, timeout=5)
    except requests.RequestException:
        return False
    return True


@dataclass(frozen=True)
class _Process:
    pid: int
    name: str
    started_at: int  # in ticks since the system started


def _process(directory: Path) -> _Process | None:
    """Read what the system tells of a process; None if it has ended."""
    try:
        stat = (directory / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The name is in brackets, and may have blanks and brackets in it; behind it are fields 3 and on.
    name, _, others = stat.partition("(")[2].rpartition(")")
    state, *fields = others.split()
    return None if state in _DEAD else _Process(int(directory.name), name, int(fields[18]))


def _belongs_to(process: Path, prefix: Path) -> bool:
    """Whether a process is of the plugin server with this prefix; its shell has been replaced by it (`exec`)."""
    try:
        command = (process / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return b"--kong-prefix" in command and str(prefix).encode() in command


def _close(sockets: Iterable[socket.socket]) -> None:
    for each in sockets:
        each.close()
