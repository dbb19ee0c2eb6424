"""Taking over logs that nobody holds, for as long as a command works on them.

Contract: what killed processes left in shared memory is poured into logs before any is taken over.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from kong_metering.commands.sharedmemory import pouring_for
from kong_metering.spool.delivered import Delivered
from kong_metering.spool.directory import Found, HeldLog, SpoolDirectory, survey

if TYPE_CHECKING:
    from kong_metering.commands.options import Place
    from kong_metering.inbox.pouring import Pouring
    from kong_metering.spool.directory import Adoption
    from kong_metering.spool.identity import QueueIdentity

# A server looks at a free log once a second, and holds it for a moment while it does.
_PATIENCE_SECONDS = 3.0
_PAUSE_SECONDS = 0.1

IsWanted = Callable[["QueueIdentity | None"], bool]


@dataclass
class Holding:
    """The logs that are ours for now, and those that were not to be had."""

    logs: list[HeldLog] = field(default_factory=list)
    # Those that could not be opened, and why.
    refused: dict[Path, str] = field(default_factory=dict)
    # Wanted ones that are not ours: what other processes hold, and what could not be taken though nobody holds it.
    others: list[Found] = field(default_factory=list)


def delivered_in(place: Place) -> Delivered:
    """Return where what was delivered of this spool is kept."""
    return Delivered(place.root, lambda: time.time_ns() // 1_000_000)


@contextlib.contextmanager
def held_logs(
    place: Place, is_wanted: IsWanted, delivered: Delivered | None = None
) -> Iterator[tuple[SpoolDirectory, Holding]]:
    """Hold all wanted logs that no living process holds; afterwards each is free again, or gone if it is empty.

    What is settled in them is kept in `delivered`; None to keep nothing.
    """
    spool = SpoolDirectory(place.root, delivered=delivered)
    try:
        yield spool, _hold(spool, pouring_for(place, delivered), is_wanted)
    finally:
        spool.close()


def _hold(spool: SpoolDirectory, pouring: Pouring | None, is_wanted: IsWanted) -> Holding:
    holding, deadline = Holding(), time.monotonic() + _PATIENCE_SECONDS
    while True:
        _take(holding, _adopted(spool, pouring, is_wanted))
        ours = {held.directory for held in holding.logs}
        holding.others = [log for log in survey(spool.root) if is_wanted(log.identity) and log.directory not in ours]
        free = [log for log in holding.others if log.holder is None and log.directory not in holding.refused]
        if not free or time.monotonic() > deadline:
            return holding
        time.sleep(_PAUSE_SECONDS)


def _adopted(spool: SpoolDirectory, pouring: Pouring | None, is_wanted: IsWanted) -> Adoption:
    if pouring is None:
        return spool.adopt(is_wanted)
    pouring.pour()
    return spool.adopt(is_wanted, pouring.held_back)


def _take(holding: Holding, adoption: Adoption) -> None:
    holding.logs += adoption.logs
    holding.refused |= {refused.directory: refused.reason for refused in adoption.refused}
