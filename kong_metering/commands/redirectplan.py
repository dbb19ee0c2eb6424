"""What `kong-metering spool redirect` is to move: found before anything is asked or changed."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kong_metering.commands.filters import Filters, chosen_endpoint
from kong_metering.commands.holders import Holder, held_by, waiting_in
from kong_metering.commands.letters import ChosenLetters, matching_letters
from kong_metering.commands.logs import marks_of, unanswered_in
from kong_metering.commands.options import Place
from kong_metering.errors import KongMeteringError
from kong_metering.eventlog.log import EventLog
from kong_metering.spool.deadletters import DEAD_LETTERS, DeadLetters
from kong_metering.spool.directory import survey
from kong_metering.urls import without_credentials

if TYPE_CHECKING:
    from pathlib import Path

    from kong_metering.spool.identity import QueueIdentity


@dataclass(frozen=True, kw_only=True)
class RedirectOptions(Place):
    """What `redirect` takes."""

    plugin_id: str
    endpoint: str | None
    to: str
    dead_letters: bool
    wait: float
    yes: bool
    as_json: bool


@dataclass(frozen=True)
class Plan:
    """What is to go where: the logs in which something waits, how many events, and the dead letters."""

    source: QueueIdentity
    target: QueueIdentity
    logs: dict[Path, int]
    held: Counter[Holder]
    unanswered: int
    letters: ChosenLetters

    @property
    def events(self) -> int:
        """How many events wait."""
        return sum(self.logs.values())

    def is_ours(self, queue: QueueIdentity | None) -> bool:
        """Whether a log of this queue is meant."""
        return queue is not None and queue.key == self.source.key


def plan_of(options: RedirectOptions) -> Plan:
    """Find what there is to redirect. Raises `KongMeteringError` when it is not clear what is meant."""
    found = survey(options.root)
    letters = DeadLetters(options.root / DEAD_LETTERS)
    source = _source(options, [log.identity for log in found if log.identity], list(letters.counts()))
    target = replace(source, endpoint=without_credentials(options.to))
    if source.key == target.key:
        raise KongMeteringError(f"that is where they wait: {source.endpoint}; --to has to be another URL")
    mine = [log for log in found if log.identity and log.identity.key == source.key]
    logs = {log.directory: count for log in mine if (count := waiting_in(log.directory))}
    chosen = ChosenLetters()
    if options.dead_letters:
        for stored in matching_letters(letters, Filters(options.plugin_id)):
            if stored.letter.queue.key == source.key:
                chosen.add(stored)
    unanswered = sum(_unanswered_in(path) for path in logs)
    return Plan(source, target, logs, held_by(mine), unanswered, chosen)


def _source(
    options: RedirectOptions, queues: Sequence[QueueIdentity], letters: Sequence[tuple[QueueIdentity, str]]
) -> QueueIdentity:
    """Find whose events are meant; the endpoint that they are to go to is not the one."""
    known = [*queues, *(queue for queue, _ in letters)] if options.dead_letters else list(queues)
    target = without_credentials(options.to)
    if options.endpoint is None:
        others = [queue for queue in known if queue.entity_id != options.plugin_id or queue.endpoint != target]
        # All that is there is where it is to go: somebody has done it already.
        known = others if any(queue.entity_id == options.plugin_id for queue in others) else known
    endpoint = chosen_endpoint(known, options.plugin_id, options.endpoint, "--endpoint")
    return next(queue for queue in known if (queue.entity_id, queue.endpoint) == (options.plugin_id, endpoint))


def _unanswered_in(directory: Path) -> int:
    """Count the waiting events of a log that were sent without an answer so far."""
    with contextlib.suppress(OSError, KongMeteringError), closing(EventLog.view(directory)) as view:
        return unanswered_in(marks_of(view))
    return 0
