"""The logs on disk whose queue is not open in this process: nobody delivers them here, but somebody has to look.

Contract: on the janitor's thread, which borrows them for moments: meanwhile nobody else can take them. What
is dropped of them goes through this process's account as adopted and dropped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kong_metering.log import LOGGER, printable, trouble
from kong_metering.plurals import counted, form
from kong_metering.reasons import Dropped

if TYPE_CHECKING:
    from kong_metering.backlog.logsource import LogSource
    from kong_metering.spool.directory import HeldLog
    from kong_metering.spool.identity import QueueIdentity
    from kong_metering.stats import Stats


class FreeLog:
    """One of them, while it is borrowed."""

    def __init__(self, log: LogSource, stats: Stats) -> None:
        self.held = log.held
        self._log = log
        self._stats = stats

    def oldest_ms(self) -> int | None:
        """Tell when the oldest event was accepted; None when nothing waits."""
        return self._log.oldest_ms()

    def bytes_on_disk(self) -> int:
        """Tell the size of the log."""
        return self._log.bytes_on_disk

    def drop_segment(self) -> None:
        """Drop the oldest segment."""
        self._count(Dropped.SPOOL_BYTES_FULL, self._log.drop_segment())

    def drop_older_than(self, time_ms: int) -> int:
        """Drop the oldest events that were accepted before this time, some of them; tell how many."""
        dropped = self._log.drop_older_than(time_ms)
        self._count(Dropped.SPOOL_AGE_EXCEEDED, dropped)
        return dropped

    def _count(self, reason: Dropped, dropped: int) -> None:
        if dropped:
            name = _name(self.held.identity)
            LOGGER.error(
                "queue %s: %s dropped from disk: %s",
                name,
                counted(dropped, "event, the oldest, was", "events, the oldest, were"),
                reason.value,
                extra=trouble(f"dropped:{reason.value}:{name}"),
            )
            self._stats.adopt(dropped)
            self._stats.drop(reason, dropped)


class FreeLogsReport:
    """Says how much waits for an instance of its plugin: when that changes, and once an hour."""

    def __init__(self) -> None:
        self._said: Counter[str] = Counter()
        self._said_at = 0.0

    @property
    def waiting(self) -> dict[str, int]:
        """How many events there were in them at the last look, by their queue and its endpoint."""
        return dict(self._said)

    def say(self, logs: Sequence[HeldLog], now: float) -> None:
        """Look at the free logs there are now; `now` is monotonic."""
        waiting: Counter[str] = Counter()
        for held in logs:
            waiting[_name(held.identity)] += held.log.waiting
        if waiting == self._said and now - self._said_at < 3600:  # noqa: PLR2004 - an hour
            return
        self._said, self._said_at = waiting, now
        for name, events in waiting.items():
            them = form(events, "it", "them")
            LOGGER.warning(
                "queue %s: %s on disk until an instance of the plugin starts in a process that uses this spool (Kong "
                "starts one with its first request); `kong-metering spool` shows %s, delivers or exports %s",
                name,
                counted(events, "event waits", "events wait"),
                them,
                them,
                extra=trouble(f"free:{name}"),
            )


def _name(identity: QueueIdentity | None) -> str:
    return "(unknown)" if identity is None else printable(f"{identity.name} for {identity.endpoint}")
