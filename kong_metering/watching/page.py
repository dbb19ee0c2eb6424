"""The status page: what waits, for whom, why, and the last hour, for people without a dashboard. Pure."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import TYPE_CHECKING

from kong_metering.watching.words import ago, duration, stalled_threads, standing

if TYPE_CHECKING:
    from kong_metering.watching.exposition import Surroundings
    from kong_metering.watching.view import QueueView, View

REFRESH_SECONDS = 5
_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; }
h1 { font-size: 1.3rem; } h2 { font-size: 1.05rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .35rem .7rem .35rem 0; border-bottom: 1px solid #8884; vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
.bad { color: #c33; font-weight: 600; } .good { color: #287d3c; } .dim { color: #888; }
"""


@dataclass(frozen=True)
class LastHour:
    """What came within the last hour, or since it has been watched: requests by outcome, and delivered, by entity."""

    seconds: float = 0.0
    requests: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    delivered: Mapping[str, int] = field(default_factory=dict)


def status_page(view: View, around: Surroundings, hour: LastHour, now: float) -> bytes:
    """Return the page; `now` is epoch seconds."""
    title = "metering-and-billing"
    body = [
        f"<h1>{title} <span class=dim>{html.escape(around.version)}</span></h1>",
        f"<p>{_summary(view, around)}</p>",
        "<h2>Queues</h2>",
        _table(_QUEUE_HEADS, [_queue_row(queue, now) for queue in _worst_first(view.queues.values())])
        if view.queues
        else "<p>No plugin has been started yet: Kong starts one with its first metered request.</p>",
        f"<h2>Requests, last {duration(hour.seconds)}</h2>",
        _table(_REQUEST_HEADS, _request_rows(view, hour, now)),
    ]
    if view.waiting_for_instances:
        body += [
            "<h2>On disk, until Kong starts their plugin</h2>",
            _table(
                ("plugin", "#events"), [[_text(name), _number(n)] for name, n in view.waiting_for_instances.items()]
            ),
        ]
    stamp = datetime.fromtimestamp(now, timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
    body.append(f'<p class=dim>{stamp} · refreshes each {REFRESH_SECONDS} s · <a href="/metrics">metrics</a></p>')
    head = (
        f'<meta charset="utf-8"><meta http-equiv="refresh" content="{REFRESH_SECONDS}"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style>'
    )
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>'.encode()


_QUEUE_HEADS = (
    "plugin",
    "endpoint",
    "it",
    "#waiting",
    "oldest",
    "#delivered",
    "last delivery",
    "#dead letters",
    "#dropped",
    "last failure",
)
_REQUEST_HEADS = ("plugin", "last request", "#metered", "not metered, by reason", "#events delivered")


def _summary(view: View, around: Surroundings) -> str:
    is_whole = around.serving >= around.expected
    servers = f"{around.serving} of {around.expected} servers serve"
    words = [_mark(servers, "good" if is_whole else "bad")]
    if around.deaths:
        words.append(_mark(f"{around.deaths} ended and were replaced", "bad"))
    if stalled := stalled_threads(view):
        words.append(_mark(f"delivery is not alive: {', '.join(stalled)} stalled", "bad"))
    words.append(f"{view.waiting:,} events wait")
    if around.spool_bytes is not None and view.spool:
        most = view.spool.get("max_bytes") or 0
        share = f" ({around.spool_bytes * 100 // most} % of its bound)" if most else ""
        words.append(f"the spool has {around.spool_bytes / 1e6:,.1f} MB{share}")
    return " · ".join(words)


def _worst_first(queues: Iterable[QueueView]) -> list[QueueView]:
    return sorted(queues, key=lambda one: (one.condition == "works", -one.waiting, one.name))


def _queue_row(queue: QueueView, now: float) -> list[str]:
    told = standing(queue)
    failure = queue.last_failure
    return [
        _text(queue.name),
        _text(queue.endpoint),
        f"<td>{_mark(told.words, 'good' if told.is_well else 'bad')}</td>",
        _number(queue.waiting),
        _text(duration(queue.oldest_seconds) if queue.waiting else ""),
        _number(queue.counts["delivered"]),
        _moment(now, queue.delivered_at),
        _number(queue.dead_letters.total(), is_bad=True),
        _number(queue.dropped.total(), is_bad=True),
        _text(f"{failure['reason']} ({ago(now, failure['at'])})" if failure else ""),
    ]


def _request_rows(view: View, hour: LastHour, now: float) -> list[list[str]]:
    rows = []
    for entity, plugin in view.plugins.items():
        requests = hour.requests.get(entity, {})
        skipped = {name: count for name, count in requests.items() if name != "metered" and count}
        rows.append(
            [
                _text(plugin.name),
                _moment(now, plugin.last_request_at),
                _number(requests.get("metered", 0)),
                _text(", ".join(f"{count:,} {name}" for name, count in skipped.items())),
                _number(hour.delivered.get(entity, 0)),
            ]
        )
    return rows


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    columns = "".join(f"<th class=n>{name[1:]}</th>" if name.startswith("#") else f"<th>{name}</th>" for name in heads)
    lines = "".join(f"<tr>{line}</tr>" for line in map("".join, rows))
    return f"<table><tr>{columns}</tr>{lines}</table>"


def _mark(words: str, kind: str) -> str:
    return f"<span class={kind}>{html.escape(words)}</span>"


def _text(words: str) -> str:
    return f"<td>{html.escape(words)}</td>"


def _moment(now: float, moment: float | None) -> str:
    return _text("never" if moment is None else ago(now, moment))


def _number(number: int, *, is_bad: bool = False) -> str:
    written = f"{number:,}"
    return f"<td class=n>{_mark(written, 'bad') if is_bad and number else written}</td>"
