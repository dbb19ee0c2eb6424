"""Killed at any moment: nothing that was accepted is lost, and nothing is given another id."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kong_metering.spool.deadletters import DEAD_LETTERS, DeadLetters
from kong_metering.spool.identity import QueueIdentity
from kong_metering.trial.turns import REACH
from tests.support.waiting import wait_until
from tests.unit.commands.helpers import PLUGIN, dead_letters, event, events_of, letter, start, waiting

if TYPE_CHECKING:
    from tests.unit.ingest.ingest_server import Exchange, IngestServer

pytestmark = pytest.mark.slow
KILLS = 8


def kill_at_random(chance: random.Random, root: Path, has_begun: Callable[[int], object], *arguments: object) -> None:
    """Kill a command at some moment after it began to work."""
    with start(root, *arguments) as process:
        wait_until(lambda: has_begun(process.pid) or process.poll() is not None, "it works, or has ended")
        time.sleep(chance.uniform(0, 0.1))
        process.kill()


def _has_more_than(endpoint: IngestServer, count: int, _pid: int) -> bool:
    return len(endpoint.requests) > count


def test_a_killed_replay_loses_nothing(root: Path) -> None:
    chance, everything = random.Random(1), [event(n, data="x" * 2000) for n in range(4000)]  # noqa: S311
    kept, expected = dead_letters(root), set(everything)
    for first in range(0, 4000, 1000):
        kept.add([letter("rejected", body) for body in everything[first : first + 1000]], 1)
    for _ in range(KILLS):
        kill_at_random(chance, root, lambda pid: [*root.glob(f"proc-{pid}-*")], "replay", "--all", "--yes")
        left = {stored.letter.event for stored in kept.letters()}
        assert left | set(events_of(root)) == expected
    with start(root, "replay", "--all", "--yes") as process:
        assert process.wait() == 0
    assert list(kept.letters()) == []
    assert set(events_of(root)) == expected


def test_a_killed_delivery_loses_nothing(root: Path, endpoint: IngestServer, token: Path) -> None:
    chance, queue = random.Random(2), QueueIdentity(PLUGIN, "metering-and-billing", endpoint.url)  # noqa: S311
    expected = [event(n) for n in range(4000)]
    for first in range(0, 4000, 1000):
        waiting(root, expected[first : first + 1000], queue)
    arrived: list[bytes] = []

    def react(exchange: Exchange) -> None:
        events = exchange.server.requests[-1].events
        if any(int(each["id"][:8]) % 501 == 500 for each in events):
            exchange.reply(400, b"bad")
            return
        arrived.extend(json.dumps(each).encode() for each in events)
        time.sleep(0.005)
        exchange.reply(204)

    endpoint.on_request = react
    command = ("deliver", "--plugin-id", PLUGIN, "--token-file", token, "--batch-size", 20)
    for _ in range(KILLS):
        kill_at_random(chance, root, partial(_has_more_than, endpoint, len(endpoint.requests)), *command)
        given_up = {stored.letter.event for stored in DeadLetters(root / DEAD_LETTERS).letters()}
        assert set(arrived) | given_up | set(events_of(root, queue)) == set(expected)
    with start(root, *command) as process:
        assert process.wait() in (0, 1)
    given_up = {stored.letter.event for stored in DeadLetters(root / DEAD_LETTERS).letters()}
    assert events_of(root, queue) == []
    assert set(arrived) | given_up == set(expected)
    assert given_up == {event(n) for n in range(4000) if n % 501 == 500}
    # A kill repeats a batch, and what got through behind an event that was just being found out.
    assert len(arrived) - len(set(arrived)) <= KILLS * (20 + REACH)
