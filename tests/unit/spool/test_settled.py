"""What of a spool still waits, or is a dead letter, seen while events move between the two."""

from __future__ import annotations

from pathlib import Path

import pytest

from kong_metering.spool.deadletters import DEAD_LETTERS, DeadLetter, DeadLetters
from kong_metering.spool.directory import SpoolDirectory
from kong_metering.spool.identity import QueueIdentity
from kong_metering.spool.settled import still_here

QUEUE = QueueIdentity("11111111-one", "metering", "https://ingest.test/events")
EVENT = b'{"id":"moving"}'
IDS = {"moving", "elsewhere"}


@pytest.fixture
def letters(tmp_path: Path) -> DeadLetters:
    return DeadLetters(tmp_path / DEAD_LETTERS)


def buried(letters: DeadLetters) -> None:
    letters.add([DeadLetter("rejected", "no subject", QUEUE, 1000, EVENT)], 1000)


def test_an_event_is_found_that_becomes_a_dead_letter_meanwhile(tmp_path: Path, letters: DeadLetters) -> None:
    held = SpoolDirectory(tmp_path).log_for(QUEUE)
    held.log.append([EVENT], 1000)

    def bury(queue: QueueIdentity) -> bool:
        """Asked after the dead letters were looked through, and before the logs are."""
        buried(letters)
        held.log.done(1)
        held.log.save_position()
        return queue == QUEUE

    assert still_here(tmp_path, IDS, bury) == {"moving"}


def test_an_event_is_found_that_is_replayed_meanwhile(tmp_path: Path, letters: DeadLetters) -> None:
    held = SpoolDirectory(tmp_path).log_for(QUEUE)
    buried(letters)

    def replay(queue: QueueIdentity) -> bool:
        held.log.append([EVENT], 1000)
        letters.remove([stored.id for stored in letters.letters()])
        return queue == QUEUE

    assert still_here(tmp_path, IDS, replay) == {"moving"}


def test_an_event_that_waits_or_is_a_dead_letter_is_found_and_no_other(tmp_path: Path, letters: DeadLetters) -> None:
    assert still_here(tmp_path, IDS, lambda _: True) == set()
    SpoolDirectory(tmp_path).log_for(QUEUE).log.append([b'{"id":"waits"}', b"no id", b'{"id":"other"}'], 1000)
    buried(letters)
    assert still_here(tmp_path, {"waits", "moving", "elsewhere"}, lambda _: True) == {"waits", "moving"}
    assert still_here(tmp_path, {"waits", "moving"}, lambda _: False) == {"moving"}
