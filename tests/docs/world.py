"""The machine that the documentation speaks of, in a directory: a checkout, Kong's files, a gateway, an endpoint.

Contract: all processes run as long as the context. `here` and `there` take a text from the documentation to this
machine and back, by the few places that it names: what else it says is left as it is.
"""

from __future__ import annotations

import os
import pwd
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import requests

from kong_metering_sandbox.collector.process import CollectorProcess
from kong_metering_sandbox.gateways import Beside, StandIn
from kong_metering_sandbox.ports import port_of, reserve_port
from kong_metering_sandbox.upstream_process import UpstreamProcess
from tests.docs.terminal import Terminal
from tests.e2e.declarative import document, service
from tests.support.ingest import IngestServer
from tests.support.plugin_server import BIN, ROOT, ServerProcess, short_directory
from tests.unit.commands.test_verify import TOKEN

KONNECT = "https://us.api.konghq.com/v3/openmeter/events"
ANOTHER = "https://eu.api.konghq.com/v3/openmeter/events"
# Plugin entities of docs/spool-command.md: one that is no more, and one that a server has.
DELETED = "0d9a4f0e-6a37-4a6e-9d3f-52f3b4ad7c10"
RUNNING = "b1f6c7a2-19d4-4c0b-8f0e-3c5e8a90d2e7"
_USER = pwd.getpwuid(os.geteuid()).pw_name
_PROGRAM = "kong-metering-plugin-server"


@dataclass(frozen=True)
class World:
    """What runs, and where: `root` stands for the root of the file system, commands are typed in `checkout`."""

    root: Path
    checkout: Path
    endpoint: CollectorProcess  # in Konnect's place
    another: CollectorProcess  # in the place of another region's
    openmeter: IngestServer  # in the place of an OpenMeter of one's own
    server: ServerProcess
    gateway: StandIn
    metrics: str  # HOST:PORT that nobody listens at

    @property
    def spool(self) -> Path:
        """The spool of the plugin server."""
        return self.root / "var/lib/kong-metering/spool"

    @property
    def places(self) -> dict[str, str]:
        """What the documentation names, and what there is of it here."""
        return {
            KONNECT: self.endpoint.ingest_v3,
            ANOTHER: self.another.ingest_v3,
            "https://om.example.com": self.openmeter.url.partition("/api/")[0],
            "http://localhost:8001": self.gateway.admin_url,
            "127.0.0.1:9542": self.metrics,
            "/opt/kong-metering": f"{self.root}/opt/kong-metering",
            "/etc/": f"{self.root}/etc/",
            "/run/": f"{self.root}/run/",
            "/usr/local/kong": f"{self.root}/usr/local/kong",
            "/var/lib/": f"{self.root}/var/lib/",
        }

    @property
    def placeholders(self) -> dict[str, str]:
        """What in a command stands for something else, or would change this machine, or take a minute."""
        aside, prefix = self.root / "run/second", self.root / "usr/local/kong"
        return {
            "--plugin-id ID": f"--plugin-id {RUNNING}",
            "--endpoint URL": f"--endpoint {self.endpoint.ingest_v3}",
            "/path/to/kong-metering": str(ROOT),
            "kong-metering verify": "kong-metering verify --settle 1s",
            "kong-metering install": f"kong-metering install --root {self.root} --user {_USER} -p {prefix}",
            f"{_PROGRAM} --metrics": f"{_PROGRAM} --socket {aside}.sock --spool-dir {aside} --metrics",
        }

    def here(self, text: str) -> str:
        """Give a text of the documentation with the places of this machine."""
        text = re.sub("|".join(map(re.escape, self.places)), lambda found: self.places[found[0]], text)
        for placeholder, meant in self.placeholders.items():
            text = text.replace(placeholder, meant)
        return text

    def there(self, text: str) -> str:
        """Give a text of this machine with the places that the documentation names."""
        names = {here: there for there, here in self.places.items()}
        return re.sub("|".join(map(re.escape, names)), lambda found: names[found[0]], text)

    def terminal(self) -> Terminal:
        """Open a terminal in the checkout, as the plugin server's user, who has told its place in variables."""
        environment = {
            "PATH": f"{self.checkout}/.venv/bin:{os.environ['PATH']}",
            "HOME": str(self.checkout),
            "NO_PROXY": "127.0.0.1",
            "AUTH_TOKEN": TOKEN,
            "KONG_METERING_API_TOKEN": TOKEN,
            "DEMO": "--requests 50 --any-ports",
            "KONG_METERING_SOCKET": str(self.server.path),
            "KONG_METERING_SPOOL_DIR": str(self.spool),
            "KONG_METERING_INBOX_DIR": f"{self.root}/run/inbox",
        }
        return Terminal(environment, self.checkout)

    def write(self, name: str, text: str) -> None:
        """Write a file of the checkout, with the places of this machine."""
        (self.checkout / name).write_text(self.here(text), encoding="utf-8")

    def add_customer(self, key: str) -> None:
        """Make a customer at the endpoint."""
        self.endpoint.client.set_tokens([])
        self.endpoint.client.add_customer(key)
        self.endpoint.client.set_tokens([TOKEN])

    def request(self, subject: str) -> None:
        """Send a request through the gateway."""
        answer = requests.get(f"{self.gateway.proxy_url}/echo", headers={"x-tenant-id": subject}, timeout=60)
        assert answer.ok


