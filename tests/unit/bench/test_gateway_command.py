"""The command says what is missing, and how to get it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from .conftest import BENCH

CANNOT_RUN = 2


def run(*arguments: str, path: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": path}
    command = [sys.executable, str(BENCH / "gateway.py"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)


def program(directory: Path, name: str) -> None:
    (directory / name).write_text("#!/bin/sh\nexit 0\n")
    (directory / name).chmod(0o755)


def test_the_stand_in_is_not_measured(tmp_path: Path) -> None:
    done = run("--gateway", "standin", path=str(tmp_path))
    assert done.returncode == CANNOT_RUN
    assert "make bench GATEWAY=kong" in done.stdout


def test_says_how_to_get_kong_onto_the_path(tmp_path: Path) -> None:
    done = run(path=str(tmp_path))
    assert done.returncode == CANNOT_RUN
    assert "there is no `kong` on the PATH" in done.stdout


def test_says_how_to_get_wrk(tmp_path: Path) -> None:
    program(tmp_path, "kong")
    done = run(path=str(tmp_path))
    assert done.returncode == CANNOT_RUN
    assert "apt-get install wrk" in done.stdout


def test_names_the_candidates_when_one_is_unknown(tmp_path: Path) -> None:
    program(tmp_path, "kong")
    program(tmp_path, "wrk")
    done = run("--only", "ours-protobuf-100", "perl", path=str(tmp_path))
    assert done.returncode == CANNOT_RUN
    said = " ".join(done.stdout.split())
    assert "there is no candidate perl; there are nothing, key-auth" in said
    assert "go, floor, ours-protobuf-100" in said


def test_says_how_to_get_go_for_a_candidate_that_is_built_with_it(tmp_path: Path) -> None:
    program(tmp_path, "kong")
    program(tmp_path, "wrk")
    done = run("--only", "floor", "nothing", path=str(tmp_path))
    assert done.returncode == CANNOT_RUN
    assert "there is no `go` on the PATH" in " ".join(done.stdout.split())
