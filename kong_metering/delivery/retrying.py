"""When to try again after a failure, and when to stop trying for a while: numbers in, a decision out. Pure."""

from __future__ import annotations

import math
from datetime import timezone
from email.utils import parsedate_to_datetime
from typing import Protocol


class RetryRules(Protocol):
    """The settings that decide it; all times in seconds."""

    @property
    def initial_retry_delay(self) -> float:
        """The first pause."""
        ...

    @property
    def max_retry_delay(self) -> float:
        """The longest pause."""
        ...

    @property
    def max_retry_time(self) -> float:
        """How long a failing batch is tried."""
        ...

    @property
    def failure_threshold(self) -> int:
        """After how many failed batches in a row the breaker opens; 0 means never."""
        ...

    @property
    def breaker_cooldown(self) -> float:
        """How long the open breaker waits before a probe."""
        ...


def retry_delay(rules: RetryRules, failures: int, retry_after: float | None) -> float:
    """Return the pause in seconds after the `failures`-th failure in a row (the first is 1).

    It doubles from `initial_retry_delay` up to `max_retry_delay`. What the endpoint asks for with Retry-After can make
    it longer, up to `max_retry_delay`, never shorter.
    """
    doublings = min(failures - 1, 64)
    backoff = min(rules.max_retry_delay, rules.initial_retry_delay * 2.0**doublings)
    return max(backoff, min(retry_after or 0.0, rules.max_retry_delay))


def gives_up(rules: RetryRules, trying_for: float) -> bool:
    """Return whether a batch that just failed, `trying_for` seconds after it was first sent, has had its time."""
    return trying_for > rules.max_retry_time


def parse_retry_after(value: str | None, now: float) -> float | None:
    """Return a Retry-After header, in seconds or as a date, as seconds from `now` (wall clock); nonsense is None."""
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


class Breaker:
    """Stops trying for a while after too many failed batches in a row."""

    def __init__(self) -> None:
        self._failures = 0
        self._opened_at: float | None = None

    @property
    def is_open(self) -> bool:
        """True if too many batches in a row have failed; a batch that is sent now is a probe, tried once."""
        return self._opened_at is not None

    def probe_at(self, rules: RetryRules) -> float:
        """Return when the next try may be made (monotonic); it was at any time while the breaker is closed."""
        return -math.inf if self._opened_at is None else self._opened_at + rules.breaker_cooldown

    def probe(self, now: float) -> None:
        """Note that a probe is sent, so that the next one waits for another cooldown."""
        if self._opened_at is not None:
            self._opened_at = now

    def end_cooldown(self) -> None:
        """Have the next probe at once."""
        if self._opened_at is not None:
            self._opened_at = -math.inf

    def failed(self, rules: RetryRules, now: float) -> bool:
        """Count a batch that had its time; True when this one opened the breaker."""
        self._failures += 1
        if rules.failure_threshold == 0 or self._failures < rules.failure_threshold:
            return False
        opened = self._opened_at is None
        self._opened_at = now
        return opened

    def succeeded(self) -> bool:
        """Count a delivered batch; True when it closed the breaker."""
        closed = self._opened_at is not None
        self._failures, self._opened_at = 0, None
        return closed
