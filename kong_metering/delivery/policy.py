"""When a batch leaves, when it is tried again, when a breaker opens: values and a clock's reading in, a decision out.

Pure. The rules are those of Kong's queue (`kong/tools/queue.lua`, 3.9.1), where `docs/queue.md` does not say otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import timezone
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from kong_metering.config import Queue
    from kong_metering.delivery.ingest import Failed, Rejected

T = TypeVar("T")

# Kong's own threshold (CAPACITY_WARNING_THRESHOLD).
CAPACITY_WARNING = 0.8
# A batch that failed this often in a row with a 5xx is cut in two, to see whether only one of its events is to blame.
SUSPICIOUS_FAILURES = 5


def due_in(settings: Queue, waiting: int, oldest_age: float) -> float:
    """Tell in how many seconds a batch may leave; `oldest_age` is the seconds that its first event has waited."""
    if waiting >= settings.max_batch_size or settings.concurrency_limit != 1:
        return 0.0
    return max(0.0, settings.max_coalescing_delay - oldest_age)


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

    The endpoint's own word for which ones counts; without it the batch is halved, until the bad one is alone.
    """
    named = {index for index in rejected.indexes if index < len(batch)} if len(batch) > 1 else {0}
    if not named:
        return [], halves(batch)
    bad = [item for index, item in enumerate(batch) if index in named]
    rest = [item for index, item in enumerate(batch) if index not in named]
    return bad, [rest] if rest else []


def halves(batch: Sequence[T]) -> list[list[T]]:
    """Cut a batch in two."""
    middle = len(batch) // 2
    return [list(batch[:middle]), list(batch[middle:])]


def is_suspicious(failed: Failed, failures: int) -> bool:
    """Whether a part that keeps failing should be told apart from others: an event in it may be why."""
    return failed.is_server_error and failures >= SUSPICIOUS_FAILURES


class Breaker:
    """Stops trying for a while after too many failed batches in a row."""

    def __init__(self) -> None:
        self._failures = 0
        self._opened_at: float | None = None

    def sheds(self, settings: Queue, now: float) -> bool:
        """Whether a batch is to be given up without a try; False also for the one probe after the cooldown."""
        if settings.failure_threshold == 0 or self._opened_at is None:
            return False
        return now - self._opened_at < settings.breaker_cooldown

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
