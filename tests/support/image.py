"""The image of docker/Dockerfile, by hand: what it runs, with its variables, below another directory."""

from __future__ import annotations

import json
import re
from pathlib import Path

from tests.support.plugin_server import BIN, ROOT

IMAGE = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8")


def variables_of_the_image(root: Path | None = None) -> dict[str, str]:
    """Read the variables that the image sets for the program, for paths below a directory if one is given."""
    found = re.findall(r"\b(KONG_METERING_[A-Z_]+)=(\S+)", IMAGE)
    return {name: f"{root or ''}{value}" for name, value in found}


def command_of_the_image(instruction: str) -> list[str]:
    """Read a command that the image runs without a shell."""
    (found,) = re.findall(rf"^{instruction}\b.*?(\[.*\])$", IMAGE, re.MULTILINE)
    command: list[str] = json.loads(found)
    return [str(BIN / command[0]), *command[1:]]


def make_directories(root: Path) -> None:
    """Make those that the image has."""
    for made in ("run/kong-metering", "var/lib/kong-metering/spool"):
        (root / made).mkdir(parents=True)
