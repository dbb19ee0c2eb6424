"""What a killed server had taken in and not written yet: put into logs by commands that change the spool, else told."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING
from zlib import crc32

import pytest

from kong_metering.spool.directory import survey
from kong_metering.spool.identity import QueueIdentity
from tests.unit.commands.helpers import (
    OTHER,
    PLUGIN,
    QUEUE,
    event,
    events_of,
    killed_before_it_wrote,
    run,
    run_json,
    shared_memory,
    waiting,
)

if TYPE_CHECKING:
    from tests.unit.ingest.ingest_server import IngestServer


def rings(root: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(shared_memory(root).glob("*/*.ring"))]


def test_status_counts_what_is_in_no_log_and_changes_nothing(root: Path) -> None:
    killed_before_it_wrote(root, 10, written=4)
    before = rings(root)
    status = run_json(root, "status")
    assert (status["waiting"], status["unwritten"]) == (4, 6)
    assert (status["queues"][0]["waiting"], status["queues"][0]["unwritten"]) == (4, 6)
    text = run(root, "status", width=200).stdout
    assert "6 events that a killed process had not written to disk" in text
    assert "In all: 4 events waiting, 6 events in memory, 0 dead letters." in text
    assert rings(root) == before
    assert len(survey(root)) == 1


def test_a_queue_that_is_in_shared_memory_alone_is_shown(root: Path) -> None:
    killed_before_it_wrote(root, 3)
    (queue,) = run_json(root, "status")["queues"]
    assert (queue["plugin_id"], queue["waiting"], queue["unwritten"], queue["logs"]) == (PLUGIN, 0, 3, [])


@pytest.mark.parametrize(("command", "done"), [("list", "listed"), ("export", "exported")])
def test_list_and_export_tell_what_they_leave_out(root: Path, command: str, done: str) -> None:
    killed_before_it_wrote(root, 10, written=4)
    assert f"6 events not {done}: killed processes had not written them to disk." in run(root, command).stderr
    assert "killed" not in run(root, command, "--plugin-id", OTHER.entity_id).stderr
    assert "killed" not in run(root, command, "--dead-letters").stderr
    assert len(rings(root)) == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_a_look_needs_no_right_to_write(root: Path) -> None:
    killed_before_it_wrote(root, 3)
    for path in shared_memory(root).rglob("*"):
        os.chown(path, 65534, 65534)
        path.chmod(0o500 if path.is_dir() else 0o400)
    (place,) = shared_memory(root).iterdir()
    place.chmod(0o700)
    place.rename(place.with_name(place.name.replace("kong-metering-0-", "kong-metering-65534-")))
    for path in (root, *root.rglob("*")):
        os.chown(path, 65534, 65534)
    assert run_json(root, "status")["unwritten"] == 3


def test_a_place_that_is_somebody_elses_is_told(root: Path) -> None:
    killed_before_it_wrote(root, 3)
    (place,) = shared_memory(root).iterdir()
    place.chmod(0o777)
    result = run(root, "status", width=300)
    assert (result.exit_code, "Shared memory cannot be looked at: " in result.stderr) == (0, True)


def test_delivery_by_hand_sends_it_behind_what_the_log_has(root: Path, endpoint: IngestServer, token: Path) -> None:
    queue = QueueIdentity(PLUGIN, "metering-and-billing", endpoint.url)
    killed_before_it_wrote(root, 10, written=4, queue=queue)
    result = run(root, "deliver", "--plugin-id", PLUGIN, "--token-file", token)
    assert (result.exit_code, result.stdout) == (0, "10 events delivered.\n")
    assert [each["id"][:8] for request in endpoint.requests for each in request.events] == [
        f"{n:08d}" for n in range(10)
    ]
    assert (rings(root), survey(root)) == ([], [])


def test_delivery_by_hand_finds_a_plugin_that_is_in_shared_memory_alone(
    root: Path, endpoint: IngestServer, token: Path
) -> None:
    killed_before_it_wrote(root, 3, queue=QueueIdentity(PLUGIN, "metering-and-billing", endpoint.url))
    assert run(root, "deliver", "--plugin-id", PLUGIN, "--token-file", token).stdout == "3 events delivered.\n"


def test_none_leaves_shared_memory_alone(root: Path, endpoint: IngestServer, token: Path) -> None:
    queue = QueueIdentity(PLUGIN, "metering-and-billing", endpoint.url)
    killed_before_it_wrote(root, 3, queue=queue)
    waiting(root, [event(7)], queue)
    result = run(root, "deliver", "--plugin-id", PLUGIN, "--token-file", token, "--inbox-dir", "none")
    assert result.stdout == "1 event delivered.\n"
    assert run_json(root, "status", "--inbox-dir", "none")["unwritten"] == 0
    assert run_json(root, "status")["unwritten"] == 3


def test_purge_removes_it_with_the_rest(root: Path) -> None:
    killed_before_it_wrote(root, 10, written=4)
    result = run(root, "purge", "--waiting", "--plugin-id", PLUGIN, "--yes")
    assert (result.exit_code, result.stdout) == (0, "10 waiting events removed.\n")
    assert (rings(root), events_of(root, QUEUE)) == ([], [])


def test_what_cannot_be_poured_is_told_and_stays(root: Path) -> None:
    killed_before_it_wrote(root, 3)
    (ring,) = shared_memory(root).glob("*/*.ring")
    data = bytearray(ring.read_bytes())
    # Of a format that comes later, with a good checksum.
    data[8:12] = (9).to_bytes(4, "little")
    data[12:16] = crc32(data[:12]).to_bytes(4, "little")
    ring.write_bytes(data)
    result = run(root, "purge", "--waiting", "--plugin-id", PLUGIN, "--yes", width=300)
    assert result.exit_code == 1
    assert f"Events of a killed process stay in {ring}: format version 9" in result.stderr
    assert ring.exists()
