"""What make says and does where Python is too old."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.plugin_server import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")]


def make(directory: Path, python: str | Path) -> subprocess.CompletedProcess[str]:
    command = ["make", "-f", str(ROOT / "Makefile"), ".venv/bin/python", f"PYTHON={python}"]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=120, check=False)


def test_a_python_that_is_too_old_is_said_and_its_environment_is_made_anew(tmp_path: Path) -> None:
    old = tmp_path / "python3.9"
    code = "import sys; sys.version_info = (3, 9, 18); exec(sys.argv[1])"
    old.write_text(f"#!/bin/sh\nexec {sys.executable} -c '{code}' \"$2\"\n")
    old.chmod(0o755)
    said = f"Python 3.10 or later is needed, and {old} is 3.9: type, for example, make "
    assert make(tmp_path, old).stderr.startswith(f"{said}.venv/bin/python PYTHON=python3.12\n")
    assert not (tmp_path / ".venv").exists()
    environment = tmp_path / ".venv/bin"
    environment.mkdir(parents=True)
    shutil.copy(old, environment / "python")
    assert make(tmp_path, sys.executable).returncode == 0
    assert (environment / "python").is_symlink()
    assert "up to date" in make(tmp_path, old).stdout
