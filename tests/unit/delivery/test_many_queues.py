"""Many queues at few descriptors, over real HTTP: all are served, and a kill in the middle loses none of them."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.support.ingest import IngestServer
from tests.support.waiting import wait_until
from tests.unit.delivery.fakes import on_disk
from tests.unit.delivery.many_queues import QUEUES

REPOSITORY = Path(__file__).parents[3]
PATIENCE_SECONDS = 160.0


def started(root: Path, inbox: Path, server: IngestServer, events: int, log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.unit.delivery.many_queues", str(root), str(inbox), server.url, str(events)]
    with log.open("ab") as stderr:
        process = subprocess.Popen(
            command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr
        )
    assert process.stdout
    assert process.stdout.readline() == b"all are put\n"
    return process


def delivered(server: IngestServer) -> Counter[int]:
    return Counter(event["id"] for event in server.events())


@pytest.mark.slow
def test_events_of_2000_queues_are_delivered_at_1024_descriptors_also_after_a_kill(
    root: Path, inbox: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    with IngestServer() as server:
        server.answer_next(*[202] * 300, *[503] * 100_000)
        with started(root, inbox, server, QUEUES, log) as killed:
            wait_until(lambda: len(server.requests()) > 1000, "they are sent", PATIENCE_SECONDS)
            killed.kill()
        first = delivered(server)
        assert len(first) == 300
        server.clear()
        with started(root, inbox, server, 0, log) as following:
            wait_until(lambda: len(first | delivered(server)) == QUEUES, "all are delivered", PATIENCE_SECONDS)
            following.communicate()
        assert following.returncode == 0
        # What was under way when the first one was killed may have come again.
        assert set((first + delivered(server)).values()) <= {1, 2}
    assert on_disk(root) == []
    assert "Too many open files" not in log.read_text()
    assert "error: " not in "".join(line for line in log.read_text().splitlines() if "503" not in line)
