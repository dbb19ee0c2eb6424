"""Which queue the events of a configuration go into.

Contract: a queue belongs to one plugin entity **and** one ingest endpoint. All instances of the entity (each of Kong's
workers has its own) share it, and the configuration that was opened last rules it: a rotated token takes over what
waits. Events never leave for another endpoint than the one they were accepted for: a changed endpoint is another queue,
and the old one goes on until it is empty. A queue that no instance uses ends when it is empty.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kong_metering.delivery.ingest import Endpoint, IngestClient
from kong_metering.delivery.queue import EventQueue
from kong_metering.log import LOGGER

if TYPE_CHECKING:
    from kong_metering.clock import Clock
    from kong_metering.config import Entity, PluginConfig
    from kong_metering.config import Queue as QueueSettings
    from kong_metering.log import TroubleLog
    from kong_metering.stats import Stats

_Key = tuple[str, str]


@dataclass
class _Open:
    queue: EventQueue
    endpoint: Endpoint
    settings: QueueSettings
    users: int = 0


class Delivery:
    """All queues of the process."""

    def __init__(self, *, clock: Clock, stats: Stats, troubles: TroubleLog, ca_bundle: str | None = None) -> None:
        self._clock = clock
        self._stats = stats
        self._troubles = troubles
        self._ca_bundle = ca_bundle
        self._lock = threading.Lock()
        self._open: dict[_Key, _Open] = {}

    def open(self, entity: Entity, config: PluginConfig) -> EventQueue:
        """Give the queue for a configuration of a plugin entity; the caller lets go of it with `release`."""
        endpoint = Endpoint.of(config, self._ca_bundle)
        key = (entity.id, endpoint.url)
        with self._lock:
            opened = self._open.get(key)
            if opened is None:
                opened = self._open[key] = _Open(self._queue(entity, endpoint, config), endpoint, config.queue)
            elif (opened.endpoint, opened.settings) != (endpoint, config.queue):
                opened.endpoint, opened.settings = endpoint, config.queue
                opened.queue.reconfigure(config.queue, self._connector(endpoint))
                LOGGER.info("queue %s: a newer configuration took over", opened.queue.name)
            opened.users += 1
            return opened.queue

    def release(self, queue: EventQueue) -> None:
        """Let go of a queue that `open` gave."""
        with self._lock:
            for opened in self._open.values():
                if opened.queue is queue:
                    opened.users -= 1
        self.sweep()

    def sweep(self) -> None:
        """End the queues that nobody uses and that are empty."""
        with self._lock:
            ended = [key for key, opened in self._open.items() if opened.users <= 0 and opened.queue.waiting == 0]
            queues = [self._open.pop(key).queue for key in ended]
        for queue in queues:
            queue.close(self._clock.monotonic())

    def begin_close(self) -> None:
        """Send what waits in all queues at once, without waiting for it; what comes later is sent at once too."""
        with self._lock:
            queues = [opened.queue for opened in self._open.values()]
        for queue in queues:
            queue.begin_close()

    def close(self, timeout: float) -> None:
        """Send what waits in all queues, each batch once, for `timeout` seconds at most; drop and count the rest."""
        deadline = self._clock.monotonic() + timeout
        self.begin_close()
        with self._lock:
            queues = [opened.queue for opened in self._open.values()]
            self._open.clear()
        for queue in queues:
            queue.close(deadline)

    def waiting(self) -> dict[str, int]:
        """Tell how many events wait, by the name of their queue: after a change of the endpoint two have the same."""
        waiting: Counter[str] = Counter()
        with self._lock:
            for opened in self._open.values():
                waiting[opened.queue.name] += opened.queue.waiting
        return dict(waiting)

    def _queue(self, entity: Entity, endpoint: Endpoint, config: PluginConfig) -> EventQueue:
        return EventQueue(
            entity.name,
            config.queue,
            self._connector(endpoint),
            clock=self._clock,
            stats=self._stats,
            troubles=self._troubles,
        )

    def _connector(self, endpoint: Endpoint) -> Callable[[], IngestClient]:
        return lambda: IngestClient(endpoint, self._clock)
