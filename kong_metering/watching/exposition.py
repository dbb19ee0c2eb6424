"""What is watched, as Prometheus and OpenMetrics read it. Pure.

Names begin with `kong_metering_`, units are seconds and bytes. A plugin entity is named by `plugin` (its instance name
and id) and `plugin_id`; no label has a client's value, so their number is that of the plugin entities.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, exposition
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    StateSetMetricFamily,
)
from prometheus_client.registry import Collector

from kong_metering.trial.retrying import Condition

if TYPE_CHECKING:
    from prometheus_client.core import Metric

    from kong_metering.watching.view import QueueView, View

_PLUGIN = ["plugin", "plugin_id"]
_QUEUE = [*_PLUGIN, "endpoint"]
_TIMES = {
    "post": ("post_seconds", "Time of a request to an ingest endpoint"),
    "write": ("disk_write_seconds", "Time of a write of events to the spool"),
    "sync": ("disk_sync_seconds", "Time until the disk confirmed what was written"),
}


@dataclass(frozen=True)
class Surroundings:
    """What is known beside the servers' figures; bytes of the spool are None where there is none, or it is not seen."""

    version: str
    serving: int
    expected: int
    deaths: int
    spool_bytes: int | None = None
    dead_letter_bytes: int | None = None
    delivered_bytes: int | None = None
    free_bytes: int | None = None


