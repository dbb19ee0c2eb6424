"""A disk that hangs when a process begins or ends: it serves, and it ends, and nothing is lost or sent twice for it."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import pytest

from kong_metering.clock import SystemClock
from kong_metering.config import Entity, PluginConfig
from kong_metering.delivery.couriers import Couriers
from kong_metering.delivery.registry import Delivery
from kong_metering.ingest.client import IngestClient
from kong_metering.ingest.connections import Connections
from kong_metering.spool.options import SpoolOptions
from kong_metering.stats import Stats
from kong_metering.upkeep import lodging
from kong_metering.upkeep.spooler import Spooler
from tests.support.waiting import wait_until
from tests.unit.delivery.fakes import on_disk
from tests.unit.ingest.ingest_server import IngestServer, answer

if TYPE_CHECKING:
    from tests.support.loglines import LogLines

ONE = Entity("11111111-one", "one")
pytestmark = pytest.mark.usefixtures("log")


class Hanging:
    """Writes, and directories to be made, that do not come to an end while it hangs; other threads look on."""

    def __init__(self) -> None:
        self._goes_on = threading.Event()
        self._goes_on.set()
        self.is_waited_for = threading.Event()
        self._pwrite, self._mkdir = os.pwrite, Path.mkdir

    def hang(self) -> None:
        self._goes_on.clear()

    def go_on(self) -> None:
        self._goes_on.set()

    def _wait(self) -> None:
        if not self._goes_on.is_set():
            self.is_waited_for.set()
            self._goes_on.wait(60)

    def pwrite(self, descriptor: int, data: bytes, offset: int) -> int:
        self._wait()
        return self._pwrite(descriptor, data, offset)

    def mkdir(self, path: Path, mode: int = 0o777) -> None:
        self._wait()
        self._mkdir(path, mode)


@pytest.fixture
def disk() -> Iterator[Hanging]:
    disk = Hanging()

    def mkdir(path: Path, mode: int = 0o777) -> None:
        disk.mkdir(path, mode)

    with mock.patch.object(os, "pwrite", disk.pwrite), mock.patch.object(Path, "mkdir", mkdir):
        yield disk
        disk.go_on()
        # Whatever still waits for it has to be gone before the disk is a real one again.
        wait_until(lambda: not any(each.name.startswith("metering") for each in threading.enumerate()), "threads end")


def delivery(root: Path, inbox: Path) -> Delivery:
    clock, stats = SystemClock(), Stats()
    connections = Connections(clock, functools.partial(IngestClient, clock=clock))
    options = SpoolOptions(root, inbox_directory=inbox)
    spooler = Spooler(options, clock=clock, stats=stats, connections=connections, janitor_round_seconds=0.02)
    spooler.start()
    couriers = Couriers(clock, idle_seconds=0.1)
    return Delivery(clock=clock, stats=stats, couriers=couriers, connections=connections, spooler=spooler)


def config(server: IngestServer) -> PluginConfig:
    queue = {"max_retry_delay": 0.02, "max_retry_time": 3600}
    return PluginConfig.model_validate({"ingest_endpoint": server.url, "api_token": "token-1", "queue": queue})


def delivered(server: IngestServer) -> list[int]:
    bodies = b",".join(request.body.strip(b"[]") for request in server.requests)
    return sorted({int(number) for number in bodies.split(b",")}) if bodies else []


def test_the_end_comes_though_the_disk_hangs_and_the_next_process_has_all(
    root: Path, inbox: Path, server: IngestServer, disk: Hanging, log: LogLines
) -> None:
    server.on_request = answer(503)
    first = delivery(root, inbox)
    queue = first.open(ONE, config(server))
    for number in range(100):
        queue.put(b"%d" % number)
    wait_until(lambda: len(on_disk(root)) == 100, "they are on disk")
    disk.hang()
    assert disk.is_waited_for.wait(20)
    for number in range(100, 200):
        queue.put(b"%d" % number)
    first.close(0.1, 0.5)
    assert log.with_text("the disk hangs: what was not written down of the end is left to the next process")
    disk.go_on()
    wait_until(lambda: not any(each.name == "metering end" for each in threading.enumerate()), "it lets go")
    server.on_request = answer(204)
    del server.requests[:]
    following = delivery(root, inbox)
    following.open(ONE, config(server))
    wait_until(lambda: delivered(server) == list(range(200)), "all are delivered")
    following.close(20)
    assert on_disk(root) == []


def test_a_process_that_begins_on_a_disk_that_hangs_takes_events_and_delivers_them_when_it_goes_on(
    root: Path, inbox: Path, server: IngestServer, disk: Hanging, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lodging, "_OPENING_SECONDS", 0.05)
    disk.hang()
    process = delivery(root, inbox)
    queue = process.open(ONE, config(server))
    for number in range(100):
        queue.put(b"%d" % number)
    assert disk.is_waited_for.wait(20)
    assert queue.waiting == 100
    disk.go_on()
    wait_until(lambda: delivered(server) == list(range(100)), "all are delivered")
    process.close(20)
    assert on_disk(root) == []
