"""`make demo`: requests go through a gateway, events arrive at a collector, and a table tells whether it all adds up.

`make sandbox` keeps gateway, plugin server and collector running, to play with.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from kong_metering_sandbox.collector.process import CollectorProcess
from kong_metering_sandbox.contained import contained
from kong_metering_sandbox.gateways import GATEWAYS, GatewayError, wait_for
from kong_metering_sandbox.playground import play
from kong_metering_sandbox.stage import DECK_EXAMPLE, TOKEN, VARIABLES, deck_example, declarative
from kong_metering_sandbox.status import plugin_status
from kong_metering_sandbox.troubles import SUBJECT_HEADER
from kong_metering_sandbox.upstream_process import UpstreamProcess

if TYPE_CHECKING:
    from kong_metering_sandbox.collector.client import CollectorClient
    from kong_metering_sandbox.gateways import Gateway

_CLIENTS = 8
_DELIVERY_SECONDS = 60.0
_POLL_SECONDS = 0.05
_WARM_UP = 20
_QUIET_SECONDS = 0.3


@dataclass(frozen=True)
class Kind:
    """One kind of request in the demo: who it is billed to (None: nobody), its headers, its share of the traffic."""

    label: str
    subject: str | None
    headers: tuple[tuple[bytes, bytes], ...]
    share: int


_HEADER = SUBJECT_HEADER.encode()
_NOBODY = Kind("no header", None, (), 8)
KINDS = (
    Kind("acme", "acme", ((_HEADER, b"acme"),), 40),
    Kind("globex", "globex", ((_HEADER, b"globex"), (b"user-agent", b"globex-sdk/2.1")), 25),
    Kind("initech", "initech", ((_HEADER, b"initech"),), 10),
    Kind("other letter case", "acme", ((b"X-TENANT-ID", b"acme"),), 3),
    Kind("sent twice", "acme", ((_HEADER, b"acme"), (_HEADER, b"globex")), 3),
    Kind("not UTF-8", "café", ((_HEADER, b"caf\xe9"),), 3),
    Kind("junk elsewhere", "globex", ((_HEADER, b"globex"), (b"x-junk", b"\xff\xfe\x80")), 3),
    Kind("behind 110 others", "initech", (*((b"x-%d" % n, b"1") for n in range(110)), (_HEADER, b"initech")), 1),
    _NOBODY,
    Kind("blank header", None, ((_HEADER, b"  "),), 4),
)


def main() -> int:
    """Run the demo or the sandbox; returns the exit status, 1 when the account does not add up."""
    options = _options()
    return contained(lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    console = Console(highlight=False)
    try:
        with tempfile.TemporaryDirectory(prefix="kong-metering-") as directory:
            if options.keep:
                return play(console, Path(directory), options.gateway, usual_ports=not options.any_ports)
            return _demo(console, Path(directory), options.gateway, options.requests)
    except GatewayError as error:
        console.print(f"[red]The demo cannot run:[/] {escape(str(error))}")
        return 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--gateway", choices=sorted(GATEWAYS), default="standin", help="the stand-in, or a real Kong")
    parser.add_argument("--requests", type=int, default=3000, help="how many requests to send")
    parser.add_argument("--any-ports", action="store_true", help="with --keep: not Kong's usual ports")
    parser.add_argument("--keep", action="store_true", help="send nothing, and keep everything running")
    return parser.parse_args()


def _demo(console: Console, directory: Path, gateway_name: str, requests: int) -> int:
    with ExitStack() as running:
        console.print(f"Starting gateway ({gateway_name}), plugin server, upstream and collector ...")
        upstream = running.enter_context(UpstreamProcess())
        collector = running.enter_context(CollectorProcess(tokens=[TOKEN]))
        configuration = declarative(upstream.url, deck_example(collector.ingest_v3))
        gateway = GATEWAYS[gateway_name](directory / "gateway", configuration, environment=VARIABLES)
        running.enter_context(gateway)
        console.print(
            f"Applied {DECK_EXAMPLE.name} of the vendor plugin's decK examples: metering by {SUBJECT_HEADER}."
        )
        before = _status_after_warm_up(gateway)
        sent = _send(console, gateway.proxy_port, requests)
        billable = sum(count for kind, count in sent.items() if kind.subject is not None)
        _wait_for_delivery(collector.client, billable)
        after = _settled_status(gateway)
        return _report(console, collector.client, sent, _difference(after, before))


def _status_after_warm_up(gateway: Gateway) -> Mapping[str, Any]:
    """Ask the plugin server for its account when nothing more comes into it.

    A request's log phase runs after its answer: the probe that found the gateway ready may still be on its way, if it
    met a plugin server at all. What is sent here comes after it, to both of Kong's workers, and is waited for.
    """
    for _ in range(_WARM_UP):
        _send_batch(gateway.proxy_port, [_NOBODY])
    wait_for(lambda: _nobodys(plugin_status(gateway)) >= _WARM_UP, "the plugin server has counted the first requests")
    status = plugin_status(gateway)
    while True:
        time.sleep(_QUIET_SECONDS)
        before, status = status, plugin_status(gateway)
        if _nobodys(status) == _nobodys(before):
            return status


def _nobodys(status: Mapping[str, Any]) -> int:
    return int(status["skipped"].get("no_subject", 0))


def _send(console: Console, port: int, requests: int) -> Counter[Kind]:
    """Send the traffic over a few connections at a time, and count what was sent and answered."""
    traffic = random.Random(1).choices(KINDS, [kind.share for kind in KINDS], k=requests)  # noqa: S311 - a fixed mix
    batches = [traffic[start : start + 50] for start in range(0, requests, 50)]
    answered: Counter[Kind] = Counter()
    with ThreadPoolExecutor(_CLIENTS) as clients:
        results = clients.map(lambda batch: _send_batch(port, batch), batches)
        for result in track(results, f"Sending {requests} requests", len(batches), console=console):
            answered.update(result)
    return answered


def _send_batch(port: int, kinds: list[Kind]) -> list[Kind]:
    answered = []
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        reader = connection.makefile("rb")
        for kind in kinds:
            lines = [b"GET /orders/42?page=1 HTTP/1.1", b"Host: api.example"]
            lines += [name + b": " + value for name, value in kind.headers]
            connection.sendall(b"\r\n".join(lines) + b"\r\n\r\n")
            _read_answer(reader)
            answered.append(kind)
    return answered


def _read_answer(reader: BinaryIO) -> None:
    if not reader.readline().startswith(b"HTTP/1.1 "):
        raise GatewayError("the gateway ended a connection before it answered")
    length, chunked = 0, False
    while (line := reader.readline()) not in (b"\r\n", b""):
        name, _, value = line.lower().partition(b":")
        length = int(value) if name == b"content-length" else length
        chunked = chunked or (name == b"transfer-encoding" and b"chunked" in value)
    if chunked:
        while (size := int(reader.readline(), 16)) > 0:
            reader.read(size + 2)
        reader.readline()
    reader.read(length)


def _wait_for_delivery(collector: CollectorClient, expected: int) -> None:
    """Wait until all events are there, or no new ones come; the report tells what is missing."""
    try:
        collector.wait_for_events(expected, timeout=_DELIVERY_SECONDS)
    except TimeoutError:
        return


def _settled_status(gateway: Gateway) -> Mapping[str, Any]:
    """Ask the plugin server for its account once nothing is on its way: it counts an event when it has the answer."""
    deadline = time.monotonic() + _DELIVERY_SECONDS
    while (status := plugin_status(gateway))["waiting"] and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    return status


def _difference(after: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, int]:
    """Tell what the plugin server counted between two moments: what came before is not part of it."""
    flat = [_flat(status) for status in (after, before)]
    return {name: count - flat[1].get(name, 0) for name, count in flat[0].items()}


def _flat(status: Mapping[str, Any]) -> dict[str, int]:
    counts = {"accepted": status["accepted"], "delivered": status["delivered"]}
    for group in ("dropped", "skipped"):
        counts |= {f"{group}: {reason}": count for reason, count in status[group].items()}
    return counts


def _report(console: Console, collector: CollectorClient, sent: Counter[Kind], counted: Mapping[str, int]) -> int:
    usage = {item.subject: item.count for item in collector.usage()}
    expected: Counter[str] = Counter()
    for kind, count in sent.items():
        expected[kind.subject or ""] += count
    console.print(_table(sent, expected, usage, counted))
    for event in collector.events()[:1]:
        console.print("An event, as the collector has it:")
        shown = {"type": event.type, "source": event.source, "subject": event.subject, "time": event.time}
        console.print_json(json.dumps({"id": event.id, **shown, "data": event.data}, ensure_ascii=False))
    return _verdict(console, collector, expected, usage, counted)


def _table(sent: Counter[Kind], expected: Counter[str], usage: Mapping[str, int], counted: Mapping[str, int]) -> Table:
    table = Table()
    table.add_column("tenant")
    for name in ("requests", "events"):
        table.add_column(name, justify="right")
    table.add_column("dropped, and why")
    table.add_column("among the requests")
    for subject in sorted((set(expected) | set(usage)) - {""}):
        hostile = [f"{kind.label}: {count}" for kind, count in sent.items() if _is_special(kind, subject)]
        delivered = usage.get(subject, 0)
        table.add_row(subject, str(expected[subject]), str(delivered), "", "\n".join(hostile), end_section=True)
    why = [f"{name}: {count}" for name, count in counted.items() if name.startswith(("dropped", "skipped")) and count]
    nobody = [f"{kind.label}: {count}" for kind, count in sent.items() if kind.subject is None]
    table.add_row("[dim]nobody[/]", str(expected[""]), "0", "\n".join(why), "\n".join(nobody))
    return table


def _is_special(kind: Kind, subject: str) -> bool:
    return kind.subject == subject and kind.label != subject


def _verdict(
    console: Console,
    collector: CollectorClient,
    expected: Counter[str],
    usage: Mapping[str, int],
    counted: Mapping[str, int],
) -> int:
    stats = collector.stats()
    billable = {subject: count for subject, count in expected.items() if subject and count}
    checks = {
        "each tenant is billed for each of its requests": dict(usage) == billable,
        "requests without a subject gave no event": counted.get("skipped: no_subject", 0) == expected[""],
        "no event was delivered twice or changed": stats.duplicates == stats.conflicts == 0,
        f"the plugin server says so too: {counted['accepted']} events accepted, {counted['delivered']} delivered": (
            counted["accepted"] == counted["delivered"] == sum(billable.values())
        ),
    }
    for claim, holds in checks.items():
        console.print(f"  {'[green]yes[/]' if holds else '[red]NO[/] '}  {claim}")
    if all(checks.values()):
        console.print("[bold green]It all adds up.[/]")
        return 0
    console.print("[bold red]It does not add up.[/]")
    return 1


if __name__ == "__main__":
    sys.exit(main())
