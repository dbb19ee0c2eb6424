"""Counters that go on growing when a server dies and the next one begins at nothing. Pure.

Contract: `look` is called about once a second with what each server's place shows, and `view` gives the sum of the
living and of all that were seen before. A server that dies takes with it what it had counted since it was looked at
last; what it left waiting is counted again, as adopted, by whoever takes it over.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from kong_metering.host.figures import added
from kong_metering.watching.view import PluginView, QueueView, View


class Continuity:
    """What has been counted in each server's place."""

    def __init__(self, places: int) -> None:
        self._last: list[Mapping[str, Any]] = [{} for _ in range(places)]
        # Of servers that are gone.
        self._gone: dict[str, Any] = {}
        self._names: dict[str, str] = {}
        self._requested_at: dict[str, float] = {}
        self.deaths = 0

    def look(self, servers: Sequence[Mapping[str, Any]]) -> None:
        """Take what each place shows now: a server's figures with its `pid`, or nothing."""
        for index, told in enumerate(servers):
            last = self._last[index]
            if last and last["pid"] != told.get("pid", 0):
                self._gone = added([self._gone, View.of([last]).counters()])
                self.deaths += 1
            elif last and len(told) < len(last):
                continue  # it is just being written
            self._last[index] = told if told.get("pid") else {}

    def view(self) -> View:
        """Return what the living tell, with the counts of those that are gone added."""
        view = View.of([told for told in self._last if told])
        self._names.update({plugin.entity: plugin.name for plugin in view.plugins.values()})
        for key, gone in self._gone.get("queues", {}).items():
            entity, _, endpoint = key.partition(" ")
            queue = view.queues.setdefault(key, QueueView(entity, self._names.get(entity, entity), endpoint))
            for name, counts in gone.items():
                getattr(queue, name).update(Counter(counts))
        for entity, gone in self._gone.get("plugins", {}).items():
            plugin = view.plugins.setdefault(entity, PluginView(entity, self._names.get(entity, entity)))
            plugin.requests.update(gone["requests"])
            plugin.events.update(gone["events"])
        for entity, plugin in view.plugins.items():
            plugin.saw(self._requested_at.get(entity))
            if plugin.last_request_at is not None:
                self._requested_at[entity] = plugin.last_request_at
        view.timings = added([view.timings, self._gone.get("timings", {})])
        return view
