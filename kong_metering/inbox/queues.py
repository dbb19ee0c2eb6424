r"""The list behind a ring: whose events are in it, and which of them a log has already. Lines are only ever added.

    \n | checksum of the JSON, CRC32 in 8 hexadecimal digits | space | JSON | \n

A line that is damaged, or that a crash cut short, costs nothing but itself. The JSON is one of

    {"queue": NUMBER, "entity_id": ..., "name": ..., "endpoint": ..., "directory": "proc-1-ab/KEY" or null}
    {"poured": {"NUMBER": how many of the queue's unread events, the first ones, are in logs by now}}

The last word about a queue counts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any
from zlib import crc32

from kong_metering.spool.free import PART
from kong_metering.spool.identity import QueueIdentity

# Anything else would lead out of the spool.
_DIRECTORY = re.compile(re.escape(PART) + r"[0-9A-Za-z-]+/[0-9A-Za-z-]+")


@dataclass(frozen=True)
class ListedQueue:
    """A queue, and where its log is, below the spool's root; None while it has none."""

    identity: QueueIdentity
    directory: str | None


@dataclass
class QueueList:
    """What a list says, by the numbers of the queues."""

    queues: dict[int, ListedQueue] = field(default_factory=dict)
    poured: dict[int, int] = field(default_factory=dict)


def encode_queue(number: int, queue: ListedQueue) -> bytes:
    """Make the line that tells whose events have this number."""
    return _line({"queue": number, **asdict(queue.identity), "directory": queue.directory})


def encode_poured(counts: Mapping[int, int]) -> bytes:
    """Make the line that tells how many of the unread events of each of these queues are in logs."""
    return _line({"poured": counts})


def decode_list(data: bytes) -> QueueList:
    """Read a list, passing over what is damaged."""
    found = QueueList()
    for members in _members(data):
        try:
            _add(found, members)
        except (TypeError, ValueError, KeyError, AttributeError):
            continue
    return found


def _line(members: dict[str, Any]) -> bytes:
    text = json.dumps(members).encode("ascii")
    return b"\n%08x %b\n" % (crc32(text), text)


def _members(data: bytes) -> Iterator[dict[str, Any]]:
    for line in data.split(b"\n"):
        checksum, _, text = line.partition(b" ")
        if text and checksum == b"%08x" % crc32(text):
            yield json.loads(text)


def _add(found: QueueList, members: dict[str, Any]) -> None:
    if "poured" in members:
        found.poured |= {int(number): int(count) for number, count in members["poured"].items()}
        return
    number, directory = int(members.pop("queue")), members.pop("directory")
    if directory is not None and not _DIRECTORY.fullmatch(directory):
        directory = None
    found.queues[number] = ListedQueue(QueueIdentity(**members), directory)
