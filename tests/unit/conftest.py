"""What the tests of the modules share."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kong_metering.log import LOGGER, Repeats
from tests.support.loglines import LogLines

if TYPE_CHECKING:
    from tests.support.clock import FakeClock


@pytest.fixture
def log(request: pytest.FixtureRequest, clock: FakeClock) -> Iterator[LogLines]:
    is_steered = "steered" in request.fixturenames
    lines, repeats = LogLines(), Repeats(request.getfixturevalue("steered") if is_steered else clock)
    level = LOGGER.level
    LOGGER.addHandler(lines)
    LOGGER.addFilter(repeats)
    LOGGER.setLevel(logging.DEBUG)
    yield lines
    LOGGER.removeFilter(repeats)
    LOGGER.removeHandler(lines)
    LOGGER.setLevel(level)


@pytest.fixture(autouse=True)
def _files_are_closed(request: pytest.FixtureRequest) -> Iterator[None]:
    """Close what a test has left open of its spools: after hundreds of them that would be a thousand files.

    But for rings: their memory has a descriptor of its own, which it closes by its number when it is collected, whoever
    has that number by then.
    """
    own = request.getfixturevalue("tmp_path") if "tmp_path" in request.fixturenames else None
    yield
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # that of the list itself
            name = str(descriptor.readlink())
            path = Path(name.removesuffix(" (deleted)"))
            is_left = str(path) != name or own in path.parents
            if is_left and (path.suffix == ".seg" or path.name in ("position", "lock")):
                os.close(int(descriptor.name))
