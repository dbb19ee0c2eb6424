"""What lies in the rings of dead processes and is in no log yet, for people to look at; nothing is changed.

Contract: needs the right to read only. Whatever cannot be read is not counted, as events that are just being poured.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from kong_metering.errors import SpoolFormatError
from kong_metering.inbox.queues import decode_list
from kong_metering.inbox.remains import parts_of, sorted_out
from kong_metering.inbox.ring import HEADER_BYTES, read_header, read_unread

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kong_metering.inbox.place import Place
    from kong_metering.inbox.remains import Remains
    from kong_metering.spool.identity import QueueIdentity


def count_unpoured(place: Place, root: Path) -> Counter[QueueIdentity | None]:
    """Count the events by their owners; None is one that is not known any more. Raises `InboxError`."""
    counts: Counter[QueueIdentity | None] = Counter()
    for stem, data in place.look():
        with contextlib.suppress(SpoolFormatError):
            for remains in _remains_of(data):
                _leave_out_known(remains, root, stem)
                counts[remains.identity] += len(remains.events)
    return +counts


def _remains_of(data: bytes) -> list[Remains]:
    header = read_header(data)
    if header is None:
        return []
    listed = decode_list(data[HEADER_BYTES + header.capacity :])
    return sorted_out(listed, read_unread(data, header), _note_nothing)


def _leave_out_known(remains: Remains, root: Path, stem: str) -> None:
    """Leave out what stands in the logs that it would be poured into."""
    if remains.home:
        _leave_out_of(root / remains.home, remains)
    for part in parts_of(stem):
        if not (root / part).is_dir():
            return
        _leave_out_of(root / part / remains.key, remains)


def _leave_out_of(directory: Path, remains: Remains) -> None:
    with contextlib.suppress(OSError, SpoolFormatError):
        remains.leave_out_known(directory)


def _note_nothing(counts: Mapping[int, int]) -> None:
    """Leave the ring as it is."""
