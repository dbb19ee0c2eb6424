"""A PostgreSQL of the tests' own, with Debian's or any other server that is installed: for gateways with a database.

Contract: one cluster in a temporary directory, one server on a loopback port until the context ends, not durable.
As root the server runs as the user `postgres`, for it refuses to run as root. Kong's tables are made once; each
database is a copy of them, for one gateway, and goes with the cluster. One thread calls it.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from kong_metering_sandbox.gateways import free_port, run_kong, wait_for

_DEBIANS = Path("/usr/lib/postgresql")
_STOP_SECONDS = 20
_COMMAND_SECONDS = 120


def find_postgres() -> Path | None:
    """Find the directory with PostgreSQL's programs; None where there is none."""
    newest = sorted(_DEBIANS.glob("*/bin/initdb"), key=lambda path: int(path.parts[-3].split(".")[0]))
    on_path = shutil.which("initdb")
    found = Path(on_path).resolve() if on_path else (newest[-1] if newest else None)
    return found.parent if found and (found.parent / "postgres").exists() else None


class Cluster:
    """A server that runs, as `running_postgres` gives it."""

    def __init__(self, programs: Path, directory: Path, port: int, user: str | None) -> None:
        self._programs = programs
        self._directory = directory
        self._port = port
        self._user = user
        self._names = (f"kong{number}" for number in itertools.count())
        self._template: str | None = None

    def database(self) -> Mapping[str, str]:
        """Make a database that holds Kong's tables and no entity; gives the lines of kong.conf that lead to it."""
        if self._template is None:
            self._template = self._made(from_template="template0")
            self._make_tables(self._settings(self._template))
        return self._settings(self._made(from_template=self._template))

    def answers(self) -> bool:
        """Tell whether the server takes connections."""
        return _succeeds(self._user, self._programs / "pg_isready", *self._place)

    @property
    def _place(self) -> list[str]:
        return ["--host=127.0.0.1", f"--port={self._port}", "--username=kong"]

    def _made(self, from_template: str) -> str:
        name = next(self._names)
        _run(self._user, self._programs / "createdb", *self._place, f"--template={from_template}", name)
        return name

    def _settings(self, name: str) -> dict[str, str]:
        place = {"pg_host": "127.0.0.1", "pg_port": str(self._port), "pg_user": "kong"}
        return {"database": "postgres", "pg_database": name, **place}

    def _make_tables(self, settings: Mapping[str, str]) -> None:
        prefix = self._directory / "prefix"
        prefix.mkdir()
        conf = self._directory / "kong.conf"
        lines = {**settings, "prefix": str(prefix), "anonymous_reports": "off"}
        conf.write_text("".join(f"{name} = {value}\n" for name, value in lines.items()), encoding="utf-8")
        run_kong("migrations", "bootstrap", "-c", str(conf), directory=prefix)


@contextmanager
def running_postgres(programs: Path) -> Iterator[Cluster]:
    """Run a server."""
    user = "postgres" if os.geteuid() == 0 else None
    with tempfile.TemporaryDirectory(prefix="km-pg-") as name:
        if user is not None:
            shutil.chown(name, user, user)
        directory, port = Path(name), free_port()
        data = directory / "data"
        flags = ["--username=kong", "--auth=trust", "--no-sync", "--encoding=UTF8"]
        _run(user, programs / "initdb", "--pgdata", data, *flags)
        settings = {"listen_addresses": "127.0.0.1", "port": port, "unix_socket_directories": "", "fsync": "off"}
        command: list[str | Path] = [programs / "postgres", "-D", data]
        command += [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        with (directory / "log").open("wb") as log:
            server = subprocess.Popen(command, user=user, stdout=log, stderr=log, cwd=directory)
        try:
            cluster = Cluster(programs, directory, port, user)
            wait_for(cluster.answers, "PostgreSQL takes connections", (directory / "log").read_text)
            yield cluster
        finally:
            # Ends sessions too, Kong's among them.
            server.send_signal(signal.SIGINT)
            server.wait(_STOP_SECONDS)


def _run(user: str | None, *command: str | Path) -> None:
    subprocess.run(command, user=user, cwd="/", check=True, capture_output=True, timeout=_COMMAND_SECONDS)


def _succeeds(user: str | None, *command: str | Path) -> bool:
    done = subprocess.run(command, user=user, cwd="/", check=False, capture_output=True, timeout=_COMMAND_SECONDS)
    return done.returncode == 0
