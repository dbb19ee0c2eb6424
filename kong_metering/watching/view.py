"""What all servers together tell at one moment: their figures, read and added up. Pure.

The figures come as JSON from servers that may be of another version, at a hand-over; what is missing counts as nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kong_metering.host.figures import added
from kong_metering.trial.retrying import Condition

_GRAVITY = {condition.value: index for index, condition in enumerate(Condition)}
# How bad what a server tells of the disk is, in this order.
_DISKS = ("none", "works", "hangs", "refuses")
_COUNTS = ("accepted", "adopted", "delivered", "retries", "moved_in", "moved_out", "left")
_COUNTS_BY_NAME = ("dead_letters", "dropped", "requests", "verified")


@dataclass
class QueueView:
    """One queue, of a plugin entity and an endpoint, over all servers; `last_failure` has `at` (epoch) and `reason`."""

    entity: str
    name: str
    endpoint: str
    waiting: int = 0
    oldest_seconds: float = 0.0
    condition: str = Condition.WORKS.value
    next_try_in_seconds: float = 0.0
    suspects: int = 0
    disk: str = "none"
    delivered_at: float | None = None
    last_failure: Mapping[str, Any] | None = None
    counts: Counter[str] = field(default_factory=Counter)
    dead_letters: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    requests: Counter[str] = field(default_factory=Counter)
    verified: Counter[str] = field(default_factory=Counter)

    @property
    def key(self) -> str:
        """What tells it apart from all others."""
        return f"{self.entity} {self.endpoint}"

    def add(self, told: Mapping[str, Any]) -> None:
        """Add what one server tells of it."""
        self.waiting += told.get("waiting", 0)
        self.suspects += told.get("suspects", 0)
        self.oldest_seconds = max(self.oldest_seconds, told.get("oldest_seconds", 0))
        if _GRAVITY.get(told.get("condition", ""), 0) > _GRAVITY.get(self.condition, 0):
            self.condition = told["condition"]
        self.next_try_in_seconds = max(self.next_try_in_seconds, told.get("next_try_in_seconds", 0))
        self.disk = max(self.disk, told.get("disk", "none"), key=_gravity_of_disk)
        self.delivered_at = _latest(self.delivered_at, told.get("delivered_at"))
        failures = [one for one in (self.last_failure, told.get("last_failure")) if one]
        self.last_failure = max(failures, key=lambda one: one["at"], default=None)
        self.counts.update({name: told.get(name, 0) for name in _COUNTS})
        self.dead_letters.update(told.get("dead_letters", {}))
        self.dropped.update(told.get("dropped", {}))
        self.requests.update(told.get("requests", {}))
        self.verified.update(told.get("verified", {}))


@dataclass
class PluginView:
    """What became of the requests of one plugin entity, over all servers."""

    entity: str
    name: str
    requests: Counter[str] = field(default_factory=Counter)
    events: Counter[str] = field(default_factory=Counter)
    # When the last of them was (epoch).
    last_request_at: float | None = None

    def saw(self, request_at: float | None) -> None:
        """Take note of a request; None: there was none."""
        self.last_request_at = _latest(self.last_request_at, request_at)


@dataclass(frozen=True)
class ServerView:
    """One server: its process, 0 if there is none."""

    pid: int
    version: str = ""
    accepted: int = 0
    delivered: int = 0


@dataclass
class View:
    """All of it; `account` are the numbers that add up (`kong_metering/stats.py`)."""

    servers: list[ServerView] = field(default_factory=list)
    queues: dict[str, QueueView] = field(default_factory=dict)
    plugins: dict[str, PluginView] = field(default_factory=dict)
    account: dict[str, Any] = field(default_factory=dict)
    timings: dict[str, Any] = field(default_factory=dict)
    waiting_for_instances: dict[str, int] = field(default_factory=dict)
    # In how many servers each kind of thread has ended, or been at one thing for two minutes.
    stalled: Counter[str] = field(default_factory=Counter)
    spool: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, servers: Iterable[Mapping[str, Any]]) -> View:
        """Add up what servers tell (`plugin.GetStatus`, under `servers`)."""
        view = cls()
        for told in servers:
            view._add(told)
        return view

    @property
    def waiting(self) -> int:
        """How many events wait in all queues."""
        return sum(queue.waiting for queue in self.queues.values())

    @property
    def waiting_later(self) -> int:
        """How many events wait on disk for plugins that Kong has not started."""
        return sum(self.waiting_for_instances.values())

    def counters(self) -> dict[str, Any]:
        """Return what only ever grows while the servers live, to be added to that of others."""
        return {
            "queues": {
                key: {"counts": queue.counts, **{name: getattr(queue, name) for name in _COUNTS_BY_NAME}}
                for key, queue in self.queues.items()
            },
            "plugins": {
                key: {"requests": plugin.requests, "events": plugin.events} for key, plugin in self.plugins.items()
            },
            "timings": self.timings,
        }

    def _add(self, told: Mapping[str, Any]) -> None:
        account = {name: told[name] for name in ("accepted", "adopted", "delivered", "left", "waiting") if name in told}
        by_reason = {name: told[name] for name in ("dead_letters", "dropped", "skipped", "verified") if name in told}
        self.account = added([self.account, account, by_reason])
        self.servers.append(
            ServerView(
                told.get("pid", 0), told.get("version", ""), account.get("accepted", 0), account.get("delivered", 0)
            )
        )
        for one in told.get("queue_details", ()):
            queue = QueueView(one.get("entity", ""), one.get("name", ""), one.get("endpoint", ""))
            self.queues.setdefault(queue.key, queue).add(one)
        for entity, one in told.get("plugins", {}).items():
            plugin = self.plugins.setdefault(entity, PluginView(entity, one.get("name", entity)))
            plugin.requests.update(one.get("requests", {}))
            plugin.events.update(one.get("events", {}))
            plugin.saw(one.get("last_request_at"))
        self.timings = added([self.timings, told.get("timings", {})])
        self.stalled.update(told.get("stalled", {}))
        # Each server counts what waits on disk in the one spool.
        seen = told.get("waiting_for_instances", {})
        self.waiting_for_instances = {
            name: max(seen.get(name, 0), self.waiting_for_instances.get(name, 0))
            for name in {**seen, **self.waiting_for_instances}
        }
        self.spool = told.get("spool") or self.spool


def _latest(*moments: float | None) -> float | None:
    return max((moment for moment in moments if moment is not None), default=None)


def _gravity_of_disk(word: str) -> int:
    return _DISKS.index(word) if word in _DISKS else 0