@contextmanager
def running_world() -> Iterator[World]:
    """Start all of it, as README tells to: the plugin server first, beside the gateway."""
    with (
        _directory() as directory,
        CollectorProcess(tokens=[TOKEN]) as endpoint,
        CollectorProcess(tokens=[TOKEN]) as another,
        IngestServer() as openmeter,
        UpstreamProcess() as upstream,
        reserve_port() as metrics,
    ):
        checkout = _checkout(directory / "checkout")
        root = _root(directory / "root", checkout)
        with (
            _server(root) as server,
            StandIn(
                directory / "gateway",
                document(service(upstream.url)),
                settings={"database": "memory"},
                beside=Beside(server.path, server.path.with_name("dump.json")),
            ) as gateway,
        ):
            address = f"127.0.0.1:{port_of(metrics)}"
            world = World(root, checkout, endpoint, another, openmeter, server, gateway, address)
            world.add_customer("acme")
            yield world


@contextmanager
def with_server_of_its_own(world: World) -> Iterator[World]:
    """Give the same world with another plugin server and spool, for commands that look after what waits there."""
    with _directory() as directory:
        root = _root(directory, world.checkout)
        with _server(root) as server:
            yield replace(world, root=root, server=server)


@contextmanager
def _directory() -> Iterator[Path]:
    directory = short_directory()
    yield directory
    shutil.rmtree(directory)


def _server(root: Path) -> ServerProcess:
    socket = root / "run/kong-metering/kong-metering.sock"
    (root / "usr/local/kong/metering-and-billing.sock").symlink_to(socket)
    # What killed servers of other tests left in /dev/shm is no matter of this machine.
    flags = f"--socket {socket} --dump-file {socket.with_name('dump.json')} --inbox-dir {root}/run/inbox"
    return ServerProcess(f"{BIN}/{_PROGRAM} {flags} --spool-dir {root}/var/lib/kong-metering/spool", socket)


def _root(directory: Path, checkout: Path) -> Path:
    """Make a directory that stands for the root of the file system."""
    for place in ("etc/kong", "run/kong-metering", "usr/local/kong", "var/lib/kong-metering", "opt", "run/inbox"):
        (directory / place).mkdir(parents=True)
    (directory / "opt/kong-metering").symlink_to(checkout / ".venv")
    (directory / "etc/kong/kong.conf").write_text(_kong_conf(), encoding="utf-8")
    return directory


def _checkout(directory: Path) -> Path:
    """Make a directory that has what this checkout has, and this environment as the one that `make` has made."""
    directory.mkdir()
    for path in ROOT.iterdir():
        if path.name not in {".venv", ".git", "build"}:
            (directory / path.name).symlink_to(path)
    environment = directory / ".venv"
    environment.mkdir()
    for path in Path(sys.prefix).iterdir():
        if path.name not in {".dev", ".docs", ".sandbox"}:
            (environment / path.name).symlink_to(path)
    for made in (".dev", ".docs", ".sandbox"):
        (environment / made).touch()
    return directory


def _kong_conf() -> str:
    """Read what README has for kong.conf."""
    (lines,) = re.findall(r"^ *```ini\n(.*?)^ *```$", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE | re.DOTALL)
    return "".join(f"{line.strip()}\n" for line in lines.splitlines())
