"""Whether an endpoint may have one more courier, and what it waits for if it may not.

Contract: pure, and for one thread at a time; moments (monotonic) come in, and never go back. Couriers `begin` work for
an endpoint and `end` it, and `look` at the clock before they ask. An endpoint *hangs* once work for it has taken longer
than `HANGING_SECONDS`, until a request of it is delivered, or fails sooner than that. Three rules:

- At most `limit` couriers are at work that have been so for less than that, and there may be half as many more for what
  takes longer. Where all endpoints begin to hang in the same moment, which nobody can foresee, those that answer wait
  for a second then, not for a timeout.
- Those at work for endpoints that hang are half of all at most. So an endpoint that answers finds one at once from then
  on. One that takes its time, and delivers, does not stand in line with those that hang.
- An endpoint has at most half of those that others leave of `limit`.

What may not have its turn is to be kept under what it waits for, in order, until `end` names that.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kong_metering.delivery.requestfigures import LastRequest

# Much longer than most requests take, and much shorter than a timeout is by default.
HANGING_SECONDS = 1.0
# What an endpoint that hangs waits for, while others that do have their half; no endpoint has this name.
_HALF_OF_ALL = ""


@dataclass(eq=False, slots=True)
class Work:
    """A courier's work for an endpoint, since when, and whether it counts among what hangs."""

    origin: str
    since: float
    hangs: bool


class Shares:
    """Who has the couriers."""

    def __init__(self, limit: int) -> None:
        """Have `limit` couriers, and half as many more."""
        self._limit = limit
        self.most = limit + limit // 2
        self._most_hanging = max(1, self.most // 2)
        self._at_work: Counter[str] = Counter()
        # What may still turn out to hang, the oldest first.
        self._young: dict[Work, None] = {}
        self._hanging_at_work = 0
        self._hanging: set[str] = set()

    @property
    def at_work(self) -> int:
        """How many are at work."""
        return len(self._young) + self._hanging_at_work

    @property
    def full_until(self) -> float | None:
        """When somebody may begin who may not now, if nobody ends before; None if somebody may."""
        return next(iter(self._young)).since + HANGING_SECONDS if len(self._young) >= self._limit else None

    def look(self, now: float) -> None:
        """Count what has been at work for long among what hangs."""
        while self._young and (work := next(iter(self._young))).since + HANGING_SECONDS <= now:
            del self._young[work]
            work.hangs = True
            self._hanging_at_work += 1
            self._hanging.add(work.origin)

    def awaited(self, origin: str) -> str | None:
        """Name what an endpoint waits for before it may have one more; None if it may have it now."""
        if self._at_work[origin] >= self._share_of(origin):
            return origin
        if origin in self._hanging and self._hanging_at_work >= self._most_hanging:
            return _HALF_OF_ALL
        return None

    def begin(self, origin: str, now: float) -> Work:
        """Begin work for an endpoint."""
        work = Work(origin, now, origin in self._hanging)
        self._at_work[origin] += 1
        if work.hangs:
            self._hanging_at_work += 1
        else:
            self._young[work] = None
        return work

    def end(self, work: Work, answered: LastRequest | None) -> tuple[str, ...]:
        """End it, with the request that came of it, if one did; name what may be asked for once more."""
        self._at_work[work.origin] -= 1
        if not self._at_work[work.origin]:
            del self._at_work[work.origin]
        is_freed = work.hangs
        if work.hangs:
            self._hanging_at_work -= 1
        else:
            del self._young[work]
        if answered and (not answered.problem or answered.seconds <= HANGING_SECONDS):
            is_freed |= work.origin in self._hanging
            self._hanging.discard(work.origin)
        return (work.origin, _HALF_OF_ALL) if is_freed else (work.origin,)

    def forget(self, origin: str) -> None:
        """Know nothing of an endpoint any more."""
        self._hanging.discard(origin)

    def _share_of(self, origin: str) -> int:
        others = self.at_work - self._at_work[origin]
        return max(1, (self._limit - others) // 2)
