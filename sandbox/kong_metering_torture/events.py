"""The events of the torture test: what one is follows from who put it, into which queue, and its number.

A process that is to be killed tells what it put in a file of its own, a record for each event whose `put` returned:
what was written there outlives it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import orjson

_TOLD = struct.Struct("<IId")
# One in so many is refused by the endpoint, that with this remainder.
_BAD = (25, 7)


@dataclass(frozen=True)
class QueuePlan:
    """A queue of each process: its settings, and which share of the events it gets, of all queues' shares."""

    settings: dict[str, Any]
    share: int
    has_order: bool = True


_PAUSES = {"initial_retry_delay": 0.01, "max_retry_delay": 0.3}
QUEUES = (
    QueuePlan({"max_batch_size": 100, "max_coalescing_delay": 0.1, **_PAUSES}, 16),
    QueuePlan({"max_batch_size": 10, "max_coalescing_delay": 0.02, **_PAUSES}, 3),
    QueuePlan({"max_batch_size": 1, "concurrency_limit": -1, **_PAUSES}, 1, has_order=False),
)


class Name(NamedTuple):
    """Who put an event, into which queue, and its number: counted over all queues of that process."""

    process: str
    queue: int
    number: int

    @property
    def id(self) -> str:
        """The id of the event."""
        return f"{self.process}.{self.queue}.{self.number}"

    @property
    def is_bad(self) -> bool:
        """Whether the endpoint refuses the event for itself."""
        return self.number % _BAD[0] == _BAD[1]

    @classmethod
    def of(cls, event_id: str) -> Name:
        """Read it from an id. Raises `ValueError`."""
        process, queue, number = event_id.split(".")
        return cls(process, int(queue), int(number))


def event_of(name: Name) -> bytes:
    """Make the event with this name."""
    data = {"number": name.number, "filling": f"{name.number:x}" * (name.number % 40)}
    return orjson.dumps(
        {
            "specversion": "1.0",
            "id": name.id,
            "source": "torture",
            "type": "request",
            "subject": f"queue-{name.queue}",
            "data": data,
        }
    )


def digest(event: bytes) -> bytes:
    """Return what tells the content of an event from another one."""
    return blake2b(event, digest_size=8).digest()


class Put(NamedTuple):
    """An event whose `put` had returned at this time (monotonic clock)."""

    name: Name
    at: float


def told_line(queue: int, number: int, at: float) -> bytes:
    """Write the record of an event whose `put` has returned."""
    return _TOLD.pack(queue, number, at)


def read_told(path: Path) -> Iterator[Put]:
    """Read what the process told that the file is named after."""
    data = path.read_bytes() if path.exists() else b""
    for queue, number, at in _TOLD.iter_unpack(data[: len(data) // _TOLD.size * _TOLD.size]):
        yield Put(Name(path.name, queue, number), at)
