"""Which queue the events of a configuration go into.

Contract: a queue belongs to one plugin entity **and** one ingest endpoint. All instances of the entity (each of Kong's
workers has its own) share it, and the newest configuration rules it: a rotated token takes over what waits. The newest
is the one that was opened last, except that an old one which comes late does not take over, and that of two values of
a vault's the one rules that the endpoint takes (`precedence`). Events never leave for another endpoint than the one
they were accepted for, if that has ever accepted an event of the entity: a changed endpoint is another queue, and the
old one goes on until it is empty. What waits at an endpoint that never accepted one was configured wrong: the new queue
takes it over. A queue that no instance uses ends when it is empty. With a spool, what waits when the
process ends stays on disk, and comes back when its queue is opened in another process.
"""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from kong_metering.delivery import outcome as outcomes
from kong_metering.delivery.account import QueueAccount
from kong_metering.delivery.arrays import Arrays
from kong_metering.delivery.backlog import MemoryBacklog
from kong_metering.delivery.batching import ADAPTIVE_BATCH
from kong_metering.delivery.ingest import Endpoint
from kong_metering.delivery.outcome import Delivered
from kong_metering.delivery.precedence import Configuration, Precedence
from kong_metering.delivery.queue import EventQueue, Succession
from kong_metering.delivery.spooled import SpooledBacklog
from kong_metering.log import LOGGER, cause_of, trouble
from kong_metering.spool.accepted import Acceptances
from kong_metering.spool.identity import QueueIdentity
from kong_metering.urls import without_credentials

if TYPE_CHECKING:
    from kong_metering.clock import Clock
    from kong_metering.config import Entity, PluginConfig
    from kong_metering.delivery.connections import Connections
    from kong_metering.delivery.couriers import Couriers
    from kong_metering.delivery.outcome import Outcome
    from kong_metering.stats import Stats
    from kong_metering.upkeep.spooler import Spooler


_LATE = "an older configuration came late, the newer one goes on"


@dataclass(eq=False)
class _Open:
    """A queue, and its backlog if that is on disk."""

    queue: EventQueue
    precedence: Precedence
    identity: QueueIdentity
    backlog: SpooledBacklog | MemoryBacklog
    users: int = 0
    # Which one takes over what waits, unless it turns out that the endpoint accepts events.
    heir: _Open | None = None


class _Course(NamedTuple):
    """Where an entity sends now: the key of the queue, and the number of the configuration that led there."""

    key: str
    sequence: int