def exposed(view: View, surroundings: Surroundings, accept: str | None) -> tuple[bytes, str]:
    """Return the text, and its content type, in the newest format that an `Accept` header takes."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Figures(view, surroundings))
    encode, content_type = exposition.choose_encoder(accept or "")
    return encode(registry), content_type


class _Figures(Collector):
    """Gives the figures of one moment."""

    def __init__(self, view: View, surroundings: Surroundings) -> None:
        self._view = view
        self._surroundings = surroundings

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics."""
        yield from self._of_servers()
        yield from self._of_plugins()
        yield from self._of_queues()
        yield from self._of_the_spool()
        yield from self._of_times()

    def _of_servers(self) -> Iterator[Metric]:
        around = self._surroundings
        yield InfoMetricFamily("kong_metering_build", "Version that runs", {"version": around.version})
        yield GaugeMetricFamily("kong_metering_servers", "Servers that serve Kong", around.serving)
        yield GaugeMetricFamily("kong_metering_servers_expected", "Servers that there should be", around.expected)
        yield CounterMetricFamily("kong_metering_server_deaths", "Servers that ended and were replaced", around.deaths)
        stalled = GaugeMetricFamily(
            "kong_metering_stalled", "Servers whose thread has ended, or been at one thing for long", labels=["thread"]
        )
        for thread, servers in self._view.stalled.items():
            stalled.add_metric([thread], servers)
        yield stalled

    def _of_plugins(self) -> Iterator[Metric]:
        requests = CounterMetricFamily(
            "kong_metering_requests",
            "Requests whose log phase was seen, by what came of them",
            labels=[*_PLUGIN, "outcome"],
        )
        events = CounterMetricFamily("kong_metering_events", "Events that requests gave", labels=[*_PLUGIN, "type"])
        last = GaugeMetricFamily(
            "kong_metering_last_request_timestamp_seconds", "When the last log phase was seen", labels=_PLUGIN
        )
        for plugin in self._view.plugins.values():
            names = [plugin.name, plugin.entity]
            _add_each(requests, names, plugin.requests)
            _add_each(events, names, plugin.events)
            if plugin.last_request_at is not None:
                last.add_metric(names, plugin.last_request_at)
        yield requests
        yield events
        yield last

    def _of_queues(self) -> Iterator[Metric]:
        counts = {
            "accepted": "Events that a queue took",
            "adopted": "Events that a process before this one had accepted",
            "delivered": "Events that the endpoint answered with a 2xx",
            "retries": "Requests for events that had failed before",
        }
        for name, meaning in counts.items():
            yield self._counted(f"kong_metering_{name}", meaning, lambda queue, name=name: queue.counts[name])
        yield self._by_label("kong_metering_deliveries", "Requests to the endpoint", "status", lambda one: one.requests)
        yield self._by_label(
            "kong_metering_dead_letters", "Events set aside as dead letters", "reason", lambda one: one.dead_letters
        )
        yield self._by_label("kong_metering_dropped", "Events that were given up", "reason", lambda one: one.dropped)
        yield self._by_label(
            "kong_metering_verified", "Delivered events that were read back", "result", lambda one: one.verified
        )
        yield self._gauge("kong_metering_waiting", "Events that wait for delivery", lambda one: one.waiting)
        yield self._gauge(
            "kong_metering_oldest_waiting_seconds", "Age of the oldest event that waits", lambda one: one.oldest_seconds
        )
        yield self._gauge(
            "kong_metering_next_try_seconds",
            "Time until the endpoint is asked again",
            lambda one: one.next_try_in_seconds,
        )
        yield self._gauge("kong_metering_suspects", "Events that fail while others pass", lambda one: one.suspects)
        yield self._gauge(
            "kong_metering_last_delivery_timestamp_seconds", "When the endpoint last took events", _delivered_at
        )
        yield self._gauge(
            "kong_metering_disk_refuses",
            "1 while events wait in memory because the disk refuses them",
            lambda one: int(one.disk == "refuses"),
        )
        yield self._gauge(
            "kong_metering_disk_hangs",
            "1 while a write of events to disk does not come to an end",
            lambda one: int(one.disk == "hangs"),
        )
        yield self._conditions()
        waiting = GaugeMetricFamily(
            "kong_metering_waiting_for_instances", "Events on disk whose plugin Kong has not started", labels=["plugin"]
        )
        for name, events in self._view.waiting_for_instances.items():
            waiting.add_metric([name], events)
        yield waiting

    def _conditions(self) -> Metric:
        family = StateSetMetricFamily(
            "kong_metering_endpoint_condition", "How it stands with the endpoint", labels=_QUEUE
        )
        for queue in self._view.queues.values():
            family.add_metric(_names(queue), {one.value: one.value == queue.condition for one in Condition})
        return family

    def _of_the_spool(self) -> Iterator[Metric]:
        around, spool = self._surroundings, self._view.spool
        if spool is None:
            return
        sizes = {
            "spool_bytes": ("Bytes of the spool on disk", around.spool_bytes),
            "spool_max_bytes": ("Bytes above which the oldest events are dropped", spool.get("max_bytes")),
            "spool_free_bytes": ("Bytes that the spool's file system has left", around.free_bytes),
            "spool_delivered_bytes": ("Bytes of delivered events that are kept on disk", around.delivered_bytes),
            "spool_dead_letter_bytes": ("Bytes of the dead letters on disk", around.dead_letter_bytes),
        }
        for name, (meaning, size) in sizes.items():
            if size is not None:
                yield GaugeMetricFamily(f"kong_metering_{name}", meaning, size)

    def _of_times(self) -> Iterator[Metric]:
        timings = self._view.timings
        phases = HistogramMetricFamily(
            "kong_metering_phase_seconds", "Time of a phase, from Kong's call to its last answer", labels=["phase"]
        )
        for name in ("access", "log"):
            _add_times(phases, [name], timings.get(name))
        yield phases
        for name, (metric, meaning) in _TIMES.items():
            family = HistogramMetricFamily(f"kong_metering_{metric}", meaning, labels=[])
            _add_times(family, [], timings.get(name))
            yield family

    def _counted(self, name: str, meaning: str, of: Any) -> Metric:
        family = CounterMetricFamily(name, meaning, labels=_QUEUE)
        for queue in self._view.queues.values():
            family.add_metric(_names(queue), of(queue))
        return family

    def _gauge(self, name: str, meaning: str, of: Any) -> Metric:
        family = GaugeMetricFamily(name, meaning, labels=_QUEUE)
        for queue in self._view.queues.values():
            if (value := of(queue)) is not None:
                family.add_metric(_names(queue), value)
        return family

    def _by_label(self, name: str, meaning: str, label: str, of: Any) -> Metric:
        family = CounterMetricFamily(name, meaning, labels=[*_QUEUE, label])
        for queue in self._view.queues.values():
            _add_each(family, _names(queue), of(queue))
        return family


def _names(queue: QueueView) -> list[str]:
    return [queue.name, queue.entity, queue.endpoint]


def _delivered_at(queue: QueueView) -> float | None:
    return queue.delivered_at


def _add_each(family: CounterMetricFamily, labels: Iterable[str], counts: Mapping[str, int]) -> None:
    for name, count in counts.items():
        family.add_metric([*labels, name], count)


def _add_times(family: HistogramMetricFamily, labels: list[str], told: Mapping[str, Any] | None) -> None:
    buckets, sum_so_far = [], 0
    for bound, count in (told or {}).get("counts", {}).items():
        sum_so_far += count
        buckets.append((bound, sum_so_far))
    if buckets:
        family.add_metric(labels, buckets, (told or {}).get("sum", 0.0))
