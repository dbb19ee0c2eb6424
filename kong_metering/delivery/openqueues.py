"""The queues that are open, where each entity sends now, and which queue takes over what waits at another one.

Contract: the registry calls, and holds its lock. Events never leave for another endpoint than the one they were
accepted for, if that has ever accepted an event of the entity: then a changed endpoint is another queue, and the old
one goes on until it is empty. What waits at an endpoint that never accepted one was configured wrong: the queue where
the entity sends now takes it over. That is done by a courier, when no request is under way (`EventQueue.hand_over`),
and not at all if the endpoint turns out to accept events. A configuration that comes late changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from kong_metering.backlog.memory import MemoryBacklog
from kong_metering.backlog.spooled import SpooledBacklog
from kong_metering.delivery.succession import Succession
from kong_metering.log import LOGGER, printable
from kong_metering.plurals import counted

if TYPE_CHECKING:
    from kong_metering.config import Entity
    from kong_metering.delivery.precedence import Precedence
    from kong_metering.delivery.queue import EventQueue
    from kong_metering.spool.accepted import Acceptances
    from kong_metering.spool.identity import QueueIdentity
    from kong_metering.upkeep.spooler import Spooler


@dataclass(eq=False)
class OpenQueue:
    """A queue, what rules it, where its events wait, and how many instances use it."""

    queue: EventQueue
    precedence: Precedence
    identity: QueueIdentity
    backlog: SpooledBacklog | MemoryBacklog
    users: int = 0
    # Which one takes over what waits, unless it turns out that the endpoint accepts events.
    heir: OpenQueue | None = None

    @property
    def has_moving_events(self) -> bool:
        """Whether events are on their way to the heir."""
        return self.queue.has_moved and self.queue.waiting > 0

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits in it, and nothing is left to be written down of what did."""
        return self.queue.waiting == 0 and not (self.on_disk is not None and self.on_disk.is_unsaved)

    @property
    def on_disk(self) -> SpooledBacklog | None:
        """The backlog, if that is on disk."""
        return self.backlog if isinstance(self.backlog, SpooledBacklog) else None


class _Course(NamedTuple):
    """Where an entity sends now: the key of the queue, and the number of the configuration that led there."""

    key: str
    sequence: int


