"""What the tests of the host's process share."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kong_metering.log import LOGGER
from tests.support.ingest import IngestServer
from tests.support.plugin_server import PluginServerProcess, remove_directory, short_directory

Config = dict[str, Any]


@pytest.fixture
def prefix() -> Iterator[Path]:
    directory = short_directory()
    yield directory
    remove_directory(directory)


@pytest.fixture(autouse=True)
def _log_as_it_was() -> Iterator[None]:
    before = LOGGER.handlers[:], LOGGER.filters[:]
    yield
    LOGGER.handlers[:], LOGGER.filters[:] = before


@pytest.fixture
def launch(prefix: Path) -> Iterator[Callable[..., PluginServerProcess]]:
    """Make plugin servers in the same prefix; none of them outlives the test."""
    made: list[PluginServerProcess] = []

    def make(*flags: str, **options: Any) -> PluginServerProcess:
        made.append(PluginServerProcess(*flags, prefix=prefix, **options))
        return made[-1]

    yield make
    for process in made:
        process.kill()


@pytest.fixture
def ingest() -> Iterator[IngestServer]:
    with IngestServer() as server:
        yield server


def header_config(endpoint: str, **changes: object) -> Config:
    """Give a configuration with the subject in the header x-tenant-id."""
    return {
        "ingest_endpoint": endpoint,
        "api_token": "om_s3cret_token",
        "subject": {"look_up_value_in": "header", "field": "x-tenant-id"},
        "__plugin_id": "878715eb-ff5f-4bc3-b2ce-a52b1cd3b907",
        **changes,
    }


def record(number: int = 0, **request: object) -> str:
    """Give what `kong.log.serialize` says of a request."""
    return json.dumps(
        {
            "request": {"id": f"{number:032x}", "uri": "/anything", "method": "GET", "headers": {}, **request},
            "response": {"status": 200, "size": 700},
            "service": {"name": "echo"},
            "started_at": 1_795_359_962_893,
            "tries": [{"ip": "127.0.0.1"}],
            "upstream_status": "200",
        }
    )


def answers(subject: str | None, number: int = 0) -> dict[str, object]:
    """Give what Kong answers to the PDK calls of a request."""
    return {"kong.request.get_header": subject, "kong.log.serialize": record(number)}
