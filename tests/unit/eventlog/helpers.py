"""What the spool's tests share."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import pytest

from kong_metering.eventlog.log import EventLog

if TYPE_CHECKING:
    from kong_metering.eventlog.format import StoredEvent

NOW = 1_700_000_000_000


def payload(number: int) -> bytes:
    """Make an event that can be told from all others, of 20 to 300 bytes, with bytes of every kind."""
    source = random.Random(number)  # noqa: S311
    return b"%d:" % number + source.randbytes(source.randint(18, 290))


def payloads(first: int, count: int) -> list[bytes]:
    return [payload(number) for number in range(first, first + count)]


def read_all(log: EventLog, after: int = 0, batch: int = 7) -> list[StoredEvent]:
    events: list[StoredEvent] = []
    while found := log.read(after, batch, 1 << 30):
        events += found
        after = found[-1].sequence
    return events


def sequences(log: EventLog) -> list[int]:
    return [event.sequence for event in read_all(log)]


def filled(directory: Path, count: int, *, group: int = 5, segment_bytes: int = 2000) -> EventLog:
    """Make a log in which event n is payload(n)."""
    directory.mkdir(exist_ok=True)
    log = EventLog.open(directory, segment_bytes=segment_bytes)
    for first in range(1, count + 1, group):
        log.append(payloads(first, min(group, count + 1 - first)), NOW + first)
    return log


def segments(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.seg"))


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def kept(directory: Path) -> bytes:
    """All bytes that were set aside."""
    names = sorted((directory / "damaged").glob("*"))
    return b"".join(path.read_bytes() for path in names if path.suffix != ".json")


@contextlib.contextmanager
def failing_writes(after_bytes: int = 0, error: int = errno.ENOSPC) -> Iterator[None]:
    """Let the next writes write this many bytes in all, then fail as a full disk does."""
    room = after_bytes
    pwrite = os.pwrite

    def short(descriptor: int, data: bytes, offset: int) -> int:
        nonlocal room
        if room == 0:
            raise OSError(error, os.strerror(error))
        written = pwrite(descriptor, data[:room], offset)
        room -= written
        return written

    with mock.patch.object(os, "pwrite", short):
        yield


@contextlib.contextmanager
def mounted(path: Path, options: str) -> Iterator[Path]:
    """Mount a tmpfs of our own; skip the test where we may not."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("may not mount a tmpfs here; the tests with injected errors cover it")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)  # noqa: S607
