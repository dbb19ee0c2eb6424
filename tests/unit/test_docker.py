"""The files in docker/: what tools say of them, and that the image's own settings make a server that is well.

There is no engine here: the image's entry point and probe are run by hand, with its variables, below another directory.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from kong_metering import information
from tests.support.image import command_of_the_image, make_directories, variables_of_the_image
from tests.support.plugin_server import BIN, ROOT, ServerProcess, remove_directory, short_directory

DOCKER = ROOT / "docker"
_SECONDS = 60


def tool(name: str) -> str:
    """Give the path of a tool, which may be installed beside the tests or on the PATH; skip without it."""
    path = shutil.which(name, path=str(BIN)) or shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def compose() -> list[str]:
    """Give the command that is compose; skip without it."""
    for command in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(command[0]) is None:
            continue
        if subprocess.run([*command, "version"], capture_output=True, timeout=_SECONDS, check=False).returncode == 0:
            return command
    pytest.skip("neither `docker compose` nor docker-compose is installed")


@pytest.mark.parametrize("name", sorted(path.name for path in DOCKER.glob("*Dockerfile")))
def test_a_dockerfile_has_no_fault_that_hadolint_knows(name: str) -> None:
    command = [tool("hadolint"), "--no-color", "--failure-threshold", "warning", str(DOCKER / name)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_compose_file_is_one() -> None:
    command = [*compose(), "--file", str(DOCKER / "compose.yaml"), "config"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    assert done.returncode == 0, done.stderr
    assert "KONG_PLUGINSERVER_METERING_QUERY_CMD: cat /run/kong-metering/dump.json" in done.stdout


# The image, by hand


@pytest.fixture
def root() -> Iterator[Path]:
    """Have a directory that stands for the image's root, with the directories that the image makes."""
    directory = short_directory()
    make_directories(directory)
    yield directory
    remove_directory(directory)


def test_the_images_variables_are_flags_of_the_program() -> None:
    help_text = subprocess.run(
        [str(BIN / "kong-metering-plugin-server"), "--help"],
        capture_output=True,
        text=True,
        timeout=_SECONDS,
        check=True,
    ).stdout
    assert set(variables_of_the_image()) <= set(re.findall(r"KONG_METERING_[A-Z_]+", help_text))


def test_the_image_serves_is_well_and_writes_what_kong_reads(root: Path) -> None:
    """Without a shell, as the entry point and the probe are run."""
    environment = variables_of_the_image(root)
    entry_point = shlex.join(command_of_the_image("ENTRYPOINT"))
    with ServerProcess(entry_point, Path(environment["KONG_METERING_SOCKET"]), environment=environment) as server:
        assert server.complaints() == []
        dump = root / "run/kong-metering/dump.json"
        assert json.loads(dump.read_text("utf-8")) == json.loads(json.dumps(information.dump("protobuf")))
        probe = subprocess.run(
            command_of_the_image("HEALTHCHECK"),
            env=environment,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
        assert (probe.returncode, probe.stdout[:3]) == (0, "ok:")
    assert sorted(path.name for path in (root / "run/kong-metering").iterdir()) == ["dump.json", "kong-metering.sock"]


def test_kong_finds_in_compose_what_the_image_makes() -> None:
    text = (DOCKER / "compose.yaml").read_text(encoding="utf-8")
    image = variables_of_the_image()
    assert f"KONG_PLUGINSERVER_METERING_SOCKET: {image['KONG_METERING_SOCKET']}\n" in text
    assert f"KONG_PLUGINSERVER_METERING_QUERY_CMD: cat {image['KONG_METERING_DUMP_FILE']}\n" in text
