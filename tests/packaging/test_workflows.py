"""The workflows, by actionlint where it is installed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


def test_actionlint_has_nothing_to_say() -> None:
    program = shutil.which("actionlint")
    if program is None:
        pytest.skip("there is no `actionlint` on the PATH")
    files = sorted((REPOSITORY / ".github" / "workflows").glob("*.yml"))
    done = subprocess.run([program, *files], cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")
