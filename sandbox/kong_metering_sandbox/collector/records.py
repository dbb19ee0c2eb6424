"""What the collector tells about itself: one record for each row of its JSON answers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StoredEvent:
    """One unique event, as it arrived first.

    ``seq`` counts from 1 in order of arrival. ``attributes`` holds what has no field of its own here, such as
    ``specversion``. ``received_at`` is in seconds since the epoch. ``token`` is a short hash of the bearer token.
    """

    seq: int
    id: str
    source: str
    type: str
    subject: str
    time: str | None
    data: dict[str, object] | None
    attributes: dict[str, object]
    received_at: float
    token: str | None
    path: str


@dataclass(frozen=True)
class Customer:
    """Who pays for the usage of some subjects."""

    id: str
    key: str
    name: str
    subjects: list[str]


@dataclass(frozen=True)
class IngestRequest:
    """One request to an ingest path.

    ``events`` is None when the body was not read or is not JSON. ``status`` is None when the connection ended
    without an answer. ``connection`` is the same text for all requests of one TCP connection.
    """

    received_at: float
    path: str
    content_type: str | None
    events: int | None
    status: int | None
    connection: str | None


@dataclass(frozen=True)
class Stats:
    """Totals since the last reset: ``events == unique + duplicates + conflicts``.

    ``events`` counts every event of every stored batch, ``duplicates`` those that repeat a stored event,
    ``conflicts`` those that have the source and id of a stored event but other content. ``requests`` counts
    by status, with ``"none"`` for no answer; ``by_type`` counts unique events.
    """

    requests: dict[str, int]
    events: int
    unique: int
    duplicates: int
    conflicts: int
    by_type: dict[str, int]


@dataclass(frozen=True)
class Usage:
    """What one subject used: the number of events of a type, and the sum of their ``data.tokens``."""

    subject: str
    type: str
    count: int
    tokens: int
