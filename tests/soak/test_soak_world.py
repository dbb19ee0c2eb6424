"""The soak's faults on a machine that is slow: who was killed, and that the next one is there afterwards."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kong_metering_soak.schedule import Kind, Planned
from kong_metering_soak.world import Settings, World
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from kong_metering_soak.verdict import Killed


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with World(tmp_path, Settings(seconds=60, rate=10, has_spool=True)) as world:
        yield world


def signalled_when_none_is_found(find: Callable[[], list[int]], stopped: int) -> Callable[[], list[int]]:
    """Have a stopped process go on once somebody has looked for plugin servers and found none."""

    def look() -> list[int]:
        found = find()
        if not found:
            os.kill(stopped, signal.SIGCONT)
        return found

    return look


def test_a_kill_waits_for_a_supervisor_that_has_not_started_the_next_server_yet(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    (supervisor,) = world.gateway.supervisor_pids()
    (first,) = world.gateway.plugin_server_pids()
    os.kill(supervisor, signal.SIGSTOP)
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: world.gateway.plugin_server_pids() == [], "there is no plugin server")
    look = signalled_when_none_is_found(world.gateway.plugin_server_pids, supervisor)
    monkeypatch.setattr(world.gateway, "plugin_server_pids", look)
    happened = world.befall(Planned(Kind.KILL, start=0, seconds=0, seed=1))
    killed: Killed = world.killed[0]
    assert killed.pid != first
    assert happened.begun < killed.at < happened.ended
    assert happened.detail == f"process {killed.pid}"
    assert [*Path("/proc").glob(f"{killed.pid}")] == []
    (following,) = world.gateway.plugin_server_pids()
    assert following not in (first, killed.pid)


def test_the_next_plugin_server_is_there_after_each_kill(world: World) -> None:
    for number in range(3):
        before = world.gateway.plugin_server_pids()
        world.befall(Planned(Kind.KILL, start=0, seconds=0, seed=number))
        assert [kill.pid for kill in world.killed[number:]] == before
        (following,) = world.gateway.plugin_server_pids()
        assert following not in before
