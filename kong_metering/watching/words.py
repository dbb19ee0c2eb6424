"""Figures in words, for the status page and for `kong-metering status` alike. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from kong_metering.plurals import counted, form

if TYPE_CHECKING:
    from kong_metering.watching.view import QueueView, View

_CONDITIONS = {
    "works": "takes events",
    "fails_at_times": "fails at times",
    "nothing_gets_through": "takes nothing",
    "breaker_open": "takes nothing, the circuit breaker is open",
}
_DISKS = {
    "refuses": "the disk refuses events, they wait in memory",
    "hangs": "the disk hangs, events wait in memory",
}
_MINUTE, _HOUR, _DAY = 60, 3600, 86_400


class Told(NamedTuple):
    """A state in words, and whether all is well."""

    words: str
    is_well: bool


def standing(queue: QueueView) -> Told:
    """Return how it stands with a queue's endpoint and disk."""
    said = [_CONDITIONS.get(queue.condition, queue.condition)]
    if queue.next_try_in_seconds:
        said[0] += f", next try in {duration(queue.next_try_in_seconds)}"
    if queue.disk in _DISKS:
        said.append(_DISKS[queue.disk])
    return Told("; ".join(said), queue.condition == "works" and queue.disk not in _DISKS)


def waiting(events: int, for_instances: int) -> str:
    """Write how many events wait in queues, and how many on disk for plugins that Kong has not started."""
    later = (
        f", and {for_instances:,} on disk until Kong starts {form(for_instances, 'its', 'their')} plugin"
        if for_instances
        else ""
    )
    return f"{counted(events, 'event waits', 'events wait')}{later}"


def servers_serve(serving: int, expected: int) -> str:
    """Write how many of the servers serve that there should be."""
    return f"{serving} of {counted(expected, 'server')} {form(serving or expected, 'serves', 'serve')}"


def stalled_threads(view: View) -> list[str]:
    """Return which threads have ended, or have been at one thing for two minutes: events are not delivered then."""
    return [name for name, count in view.stalled.items() if count]


def duration(seconds: float) -> str:
    """Write a time as people say it: its two largest units."""
    whole = int(seconds)
    if whole < _MINUTE:
        return f"{whole} s"
    if whole < _HOUR:
        return f"{whole // _MINUTE} min"
    if whole < _DAY:
        return f"{whole // _HOUR} h {whole % _HOUR // _MINUTE} min"
    return f"{whole // _DAY} d {whole % _DAY // _HOUR} h"


def ago(now: float, moment: float) -> str:
    """Write how long ago a moment was; both are epoch seconds."""
    return f"{duration(max(0.0, now - moment))} ago"
