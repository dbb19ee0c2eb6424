"""When a batch leaves, when it is tried again, when a breaker opens: values and a clock's reading in, a decision out.

Pure. The rules are those of Kong's queue (`kong/tools/queue.lua`, 3.9.1), where `docs/queue.md` does not say otherwise.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from datetime import timezone
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, NamedTuple, TypeVar

if TYPE_CHECKING:
    from kong_metering.config import Queue
    from kong_metering.delivery.outcome import Failed, Rejected

T = TypeVar("T")

# OpenMeter hands events to Kafka, which by default refuses messages over about 1 MB, for ever.
MAX_EVENT_BYTES = 900 * 1024

# Kong's own threshold (CAPACITY_WARNING_THRESHOLD).
CAPACITY_WARNING = 0.8
# What failed this often in a row with a 5xx is suspicious: one of its events may be why. Parts of a suspicious batch,
# and what overtakes a suspicious event, are so after fewer failures.
SUSPICIOUS_FAILURES = 6
SUSPICIOUS_FAILURES_AMONG_OTHERS = 2
# An event is to blame once it was so suspicious this often, with others delivered each time in between. By then it was
# tried at least as often as Kong tries a batch with default settings (14 times): an endpoint that fails now and then
# does not cost good events.
SUSPICIONS_TO_BLAME = 3
# How many suspicious events others may overtake at a time.
MAX_SUSPECTS = 4


def due_in(settings: Queue, waiting: int, waiting_bytes: int, oldest_age: float) -> float:
    """Tell in how many seconds a batch may leave; `oldest_age` is the seconds that its first event has waited.

    A queue that is nearly full does not wait: it would drop events, and with them their age, and never send any.
    """
    is_full_batch = waiting >= settings.max_batch_size or settings.concurrency_limit != 1
    if is_full_batch or is_nearly_full(settings, waiting, waiting_bytes):
        return 0.0
    return max(0.0, settings.max_coalescing_delay - oldest_age)


def is_nearly_full(settings: Queue, waiting: int, waiting_bytes: int) -> bool:
    """Whether the queue has come to where Kong warns."""
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
    """Work out the thresholds of a configuration."""
    nearly_full = math.ceil(settings.max_entries * CAPACITY_WARNING)
    if settings.max_bytes is not None:
        return Thresholds(min(MAX_EVENT_BYTES, settings.max_bytes), 0, 0)
    return Thresholds(MAX_EVENT_BYTES, nearly_full, min(batch_size(settings), nearly_full))


def batch_size(settings: Queue) -> int:
    """Tell how many events leave in one request, at most."""
    return settings.max_batch_size if settings.concurrency_limit == 1 else 1


def retry_delay(settings: Queue, failures: int, retry_after: float | None) -> float:
    """Tell the pause in seconds after the `failures`-th failure in a row (the first is 1).

    It doubles from `initial_retry_delay` up to `max_retry_delay`. What the endpoint asks for with Retry-After can make
    it longer, up to `max_retry_delay`, never shorter.
    """
    doublings = min(failures - 1, 64)
    backoff = min(settings.max_retry_delay, settings.initial_retry_delay * 2.0**doublings)
    return max(backoff, min(retry_after or 0.0, settings.max_retry_delay))


def gives_up(settings: Queue, trying_for: float) -> bool:
    """Whether a batch that just failed, `trying_for` seconds after it was first sent, is not sent again."""
    return trying_for > settings.max_retry_time


def parse_retry_after(value: str | None, now: float) -> float | None:
    """Read a Retry-After header, in seconds or as a date, into seconds from `now` (wall clock); nonsense is None."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            moment = parsedate_to_datetime(value)
        except (ValueError, TypeError, OverflowError):
            return None
        seconds = (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp() - now
    return max(0.0, seconds) if math.isfinite(seconds) else None


def isolate(batch: Sequence[T], rejected: Rejected) -> tuple[list[T], list[list[T]]]:
    """Find the bad ones in a batch that was refused: those to drop, and the parts of the rest to send again.

    The endpoint's own word for which ones counts; without it the batch is cut up, until the bad one is alone.
    """
    named = {index for index in rejected.indexes if index < len(batch)} if len(batch) > 1 else {0}
    if not named:
        return [], cut_up(batch)
    bad = [item for index, item in enumerate(batch) if index in named]
    rest = [item for index, item in enumerate(batch) if index not in named]
    return bad, [rest] if rest else []


def cut_up(batch: Sequence[T]) -> list[list[T]]:
    """Cut a batch of two or more in three, or in two where it is small.

    Finding one bad event among n by thirds takes 3·log3(n) requests, fewer than the 2·log2(n) that halves take.
    """
    pieces = 2 if len(batch) in (2, 4) else 3
    size, larger = divmod(len(batch), pieces)
    starts = [number * size + min(number, larger) for number in range(pieces + 1)]
    return [list(batch[start:end]) for start, end in itertools.pairwise(starts)]


def is_suspicious(failed: Failed, failures: int, *, among_others: bool) -> bool:
    """Whether what failed so often should be told apart from others: an event in it may be why."""
    limit = SUSPICIOUS_FAILURES_AMONG_OTHERS if among_others else SUSPICIOUS_FAILURES
    return failed.is_server_error and failures >= limit


class Breaker:
    """Stops trying for a while after too many failed batches in a row."""

    def __init__(self) -> None:
        self._failures = 0
        self._opened_at: float | None = None

    def sheds(self, settings: Queue, now: float) -> bool:
        """Whether a batch is to be given up without a try; after the cooldown one batch is not, the probe."""
        if self._opened_at is None:
            return False
        sheds = now - self._opened_at < settings.breaker_cooldown
        if not sheds:
            self._opened_at = now
        return sheds

    def pause(self, settings: Queue, now: float) -> float:
        """Tell the seconds until the next probe may be sent."""
        return 0.0 if self._opened_at is None else max(0.0, self._opened_at + settings.breaker_cooldown - now)

    @property
    def is_open(self) -> bool:
        """Whether too many batches in a row have failed; a batch that is sent now is a probe, tried once."""
        return self._opened_at is not None

    def failed(self, settings: Queue, now: float) -> bool:
        """Count a batch that was given up; True when this one opened the breaker."""
        self._failures += 1
        if settings.failure_threshold == 0 or self._failures < settings.failure_threshold:
            return False
        opened = self._opened_at is None
        self._opened_at = now
        return opened

    def succeeded(self) -> bool:
        """Count a delivered batch; True when it closed the breaker."""
        closed = self._opened_at is not None
        self._failures, self._opened_at = 0, None
        return closed
