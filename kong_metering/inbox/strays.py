"""Shared memory of this user that belongs to no spool here: of one whose directory was replaced, or of another Kong's.

Contract: `tidy` removes rings that nobody holds and in which no event is left, which nobody needs, whoever they were
made for; what holds events stays, since the servers of that spool may come back. `look` changes nothing, and needs the
right to read only. Neither raises: what cannot be looked at is nobody's business here.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from kong_metering.errors import InboxError, SpoolFormatError
from kong_metering.inbox.place import Place
from kong_metering.inbox.queues import decode_list
from kong_metering.inbox.ring import HEADER_BYTES, read_header, read_unread


class Stray(NamedTuple):
    """A directory in shared memory with events of dead processes that no server here will pour."""

    directory: Path
    events: int


class _Named(Place):
    """A place that is named by its path."""

    def __init__(self, path: Path, uid: int) -> None:
        super().__init__(path.parent, path.parent, uid=uid)
        self._path = path

    @property
    def path(self) -> Path:
        return self._path


def tidy(place: Place) -> list[Stray]:
    """Remove what is empty beside the place of a spool, and tell of what is not."""
    for other in _others(place):
        with contextlib.suppress(InboxError, OSError):
            for ring in other.orphans():
                with contextlib.suppress(SpoolFormatError):
                    if _events_in(ring.read()) == 0:
                        ring.remove()
        with contextlib.suppress(OSError):
            other.path.rmdir()
    return look(place)


def look(place: Place) -> list[Stray]:
    """Tell of what is not empty beside the place of a spool."""
    strays = [Stray(other.path, _waiting_in(other)) for other in _others(place)]
    return [stray for stray in strays if stray.events]


def _others(place: Place) -> Iterator[_Named]:
    with contextlib.suppress(InboxError, OSError):
        own = place.path
        named = re.compile(rf"kong-metering-{place.uid}-[0-9]+-[0-9]+")
        for name in sorted(os.listdir(own.parent)):  # noqa: PTH208 - names are all that is asked for
            if named.fullmatch(name) and name != own.name:
                yield _Named(own.parent / name, place.uid)


def _waiting_in(place: _Named) -> int:
    waiting = 0
    with contextlib.suppress(InboxError, OSError):
        for _, data in place.look():
            with contextlib.suppress(SpoolFormatError):
                waiting += _events_in(data) or 0
    return waiting


def _events_in(data: bytes) -> int | None:
    """Count the events of a ring that are in no log; None where damage leaves that open."""
    header = read_header(data)
    if header is None:
        return None
    poured = decode_list(data[HEADER_BYTES + header.capacity :]).poured
    return max(0, len(read_unread(data, header)) - sum(poured.values()))
