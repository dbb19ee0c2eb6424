"""Runs the collector: ``python -m kong_metering_sandbox.collector --help``."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Final

import orjson
from aiohttp import web

from kong_metering_sandbox.collector.app import make_app
from kong_metering_sandbox.collector.store import EventStore
from kong_metering_sandbox.collector.tokens import Tokens

if TYPE_CHECKING:
    from collections.abc import Sequence

# What a request that is being answered at the end may still take.
_GRACE_SECONDS: Final = 0.5


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT. Returns the exit status."""
    options = _parser().parse_args(arguments)
    with closing(EventStore(options.database)) as store:
        if options.token:
            store.tokens = Tokens.of(options.token)
        try:
            asyncio.run(_serve(store, options.host, options.port, options.ready_file))
        except OSError as error:
            sys.stderr.write(f"collector: cannot serve on {options.host} port {options.port}: {error}\n")
            return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kong_metering_sandbox.collector",
        description="A stand-in for OpenMeter's ingest endpoint, for tests and demonstrations.",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=0, help="port to listen on; 0, the default, takes a free one")
    parser.add_argument("--database", default=":memory:", help="SQLite file (default: kept in memory)")
    parser.add_argument(
        "--token",
        action="append",
        metavar="TOKEN",
        help="bearer token to accept, repeatable; without any, those that the database remembers, or everyone",
    )
    parser.add_argument(
        "--ready-file", type=Path, help='file to write {"url", "pid"} into as soon as requests are answered'
    )
    return parser


async def _serve(store: EventStore, host: str, port: int, ready_file: Path | None) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    # OpenMeter does not decompress bodies, so nothing here may do it on the quiet.
    runner = web.AppRunner(make_app(store), access_log=None, auto_decompress=False, shutdown_timeout=_GRACE_SECONDS)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
        _announce(_url(runner), ready_file)
        await stop.wait()
    finally:
        await runner.cleanup()


def _url(runner: web.AppRunner) -> str:
    host, port = runner.addresses[0][:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _announce(url: str, ready_file: Path | None) -> None:
    sys.stderr.write(f"collector: listening on {url}\n")
    if ready_file is not None:
        # Renamed into place, so that whoever waits for the file never reads half of it.
        partial = ready_file.with_name(f"{ready_file.name}.{os.getpid()}")
        partial.write_bytes(orjson.dumps({"url": url, "pid": os.getpid()}))
        partial.replace(ready_file)


if __name__ == "__main__":
    sys.exit(main())
