"""Which queue the events of a configuration go into.

Contract: a queue belongs to one plugin entity **and** one ingest endpoint. All instances of the entity (each of Kong's
workers has its own) share it, and the newest configuration rules it: a rotated token takes over what waits. The newest
is the one that was opened last, except that an old one which comes late does not take over, and that of two values of
a vault the one that the endpoint takes wins (`precedence`). A changed endpoint is another queue (`openqueues`). What
somebody redirects goes where that one says, and a new queue goes on in the place of the one that gives it up (`renew`).
A queue that no instance uses ends when it is empty. With a spool, what waits when the process ends stays on disk, and
comes back when its queue is opened in another process. The lock is held for memory only.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from kong_metering.account import QueueAccount
from kong_metering.backlog.memory import MemoryBacklog
from kong_metering.backlog.spooled import SpooledBacklog
from kong_metering.delivery.openqueues import OpenQueue, OpenQueues
from kong_metering.delivery.precedence import Configuration, Precedence
from kong_metering.delivery.queue import EventQueue
from kong_metering.delivery.succession import Succession
from kong_metering.ingest.arrays import Arrays
from kong_metering.ingest.client import Endpoint
from kong_metering.log import LOGGER, cause_of, trouble
from kong_metering.measures import Timings
from kong_metering.spool.accepted import Acceptances
from kong_metering.spool.identity import QueueIdentity
from kong_metering.trial import outcome as outcomes
from kong_metering.trial.batching import ADAPTIVE_BATCH
from kong_metering.trial.outcome import Delivered
from kong_metering.upkeep.guard import within
from kong_metering.upkeep.verifier import DeliveredQueue
from kong_metering.urls import without_credentials

if TYPE_CHECKING:
    from kong_metering.clock import Clock
    from kong_metering.config import Entity, PluginConfig
    from kong_metering.delivery.couriers import Couriers
    from kong_metering.ingest.connections import Connections
    from kong_metering.stats import Stats
    from kong_metering.trial.outcome import Outcome
    from kong_metering.upkeep.spooler import Spooler


_LATE = "an older configuration came late, the newer one goes on"


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
        timings: Timings | None = None,
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
        self._timings = timings or Timings()
        self._arrays = Arrays()
        self._lock = threading.Lock()
        self._acceptances = spooler.acceptances if spooler else Acceptances(None)
        self._queues = OpenQueues(self._acceptances, spooler)
        if spooler is not None:
            spooler.answer_for(self)

    def open(self, entity: Entity, config: PluginConfig) -> EventQueue:
        """Give the queue for a configuration of a plugin entity; the caller lets go of it with `release`."""
        wanted = Configuration(Endpoint.of(config, self._ca_bundle), config.queue)
        written = _written(wanted, entity)
        identity = QueueIdentity(entity.id, entity.name, without_credentials(wanted.endpoint.url))
        with self._lock:
            is_late = self._queues.is_late(entity, identity.key)
            opened = self._queues.find(identity.key, is_late=is_late)
            if opened is not None and opened.identity.key != identity.key:
                LOGGER.info("queue %s: %s", opened.queue.name, _LATE)
                opened.users += 1
                return opened.queue
            if opened is None:
                opened = self._opened(identity, wanted, Precedence(wanted, entity.sequence, written))
                self._queues.add(opened)
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
            self._queues.settle_course(opened, entity.sequence, is_late=is_late)
            opened.users += 1
            return opened.queue

    def is_refused(self, queue: EventQueue) -> bool:
        """Return whether the endpoint's last word on the token of a queue that `open` gave was 401 or 403."""
        with self._lock:
            return self._queues.is_refused(queue)

    def find(self, key: str) -> EventQueue | None:
        """Return the queue with this key that new events go into."""
        with self._lock:
            opened = self._queues.get(key)
        return opened.queue if opened else None

    def renew(self, key: str, carry_out: Callable[[SpooledBacklog, SpooledBacklog], None]) -> bool:
        """Have a new queue, for the same endpoint, go on in the place of one; False if that cannot be now.

        `carry_out` is called on a courier's thread, with both places on disk, when the old one has no request under
        way and will begin none; all that comes from then on is the new one's.
        """
        with self._lock:
            old = self._queues.renewable(key)
            if old is None or self._spooler is None or old.on_disk is None:
                return False
            self._spooler.set_aside(old.on_disk)
            new = self._opened(old.identity, old.precedence.ruling, old.precedence)
            if new.on_disk is None:
                raise TypeError("with a spooler each queue is on disk")
            self._queues.replace(old, new)
            old.queue.hand_over(Succession(new.queue, lambda: False, partial(carry_out, old.on_disk, new.on_disk)))
        return True

    def _note_answer(self, key: str, endpoint: Endpoint, outcome: Outcome) -> None:
        is_refused = outcomes.refuses_the_token(outcome)
        if not (is_refused or isinstance(outcome, Delivered)):
            return
        if isinstance(outcome, Delivered):
            self._note_acceptance(key)
        with self._lock:
            opened = self._queues.get(key)
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

    def release(self, queue: EventQueue) -> None:
        """Let go of a queue that `open` gave."""
        with self._lock:
            for opened in self._queues.all():
                if opened.queue is queue:
                    opened.users -= 1
        self.sweep()

    def sweep(self) -> None:
        """End the queues that nobody uses and that are empty; to be called about once a second.

        Starts a courier that could not be started, too, though no event comes, has the disk asked again whether a queue
        may hand over, where it did not tell, and says when it hangs.
        """
        self._couriers.try_again()
        if self._spooler is None:
            # With a spool the janitor does it.
            self._connections.sweep(self._clock.monotonic())
        else:
            self._spooler.say_what_hangs()
        with self._lock:
            self._queues.ask_again()
            closing = self._queues.unneeded()
            self._queues.forget(closing)
        for opened in closing:
            # On the thread that answers Kong: what is on disk is for the janitor to end.
            opened.queue.dismiss()
            self._let_go(opened)

    def begin_close(self) -> None:
        """Send what waits in all queues at once, without waiting for it; what comes later is sent at once too."""
        with self._lock:
            queues = [opened.queue for opened in self._queues.all()]
        for queue in queues:
            queue.begin_close()

    def close(self, timeout: float, disk_timeout: float = 30.0) -> None:
        """Send what waits in all queues, each batch once, for `timeout` seconds at most; account for the rest.

        A disk that takes longer than `disk_timeout` seconds over that hangs: the next process does it then.
        """
        deadline = self._clock.monotonic() + timeout
        self.begin_close()
        if self._spooler is not None:
            self._spooler.flush(deadline)
        with self._lock:
            closing = self._queues.all()
            self._queues.forget(closing)
        for opened in closing:
            opened.queue.close(deadline)
        if not within(disk_timeout, partial(self._end, closing, deadline), "metering end"):
            LOGGER.error("the disk hangs: what was not written down of the end is left to the next process")
        self._couriers.close(max(0.0, deadline - self._clock.monotonic()))
        self._connections.close()

    def _end(self, closing: list[OpenQueue], deadline: float) -> None:
        """Account for what is left, and let go of all that is on disk."""
        is_written = self._spooler is None or self._spooler.end()
        for opened in closing:
            opened.queue.end(deadline, is_written=is_written)
            self._let_go(opened)
        if self._spooler is not None:
            self._spooler.close()

    def waiting(self) -> dict[str, int]:
        """Tell how many events wait, by the name of their queue: after a change of the endpoint two have the same."""
        waiting: Counter[str] = Counter()
        with self._lock:
            for opened in self._queues.all():
                waiting[opened.queue.name] += opened.queue.waiting
        return dict(waiting)

    def stalled(self) -> dict[str, int]:
        """Tell what of delivery is not alive: 1 for each thread, or pool of threads, that gets nowhere, else 0."""
        of_spool = {} if self._spooler is None else self._spooler.stalled()
        return {**of_spool, "couriers": int(self._couriers.is_stalled())}

    def held_back(self) -> dict[str, int]:
        """Tell by queue how many events on disk may not be sent, because the disk does not take the note of it."""
        held: Counter[str] = Counter()
        with self._lock:
            for opened in self._queues.all():
                if isinstance(opened.backlog, SpooledBacklog):
                    held[opened.queue.name] += opened.backlog.held_back
        return dict(+held)

    def told(self) -> list[dict[str, Any]]:
        """Return the figures of each queue, with the plugin entity that it belongs to."""
        with self._lock:
            opened = self._queues.all()
        return [{"entity": one.identity.entity_id, "name": one.identity.name, **one.queue.told()} for one in opened]

    def delivered_queues(self) -> list[DeliveredQueue]:
        """Return the queues on disk, for those who read back what they delivered."""
        with self._lock:
            opened = self._queues.all()
        return [
            DeliveredQueue(one.identity, one.queue.endpoint, one.on_disk.chores.begin_segment, one.queue.note_verified)
            for one in opened
            if one.on_disk is not None
        ]

    def waiting_for_instances(self) -> dict[str, int]:
        """Tell how many events waited on disk, within the last minute, until an instance opens their queue."""
        return {} if self._spooler is None else self._spooler.waiting_for_instances()

    def _let_go(self, opened: OpenQueue) -> None:
        if self._spooler is not None and opened.on_disk:
            self._spooler.release(opened.on_disk)

    def _opened(self, identity: QueueIdentity, wanted: Configuration, precedence: Precedence) -> OpenQueue:
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
            post_times=self._timings.post,
            on_answer=partial(self._note_answer, identity.key),
        )
        if self._spooler is not None and isinstance(backlog, SpooledBacklog):
            self._spooler.look_after(backlog)
        return OpenQueue(queue, precedence, identity, backlog)


def _written(configuration: Configuration, entity: Entity) -> Configuration:
    """Return a configuration with its vault references in the place of what they stand for."""
    endpoint, references = configuration.endpoint, entity.references
    url, token = references.get("ingest_endpoint", endpoint.url), references.get("api_token", endpoint.token)
    return replace(configuration, endpoint=replace(endpoint, url=url, token=token))
