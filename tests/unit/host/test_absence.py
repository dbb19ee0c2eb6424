"""A Kong that does not come: said once, a minute after the start, in the server's own log only."""

from __future__ import annotations

import logging
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from kong_metering.host.absence import ABSENCE_SECONDS, Absence
from kong_metering.log import LOGGER, Relay
from tests.support.clock import FakeClock
from tests.support.kongs import kong_in
from tests.support.plugin_server import short_directory

STRANGER = 54_321
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be several users")


@pytest.fixture
def path() -> Iterator[Path]:
    directory = short_directory()
    directory.chmod(0o755)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(directory / "plugin.sock"))
        (directory / "plugin.sock").chmod(0o600)
        yield directory / "plugin.sock"
    shutil.rmtree(directory)


@pytest.fixture
def relay() -> Iterator[Relay]:
    relay = Relay()
    LOGGER.addHandler(relay)
    yield relay
    LOGGER.removeHandler(relay)


def said(caplog: pytest.LogCaptureFixture) -> list[tuple[int, str]]:
    return [(record.levelno, record.getMessage()) for record in caplog.records]


def test_a_kong_that_has_not_come_for_a_minute_is_missed_once(
    path: Path, relay: Relay, caplog: pytest.LogCaptureFixture
) -> None:
    clock = FakeClock()
    absence = Absence(path, clock)
    clock.advance(ABSENCE_SECONDS - 1)
    absence.look(lambda: False)
    assert said(caplog) == []
    for _ in range(3):
        clock.advance(1)
        absence.look(lambda: False)
    ((level, words),) = said(caplog)
    assert level >= logging.WARNING
    assert words.startswith("Kong has not come")
    assert not relay.holds_any, "once Kong could say it, it is not true any more"


def test_a_kong_that_has_come_is_not_missed(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    clock = FakeClock()
    absence = Absence(path, clock)
    clock.advance(ABSENCE_SECONDS)
    absence.look(lambda: True)
    clock.advance(ABSENCE_SECONDS)
    absence.look(lambda: False)
    assert said(caplog) == []


@needs_root
def test_workers_that_cannot_connect_are_named(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    clock = FakeClock()
    absence = Absence(path, clock)
    clock.advance(ABSENCE_SECONDS)
    with kong_in(path.parent, path, user=STRANGER):
        absence.look(lambda: False)
    ((level, words),) = said(caplog)
    assert level == logging.ERROR
    assert f"(prefix {path.parent}) run as user {STRANGER}, and cannot connect to {path}" in words
