"""What is done about the logs of one queue besides writing and delivering.

Contract: the janitor calls it: it adopts what dead processes left, gives logs to another queue, takes settled ones
away, keeps the bounds. Besides, the syncer asks what is `unsynced`, the verifier has a segment begun, and whoever ends
the process closes. It waits for the disk, with the lock of one log. What is dropped or damaged goes through the queue's
account.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kong_metering.errors import DISK_ERRORS
from kong_metering.plurals import counted, form
from kong_metering.reasons import Dropped

if TYPE_CHECKING:
    from kong_metering.account import QueueAccount
    from kong_metering.backlog.burials import Burials
    from kong_metering.backlog.logsource import LogSource
    from kong_metering.backlog.sourcelist import SourceList
    from kong_metering.eventlog.files import Unsynced
    from kong_metering.spool.directory import HeldLog


class LogChores:
    """What the janitor does about the logs of one queue."""

    def __init__(self, sources: SourceList, burials: Burials, account: QueueAccount) -> None:
        self._sources = sources
        self._burials = burials
        self._account = account

    def adopt(self, log: LogSource) -> bool:
        """Take over a log of another process; False when this queue has ended meanwhile."""
        if not self._sources.add(log, count=self._account.adopt):
            return False
        self._burials.bury_damage(log)
        self._sources.on_ready()
        return True

    def give_up(self) -> list[tuple[HeldLog, int]]:
        """Give the logs away that another queue takes over, each with how many events wait; none after the end."""
        self._burials.end()
        logs = self._sources.take_adopted()
        self._close(logs, in_order=True)
        return [(log.held, log.waiting) for log in logs]

    def take_over(self, log: LogSource, events: int, other: LogChores) -> bool:
        """Take a log of another queue in which so many events wait; False when this queue has ended meanwhile."""
        other._account.move(events, self._account)
        if not self._sources.add(log):
            self.leave(events)
            return False
        self._sources.on_ready()
        return True

    def leave(self, events: int) -> None:
        """Account for events that stay on disk."""
        self._account.leave(events)

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits, so that its log need not be open."""
        own = self._sources.own
        return own is not None and own.is_settled and self._account.waiting == 0

    @property
    def is_own_log_there(self) -> bool:
        """Whether the directory of this process's own log is where it was, if there is one."""
        own = self._sources.own
        return own is None or own.held.directory.is_dir()

    def begin_segment(self) -> None:
        """Have what is settled in this process's own log be kept, though its segment is not full."""
        if (own := self._sources.own) is not None:
            own.begin_segment()

    def take_settled(self) -> list[HeldLog]:
        """Give the logs up in which nothing waits any more, and which nobody appends to."""
        return _closed(self._sources.take_settled())

    def take_all(self) -> list[HeldLog]:
        """Give all logs up, to be closed; the queue has ended."""
        return _closed(self._sources.take_all())

    def close_all(self, *, in_order: bool) -> int:
        """Let no courier touch the logs any more; tell how many events wait in them.

        `in_order`: what waits and was overtaken is written once more, behind the last event; nothing delivered comes
        with it then. The writer has ended.
        """
        logs = self._sources.logs()
        self._close(logs, in_order=in_order)
        return sum(log.waiting for log in logs)

    def _close(self, logs: Sequence[LogSource], *, in_order: bool) -> None:
        for log in logs if in_order else ():
            try:
                log.close_in_order()
            except DISK_ERRORS as error:
                self._account.say_position_is_lost(error)
        _closed(logs)

    def rest_quiet(self) -> None:
        """Let logs that nobody has used since the last call hold no file open."""
        for log in self._sources.logs():
            log.rest_if_quiet()

    def unsynced(self) -> list[Unsynced]:
        """Tell what has to be synced to survive a power cut."""
        return [log.held.log.unsynced() for log in self._sources.logs()]

    def bounded(self) -> list[OpenLog]:
        """Give the logs of this queue, for the bounds of the spool."""
        return [OpenLog(log, self._burials, self._account) for log in self._sources.logs()]


@dataclass(frozen=True)
class OpenLog:
    """One log of a queue, for the bounds of the spool."""

    log: LogSource
    burials: Burials
    account: QueueAccount

    def oldest_ms(self) -> int | None:
        """Tell when the oldest event was accepted, in milliseconds since 1970; None when nothing waits."""
        oldest_ms = self.log.oldest_ms()
        self.burials.bury_damage(self.log)
        return oldest_ms

    def bytes_on_disk(self) -> int:
        """Tell the size of the log."""
        return self.log.bytes_on_disk

    def drop_segment(self) -> None:
        """Drop the oldest segment, for the sake of the disk's space."""
        if dropped := self.log.drop_segment():
            message = (
                f"{counted(dropped, 'event was', 'events were')} dropped, the oldest: the spool is at --spool-max-bytes"
            )
            self.account.drop(Dropped.SPOOL_BYTES_FULL, dropped, message)
        self.burials.bury_damage(self.log)

    def drop_older_than(self, time_ms: int) -> int:
        """Drop the oldest events that were accepted before this time, some of them; tell how many."""
        if dropped := self.log.drop_older_than(time_ms):
            were, they_are = counted(dropped, "event was", "events were"), form(dropped, "it is", "they are")
            message = f"{were} dropped: {they_are} older than --spool-max-age"
            self.account.drop(Dropped.SPOOL_AGE_EXCEEDED, dropped, message)
        self.burials.bury_damage(self.log)
        return dropped


def _closed(logs: Sequence[LogSource]) -> list[HeldLog]:
    for log in logs:
        log.close()
    return [log.held for log in logs]
