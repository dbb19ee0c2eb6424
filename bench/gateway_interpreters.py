"""The same plugin server on several versions of Python, side by side."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from gateway_candidates import Candidate, ours
from processes import BENCH
from terminal import say_progress

from kong_metering_sandbox.gateways import GatewayError

_VERSIONS = range(10, 15)
_INSTALL_SECONDS = 600


def find_interpreters() -> list[Path]:
    """Find a Python of each version that the package supports: those of pyenv, and those on the PATH."""
    found = []
    for minor in _VERSIONS:
        of_pyenv = sorted(Path.home().glob(f".pyenv/versions/3.{minor}.*/bin/python3.{minor}"), key=_release)
        on_path = shutil.which(f"python3.{minor}")
        if of_pyenv:
            found.append(of_pyenv[-1])
        elif on_path:
            found.append(Path(on_path))
    return found


def missing_versions(interpreters: Sequence[Path]) -> list[str]:
    """List the versions that the package supports and that are not among these."""
    there = {_version_of(interpreter).rpartition(".")[0] for interpreter in interpreters}
    return [f"3.{minor}" for minor in _VERSIONS if f"3.{minor}" not in there]


def candidates(interpreters: Sequence[Path], directory: Path) -> list[Candidate]:
    """Install this checkout for each of them, in a virtual environment of its own, and make a candidate of each."""
    return [_candidate(interpreter, directory) for interpreter in interpreters]


def _candidate(interpreter: Path, directory: Path) -> Candidate:
    version = _version_of(interpreter)
    environment = directory / f"python-{version}"
    say_progress(f"installing for Python {version}")
    _run(str(interpreter), "-m", "venv", str(environment))
    pip = [str(environment / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _run(*pip, str(BENCH.parent))
    return ours("protobuf", interpreter=version, bin_directory=environment / "bin")


def _version_of(interpreter: Path) -> str:
    return _run(str(interpreter), "-c", "import platform; print(platform.python_version())").strip()


def _release(interpreter: Path) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", interpreter.parents[1].name)]


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=_INSTALL_SECONDS, check=False)
    if done.returncode != 0:
        raise GatewayError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
    return done.stdout
