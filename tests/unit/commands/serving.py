"""A real plugin server with events of its plugin, for the commands that ask it for something."""

from __future__ import annotations

import itertools
import json
import subprocess
from typing import TYPE_CHECKING, Any

from kong_metering.eventlog.log import EventLog
from kong_metering.spool.directory import survey
from kong_metering.spool.identity import QueueIdentity
from tests.support.rpc import KongClient, KongRequest
from tests.support.waiting import wait_until
from tests.unit.commands.helpers import PLUGIN, PROGRAM, REPOSITORY

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from tests.support.plugin_server import PluginServerProcess
    from tests.unit.ingest.ingest_server import IngestServer

QUEUE = {"max_batch_size": 10, "max_coalescing_delay": 0.05, "initial_retry_delay": 0.05, "max_retry_delay": 0.2}


class Gateway:
    """Kong's part: instances of one plugin entity, and requests that are numbered through."""

    def __init__(self, process: PluginServerProcess, socket_name: str) -> None:
        self.process = process
        self._client = KongClient(process.prefix / socket_name)
        self._numbers = itertools.count(1)
        self._sequences = itertools.count(1)
        self._instance = 0

    @property
    def root(self) -> Path:
        return self.process.prefix / "metering-spool"

    def configure(self, endpoint: str, **queue: Any) -> None:
        """Have Kong send to this URL from now on; it closes the instance of before."""
        config = {
            "ingest_endpoint": endpoint,
            "api_token": "t0ken",
            "subject": {"look_up_value_in": "header", "field": "x-tenant-id"},
            "queue": QUEUE | queue,
            "timeout": 120_000,
            "__plugin_id": PLUGIN,
            "__seq__": next(self._sequences),
        }
        before, self._instance = self._instance, self._client.start_instance(config)
        if before:
            self._client.close_instance(before)

    def request(self, count: int) -> list[str]:
        """Have requests answered; give the ids of their events."""
        return [self._request(next(self._numbers)) for _ in range(count)]

    def _request(self, number: int) -> str:
        record = {
            "request": {"id": f"{number:032x}", "uri": "/orders", "method": "GET", "headers": {}},
            "response": {"status": 200, "size": 7},
            "service": {"name": "echo"},
            "started_at": 1_795_359_962_893,
            "tries": [{"ip": "127.0.0.1"}],
        }
        answers = {"kong.request.get_header": "acme", "kong.log.serialize": json.dumps(record)}
        self._client.run_phases(self._instance, KongRequest(answers))
        return f"{number:032x}:api_request"

    def status(self) -> dict[str, Any]:
        return dict(self._client.status()["Status"])

    def identity(self, endpoint: str) -> QueueIdentity:
        return QueueIdentity(PLUGIN, "metering-and-billing", endpoint)

    def waiting(self, endpoint: str) -> list[str]:
        """Give the ids of all events that wait on disk for an endpoint."""
        return waiting_ids(self.root, endpoint)

    def command(self, *arguments: object, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        return command(self.root, *arguments, stdin=stdin)


def command(root: Path, *arguments: object, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command as a process of its own."""
    name, *rest = map(str, arguments)
    return subprocess.run(
        [*PROGRAM, "spool", name, "--spool-dir", str(root), *rest],
        cwd=REPOSITORY,
        input=stdin or "",
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def waiting_ids(root: Path, endpoint: str) -> list[str]:
    found: list[str] = []
    for log in survey(root):
        if log.identity is not None and log.identity.endpoint == endpoint:
            try:
                view = EventLog.view(log.directory)
            except FileNotFoundError:
                continue
            found += [json.loads(stored.payload)["id"] for stored in view.read(0, 1_000_000, 1 << 40)]
            view.close()
    return found


def received(server: IngestServer) -> list[str]:
    """Give the ids of all events that were posted, whatever the answer."""
    return [each["id"] for request in list(server.requests) for each in request.events]


def wait_for(server: IngestServer, ids: Iterable[str]) -> None:
    """Wait until all of these were posted."""
    wanted = set(ids)
    wait_until(lambda: wanted <= set(received(server)), f"{len(wanted)} events at the endpoint")
