"""When a batch may leave, and how large it is: a configuration and what waits in, a decision out. Pure.

The rules are those of Kong's queue (`kong/tools/queue.lua`, 3.9.1), where `docs/queue.md` does not say otherwise.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from kong_metering.config import Queue

# OpenMeter hands events to Kafka, which by default refuses messages over about 1 MB, for ever.
MAX_EVENT_BYTES = 900 * 1024
MAX_BATCH_BYTES = 64 * 1024 * 1024

# Kong's own threshold (CAPACITY_WARNING_THRESHOLD).
CAPACITY_WARNING = 0.8


def due_in(settings: Queue, waiting: int, waiting_bytes: int, oldest_age: float) -> float:
    """Return in how many seconds a batch may leave; `oldest_age` is the seconds that its first event has waited.

    A queue that is nearly full does not wait: it would drop events, and with them their age, and never send any.
    """
    is_full_batch = waiting >= settings.max_batch_size or settings.concurrency_limit != 1
    if is_full_batch or is_nearly_full(settings, waiting, waiting_bytes):
        return 0.0
    return max(0.0, settings.max_coalescing_delay - oldest_age)


def is_nearly_full(settings: Queue, waiting: int, waiting_bytes: int) -> bool:
    """Return whether the queue has come to where Kong warns."""
    if settings.max_bytes is not None and waiting_bytes >= settings.max_bytes * CAPACITY_WARNING:
        return True
    return waiting >= settings.max_entries * CAPACITY_WARNING


class Thresholds(NamedTuple):
    """From when on an event that is put needs more than to be appended; worked out once for each configuration.

    `largest`: bytes of an event that surely fit. `roomy`: with fewer events waiting there is room. `wakes_at`: with so
    many waiting a batch is due at once.
    """

    largest: int
    roomy: int
    wakes_at: int


def thresholds(settings: Queue) -> Thresholds:
    """Return the thresholds of a configuration."""
    nearly_full = math.ceil(settings.max_entries * CAPACITY_WARNING)
    if settings.max_bytes is not None:
        return Thresholds(min(MAX_EVENT_BYTES, settings.max_bytes), 0, 0)
    return Thresholds(MAX_EVENT_BYTES, nearly_full, min(batch_size(settings), nearly_full))


def batch_size(settings: Queue) -> int:
    """Return how many events leave in one request, at most."""
    return settings.max_batch_size if settings.concurrency_limit == 1 else 1
