"""`kong-metering status`: what the running servers do, for whom events wait, and why."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.text import Text

from kong_metering.commands import words
from kong_metering.commands.filters import reasons_told
from kong_metering.commands.options import json_option
from kong_metering.commands.output import Failure, cell, console, cut, say, table, tell, tell_facts
from kong_metering.commands.serversocket import cause_of_silence, server_options, server_socket, server_status
from kong_metering.plurals import counted, form
from kong_metering.quantities import Duration
from kong_metering.watching.view import View
from kong_metering.watching.words import ago, duration, stalled_threads, standing, waiting

if TYPE_CHECKING:
    from rich.table import Table

    from kong_metering.watching.view import PluginView, QueueView

# From here on the tables show numbers whole and what the other cells begin with; a pipe is wider than this.
_WIDE = 200


@click.command("status")
@server_options
@click.option("--watch", type=Duration(), metavar="TIME", help="Show it anew each so often, until Ctrl-C.")
@json_option("one JSON document")
@click.pass_context
def status(  # noqa: PLR0913, PLR0917 - the command's options
    context: click.Context,
    kong_prefix: Path,
    socket_name: str | None,
    socket_path: Path | None,
    plugin_name: str,
    timeout: float,
    watch: float | None,
    as_json: bool,  # noqa: FBT001 - click hands it over so
) -> None:
    """Show what the running servers do: what waits, for whom, and why.

    Asks the plugin server itself, and changes nothing; `kong-metering spool status` looks at the disk instead, also
    when nothing runs. Run it as the user that the plugin server runs as. The counts are those since the servers were
    started.

    Exit status: 0 when the plugin server answered, 1 when it did not, 2 wrong call; 130 when --watch was ended.
    """
    path = server_socket(context, kong_prefix, socket_name, socket_path, plugin_name)
    while True:
        told = _told(path, timeout)
        if as_json:
            say(words.json_document(_document(told)))
        else:
            if watch:
                click.clear()
            _print(told, time.time())
        if not watch:
            return
        time.sleep(watch)


def _told(path: Path, timeout: float) -> Mapping[str, Any]:
    try:
        return server_status(path, timeout)[1]
    except (OSError, ValueError) as error:
        raise Failure(f"{path}: {cause_of_silence(error, timeout)}") from None


def _view(told: Mapping[str, Any]) -> View:
    return View.of(told["Status"].get("servers", ()))


def _document(told: Mapping[str, Any]) -> dict[str, Any]:
    view = _view(told)
    return {
        "servers": [vars(server) for server in view.servers],
        "instances": len(told.get("Instances", ())),
        "phases_under_way": told.get("Events", 0),
        "account": view.account,
        # Not `asdict`: it makes other counters of counters.
        "plugins": [vars(plugin) for plugin in view.plugins.values()],
        "queues": [vars(queue) for queue in view.queues.values()],
        "waiting_for_instances": view.waiting_for_instances,
        "stalled": stalled_threads(view),
        "spool": view.spool,
    }


def _print(told: Mapping[str, Any], now: float) -> None:
    view = _view(told)
    processes = ", ".join(f"{server.pid} ({server.version or 'another version'})" for server in view.servers)
    waits = waiting(view.waiting, view.waiting_later)
    servers, instances = form(len(view.servers), "server"), counted(len(told.get("Instances", ())), "instance")
    tell(f"{servers} {processes}; {instances}; {waits}")
    if stalled := stalled_threads(view):
        tell(f"DELIVERY IS NOT ALIVE: {', '.join(stalled)} stalled for two minutes")
    for name, events in view.waiting_for_instances.items():
        what = f"{counted(events, 'event')} of {words.shown(name)} {form(events, 'waits', 'wait')}"
        tell(f"{what} on disk until Kong starts the plugin: send it a request")
    if not view.plugins:
        tell("No plugin has been started yet: Kong starts one with its first metered request.")
        return
    if console().width < _WIDE:
        _print_plugins(view, now)
    else:
        _print_tables(view, now)


def _print_plugins(view: View, now: float) -> None:
    """Print a block for each plugin entity, which is legible wherever it is shown."""
    queues, plugins = view.queues.values(), view.plugins
    names = {queue.entity: queue.name for queue in queues} | {entity: one.name for entity, one in plugins.items()}
    for entity, name in names.items():
        console().print()
        console().print(cell(name, "bold"))
        of_plugin = _facts_of_plugin(plugins[entity], now) if entity in plugins else ()
        of_queues = (_facts_of_queue(queue, now) for queue in queues if queue.entity == entity)
        tell_facts([*of_plugin, *chain.from_iterable(of_queues)])


def _facts_of_plugin(plugin: PluginView, now: float) -> Iterator[tuple[str, Text]]:
    counts = {"metered": plugin.requests["metered"]} | +plugin.requests
    last = "" if plugin.last_request_at is None else f"; the last {ago(now, plugin.last_request_at)}"
    yield "requests", cell(", ".join(f"{count:,} {name}" for name, count in counts.items()) + last)
    yield "events", cell(f"{plugin.events.total():,}")


def _facts_of_queue(queue: QueueView, now: float) -> Iterator[tuple[str, Text]]:
    yield "endpoint", cell(queue.endpoint)
    yield "state", _condition(queue)
    oldest = f", the oldest for {duration(queue.oldest_seconds)}" if queue.waiting else ""
    yield "waiting", cell(words.events(queue.waiting) + oldest)
    last = "" if queue.delivered_at is None else f", the last {ago(now, queue.delivered_at)}"
    yield "delivered", cell(words.events(queue.counts["delivered"]) + last)
    for name, counts in (("dead letters", queue.dead_letters), ("dropped", queue.dropped)):
        if +counts:
            yield name, cell(reasons_told(+counts), "yellow")
    if +queue.verified:
        yield "read back", cell(reasons_told(+queue.verified))
    if queue.last_failure:
        yield "last failure", cell(f"{ago(now, queue.last_failure['at'])}: {queue.last_failure['reason']}")


def _print_tables(view: View, now: float) -> None:
    console().print(_queues(view, now))
    console().print(_requests(view, now))
    for queue in view.queues.values():
        if queue.last_failure:
            when, why = ago(now, queue.last_failure["at"]), words.shown(queue.last_failure["reason"])
            console().print(Text(f"{queue.name}: last failure {when}: {why}"))


def _queues(view: View, now: float) -> Table:
    made = table(
        "plugin",
        "endpoint",
        "state",
        "waiting",
        "oldest",
        "delivered",
        "last",
        "dead letters",
        "dropped",
        "read back",
        whole=["waiting"],
    )
    for queue in view.queues.values():
        made.add_row(
            cut(queue.name),
            cut(queue.endpoint),
            _condition(queue),
            str(queue.waiting),
            duration(queue.oldest_seconds) if queue.waiting else "",
            str(queue.counts["delivered"]),
            _moment(now, queue.delivered_at),
            _by_reason(queue.dead_letters),
            _by_reason(queue.dropped),
            _by_reason(queue.verified),
        )
    return made


def _condition(queue: QueueView) -> Text:
    told = standing(queue)
    return cell(told.words, "" if told.is_well else "red")


def _moment(now: float, moment: float | None) -> str:
    return "never" if moment is None else ago(now, moment)


def _requests(view: View, now: float) -> Table:
    whole = ["last request", "requests metered", "events"]
    made = table("plugin", "last request", "requests metered", "not metered", "events", whole=whole)
    for plugin in view.plugins.values():
        skipped = Counter({name: count for name, count in plugin.requests.items() if name != "metered"})
        metered, events = plugin.requests["metered"], plugin.events.total()
        last = _moment(now, plugin.last_request_at)
        made.add_row(cut(plugin.name), last, str(metered), _by_reason(skipped), str(events))
    return made


def _by_reason(counts: Counter[str]) -> Text:
    return cell(", ".join(f"{count} {reason}" for reason, count in counts.items() if count))
