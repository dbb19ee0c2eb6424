"""What dead processes left goes to the queues that are open here: rings are poured into logs, and logs are adopted.

Contract: called on the janitor's thread only. Rings are poured before any log is adopted (`pouring.py` says why). A log
whose queue is not open here stays free, for another process or `kong-metering spool deliver`, unless its endpoint never
accepted an event: then it goes where its plugin sends now. What cannot be read now is left for a later round, and said.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from operator import itemgetter
from typing import TYPE_CHECKING

from kong_metering.backlog.logsource import LogSource
from kong_metering.errors import DISK_ERRORS
from kong_metering.log import LOGGER, Once, cause_of, printable, trouble
from kong_metering.plurals import counted, form
from kong_metering.upkeep.guard import guarded

if TYPE_CHECKING:
    from kong_metering.backlog.spooled import Shared, SpooledBacklog
    from kong_metering.eventlog.log import Damage
    from kong_metering.inbox.pouring import Pouring
    from kong_metering.spool.accepted import Acceptances
    from kong_metering.spool.directory import Adoption, HeldLog
    from kong_metering.spool.identity import QueueIdentity
    from kong_metering.upkeep.logmoves import LogMoves

# How often shared memory is looked through for what spools left that are not there any more.
_STRAYS_SECONDS = 60.0
# A queue whose logs have waited for room for so long sends what is new before them: there may be none for days.
_TURN_SECONDS = 60.0


class Adoptions:
    """Pours, adopts and lends what is not this process's yet."""

    def __init__(self, shared: Shared, pouring: Pouring | None, acceptances: Acceptances, log_moves: LogMoves) -> None:
        self._holdings = shared.holdings
        self._options = shared.options
        self._clock = shared.clock
        self._pouring = pouring
        self._acceptances = acceptances
        self._log_moves = log_moves
        self._strays_at = shared.clock.monotonic()
        self._told = Once()
        # Since when (monotonic) logs of a queue, by its key, wait until there is room for them.
        self._left_since: dict[str, float] = {}

    def pour(self) -> None:
        """Put what the rings of dead processes hold into logs."""
        if self._pouring is None:
            return
        poured = self._pouring.pour()
        if poured.events:
            LOGGER.info(
                "put %s into logs that a process which was killed had not written yet", counted(poured.events, "event")
            )
        for damage in poured.damage:
            _say_damage("found in the log of a process that was killed", damage)
        for unpoured in poured.unpoured:
            LOGGER.error(
                "events in %s stay there, for now: %s",
                unpoured.path,
                unpoured.reason,
                extra=trouble(f"unpoured:{unpoured.path}"),
            )

    def tidy_strays(self) -> None:
        """Clear up what is left in shared memory of spools that were replaced; say what holds events."""
        if self._pouring is None or self._clock.monotonic() < self._strays_at:
            return
        self._strays_at = self._clock.monotonic() + _STRAYS_SECONDS
        for stray in self._pouring.strays():
            if self._told.is_first(str(stray.directory)):
                # No trouble of this spool's, and perhaps another Kong's that is just down.
                LOGGER.info(
                    "%s holds %s of killed servers of another spool, which was replaced or whose servers do not run: "
                    "%s there for them (`kong-metering spool status` shows it)",
                    stray.directory,
                    counted(stray.events, "event"),
                    form(stray.events, "it stays", "they stay"),
                )

    def adopt_for(self, open_here: Mapping[str, SpooledBacklog]) -> None:
        """Adopt what is free for the open queues, by their keys; those send nothing before it was looked for once.

        Where there is no room for it, they wait for a while, and then send what is new before it.
        """
        left: set[str] = set()
        guarded(lambda: left.update(self._adopt(open_here)))
        now = self._clock.monotonic()
        self._left_since = {key: self._left_since.get(key, now) for key in left}
        for key, backlog in open_here.items():
            since = self._left_since.get(key)
            if since is None or now - since >= _TURN_SECONDS:
                backlog.begin()
        if any(now - since >= _TURN_SECONDS for since in self._left_since.values()):
            LOGGER.warning(
                "what dead processes left for %s is not sent yet: it waits until other queues have delivered "
                "theirs, or for a higher limit of open files (LimitNOFILE, ulimit -n)",
                counted(len(left), "queue"),
                extra=trouble("left"),
            )

    def borrow(self, open_here: Collection[str]) -> list[LogSource]:
        """Take the logs whose queues are not open here, by their keys, for a moment: the caller retires them."""
        adoption = self._adopted(lambda identity: identity is None or identity.key not in open_here)
        _say_troubles(adoption)
        borrowed = self._looked_into(adoption.logs)
        for log in borrowed:
            for damage in log.take_damage()[0]:
                _say_damage(f"found in {log.held.directory}", damage)
        return borrowed

    def _adopt(self, open_here: Mapping[str, SpooledBacklog]) -> set[str]:
        """Adopt what was found for the open queues; give the keys of those whose turn comes later."""
        heirs = {backlog.identity.entity_id: backlog for backlog in open_here.values()}
        adoption = self._adopted(lambda identity: self._owner(identity, open_here, heirs) is not None)
        for log in self._looked_into(adoption.logs):
            self._give_to_queue(log, self._owner(log.held.identity, open_here, heirs))
        _say_troubles(adoption)
        later = [self._owner(identity, open_here, heirs) for identity in adoption.left]
        return {owner.identity.key for owner in later if owner}

    def _adopted(self, is_wanted: Callable[[QueueIdentity | None], bool]) -> Adoption:
        return self._holdings.adopt(is_wanted, self._pouring.held_back if self._pouring else tuple)

    def _owner(
        self,
        identity: QueueIdentity | None,
        open_here: Mapping[str, SpooledBacklog],
        heirs: Mapping[str, SpooledBacklog],
    ) -> SpooledBacklog | None:
        """Give whose a log is; if its endpoint never accepted anything, that of the one where its plugin sends now."""
        if identity is None:
            return None
        if identity.key in open_here:
            return open_here[identity.key]
        heir = heirs.get(identity.entity_id)
        return None if heir is None or self._acceptances.has(identity.key) else heir

    def _give_to_queue(self, log: LogSource, backlog: SpooledBacklog | None) -> None:
        identity = log.held.identity
        where = ""
        if backlog is not None and identity is not None and identity.key != backlog.identity.key:
            try:
                log = self._log_moves.given(log.held, backlog)
            except DISK_ERRORS as error:
                message = f"events in {log.held.directory} cannot be given to another endpoint, for now"
                LOGGER.error("%s: %s", message, cause_of(error), extra=trouble("adopt elsewhere"))
                backlog = None
            where = f" for {printable(identity.endpoint)}, which never accepted an event"
        if backlog is None or not backlog.chores.adopt(log):
            self._holdings.retire(log.held)
            return
        LOGGER.info(
            "queue %s: took over %s that another process left%s",
            backlog.identity.name,
            counted(log.waiting_at_first, "event"),
            where,
        )

    def _looked_into(self, held_logs: Sequence[HeldLog]) -> list[LogSource]:
        """Line logs up, the one with the oldest event first; those that cannot be read now are left for later."""
        found: list[tuple[float, LogSource]] = []
        for held in held_logs:
            try:
                log = LogSource(held, self._options)
                found.append((log.oldest_ms() or float("inf"), log))
            except DISK_ERRORS as error:
                message = f"events in {held.directory} cannot be read, for now: {cause_of(error)}"
                LOGGER.error(message, extra=trouble("adopt"))
                self._holdings.retire(held)
        return [log for _, log in sorted(found, key=itemgetter(0))]


def _say_troubles(adoption: Adoption) -> None:
    for refused in adoption.refused:
        LOGGER.error(
            "events in %s stay there, they cannot be read: %s",
            refused.directory,
            refused.reason,
            extra=trouble(f"refused:{refused.directory}"),
        )
    for damage in adoption.damage:
        _say_damage("found in a spool that was done", damage)


def _say_damage(where: str, damage: Damage) -> None:
    kept = f", they are kept in {damage.kept_in}" if damage.kept_in else ""
    length = f"{damage.length} {form(damage.length, 'byte')} of {damage.segment} {form(damage.length, 'was', 'were')}"
    message = f"{where}: {length} {damage.kind.value}{kept}"
    LOGGER.log(logging.WARNING, message, extra=trouble("damage"))
