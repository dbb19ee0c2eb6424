"""What the tests of the modules share."""

from __future__ import annotations

import logging
from collections.abc import Iterator
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
