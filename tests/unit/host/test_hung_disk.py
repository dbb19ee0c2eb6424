"""A disk that hangs under a real plugin server: Kong is answered, a stop ends in its time, and nothing is lost."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kong_metering.commands.serversocket import server_status
from kong_metering.config import parse_entity
from kong_metering.inbox.place import Place
from kong_metering.spool.directory import SpoolDirectory
from kong_metering.spool.identity import QueueIdentity
from kong_metering.spool.options import INBOX_DIRECTORY
from kong_metering_sandbox.faulty_server import DiskFault, Faults
from tests.support.plugin_server import ServerProcess, example_settings
from tests.support.rpc import KongClient, KongRequest
from tests.support.waiting import wait_until
from tests.unit.delivery.fakes import letters, on_disk
from tests.unit.host.conftest import answers, header_config

if TYPE_CHECKING:
    from tests.support.ingest import IngestServer

pytestmark = pytest.mark.slow
Serve = Callable[[], ServerProcess]
QUEUES, EACH = 20, 1000
STOP_SECONDS = 1
# Longer than `--dedupe-window`.
LONG_AGO_MS = 3 * 86_400_000


@pytest.fixture
def spool(prefix: Path) -> Path:
    return prefix / "spool"


@pytest.fixture
def faults(prefix: Path) -> Faults:
    return Faults(prefix / "faults")


@pytest.fixture
def serve(prefix: Path, spool: Path, faults: Faults) -> Iterator[Serve]:
    """Start servers whose disk can fail; none of them outlives the test."""
    made: list[ServerProcess] = []
    flags = ("--kong-prefix", str(prefix), "--spool-dir", str(spool), "--stop-timeout", str(STOP_SECONDS))
    path = Path(example_settings(prefix)["pluginserver_metering_socket"])

    def start() -> ServerProcess:
        made.append(ServerProcess(" ".join([*faults.command(spool), *flags]), path))
        return made[-1].start()

    yield start
    for process in made:
        process.kill()


def open_queue(client: KongClient, endpoint: str, number: int = 0) -> int:
    return client.start_instance(header_config(endpoint, __plugin_id=f"plugin-{number}"))


def meter(server: ServerProcess, endpoint: str, requests: range) -> None:
    client = KongClient(server.path)
    instance = open_queue(client, endpoint)
    for number in requests:
        client.run_phases(instance, KongRequest(answers("acme", number)))


def hang_after_ten_events(server: ServerProcess, faults: Faults, ingest: IngestServer) -> None:
    meter(server, ingest.url, range(10))
    ingest.wait_for_events(10)
    faults.set_disk(DiskFault.HANGS)


def end_in_time(server: ServerProcess) -> None:
    """End it, and see that it was not killed for taking too long."""
    assert server.stop() == 0
    assert not [line for line in server.log if "did not end in time" in line]


def test_kong_is_answered_and_the_end_comes_while_the_disk_hangs(
    serve: Serve, faults: Faults, spool: Path, ingest: IngestServer
) -> None:
    server = serve()
    hang_after_ten_events(server, faults, ingest)
    meter(server, ingest.url, range(10, 50))
    end_in_time(server)
    faults.set_disk(None)
    following = serve()
    meter(following, ingest.url, range(50, 60))
    wait_until(lambda: len({event["id"] for event in ingest.events()}) == 60, "all events")
    end_in_time(following)
    assert on_disk(spool) == []


def test_a_disk_that_hangs_is_said_and_the_age_of_what_waits_is_told(
    serve: Serve, faults: Faults, ingest: IngestServer
) -> None:
    """Though all who look after the spool wait for it themselves."""
    server = serve()
    hang_after_ten_events(server, faults, ingest)
    meter(server, ingest.url, range(10, 20))
    wait_until(lambda: any("the disk hangs: a write has taken" in line for line in server.log), "it is said", 20)
    _, told = server_status(server.path, 10)
    details = [queue for one in told["Status"]["servers"] for queue in one["queue_details"]]
    assert [(queue["waiting"], queue["disk"]) for queue in details] == [(10, "hangs")]
    assert details[0]["oldest_seconds"] >= 5
    faults.set_disk(None)
    ingest.wait_for_events(20)
    end_in_time(server)


def test_what_a_killed_server_had_taken_in_outlives_the_removal_of_its_shared_memory(
    serve: Serve, faults: Faults, spool: Path, ingest: IngestServer
) -> None:
    """It waits there alone while the disk hangs."""
    server = serve()
    hang_after_ten_events(server, faults, ingest)
    meter(server, ingest.url, range(10, 50))
    shutil.rmtree(Place(INBOX_DIRECTORY, spool).path)
    wait_until(lambda: any("RemoveIPC=no" in line for line in server.log), "it is said")
    meter(server, ingest.url, range(50, 60))
    os.kill(server.server_pid, signal.SIGKILL)
    wait_until(lambda: sum("serving on " in line for line in server.log) == 2, "the next one serves")
    faults.set_disk(None)
    meter(server, ingest.url, range(60, 70))
    wait_until(lambda: len({event["id"] for event in ingest.events()}) == 70, "all events")
    assert len([line for line in server.log if "RemoveIPC=no" in line]) == 1
    end_in_time(server)


def test_what_a_killed_server_left_with_the_supervisor_is_said_when_that_ends_before_it_could_be_written(
    serve: Serve, faults: Faults, ingest: IngestServer
) -> None:
    faults.set_disk(DiskFault.HANGS)
    server = serve()
    meter(server, ingest.url, range(20))
    killed = server.server_pid
    os.kill(killed, signal.SIGKILL)
    wait_until(lambda: sum("serving on " in line for line in server.log) == 2, "the next one serves")
    end_in_time(server)
    assert "servers that were killed may have left events in this process's memory" in server.log[-1]


def test_kong_is_answered_and_the_end_comes_while_the_disk_hangs_from_the_start(
    serve: Serve, faults: Faults, ingest: IngestServer
) -> None:
    faults.set_disk(DiskFault.HANGS)
    server = serve()
    meter(server, ingest.url, range(50))
    end_in_time(server)
    # There was no place in shared memory yet that the next process would look in.
    assert "50 events accepted" in server.log[-1]
    assert "; dropped process_ended 50; " in server.log[-1]


def leave_in_doubt(spool: Path, endpoint: str) -> set[bytes]:
    """Have events wait that were sent long ago without an answer: each one is to become a dead letter."""
    directory = SpoolDirectory(spool)
    sent_ms = int(time.time() * 1000) - LONG_AGO_MS
    left: set[bytes] = set()
    for queue in range(QUEUES):
        entity = parse_entity(header_config(endpoint, __plugin_id=f"plugin-{queue}"))
        log = directory.log_for(QueueIdentity(entity.id, entity.name, endpoint)).log
        events = [b'{"id": "%d-%d"}' % (queue, number) for number in range(EACH)]
        log.append(events, sent_ms)
        log.mark_ambiguous(1, EACH, sent_ms)
        log.save_position()
        left.update(events)
    directory.close()
    return left


def are_all_pending(client: KongClient) -> bool:
    """Whether nothing keeps the events from being dead letters but the disk."""
    queues = client.status()["Status"]["servers"][0]["queue_details"]
    return len(queues) == QUEUES and all(one["letters_pending"] == EACH for one in queues)


@pytest.mark.parametrize("fault", [DiskFault.HANGS, None], ids=["hangs", "works"])
def test_a_stop_ends_in_its_time_with_twenty_thousand_letters_pending(
    serve: Serve, faults: Faults, spool: Path, ingest: IngestServer, fault: DiskFault | None
) -> None:
    left = leave_in_doubt(spool, ingest.url)
    faults.set_disk(DiskFault.FULL)
    server = serve()
    client = KongClient(server.path)
    instances = [open_queue(client, ingest.url, number) for number in range(QUEUES)]
    wait_until(lambda: are_all_pending(client), "letters that the disk does not take")
    assert letters(spool) == []
    faults.set_disk(fault)
    for number, instance in enumerate(instances):
        client.run_phases(instance, KongRequest(answers("acme", number)))
    end_in_time(server)
    faults.set_disk(None)
    kept = Counter([*(stored.letter.event for stored in letters(spool)), *on_disk(spool)])
    assert left <= set(kept)
    # One whose letter was just written may wait as well: `replay` puts two letters of one event back once.
    assert kept.total() - len(kept) <= QUEUES
