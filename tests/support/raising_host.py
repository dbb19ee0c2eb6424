"""A plugin server whose plugin raises in every phase; run as a script."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from kong_metering.clock import SystemClock
from kong_metering.host.dispatch import Dispatcher
from kong_metering.host.instances import PluginDefinition
from kong_metering.host.opening import Place, open_at
from kong_metering.host.server import Hooks, serve
from kong_metering.host.supervisor import Supervisor, SupervisorOptions
from kong_metering.log import ProcessLog, Relay, Repeats, configure

if TYPE_CHECKING:
    from kong_metering.host.station import Station

NAME = "raising"
REPEATS = Repeats(SystemClock())


class Raising:
    """`access` raises before its first PDK call, `log` after it, with a big value at hand."""

    def access(self, kong: Any) -> NoReturn:
        raise ValueError(f"at once, with {kong}")

    def log(self, kong: Any) -> NoReturn:
        record = kong.log.serialize() * 1000
        raise LookupError(f"in the middle, with {len(record)} characters")


def serve_raising(station: Station) -> None:
    """Serve until SIGTERM."""
    definition = PluginDefinition(NAME, ("access", "log"), lambda _: Raising(), {})
    dispatcher = Dispatcher(definition, clock=SystemClock())
    serve(dispatcher, station, Hooks(REPEATS.summarise, ending=lambda: None))
    REPEATS.flush()


def main(prefix: Path) -> None:
    """Have it served until SIGTERM."""
    log = ProcessLog(Relay(), REPEATS)
    configure(logging.INFO, log)
    options = SupervisorOptions(stop_timeout=1)
    Supervisor(open_at(Place(prefix / f"{NAME}.sock")), options, log, serve_raising).run()


if __name__ == "__main__":
    main(Path(sys.argv[2]))
