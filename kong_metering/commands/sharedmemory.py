"""What killed processes left in shared memory and nobody has written to disk yet: put into logs, or counted.

Contract: a command that changes the spool pours before it looks for logs; one that looks only counts, and changes
nothing.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING

from kong_metering.commands import words
from kong_metering.commands.access import owner_of
from kong_metering.commands.output import note
from kong_metering.errors import InboxError
from kong_metering.inbox import place as rings
from kong_metering.inbox.pouring import Pouring
from kong_metering.inbox.strays import look
from kong_metering.inbox.unpoured import count_unpoured
from kong_metering.plurals import form

if TYPE_CHECKING:
    from kong_metering.commands.filters import Filters
    from kong_metering.commands.options import Place
    from kong_metering.inbox.pouring import Unpoured
    from kong_metering.inbox.strays import Stray
    from kong_metering.spool.delivered import Delivered
    from kong_metering.spool.identity import QueueIdentity


def pouring_for(place: Place, delivered: Delivered | None = None) -> Pouring | None:
    """Return what pours into this spool, and keeps in `delivered` what was; None where there is no shared memory."""
    if place.inbox_dir is None:
        return None
    shared_memory = [rings.Place(place.inbox_dir, place.root)]
    return Pouring(shared_memory, place.root, lambda: time.time_ns() // 1_000_000, delivered)


def pour(place: Place, delivered: Delivered | None = None) -> list[Unpoured]:
    """Put into logs what killed processes had not written yet; tell and return what could not be."""
    pouring = pouring_for(place, delivered)
    unpoured = pouring.pour().unpoured if pouring else []
    for each in unpoured:
        note(f"Events of a killed process stay in {each.path}: {words.shown(each.reason)}.")
    return unpoured


def unwritten(place: Place, filters: Filters) -> Counter[QueueIdentity | None]:
    """Count by queue the events that killed processes had not written yet."""
    if place.inbox_dir is None:
        return Counter()
    try:
        counts = count_unpoured(rings.Place(place.inbox_dir, place.root, uid=owner_of(place.root)), place.root)
    except InboxError as error:
        note(f"Shared memory cannot be looked at: {words.shown(str(error))}.")
        return Counter()
    return Counter({queue: count for queue, count in counts.items() if filters.match_queue(queue)})


def strays(place: Place) -> list[Stray]:
    """Find what is in shared memory of servers of other spools that do not run."""
    if place.inbox_dir is None:
        return []
    return look(rings.Place(place.inbox_dir, place.root, uid=owner_of(place.root)))


def tell_unwritten(place: Place, filters: Filters, done: str) -> None:
    """Tell of events that a command could not reach because they are not on disk; `done` is what was not done."""
    if count := unwritten(place, filters).total():
        note(
            f"{words.events(count)} not {done}: killed processes had not written {form(count, 'it', 'them')} to disk. "
            "The next server does, or `kong-metering spool deliver`."
        )
