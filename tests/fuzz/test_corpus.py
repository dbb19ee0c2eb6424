"""The saved cases of fuzzing: what was found once, and what reaches most of the code that reads from outside."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kong_metering.log import LOGGER
from tests.fuzz.cases import Target, load, saved
from tests.fuzz.targets import TARGETS


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Give the log its level back: the targets silence it, for what they make fail is said, and that is right."""
    level = LOGGER.level
    yield
    LOGGER.setLevel(level)


SAVED = [(target, path) for target in TARGETS for path in saved(target.name)]


@pytest.mark.parametrize(("target", "path"), SAVED, ids=[f"{target.name}/{path.stem}" for target, path in SAVED])
def test_a_saved_case_does_no_harm(target: Target, path: Path) -> None:
    target.check(load(path))


@pytest.mark.parametrize("target", TARGETS, ids=[target.name for target in TARGETS])
def test_each_target_has_saved_cases(target: Target) -> None:
    assert len(list(saved(target.name))) >= 3