class OpenQueues:
    """All of them, by their keys; the caller locks."""

    def __init__(self, acceptances: Acceptances, spooler: Spooler | None) -> None:
        self._acceptances = acceptances
        self._spooler = spooler
        self._by_key: dict[str, OpenQueue] = {}
        # Queues that have handed over and whose endpoint is another queue's again.
        self._moved: list[OpenQueue] = []
        self._courses: dict[str, _Course] = {}

    def all(self) -> list[OpenQueue]:
        """Return all, those too that have handed over."""
        return [*self.current(), *self._moved]

    def current(self) -> list[OpenQueue]:
        """Return those that another one with the same key has not replaced."""
        return list(self._by_key.values())

    def get(self, key: str) -> OpenQueue | None:
        """Return the one with this key."""
        return self._by_key.get(key)

    def add(self, opened: OpenQueue) -> None:
        """Take one in; none with its key is there, or one that is replaced."""
        self._by_key[opened.identity.key] = opened

    def renewable(self, key: str) -> OpenQueue | None:
        """Return the one with this key, unless events are on their way from it, or to it."""
        opened = self.get(key)
        if opened is None or opened.queue.is_leaving or opened.queue.has_moved:
            return None
        giving = [each for each in self.all() if each.heir is opened]
        return None if any(each.queue.is_leaving or each.has_moving_events for each in giving) else opened

    def replace(self, old: OpenQueue, new: OpenQueue) -> None:
        """Have a queue go on in the place of another one with its key, which is to hand over to it."""
        old.heir = new
        self.add(new)
        self._moved.append(old)

    def is_refused(self, queue: EventQueue) -> bool:
        """Return whether the endpoint's last word on the token of a queue was 401 or 403."""
        opened = next((each for each in self.all() if each.queue is queue), None)
        if opened is None:
            return False
        # A queue that was replaced shares its precedence with the one that goes on; one that has moved does not.
        now = self.get(opened.identity.key)
        return now is not None and now.precedence is opened.precedence and now.precedence.is_refused

    def unneeded(self) -> list[OpenQueue]:
        """Return those that nobody uses and in which nothing waits, on disk either."""
        # What still comes to one that has handed over goes to the other.
        heirs = [opened.heir for opened in self.all() if opened.heir is not None]
        idle = [opened for opened in self.all() if opened.users <= 0 and opened.is_idle]
        return [opened for opened in idle if not any(opened is heir for heir in heirs)]

    def forget(self, closing: list[OpenQueue]) -> None:
        """Let go of these."""
        gone = set(map(id, closing))
        self._by_key = {key: opened for key, opened in self._by_key.items() if id(opened) not in gone}
        self._moved = [opened for opened in self._moved if id(opened) not in gone]
        sending = {opened.identity.entity_id for opened in self.current()}
        self._courses = {entity: course for entity, course in self._courses.items() if entity in sending}

    def is_late(self, entity: Entity, key: str) -> bool:
        """Return whether a configuration was another one's before it came: that is where the entity sends."""
        course = self._courses.get(entity.id)
        return course is not None and course.key != key and 0 < entity.sequence < course.sequence

    def find(self, key: str, *, is_late: bool) -> OpenQueue | None:
        """Return the queue with this key, or the one that took over from it; a late configuration changes nothing."""
        opened = self._by_key.get(key)
        while is_late and opened is not None and opened.heir is not None and opened.queue.has_moved:
            opened = opened.heir
        if opened is None or opened.heir is None or is_late:
            return opened
        if opened.queue.stay():
            opened.heir = None
            return opened
        self._moved.append(self._by_key.pop(key))
        return None

    def settle_course(self, opened: OpenQueue, sequence: int, *, is_late: bool) -> None:
        """Have an entity send to this queue, or, where its configuration came late, hand over to where it sends."""
        if is_late:
            self._hand_over(opened, self._by_key.get(self._courses[opened.identity.entity_id].key))
        else:
            self._send_to(opened, sequence)

    def _send_to(self, opened: OpenQueue, sequence: int) -> None:
        """Have the other queues of its entity hand over to this one, those whose endpoints never accepted an event."""
        identity = opened.identity
        course = self._courses.get(identity.entity_id)
        if course is not None and course.key == identity.key:
            return
        self._courses[identity.entity_id] = _Course(identity.key, sequence)
        if self._spooler is not None and opened.on_disk:
            self._spooler.look_after(opened.on_disk)
        for other in self.current():
            if other.identity.entity_id == identity.entity_id:
                self._hand_over(other, opened)

    def _hand_over(self, opened: OpenQueue, heir: OpenQueue | None) -> None:
        """Have a queue hand over to another one of its entity, if its endpoint never accepted an event."""
        key = opened.identity.key
        if heir is None or heir is opened or opened.heir is not None or self._acceptances.knows(key):
            return
        opened.heir = heir
        self._begin_to_hand_over(opened, heir)

    def ask_again(self) -> None:
        """Have the queues hand over that were to, and did not because the disk did not tell whether they may."""
        for opened in self.all():
            if opened.heir is None or not opened.queue.is_staying or self._acceptances.knows(opened.identity.key):
                continue
            self._begin_to_hand_over(opened, opened.heir)

    def _begin_to_hand_over(self, opened: OpenQueue, heir: OpenQueue) -> None:
        is_off = partial(self._acceptances.has, opened.identity.key)
        opened.queue.hand_over(Succession(heir.queue, is_off, partial(self._carry_out, opened, heir)))

    def _carry_out(self, old: OpenQueue, heir: OpenQueue) -> None:
        """Move the events; on a courier's thread, without the lock."""
        LOGGER.info(
            "queue %s: %s never accepted an event; %s to %s",
            old.queue.name,
            printable(old.identity.endpoint),
            counted(old.queue.waiting, "event that waits goes", "events that wait go"),
            printable(heir.identity.endpoint),
        )
        if self._spooler is not None and old.on_disk and heir.on_disk:
            self._spooler.take_over(old.on_disk, heir.on_disk)
        elif isinstance(old.backlog, MemoryBacklog) and isinstance(heir.backlog, MemoryBacklog):
            old.backlog.hand_over(heir.backlog)
