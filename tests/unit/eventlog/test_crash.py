"""A killed writer loses nothing that it was told is safe."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
KILLS = 200
REPOSITORY = Path(__file__).parents[3]


def test_every_event_whose_append_returned_survives_a_kill(tmp_path: Path) -> None:
    seed = random.randrange(1 << 30)  # noqa: S311
    command = [sys.executable, "-m", "tests.unit.eventlog.crash_writer", str(tmp_path), str(KILLS), str(seed)]
    ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=150, check=False)
    assert ended.returncode == 0, f"seed {seed}: {ended.stderr}"
    account = json.loads(ended.stdout)
    assert account["kills"] == KILLS
    assert account["checked"] > KILLS
    assert "missing" not in account
    assert "unreadable" not in account
