"""A killed process loses nothing that it took, and neither does one that is killed while it pours that into logs."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

KILLS = 50
REPOSITORY = Path(__file__).parents[3]


def account_of(mode: str, directory: Path) -> dict[str, int]:
    seed = random.randrange(1 << 30)  # noqa: S311
    command = [sys.executable, "-m", "tests.unit.inbox.killer", mode, str(directory), str(KILLS), str(seed)]
    ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=150, check=False)
    assert ended.returncode == 0, f"seed {seed}: {ended.stderr}"
    account: dict[str, int] = json.loads(ended.stdout)
    return account


def test_every_event_whose_append_returned_is_in_the_ring_of_a_killed_process(tmp_path: Path) -> None:
    account = account_of("ring", tmp_path)
    assert account["kills"] == KILLS
    assert account["checked"] > KILLS


def test_every_event_is_in_a_log_once_whoever_is_killed_when(tmp_path: Path) -> None:
    account = account_of("pour", tmp_path)
    assert account["kills"] >= KILLS
    assert account["poured"] > KILLS
    assert account["checked"] > account["poured"]
