"""Gathers what a verdict rests on: from the gateway, the collector, the spool and the plugin servers themselves."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import TYPE_CHECKING, Any

import orjson

from kong_metering.eventlog.log import EventLog
from kong_metering.spool.deadletters import DeadLetters, StoredLetter
from kong_metering.spool.directory import survey
from kong_metering_sandbox.gateway.logphases import read_log_phases
from kong_metering_sandbox.status import plugin_status
from kong_metering_soak.traffic import asked, number_of
from kong_metering_soak.verdict import Answered, Event, Evidence, ProcessAccount

if TYPE_CHECKING:
    from pathlib import Path

    from kong_metering_sandbox.collector.records import StoredEvent
    from kong_metering_soak.world import World

DEAD_LETTERS = "dead-letters"

_CAME = ("accepted", "adopted")
_WENT = ("delivered", "dead letters", "dropped", "left", "waiting")
_ENDED = re.compile(r"\] info: ended: process (\d+), (.*)")
_COUNT = r"(\d+)(?: events?)? {name}\b|(?:^|; ){name} [^;]*"


def gather(world: World, issued: int, accounts: list[ProcessAccount]) -> Evidence:
    """Gather it; the gateway has stopped, the collector still runs."""
    stats = world.collector.client.stats()
    return Evidence(
        asked={number: asked(number) for number in range(issued)},
        answered=list(answered(world.log_phases)),
        collected=[_collected(world, event) for event in world.collector.client.events()],
        letters=[_letter(world, letter) for letter in _letters(world)],
        killed=tuple(world.killed),
        accounts=[*accounts, *final_accounts(world.gateway.error_log)],
        duplicates=stats.duplicates,
        conflicts=stats.conflicts,
        waiting=waiting_on_disk(world),
    )


def answered(log_phases: Path) -> Iterator[Answered]:
    """Read which requests' log phases were answered."""
    for phase in read_log_phases(log_phases):
        number = number_of(phase.target)
        if number is not None and phase.answered_at is not None and phase.server_pid is not None:
            yield Answered(number, phase.request_id, phase.answered_at, phase.server_pid, phase.access_pid)


def _collected(world: World, event: StoredEvent) -> Event:
    uri = (event.data or {}).get("request_uri")
    return Event(number_of(uri), event.id, event.subject, world.shop.route_of(event.path, event.token))


def _letters(world: World) -> list[StoredLetter]:
    if not (world.spool / DEAD_LETTERS).is_dir():
        return []
    return list(DeadLetters(world.spool / DEAD_LETTERS).letters())


def _letter(world: World, stored: StoredLetter) -> Event:
    letter = stored.letter
    event = orjson.loads(letter.event)
    route = world.shop.route_of_entity(letter.queue.entity_id, letter.queue.endpoint)
    return Event(number_of(event["data"].get("request_uri")), event["id"], event["subject"], route, letter.reason)


# -- what waits -------------------------------------------------------------------------------------------------------


def waiting(world: World) -> int:
    """Count what waits: in the one plugin server that is left, and on disk where no process holds it."""
    if len(world.gateway.plugin_server_pids()) != 1:
        return 1
    return int(plugin_status(world.gateway)["waiting"]) + waiting_on_disk(world)


def waiting_on_disk(world: World) -> int:
    """Count the events in the spool that no living process holds."""
    if not world.spool.is_dir():
        return 0
    return sum(_waiting_in(found.directory) for found in survey(world.spool) if found.holder is None)


def _waiting_in(directory: Path) -> int:
    try:
        with closing(EventLog.view(directory)) as log:
            return log.waiting
    except FileNotFoundError:
        return 0  # somebody has just adopted it


# -- what the processes say -------------------------------------------------------------------------------------------


def living_account(world: World) -> ProcessAccount:
    """Ask the newest plugin server for its account; what waits is what its queues say, not what the account lacks."""
    status = plugin_status(world.gateway)
    counts = {name: _total(status[name.replace(" ", "_")]) for name in (*_CAME, *_WENT)} | {
        "waiting": _total(status["queues"])
    }
    return _account(world.gateway.plugin_server_pids()[-1], "its status", counts)


def final_accounts(error_log: str) -> list[ProcessAccount]:
    """Read the accounts that processes logged at their end."""
    return [
        _account(int(found[1]), "its last line", {name: _count_in(found[2], name) for name in (*_CAME, *_WENT)})
        for found in _ENDED.finditer(error_log)
    ]


def _account(pid: int, source: str, counts: Mapping[str, int]) -> ProcessAccount:
    return ProcessAccount(
        pid, source, {name: counts[name] for name in _CAME}, {name: counts[name] for name in _WENT if counts[name]}
    )


def _total(value: Any) -> int:
    return sum(value.values()) if isinstance(value, Mapping) else int(value)


def _count_in(text: str, name: str) -> int:
    """Find a count in a sentence: `3 delivered`, `dropped none` or `dropped a 1, b 2`."""
    found = re.search(_COUNT.format(name=name), text)
    return sum(map(int, re.findall(r"\d+", found[0]))) if found else 0