class Delivery:
    """All queues of the process."""

    def __init__(  # noqa: PLR0913 - what it is made of
        self,
        *,
        clock: Clock,
        stats: Stats,
        couriers: Couriers,
        connections: Connections,
        ca_bundle: str | None = None,
        adaptive_batch: int = ADAPTIVE_BATCH,
        spooler: Spooler | None = None,
    ) -> None:
        """Put it together; without a `spooler` events wait in memory.

        `adaptive_batch`: how many events leave together, while more come, where `max_batch_size` is 1 (1: never more).
        """
        self._clock = clock
        self._stats = stats
        self._couriers = couriers
        self._connections = connections
        self._ca_bundle = ca_bundle
        self._adaptive_batch = adaptive_batch
        self._spooler = spooler
        self._arrays = Arrays()
        self._lock = threading.Lock()
        self._open: dict[str, _Open] = {}
        # Queues that have handed over and whose endpoint is another queue's again.
        self._moved: list[_Open] = []
        self._courses: dict[str, _Course] = {}
        self._acceptances = spooler.acceptances if spooler else Acceptances(None)

    def open(self, entity: Entity, config: PluginConfig) -> EventQueue:
        """Give the queue for a configuration of a plugin entity; the caller lets go of it with `release`."""
        wanted = Configuration(Endpoint.of(config, self._ca_bundle), config.queue)
        written = _written(wanted, entity)
        identity = QueueIdentity(entity.id, entity.name, without_credentials(wanted.endpoint.url))
        with self._lock:
            is_late = self._is_late(entity, identity.key)
            opened = self._found(identity.key, is_late=is_late)
            if opened is not None and opened.identity.key != identity.key:
                LOGGER.info("queue %s: %s", opened.queue.name, _LATE)
                opened.users += 1
                return opened.queue
            if opened is None:
                opened = self._open[identity.key] = self._opened(
                    identity, wanted, Precedence(wanted, entity.sequence, written)
                )
            elif opened.precedence.open(wanted, entity.sequence, written):
                opened.queue.reconfigure(wanted.settings, wanted.endpoint)
                LOGGER.info("queue %s: a newer configuration took over", opened.queue.name)
            elif wanted != opened.precedence.ruling:
                why = (
                    "another value came from the vault, the one before goes on as long as the endpoint takes it"
                    if opened.precedence.is_twin(wanted)
                    else _LATE
                )
                LOGGER.info("queue %s: %s", opened.queue.name, why)
            if is_late:
                self._hand_over_to(self._open.get(self._courses[entity.id].key), opened)
            else:
                self._send_to(opened, entity.sequence)
            opened.users += 1
            return opened.queue

    def _is_late(self, entity: Entity, key: str) -> bool:
        """Return whether a configuration was another one's before it came: that is where the entity sends."""
        course = self._courses.get(entity.id)
        return course is not None and course.key != key and 0 < entity.sequence < course.sequence

    def _found(self, key: str, *, is_late: bool) -> _Open | None:
        """Return the queue with this key, or the one that took over from it; a late configuration changes nothing."""
        opened = self._open.get(key)
        while is_late and opened is not None and opened.heir is not None and opened.queue.has_moved:
            opened = opened.heir
        if opened is None or opened.heir is None or is_late:
            return opened
        if opened.queue.stay():
            opened.heir = None
            return opened
        self._moved.append(self._open.pop(key))
        return None

    def _send_to(self, opened: _Open, sequence: int) -> None:
        """Have the other queues of its entity hand over to this one, those whose endpoints never accepted an event."""
        identity = opened.identity
        course = self._courses.get(identity.entity_id)
        if course is not None and course.key == identity.key:
            return
        self._courses[identity.entity_id] = _Course(identity.key, sequence)
        if self._spooler is not None and isinstance(opened.backlog, SpooledBacklog):
            self._spooler.look_after(opened.backlog)
        for other in self._open.values():
            if other.identity.entity_id == identity.entity_id:
                self._hand_over_to(opened, other)

    def _hand_over_to(self, heir: _Open | None, opened: _Open) -> None:
        """Have a queue hand over to another one of its entity, if its endpoint never accepted an event."""
        key = opened.identity.key
        if heir is None or heir is opened or opened.heir is not None or self._acceptances.knows(key):
            return
        opened.heir = heir
        carry_out = partial(self._carry_out, opened, heir)
        opened.queue.hand_over(Succession(heir.queue, partial(self._acceptances.has, key), carry_out))

    def _carry_out(self, old: _Open, heir: _Open) -> None:
        """Move the events; on a courier's thread."""
        if isinstance(old.backlog, SpooledBacklog) and isinstance(heir.backlog, SpooledBacklog):
            if self._spooler is not None:
                self._spooler.take_over(old.backlog, heir.backlog)
        elif isinstance(old.backlog, MemoryBacklog) and isinstance(heir.backlog, MemoryBacklog):
            old.backlog.hand_over(heir.backlog)

    def is_refused(self, queue: EventQueue) -> bool:
        """Return whether the endpoint's last word on the token of a queue that `open` gave was 401 or 403."""
        with self._lock:
            return any(opened.queue is queue and opened.precedence.is_refused for opened in self._open.values())

    def _note_answer(self, key: str, endpoint: Endpoint, outcome: Outcome) -> None:
        is_refused = outcomes.refuses_the_token(outcome)
        if not (is_refused or isinstance(outcome, Delivered)):
            return
        if isinstance(outcome, Delivered):
            self._note_acceptance(key)
        with self._lock:
            opened = self._open.get(key)
            if opened is not None and opened.precedence.note_answer(endpoint, is_refused=is_refused):
                ruling = opened.precedence.ruling
                opened.queue.reconfigure(ruling.settings, ruling.endpoint)
                LOGGER.info("queue %s: the token is refused, another value from the vault took over", opened.queue.name)

    def _note_acceptance(self, key: str) -> None:
        try:
            self._acceptances.note(key)
        except OSError as error:
            message = "that an endpoint accepts events cannot be written down, for now: %s"
            # Whoever writes events there says what is wrong with the disk.
            LOGGER.info(message, cause_of(error), extra=trouble("acceptance"))

    def _all(self) -> list[_Open]:
        return [*self._open.values(), *self._moved]

    def release(self, queue: EventQueue) -> None:
        """Let go of a queue that `open` gave."""
        with self._lock:
            for opened in self._all():
                if opened.queue is queue:
                    opened.users -= 1
        self.sweep()

    def sweep(self) -> None:
        """End the queues that nobody uses and that are empty; to be called about once a second."""
        if self._spooler is None:
            # With a spool the janitor does it.
            self._connections.sweep(self._clock.monotonic())
        with self._lock:
            # What still comes to one that has handed over goes to the other.
            heirs = [opened.heir for opened in self._all() if opened.heir is not None]
            idle = [opened for opened in self._all() if opened.users <= 0 and opened.queue.waiting == 0]
            closing = [opened for opened in idle if not any(opened is heir for heir in heirs)]
            self._forget(closing)
        for opened in closing:
            # On the thread that answers Kong: what is on disk is for the janitor to end.
            opened.queue.dismiss()
            self._let_go(opened)

    def _forget(self, closing: list[_Open]) -> None:
        gone = set(map(id, closing))
        self._open = {key: opened for key, opened in self._open.items() if id(opened) not in gone}
        self._moved = [opened for opened in self._moved if id(opened) not in gone]
        sending = {opened.identity.entity_id for opened in self._open.values()}
        self._courses = {entity: course for entity, course in self._courses.items() if entity in sending}

    def begin_close(self) -> None:
        """Send what waits in all queues at once, without waiting for it; what comes later is sent at once too."""
        with self._lock:
            queues = [opened.queue for opened in self._all()]
        for queue in queues:
            queue.begin_close()

    def close(self, timeout: float) -> None:
        """Send what waits in all queues, each batch once, for `timeout` seconds at most; account for the rest."""
        deadline = self._clock.monotonic() + timeout
        self.begin_close()
        if self._spooler is not None:
            self._spooler.flush(timeout)
        with self._lock:
            closing = self._all()
            self._forget(closing)
        for opened in closing:
            opened.queue.close(deadline)
        is_written = self._spooler is None or self._spooler.end()
        for opened in closing:
            opened.queue.end(is_written=is_written)
            self._let_go(opened)
        if self._spooler is not None:
            self._spooler.close()
        self._couriers.close(max(0.0, deadline - self._clock.monotonic()))
        self._connections.close()

    def waiting(self) -> dict[str, int]:
        """Tell how many events wait, by the name of their queue: after a change of the endpoint two have the same."""
        waiting: Counter[str] = Counter()
        with self._lock:
            for opened in self._all():
                waiting[opened.queue.name] += opened.queue.waiting
        return dict(waiting)

    def stalled(self) -> dict[str, int]:
        """Tell what of delivery is not alive: 1 for each thread, or pool of threads, that gets nowhere, else 0."""
        of_spool = {} if self._spooler is None else self._spooler.stalled()
        return {**of_spool, "couriers": int(self._couriers.is_stalled())}

    def waiting_for_instances(self) -> dict[str, int]:
        """Tell how many events waited on disk, within the last minute, until an instance opens their queue."""
        return {} if self._spooler is None else self._spooler.waiting_for_instances()

    def _let_go(self, opened: _Open) -> None:
        if self._spooler is not None and isinstance(opened.backlog, SpooledBacklog):
            self._spooler.release(opened.backlog)

    def _opened(self, identity: QueueIdentity, wanted: Configuration, precedence: Precedence) -> _Open:
        account = QueueAccount(identity.name, self._stats)
        backlog = (
            self._spooler.backlog(identity, wanted.settings, account)
            if self._spooler
            else MemoryBacklog(wanted.settings, self._clock, account, adaptive_batch=self._adaptive_batch)
        )
        queue = EventQueue(
            wanted.settings,
            wanted.endpoint,
            backlog,
            clock=self._clock,
            account=account,
            couriers=self._couriers,
            connections=self._connections,
            arrays=self._arrays,
            adaptive_batch=self._adaptive_batch,
            on_answer=partial(self._note_answer, identity.key),
        )
        if self._spooler is not None and isinstance(backlog, SpooledBacklog):
            self._spooler.look_after(backlog)
        return _Open(queue, precedence, identity, backlog)


def _written(configuration: Configuration, entity: Entity) -> Configuration:
    """Return a configuration with its vault references in the place of what they stand for."""
    endpoint, references = configuration.endpoint, entity.references
    url, token = references.get("ingest_endpoint", endpoint.url), references.get("api_token", endpoint.token)
    return replace(configuration, endpoint=replace(endpoint, url=url, token=token))
