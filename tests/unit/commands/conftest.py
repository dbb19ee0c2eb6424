"""What the tests of the commands share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.plugin_server import remove_directory, short_directory
from tests.unit.ingest.ingest_server import IngestServer, running


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Give the directory of a spool that is not there yet."""
    return tmp_path / "metering-spool"


@pytest.fixture
def prefix() -> Iterator[Path]:
    """Give a directory in which a path is short enough for a socket."""
    directory = short_directory()
    yield directory
    remove_directory(directory)


@pytest.fixture
def endpoint() -> Iterator[IngestServer]:
    with running(IngestServer()) as server:
        yield server


@pytest.fixture
def token(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text("s3cr3t-t0ken\n")
    return path
