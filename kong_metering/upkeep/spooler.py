"""The spool of this process: the inbox, who looks after what is on disk, and each queue's place there.

Contract: `backlog` may be called by the thread that answers Kong, and waits for no disk; nor does `release`. `flush`,
`end` and `close` are for the end of the process, in this order, with the queues' own ends in between.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from kong_metering.backlog.burials import LetterBox
from kong_metering.backlog.spooled import Shared, SpooledBacklog
from kong_metering.clock import EpochClock
from kong_metering.delivery.couriers import STALLED_SECONDS
from kong_metering.errors import StartupError
from kong_metering.inbox.place import Place
from kong_metering.inbox.pouring import Pouring
from kong_metering.measures import Timings
from kong_metering.spool.accepted import Acceptances
from kong_metering.spool.delivered import Delivered
from kong_metering.spool.options import Sync
from kong_metering.spool.times import SpoolTimes
from kong_metering.upkeep.adoption import Adoptions
from kong_metering.upkeep.bounds import Bounds
from kong_metering.upkeep.guard import guarded
from kong_metering.upkeep.holdings import Holdings
from kong_metering.upkeep.hungwrite import HungWrite
from kong_metering.upkeep.janitor import ROUND_SECONDS, Janitor
from kong_metering.upkeep.lodging import Lodging
from kong_metering.upkeep.logmoves import LogMoves
from kong_metering.upkeep.redirection import Redirection, Renewal
from kong_metering.upkeep.requestdesk import RequestDesk
from kong_metering.upkeep.syncer import Syncer
from kong_metering.upkeep.writer import Bell, Writer

if TYPE_CHECKING:
    from kong_metering.account import QueueAccount
    from kong_metering.clock import Clock
    from kong_metering.config import Queue
    from kong_metering.eventlog.files import Unsynced
    from kong_metering.inbox.inbox import Inbox
    from kong_metering.inbox.lent import LentRings
    from kong_metering.ingest.connections import Connections
    from kong_metering.spool.identity import QueueIdentity
    from kong_metering.spool.options import SpoolOptions
    from kong_metering.stats import Stats
    from kong_metering.upkeep.requestdesk import Queues

_ENDING_SECONDS = 1.0


class Spooler:
    """The spool of this process."""

    def __init__(  # noqa: PLR0913 - what it is made of
        self,
        options: SpoolOptions,
        *,
        clock: Clock,
        stats: Stats,
        connections: Connections,
        timings: Timings | None = None,
        lent: LentRings | None = None,
        janitor_round_seconds: float = ROUND_SECONDS,
    ) -> None:
        self._options = options
        self._clock = clock
        timings = timings or Timings()
        epoch = EpochClock(clock)
        times = SpoolTimes(options.directory, clock)
        delivered = Delivered(options.directory, epoch.wall_ms)
        kept = delivered if options.keep_delivered else None
        self._holdings = Holdings(options.directory, kept)
        bell = Bell()
        place = Place(options.inbox_directory, options.directory) if options.inbox_directory else None
        self._lodging = Lodging(place, lent, self._holdings.make, clock)
        self._inbox = self._lodging.open(bell.ring)
        self._writer = Writer(self._inbox, bell, clock, timings.write)
        self.acceptances = Acceptances(options.directory)
        self._shared = Shared(self._holdings, LetterBox(options, epoch, stats), options, epoch, times)
        self._numbers = itertools.count(1)
        self._number_of: dict[SpooledBacklog, int] = {}
        rings = [each for each in (place, lent) if each is not None]
        pouring = Pouring(rings, options.directory, epoch.wall_ms, kept) if rings else None
        log_moves = LogMoves(self._holdings, options)
        adoptions = Adoptions(self._shared, pouring, self.acceptances, log_moves)
        self._bounds = Bounds(self._shared, adoptions, delivered=delivered, stats=stats, times=times)
        self._janitor = Janitor(
            self._shared,
            self._writer,
            adoptions=adoptions,
            bounds=self._bounds,
            log_moves=log_moves,
            connections=connections,
            acceptances=self.acceptances,
            round_seconds=janitor_round_seconds,
        )
        self._syncer = Syncer(self._unsynced, clock, timings.sync)
        self._hung_write = HungWrite(self._writer, clock)

    def start(self) -> None:
        """Begin to write; raises `StartupError` when that cannot be."""
        try:
            self._writer.start()
            if self._options.sync is Sync.SECOND:
                self._syncer.start()
            self._janitor.start()
            self._lodging.start(self._inbox)
        except RuntimeError as error:
            raise StartupError(f"no thread can be started to write the spool: {error}") from error

    # -- for the queues -----------------------------------------------------------------------------------------------

    def backlog(self, identity: QueueIdentity, settings: Queue, account: QueueAccount) -> SpooledBacklog:
        """Give a queue its place; what waits on disk for it from before comes in once `look_after` was called."""
        number = next(self._numbers)
        self._inbox.open_queue(number, identity)
        backlog = SpooledBacklog(identity, settings, self._shared, account, _Intake(self._inbox, number))
        self._number_of[backlog] = number
        self._writer.register(number, backlog.writing)
        if not self._inbox.survives_supervisor:
            # Nothing outlives the supervisor but what is in the log: its first event must not wait for it.
            self._writer.order(backlog.writing.prepare)
        return backlog

    def look_after(self, backlog: SpooledBacklog) -> None:
        """Have what waits on disk for a queue from before come in."""
        self._janitor.look_after(backlog)

    def take_over(self, old: SpooledBacklog, heir: SpooledBacklog) -> None:
        """Have all that waits in one backlog, of which nothing is on its way, given to another one.

        To be called on a courier's thread; may wait for the disk.
        """
        old.end_burials()

        def hand_over() -> None:
            old.writing.hand_over(heir.writing)
            self._janitor.take_over(old, heir)

        self._writer.order(hand_over)

    def answer_for(self, queues: Queues) -> None:
        """Have what people ask of these queues answered from now on."""
        desk = RequestDesk(
            self._options.directory, queues, self._redirect, clock=self._shared.clock, acceptances=self.acceptances
        )
        self._janitor.answer_at(desk)

    def set_aside(self, backlog: SpooledBacklog) -> None:
        """Take note that another backlog of the same queue goes on for one."""
        self._janitor.set_aside(backlog)

    def _redirect(self, old: SpooledBacklog, new: SpooledBacklog, target: QueueIdentity) -> Redirection:
        """Have all that waits in a backlog that was set aside, of which nothing is on its way, go somewhere else.

        To be called on a courier's thread; may wait for the disk.
        """
        old.end_burials()
        redirection = Redirection(
            Renewal(old, new),
            target,
            self._holdings,
            self._janitor.backlog_of,
            self._options,
        )

        def hand_over() -> None:
            old.writing.hand_over(new.writing)
            self._janitor.redirect(old, redirection)

        self._writer.order(hand_over)
        return redirection

    def release(self, backlog: SpooledBacklog) -> None:
        """Close what a queue that has ended has on disk; what waits there stays."""
        self._writer.forget(self._number_of.pop(backlog))
        self._janitor.release(backlog)

    def say_what_hangs(self) -> None:
        """Say that a write hangs, or does so no more; to be called about once a second."""
        self._hung_write.look()

    def waiting_for_instances(self) -> dict[str, int]:
        """Tell how many events waited on disk, within the last minute, for queues that are not open here."""
        return self._bounds.waiting_for_instances()

    def stalled(self) -> dict[str, int]:
        """Tell of writer and janitor whether it has ended, or been at one thing for `STALLED_SECONDS`: 1, else 0."""
        return {
            "writer": int(self._writer.is_stalled(STALLED_SECONDS)),
            "janitor": int(self._janitor.is_stalled(STALLED_SECONDS)),
        }

    def flush(self, deadline: float) -> None:
        """Have what is in the inbox written, and what dead processes left adopted, until `deadline` (monotonic)."""
        self._janitor.order_spills()
        self._writer.flush(max(0.0, deadline - self._clock.monotonic()))
        self._janitor.look_for_others(max(0.0, deadline - self._clock.monotonic()))

    def end(self) -> bool:
        """Write no more; False if the disk hangs, and events are left in the inbox."""
        self._janitor.order_spills()
        return self._writer.end(_ENDING_SECONDS)

    def close(self) -> None:
        """Close everything, for others to take over at once. All queues have ended."""
        self._syncer.end(_ENDING_SECONDS)
        self._janitor.end(_ENDING_SECONDS)
        self._lodging.end(_ENDING_SECONDS)
        guarded(self._holdings.close)
        self._inbox.close()

    def _unsynced(self) -> Iterable[Unsynced]:
        yield self._shared.letters.unsynced()
        for backlog in self._janitor.backlogs():
            yield from backlog.chores.unsynced()


class _Intake:
    """The way into the inbox for one queue."""

    def __init__(self, inbox: Inbox, number: int) -> None:
        self._inbox = inbox
        self._number = number
        # On the way of each event a method of our own would cost more than what it does.
        self.take = partial(inbox.append, number)

    def lost_with_process(self, events: int) -> int:
        return self._inbox.lost_with_process(self._number, events)

    def log_opened(self, directory: Path) -> None:
        self._inbox.log_opened(self._number, directory)
