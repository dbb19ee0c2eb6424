"""A plugin server whose servers crash at once, or keep something for the next ones; run as a script.

odd_host.py --kong-prefix PREFIX crash|keep
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from kong_metering.clock import SystemClock
from kong_metering.host.dispatch import Dispatcher
from kong_metering.host.instances import PluginDefinition
from kong_metering.host.opening import Place, open_at
from kong_metering.host.server import Hooks, serve
from kong_metering.host.supervisor import Supervisor, SupervisorOptions
from kong_metering.log import LOGGER, ProcessLog, Relay, Repeats, configure

if TYPE_CHECKING:
    from kong_metering.host.station import Station

NAME = "odd"
REPEATS = Repeats(SystemClock())


def crash(_: Station) -> None:
    """Fail as a server does that cannot work."""
    raise LookupError("this server never works")


def keep(station: Station) -> None:
    """Serve, and keep something for the next server."""
    definition = PluginDefinition(NAME, (), lambda _: object(), {})
    hooks = Hooks(
        housekeeping=REPEATS.summarise,
        ending=lambda: None,
        parting=f"kept by {os.getpid()}".encode,
        arriving=lambda kept: LOGGER.info("arrived: %s", kept.decode()),
    )
    serve(Dispatcher(definition, clock=SystemClock()), station, hooks)


def main(prefix: Path, way: str) -> None:
    """Have it served until SIGTERM."""
    log = ProcessLog(Relay(), REPEATS)
    configure(logging.INFO, log)
    options = SupervisorOptions(stop_timeout=1)
    Supervisor(open_at(Place(prefix / f"{NAME}.sock")), options, log, {"crash": crash, "keep": keep}[way]).run()


if __name__ == "__main__":
    main(Path(sys.argv[2]), sys.argv[3])
