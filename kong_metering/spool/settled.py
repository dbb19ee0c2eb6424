"""The events of a spool that need not be delivered any more, and those that still need it; seen beside its processes.

Contract: nothing is changed, and no lock is taken. What was settled is read from living logs first and from what is
kept next, so that a segment that is moved meanwhile is seen once, and not twice. What cannot be read is passed over.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import orjson

from kong_metering.errors import DISK_ERRORS, SpoolFormatError
from kong_metering.eventlog.format import StoredEvent, decode_position, segment_first
from kong_metering.eventlog.log import POSITION, EventLog
from kong_metering.spool.deadletters import DEAD_LETTERS, DeadLetters
from kong_metering.spool.delivered import Delivered, is_first_owner, read_segment, undelivered_of
from kong_metering.spool.directory import survey
from kong_metering.spool.identity import QueueIdentity

IsMeant = Callable[[QueueIdentity], bool]
# What a segment is, wherever it lies: a part, a log in it, its first number, and its first event. The names are used
# again: the log of a queue with nothing to do goes, and its next one is called as it was and counts from 1.
_Segment = tuple[str, str, int, bytes]
_READ_EVENTS, _READ_BYTES = 1000, 4 * 1024 * 1024


def settled_queues(root: Path) -> set[QueueIdentity]:
    """Return the queues of which there may be settled events. Raises `SpoolError`, and the system's `OSError`."""
    living = {found.identity for found in survey(root) if found.identity}
    return living | {queue.identity for queue in _kept(root).queues()}


def delivered_events(
    root: Path, is_meant: IsMeant, since_ms: int = 0, on_undelivered: Callable[[bytes], object] | None = None
) -> Iterator[StoredEvent]:
    """Go through the settled events of the queues that are meant, but for those that are noted as not delivered.

    These go to `on_undelivered`. Leaves out segments that were settled as a whole before `since_ms`. Raises
    `SpoolError`, and the system's `OSError`.
    """
    for event, is_delivered in _settled_events(root, is_meant, since_ms):
        if is_delivered:
            yield event
        elif on_undelivered:
            on_undelivered(event.payload)


def _settled_events(root: Path, is_meant: IsMeant, since_ms: int) -> Iterator[tuple[StoredEvent, bool]]:
    """Go through the settled events; tell of each whether it was delivered, as far as is noted."""
    seen: dict[_Segment, int] = {}
    for found in survey(root):
        if found.identity and is_meant(found.identity) and is_first_owner(found.directory, found.identity):
            yield from _settled_in(found.directory, seen)
    for queue in _kept(root).queues():
        if not is_meant(queue.identity):
            continue
        for segment in queue.segments():
            if segment.kept_ms < since_ms:
                continue
            after, undelivered = -1, segment.undelivered()
            for event in _readable(segment.path, segment.first):
                if after < 0:
                    after = seen.get((segment.part, segment.log, segment.first, event.payload), 0)
                if event.sequence > after:
                    yield event, event not in undelivered


def waiting_events(root: Path, is_meant: IsMeant) -> Iterator[StoredEvent]:
    """Go through the events that wait in the logs of the queues that are meant. Raises `SpoolError`."""
    for found in survey(root):
        if found.identity is None or not is_meant(found.identity):
            continue
        with contextlib.suppress(*DISK_ERRORS), contextlib.closing(EventLog.view(found.directory)) as view:
            after = 0
            while events := view.read(after, _READ_EVENTS, _READ_BYTES):
                yield from events
                after = events[-1].sequence


def still_here(root: Path, ids: Collection[str], is_meant: IsMeant) -> set[str]:
    """Return which of these events still wait, or are dead letters. Raises `SpoolError`, and the system's `OSError`.

    One that goes from here to there meanwhile, either way, is at its new place before it is gone from its old one; it
    is found, for dead letters are looked through before the logs and, for what was not found, after them.
    """
    here = _in_letters(root, ids)
    here |= {event_id for event in waiting_events(root, is_meant) if (event_id := id_of(event.payload)) in ids}
    return here | _in_letters(root, left) if (left := set(ids) - here) else here


def _in_letters(root: Path, ids: Collection[str]) -> set[str]:
    letters = DeadLetters(root / DEAD_LETTERS)
    events = (stored.letter.event for stored in letters.letters()) if letters.directory.is_dir() else ()
    return {event_id for event in events if event and (event_id := id_of(event)) in ids}


def id_of(event: bytes) -> str:
    """Return an event's id; empty if it has none."""
    try:
        event_id = orjson.loads(event)["id"]
    except (ValueError, KeyError, TypeError):
        return ""
    return event_id if isinstance(event_id, str) else ""


def _settled_in(log: Path, seen: dict[_Segment, int]) -> Iterator[tuple[StoredEvent, bool]]:
    try:
        position = decode_position((log / POSITION).read_bytes())
        names = sorted(path.name for path in log.iterdir())
    except (OSError, SpoolFormatError):
        return
    done = position[0].done if position else 0
    for name in names:
        first = segment_first(name)
        if first is None or first > done:
            continue
        segment: _Segment | None = None
        undelivered = undelivered_of(log, first)
        for event in _readable(log / name, first):
            if event.sequence > done:
                break
            segment = segment or (log.parent.name, log.name, first, event.payload)
            seen[segment] = event.sequence
            yield event, event not in undelivered


def _readable(path: Path, first: int) -> Iterator[StoredEvent]:
    with contextlib.suppress(OSError, SpoolFormatError):
        yield from read_segment(path, first)


def _kept(root: Path) -> Delivered:
    return Delivered(root, lambda: 0)
