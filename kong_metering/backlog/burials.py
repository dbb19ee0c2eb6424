"""A queue's events on their way to become dead letters, and where the queues of a process put these.

Contract: couriers bury, and wait for the disk; the janitor does for what it finds damaged; the syncer asks what is to
be synced. The thread that answers Kong and the writer never come here. An event is settled when its
letter is on disk, and not before. While letters cannot be written the events wait here, at most `MAX_PENDING` of them:
beyond that the queue reads nothing more (`is_full`), so that a full disk and an endpoint that refuses everything take
no more memory than that. `try_again` writes them. The locks are held over I/O, that of a
queue's burials outermost; the log's own and the letterbox's are taken within it.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kong_metering.errors import DISK_ERRORS
from kong_metering.eventlog.syncing import synced
from kong_metering.log import LOGGER, cause_of, trouble
from kong_metering.plurals import counted, form
from kong_metering.reasons import Buried
from kong_metering.spool.deadletters import DEAD_LETTERS, DeadLetter, DeadLetters

if TYPE_CHECKING:
    from kong_metering.account import QueueAccount
    from kong_metering.backlog.logsource import LogSource
    from kong_metering.backlog.source import Entry
    from kong_metering.clock import EpochClock
    from kong_metering.eventlog.files import Unsynced
    from kong_metering.eventlog.log import Damage
    from kong_metering.spool.identity import QueueIdentity
    from kong_metering.spool.options import SpoolOptions
    from kong_metering.stats import Stats

MAX_PENDING = 1000


class LetterBox:
    """The dead letters of a process: one writes at a time."""

    def __init__(self, options: SpoolOptions, clock: EpochClock, stats: Stats) -> None:
        self._letters = DeadLetters(options.directory / DEAD_LETTERS, max_bytes=options.max_bytes // 4)
        self._syncs_each_write = options.syncs_each_write
        self._clock = clock
        self._stats = stats
        self._lock = threading.Lock()

    def keep(self, letters: Sequence[DeadLetter]) -> None:
        """Write dead letters, all or none. Raises one of `DISK_ERRORS`."""
        with self._lock:
            self._letters.add(letters, self._clock.wall_ms())
            if self._syncs_each_write:
                synced(self._letters.unsynced())
            dropped, self._letters.dropped = self._letters.dropped, 0
        if dropped:
            self._stats.drop_letters(dropped)
            LOGGER.error(
                "%s dropped to make room for new ones",
                counted(dropped, "dead letter, the oldest, was", "dead letters, the oldest, were"),
                extra=trouble("letters dropped"),
            )

    def unsynced(self) -> Unsynced:
        """Tell what has to be synced to survive a power cut."""
        with self._lock:
            return self._letters.unsynced()


@dataclass(frozen=True)
class _Burial:
    """Events to make dead letters of; or, without events, a trace of some that cannot be read."""

    entries: Sequence[Entry]
    reason: Buried
    words: str


class Burials:
    """The burials of one queue; `settle` lets entries go, and gives how many were there still."""

    def __init__(
        self,
        identity: QueueIdentity,
        letters: LetterBox,
        clock: EpochClock,
        account: QueueAccount,
        settle: Callable[[Sequence[Entry]], int],
    ) -> None:
        self._identity = identity
        self._letters = letters
        self._clock = clock
        self._account = account
        self._settle = settle
        # Held while letters are written.
        self._burying = threading.Lock()
        self._has_ended = False
        # Whether the last try failed: the next one is the janitor's, not that of each letter which comes meanwhile.
        self._is_refused = False
        self._pending: deque[_Burial] = deque()

    @property
    def pending(self) -> int:
        """How many events wait to become dead letters."""
        return sum(len(burial.entries) for burial in list(self._pending))

    @property
    def is_full(self) -> bool:
        """Whether as many events wait as may."""
        return self.pending >= MAX_PENDING

    def bury(self, entries: Sequence[Entry], reason: Buried, words: str) -> None:
        """Make dead letters of events, with the words of the endpoint; without events, of a stretch of damage."""
        self._pending.append(_Burial(entries, reason, words))
        if not self._is_refused:
            self.try_again()

    def bury_damage(self, log: LogSource) -> None:
        """Say what a look at the disk has found damaged, and keep a dead letter that tells where its bytes are."""
        damages, lost = log.take_damage()
        for damage in damages:
            self._note_damage(damage)
        if lost:
            self._account.bury(Buried.UNREADABLE, lost, f"{counted(lost, 'event')} on disk cannot be read")

    def _note_damage(self, damage: Damage) -> None:
        kept = f", its bytes are kept in {damage.kept_in}" if damage.kept_in else ""
        length = f"{damage.length} {form(damage.length, 'byte')}"
        where = f"{damage.kind.value}: {length} at {damage.offset} of {damage.segment}{kept}"
        self._account.say(f"damage {damage.kind.value}", f"found in the spool: {where}", logging.WARNING)
        if damage.events:
            self.bury([], Buried.UNREADABLE, where)

    def try_again(self) -> bool:
        """Write what could not be written before; True if something was, so that the queue may read again."""
        has_written = False
        with self._burying:
            while self._pending and not self._has_ended and self._bury_now(self._pending[0]):
                self._pending.popleft()
                has_written = True
        return has_written

    def end(self) -> None:
        """Write what is left, if it can be, and nothing after it: the events stay where they wait."""
        self.try_again()
        with self._burying:
            self._has_ended = True

    def _bury_now(self, burial: _Burial) -> bool:
        try:
            self._letters.keep(self._letters_of(burial))
        except DISK_ERRORS as error:
            self._account.say("letters", f"dead letters cannot be written, for now: {cause_of(error)}")
            self._is_refused = True
            return False
        self._is_refused = False
        if burial.entries and (settled := self._settle(burial.entries)):
            self._account.bury(burial.reason, settled, f"kept as dead letters: {burial.words}")
        return True

    def _letters_of(self, burial: _Burial) -> list[DeadLetter]:
        now_ms = self._clock.wall_ms()
        kept = [(entry.accepted_ms or now_ms, entry.event) for entry in burial.entries] or [(now_ms, b"")]
        return [
            DeadLetter(burial.reason.value, burial.words, self._identity, accepted_ms, event)
            for accepted_ms, event in kept
        ]
