"""The status page: what waits, for whom, why, and the last hour, for people without a dashboard. Pure."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import TYPE_CHECKING

from kong_metering.plurals import counted
from kong_metering.watching.words import ago, duration, servers_serve, stalled_threads, standing, waiting

if TYPE_CHECKING:
    from kong_metering.watching.exposition import Surroundings
    from kong_metering.watching.view import QueueView, View

REFRESH_SECONDS = 5
_STYLE = """
:root { color-scheme: light dark; --bad: #c22; --good: #287d3c; --dim: #737373; }
@media (prefers-color-scheme: dark) { :root { --bad: #ff7b72; --good: #56d364; --dim: #949494; } }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; }
h1 { font-size: 1.3rem; } h2 { font-size: 1.05rem; margin-top: 2rem; } a { color: inherit; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .4rem 1.2rem .4rem 0; border-bottom: 1px solid #8884; vertical-align: top; }
th { color: var(--dim); font-weight: 500; white-space: nowrap; }
th:last-child, td:last-child { padding-right: 0; }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td { overflow-wrap: anywhere; } td.t { width: 22rem; min-width: 12rem; } small { display: block; color: var(--dim); }
.bad { color: var(--bad); font-weight: 600; } .good { color: var(--good); } .dim { color: var(--dim); }
@media (max-width: 45rem) {
  tr:first-child { display: none; } tr { display: block; padding: .5rem 0; border-bottom: 1px solid #8884; }
  td, td.t, td.n { display: block; width: auto; border: 0; padding: .1rem 0; text-align: left; }
  td:empty { display: none; }
  td:not(.t)::before { content: attr(title) ": "; color: var(--dim); }
}
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
    ]
    if view.plugins:
        body += [
            f"<h2>Requests, last {duration(hour.seconds)}</h2>",
            _table(_REQUEST_HEADS, _request_rows(view, hour, now)),
        ]
    if view.waiting_for_instances:
        body += [
            "<h2>On disk, until Kong starts their plugin</h2>",
            _table(
                ("+plugin", "#events"), [[_text(name), _number(n)] for name, n in view.waiting_for_instances.items()]
            ),
        ]
    stamp = datetime.fromtimestamp(now, timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
    body.append(f'<p class=dim>{stamp} · refreshes each {REFRESH_SECONDS} s · <a href="/metrics">metrics</a></p>')
    head = (
        f'<meta charset="utf-8"><meta http-equiv="refresh" content="{REFRESH_SECONDS}"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style>'
    )
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>'.encode()


# What a column holds: `+` text, the others what is short, of which `#` is a number.
_QUEUE_HEADS = (
    "+plugin and endpoint",
    "+state",
    "#waiting",
    "#oldest",
    "#delivered",
    "#last delivery",
    "#dead letters",
    "#dropped",
)
_REQUEST_HEADS = ("+plugin", "#last request", "#metered", "not metered, by reason", "#events delivered")


def _summary(view: View, around: Surroundings) -> str:
    is_whole = around.serving >= around.expected
    words = [_mark(servers_serve(around.serving, around.expected), "good" if is_whole else "bad")]
    if around.deaths:
        words.append(_mark(counted(around.deaths, "ended and was replaced", "ended and were replaced"), "bad"))
    if stalled := stalled_threads(view):
        words.append(_mark(f"delivery is not alive: {', '.join(stalled)} stalled", "bad"))
    words.append(waiting(view.waiting, view.waiting_later))
    if around.spool_bytes is not None and view.spool:
        most = view.spool.get("max_bytes") or 0
        share = f" ({around.spool_bytes * 100 // most} % of its bound)" if most else ""
        words.append(f"the spool has {around.spool_bytes / 1e6:,.1f} MB{share}")
    return " · ".join(words)


def _worst_first(queues: Iterable[QueueView]) -> list[QueueView]:
    return sorted(queues, key=lambda one: (standing(one).is_well, -one.waiting, one.name))


def _queue_row(queue: QueueView, now: float) -> list[str]:
    told, failure = standing(queue), queue.last_failure
    why = f"last failure {ago(now, failure['at'])}: {failure['reason']}" if failure else ""
    return [
        _text(queue.name) + _small(queue.endpoint),
        _mark(told.words, "good" if told.is_well else "bad") + _small(why),
        _number(queue.waiting),
        _text(duration(queue.oldest_seconds) if queue.waiting else ""),
        _number(queue.counts["delivered"]),
        _moment(now, queue.delivered_at),
        _number(queue.dead_letters.total(), is_bad=True),
        _number(queue.dropped.total(), is_bad=True),
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
    kinds = [{"+": "t", "#": "n"}.get(head[0], "") for head in heads]
    names = [head.lstrip("+#") for head in heads]
    columns = "".join(f'<th class="{kind}">{name}</th>' for kind, name in zip(kinds, names, strict=True))
    lines = [
        "".join(
            f'<td class="{kind}" title="{name}">{cell}</td>' for kind, name, cell in zip(kinds, names, row, strict=True)
        )
        for row in rows
    ]
    return f"<table><tr>{columns}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _mark(words: str, kind: str) -> str:
    return f"<span class={kind}>{html.escape(words)}</span>"


def _small(words: str) -> str:
    return f"<small>{html.escape(words)}</small>" if words else ""


def _text(words: str) -> str:
    return html.escape(words)


def _moment(now: float, moment: float | None) -> str:
    return "never" if moment is None else ago(now, moment)


def _number(number: int, *, is_bad: bool = False) -> str:
    written = f"{number:,}"
    return _mark(written, "bad") if is_bad and number else written
