"""`python -m kong_metering_sandbox.gateway -c kong.conf [--prefix DIR]`: the stand-in gateway in the foreground."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .errlog import open_log
from .gateway import Gateway
from .settings import Settings, SettingsError, load_settings

if TYPE_CHECKING:
    from collections.abc import Callable


def main(arguments: list[str] | None = None) -> int:
    """Run the gateway until SIGTERM, SIGINT or SIGQUIT; SIGHUP reloads it. Return the exit status."""
    parser = argparse.ArgumentParser(prog="kong_metering_sandbox.gateway", description=__doc__)
    parser.add_argument("-c", "--conf", type=Path, help="configuration file, in kong.conf's format")
    parser.add_argument("-p", "--prefix", type=Path, help="folder for logs, sockets and the ready file")
    options = parser.parse_args(arguments)

    def settings() -> Settings:
        return load_settings(options.conf, os.environ, options.prefix)

    try:
        return asyncio.run(_run(settings))
    except (SettingsError, OSError) as error:
        sys.stderr.write(f"Error: {error}\n")
        return 1


async def _run(settings: Callable[[], Settings]) -> int:
    gateway = Gateway(settings, os.environ, open_log(settings().prefix))
    stopping, reloading = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
        loop.add_signal_handler(number, stopping.set)
    loop.add_signal_handler(signal.SIGHUP, reloading.set)
    await gateway.start()
    while not stopping.is_set():
        if reloading.is_set():
            reloading.clear()
            await gateway.reload()
        waits = [asyncio.ensure_future(event.wait()) for event in (stopping, reloading)]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
    await gateway.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
