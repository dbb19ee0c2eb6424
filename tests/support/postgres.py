"""A PostgreSQL of the tests' own, with Debian's or any other server that is installed: for gateways with a database.

Contract: one cluster in a temporary directory, one server on a loopback port until the context ends, not durable.
As root the server runs as the user `postgres`, for it refuses to run as root.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from kong_metering_sandbox.gateways import free_port, wait_for

_DEBIANS = Path("/usr/lib/postgresql")
_STOP_SECONDS = 20
_COMMAND_SECONDS = 120


def find_postgres() -> Path | None:
    """Find the directory with PostgreSQL's programs; None where there is none."""
    newest = sorted(_DEBIANS.glob("*/bin/initdb"), key=lambda path: int(path.parts[-3].split(".")[0]))
    on_path = shutil.which("initdb")
    found = Path(on_path).resolve() if on_path else (newest[-1] if newest else None)
    return found.parent if found and (found.parent / "postgres").exists() else None


@contextmanager
def running_postgres(programs: Path) -> Iterator[Mapping[str, str]]:
    """Run a server with an empty database for Kong; gives the lines of kong.conf that lead to it."""
    user = "postgres" if os.geteuid() == 0 else None
    with tempfile.TemporaryDirectory(prefix="km-pg-") as name:
        if user is not None:
            shutil.chown(name, user, user)
        directory, port = Path(name), free_port()
        cluster = directory / "data"
        flags = ["--username=kong", "--auth=trust", "--no-sync", "--encoding=UTF8"]
        _run(user, programs / "initdb", "--pgdata", cluster, *flags)
        settings = {"listen_addresses": "127.0.0.1", "port": port, "unix_socket_directories": "", "fsync": "off"}
        command: list[str | Path] = [programs / "postgres", "-D", cluster]
        command += [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        with (directory / "log").open("wb") as log:
            server = subprocess.Popen(command, user=user, stdout=log, stderr=log, cwd=directory)
        try:
            place = ["--host=127.0.0.1", f"--port={port}", "--username=kong"]
            wait_for(
                lambda: _succeeds(user, programs / "pg_isready", *place),
                "PostgreSQL takes connections",
                (directory / "log").read_text,
            )
            _run(user, programs / "createdb", *place, "kong")
            yield {"database": "postgres", "pg_host": "127.0.0.1", "pg_port": str(port), "pg_user": "kong"}
        finally:
            # Ends sessions too, Kong's among them.
            server.send_signal(signal.SIGINT)
            server.wait(_STOP_SECONDS)


def _run(user: str | None, *command: str | Path) -> None:
    subprocess.run(command, user=user, cwd="/", check=True, capture_output=True, timeout=_COMMAND_SECONDS)


def _succeeds(user: str | None, *command: str | Path) -> bool:
    done = subprocess.run(command, user=user, cwd="/", check=False, capture_output=True, timeout=_COMMAND_SECONDS)
    return done.returncode == 0
