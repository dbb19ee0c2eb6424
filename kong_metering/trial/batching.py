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

# How many events leave together where one is configured, while more come; and how far apart such requests begin.
ADAPTIVE_BATCH = 100
ADAPTIVE_SECONDS = 0.05
# Less is no pause: what a clock adds and takes off again may differ by a little.
_SHORTEST_PAUSE = 1e-6


def due_in(  # noqa: PLR0913 - the numbers that the rule is about
    settings: Queue,
    waiting: int,
    waiting_bytes: int,
    oldest_age: float,
    *,
    adaptive_batch: int = 1,
    since_last: float = math.inf,
) -> float:
    """Return in how many seconds a batch may leave; `oldest_age` is the seconds that its first event has waited.

    A queue that is nearly full does not wait: it would drop events, and with them their age, and never send any. With
    adaptive batches what comes after a pause does not wait either; what comes soon after the last request, which was
    begun `since_last` seconds ago, waits for others a moment, and no longer, though others are sent again meanwhile.
    """
    is_full_batch = waiting >= batch_size(settings, adaptive_batch)
    if is_full_batch or is_nearly_full(settings, waiting, waiting_bytes):
        return 0.0
    if is_adaptive(settings, adaptive_batch):
        pause = ADAPTIVE_SECONDS - max(since_last, oldest_age)
        return pause if pause > _SHORTEST_PAUSE else 0.0
    return max(0.0, settings.max_coalescing_delay - oldest_age)


def is_adaptive(settings: Queue, adaptive_batch: int) -> bool:
    """Return whether events that come one soon after the other leave together although one a request is configured."""
    return settings.max_batch_size == 1 and settings.concurrency_limit == 1 and adaptive_batch > 1


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


def thresholds(settings: Queue, adaptive_batch: int = 1) -> Thresholds:
    """Return the thresholds of a configuration."""
    nearly_full = math.ceil(settings.max_entries * CAPACITY_WARNING)
    if settings.max_bytes is not None:
        return Thresholds(min(MAX_EVENT_BYTES, settings.max_bytes), 0, 0)
    return Thresholds(MAX_EVENT_BYTES, nearly_full, min(batch_size(settings, adaptive_batch), nearly_full))


def batch_size(settings: Queue, adaptive_batch: int = 1) -> int:
    """Return how many events leave in one request, at most; `adaptive_batch` is that number where 1 is configured."""
    if settings.concurrency_limit != 1:
        return 1
    return adaptive_batch if is_adaptive(settings, adaptive_batch) else settings.max_batch_size
