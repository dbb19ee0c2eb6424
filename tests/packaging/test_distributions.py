"""Wheel and sdist, as PyPI would have them: installed into an empty environment, and started there."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import msgpack
import pytest

import kong_metering
from tests.support.plugin_server import remove_directory, short_directory
from tests.support.waiting import wait_until

# Installs from a package index.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

REPOSITORY = Path(__file__).parents[2]
_PATIENCE = 60.0


def run(*command: str | Path, directory: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a program in a directory that has nothing of ours, without settings from this environment."""
    kept = ("HOME", "PATH", "LANG", "TMPDIR")
    environment = {name: os.environ[name] for name in os.environ if name in kept or name.startswith(("PIP_", "SSL_"))}
    done = subprocess.run(  # noqa: PLW1510 - the status is looked at below
        command, cwd=directory, env=environment, capture_output=True, text=True, timeout=600
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a directory for environments; skips where pip cannot get what it has to install."""
    directory = tmp_path_factory.mktemp("p")
    asked = run(
        *(sys.executable, "-m", "pip", "download", "--no-deps", "--dest", directory / "probe", "hatchling"),
        directory=directory,
        check=False,
    )
    if asked.returncode != 0:
        pytest.skip("pip cannot reach a package index")
    return directory


@pytest.fixture(scope="module")
def distributions(empty: Path) -> dict[str, Path]:
    """Build the sdist, and the wheel out of the sdist, as `python -m build` does."""
    builder = environment(empty / "builder")
    run(builder / "pip", "install", "--quiet", "hatchling", directory=empty)
    source = empty / "source"
    ignored = shutil.ignore_patterns(".git", ".venv", "__pycache__", "*.egg-info", ".*_cache", ".hypothesis")
    shutil.copytree(REPOSITORY, source, ignore=ignored)
    run(builder / "python", "-m", "hatchling", "build", "-t", "sdist", "-d", empty / "dist", directory=source)
    (sdist,) = (empty / "dist").glob("*.tar.gz")
    run(builder / "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", empty / "dist", sdist, directory=empty)
    (wheel,) = (empty / "dist").glob("*.whl")
    return {"sdist": sdist, "wheel": wheel}


def environment(directory: Path) -> Path:
    """Make an environment with pip alone in it, and give the directory of its programs."""
    venv.create(directory, with_pip=True)
    return directory / "bin"


def test_the_wheel_holds_the_product_alone(distributions: dict[str, Path]) -> None:
    names = zipfile.ZipFile(distributions["wheel"]).namelist()
    assert {name.split("/")[0] for name in names} == {
        "kong_metering",
        f"kong_metering-{kong_metering.__version__}.dist-info",
    }
    assert "kong_metering/py.typed" in names


def test_the_sdist_has_examples_and_documentation(distributions: dict[str, Path]) -> None:
    with tarfile.open(distributions["sdist"]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"README.md", "LICENSE", "CHANGELOG.md", "docs/enabling.md", "examples/deck/kong.yaml"} <= names
    assert not [name for name in names if name.startswith(("tests", "sandbox", "bench", "docker"))]


@pytest.fixture(scope="module")
def programs(empty: Path, distributions: dict[str, Path]) -> Path:
    """Install the wheel with what it depends on, and give the directory of its programs."""
    found = environment(empty / "user")
    run(found / "pip", "install", "--quiet", distributions["wheel"], directory=empty)
    return found


def test_what_is_installed_fits_together(programs: Path, empty: Path) -> None:
    run(programs / "pip", "check", directory=empty)
    assert kong_metering.__version__ in run(programs / "kong-metering", "--version", directory=empty).stdout
    assert run(programs / "kong-metering", "schema", "--format", "lua", directory=empty).stdout.startswith("--")


@pytest.fixture
def prefix() -> Iterator[Path]:
    directory = short_directory()
    yield directory
    remove_directory(directory)


def test_the_installed_server_serves(programs: Path, prefix: Path) -> None:
    command: list[str | Path] = [programs / "kong-metering-plugin-server", "--kong-prefix", prefix]
    with (prefix / "log").open("wb") as log:
        server = subprocess.Popen(command, cwd=prefix, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={})
    try:
        served = wait_until(lambda: asked(prefix / "metering-and-billing.sock"), "the server answers", _PATIENCE)
        assert served["Plugins"]["metering-and-billing"]["Status"]["accepted"] == 0
    finally:
        server.terminate()
        assert server.wait(_PATIENCE) == 0, (prefix / "log").read_text()


def asked(path: Path) -> dict[str, dict[str, dict[str, dict[str, int]]]] | None:
    """Ask the server for its status; None while nobody answers."""
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(str(path))
        except OSError:
            return None
        connection.settimeout(_PATIENCE)
        connection.sendall(msgpack.packb([0, 1, "plugin.GetStatus", [None]]))
        unpacker = msgpack.Unpacker()
        while data := connection.recv(65536):
            unpacker.feed(data)
            for answer in unpacker:
                found: dict[str, dict[str, dict[str, dict[str, int]]]] = answer[3]
                return found
    return None
