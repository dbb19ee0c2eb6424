"""Plays an hour without the ingest endpoint, at 100 events a second: all kept, in how little memory, in which order.

    python bench/outage.py [--events 360000] [--batch 1]

The real plugin server, started as Kong starts it, with the default parameters of plugin and spool; real requests over
its socket, as fast as they go (the hour is compressed, the events are not fewer); an endpoint that refuses connections,
and then works. Fails if an event is missing, comes twice or comes out of order. The order is that on disk, read before
the endpoint works.
"""

from __future__ import annotations

import asyncio
import re
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path

import uvloop
from client import Client, plugin_config
from processes import OURS, Server
from rich.table import Table
from terminal import CONSOLE, argument_parser, say_progress

from kong_metering import PLUGIN_NAME, SPOOL_DIRECTORY
from kong_metering.eventlog.log import EventLog
from kong_metering.spool.directory import survey

_PORTION = 2_000
_IN_FLIGHT = 16
_EVENT_ID = re.compile(rb'"id":"([^"]+)"')
_NO_CONTENT = b"HTTP/1.1 204 No Content\r\n\r\n"
_SECONDS_WITHOUT_PROGRESS = 60.0


def main() -> int:
    """Run it and tell whether all is there."""
    parser = argument_parser(__doc__)
    parser.add_argument("--events", type=int, default=360_000)
    parser.add_argument("--batch", type=int, default=1, help="queue.max_batch_size; 1 is Kong's default")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-outage-") as directory, socket.socket() as reserved:
        # Bound and not listening: connections are refused, and nobody else gets the port.
        reserved.bind(("127.0.0.1", 0))
        with Server(OURS, Path(directory) / "prefix") as server:
            return _outage(server, reserved, options.events, options.batch)


def _outage(server: Server, reserved: socket.socket, events: int, batch: int) -> int:
    url = f"http://127.0.0.1:{reserved.getsockname()[1]}/events"
    client = Client(server.socket)
    instance = client.start_instance(PLUGIN_NAME, plugin_config(url, {"max_batch_size": batch}))
    before, began = server.rss_bytes(), time.monotonic()
    highest = before
    for first in range(0, events, _PORTION):
        client.run([instance], min(_PORTION, events - first), _IN_FLIGHT)
        highest = max(highest, server.rss_bytes())
        say_progress(f"{first + _PORTION:,} of {events:,} events put")
    down = time.monotonic() - began
    kept = _ids_on_disk(server.socket.parent / SPOOL_DIRECTORY, events)
    began = time.monotonic()
    arrived: list[bytes] = []
    threading.Thread(target=_collect, args=(reserved, arrived), daemon=True).start()
    highest = max(highest, _wait_for_all(server, arrived, events))
    up = time.monotonic() - began
    client.close()

    table = Table("", "events", "seconds", "highest RSS MB")
    table.add_row("before", "0", "", f"{before / 1e6:.0f}")
    table.add_row("endpoint down: kept on disk", f"{len(kept):,}", f"{down:.0f}", f"{highest / 1e6:.0f}")
    table.add_row("endpoint up: arrived", f"{len(arrived):,}", f"{up:.0f}", "")
    table.add_row("of them in the order on disk", f"{_in_order(kept, arrived):,}", "", "")
    table.add_row("twice", f"{len(arrived) - len(set(arrived)):,}", "", "")
    table.add_row("missing", f"{len(set(kept) - set(arrived)):,}", "", "")
    CONSOLE.print(table)
    is_good = len(kept) == events and arrived == kept and highest < 120e6
    CONSOLE.print("all kept, delivered in order, under 120 MB" if is_good else "FAILED")
    return 0 if is_good else 1


def _in_order(kept: list[bytes], arrived: list[bytes]) -> int:
    return sum(one == other for one, other in zip(kept, arrived, strict=False))


def _ids_on_disk(spool: Path, events: int) -> list[bytes]:
    """Read the ids of all events that wait, beside the process that holds them."""
    deadline = time.monotonic() + 5
    while True:
        ids: list[bytes] = []
        for found in survey(spool):
            log = EventLog.view(found.directory)
            after = log.done_up_to
            while stored := log.read(after, 10_000, 1 << 30):
                after = stored[-1].sequence
                ids += [match[1] for event in stored if (match := _EVENT_ID.search(event.payload))]
            log.close()
        if len(ids) == events or time.monotonic() > deadline:
            return ids
        time.sleep(0.1)


def _wait_for_all(server: Server, arrived: list[bytes], events: int) -> int:
    """Wait until all events have come, or none comes any more; give the most memory the server had meanwhile."""
    highest, seen, seen_at = 0, 0, time.monotonic()
    while len(arrived) < events and time.monotonic() - seen_at < _SECONDS_WITHOUT_PROGRESS:
        time.sleep(0.2)
        highest = max(highest, server.rss_bytes())
        if len(arrived) > seen:
            seen, seen_at = len(arrived), time.monotonic()
        say_progress(f"{len(arrived):,} of {events:,} events arrived")
    return highest


def _collect(reserved: socket.socket, arrived: list[bytes]) -> None:
    """Take events on the reserved port, and keep their ids as they come."""

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"(?i)content-length: *(\d+)", head)
                body = await reader.readexactly(int(length[1]) if length else 0)
                arrived.extend(_EVENT_ID.findall(body))
                writer.write(_NO_CONTENT)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def serve() -> None:
        server = await asyncio.start_server(take, sock=reserved, limit=1 << 24)
        await server.serve_forever()

    uvloop.run(serve())


if __name__ == "__main__":
    sys.exit(main())
