"""The program: flags and environment to a running plugin server.

Kong starts it with no environment at all, umask 0000 and file descriptors that are not ours; so the settings are flags
first, each with an environment variable as second choice, the umask is set here, and inherited descriptors are closed.
What takes long to import is imported once the socket is there: Kong's connections wait then, instead of being refused.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import os
import re
import resource
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kong_metering import PLUGIN_NAME, __version__
from kong_metering.clock import SystemClock
from kong_metering.errors import StartupError
from kong_metering.host.opening import Opening, Place, open_again, open_at
from kong_metering.host.restart import Restart
from kong_metering.log import LOGGER, ProcessLog, Relay, Repeats, cause_of, configure
from kong_metering.spool.options import SpoolOptions, Sync

ENVIRONMENT_PREFIX = "KONG_METERING_"
SPOOL = "metering-spool"
_FIRST_INHERITED = 3
_MOST_DESCRIPTORS = 65_536
_LARGEST_COUNT = 65_535
# The ends of all their channels fit into one message.
_MOST_SERVERS = 100
_SIZES = {"": 1, "K": 1024, "M": 1024**2, "G": 1024**3}
_DURATIONS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}


@dataclass(frozen=True)
class _Flag:
    """One flag; its environment variable is its long name in capitals behind `KONG_METERING_`."""

    names: tuple[str, ...]
    help: str
    default: Any
    type: Callable[[str], Any]
    metavar: str

    @property
    def variable(self) -> str:
        return ENVIRONMENT_PREFIX + self.names[0].removeprefix("--").replace("-", "_").upper()


def _count(text: str) -> int:
    """Read a count as the system takes it."""
    value = int(text)
    if not 1 <= value <= _LARGEST_COUNT:
        raise argparse.ArgumentTypeError(f"{text} is not between 1 and {_LARGEST_COUNT}")
    return value


def _servers(text: str) -> int:
    """Read how many servers there are to be."""
    value = int(text)
    if not 1 <= value <= _MOST_SERVERS:
        raise argparse.ArgumentTypeError(f"{text} is not between 1 and {_MOST_SERVERS}")
    return value


def _seconds(text: str) -> float:
    """Read a duration."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds above 0")
    return value


def _bytes(text: str) -> int:
    """Read a size: a number of bytes, or of KiB, MiB or GiB with K, M or G behind it."""
    match = re.fullmatch(r"(\d{1,15})([KMG]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if match is None or int(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not a size above 0, such as 500M or 1G")
    return int(match[1]) * _SIZES[match[2].upper()]


def _duration(text: str) -> float:
    """Read a duration: a number of seconds, or of minutes, hours or days with m, h or d behind it."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,6})?)([smhd]?)", text.strip())
    if match is None or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not a duration above 0, such as 3600, 90m, 24h or 30d")
    return float(match[1]) * _DURATIONS[match[2]]


def _sync(text: str) -> Sync:
    """Read one of the ways to sync."""
    try:
        return Sync(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not {', '.join(sync.value for sync in Sync)}") from None


_FLAGS = (
    _Flag(
        ("--kong-prefix", "-p", "-kong-prefix"),
        "directory to make the socket in: Kong's prefix",
        "/usr/local/kong",
        str,
        "DIR",
    ),
    _Flag(("--socket-name",), "name of the socket in that directory", f"{PLUGIN_NAME}.sock", str, "NAME"),
    _Flag(
        ("--servers",),
        "processes that serve; one is enough for about two of Kong's workers, each of which keeps to one of them",
        1,
        _servers,
        "N",
    ),
    _Flag(("--listen-queue-size",), "connections that may wait to be accepted", 4096, _count, "N"),
    _Flag(
        ("--event-ttl",), "seconds after which an event that Kong does not go on with is forgotten", 60, _seconds, "S"
    ),
    _Flag(("--instance-ttl",), "seconds after which an instance that Kong does not use is closed", 3600, _seconds, "S"),
    _Flag(("--stop-timeout",), "seconds to deliver what waits when told to end", 5, float, "S"),
    _Flag(
        ("--parent",),
        "'watch': end when the process that started this one ends; 'ignore': do not; 'auto': watch it unless it is "
        "process 1, as under systemd or in a container",
        "auto",
        str,
        "MODE",
    ),
    _Flag(("--ca-bundle",), "PEM file of the authorities to verify ingest endpoints with", None, str, "FILE"),
    _Flag(
        ("--spool-dir",),
        f"directory to keep events in until they are delivered, if not {SPOOL} in Kong's prefix",
        None,
        str,
        "DIR",
    ),
    _Flag(
        ("--spool-sync",),
        "when events survive a power cut too (a killed process, they always do): 'commit', as soon as they are "
        "written; 'second', at most one second later; 'off', when the system likes",
        "second",
        _sync,
        "WHEN",
    ),
    _Flag(("--spool-max-bytes",), "size of the spool beyond which the oldest events are dropped", "1G", _bytes, "SIZE"),
    _Flag(("--spool-max-age",), "age beyond which events in the spool are dropped", "30d", _duration, "TIME"),
    _Flag(
        ("--dedupe-window",),
        "for how long the endpoint tells events that come twice; later, what was sent without an answer is not sent "
        "again but set aside as a dead letter",
        "24h",
        _duration,
        "TIME",
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the plugin server, or print what it was asked to print; returns the exit status."""
    options = _parser(os.environ).parse_args(arguments)
    if options.dump:
        return _dump(options.protocol)
    restart = Restart.taken_from(os.environ)
    os.umask(0o077)
    _fill_standard_descriptors()
    _close_descriptors(restart.descriptors if restart else ())
    _allow_many_descriptors()
    log = ProcessLog(Relay(), Repeats(SystemClock()))
    configure(logging.DEBUG if options.verbose > 1 else logging.INFO, log)
    if options.multiprocessing or options.gevent:
        LOGGER.info("-m and -g are kong-pdk's; this server has one way to run, and needs neither")
    try:
        parent, ca_bundle, place = _parent(options.parent), _ca_bundle(options.ca_bundle), _place(options)
        opening = open_at(place) if restart is None else open_again(place, restart)
        _run(opening, parent, ca_bundle, options, log)
    except StartupError as error:
        LOGGER.critical("cannot start: %s", error)
        return 1
    except Exception as error:  # noqa: BLE001 - a line that says why, whatever it is
        LOGGER.critical("the plugin server failed: %s", cause_of(error))
        return 1
    return 0


def _dump(protocol: Literal["protobuf", "msgpack"]) -> int:
    from kong_metering import app  # noqa: PLC0415 - takes long

    sys.stdout.write(json.dumps(app.dump(protocol)) + "\n")
    return 0


def _run(
    opening: Opening, parent: int | None, ca_bundle: str | None, options: argparse.Namespace, log: ProcessLog
) -> None:
    from kong_metering import app  # noqa: PLC0415 - takes long
    from kong_metering.host.dispatch import Limits  # noqa: PLC0415
    from kong_metering.host.supervisor import SupervisorOptions  # noqa: PLC0415

    limits = Limits(event_ttl=options.event_ttl, instance_ttl=options.instance_ttl)
    delivery = app.DeliveryOptions(options.stop_timeout, ca_bundle, _spool_options(options))
    supervisor = SupervisorOptions(options.servers, parent, options.stop_timeout)
    app.run(opening, supervisor, limits, delivery, log)


def _fill_standard_descriptors() -> None:
    """Open those that are closed on nothing, or the first socket would be where errors are printed."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) < _FIRST_INHERITED:
        os.set_inheritable(descriptor, True)  # noqa: FBT003 - the standard library's signature
    os.close(descriptor)


def _close_descriptors(kept: Collection[int]) -> None:
    """Close what was inherited: nothing of it is ours, except what this very process has left to itself."""
    first = _FIRST_INHERITED
    for descriptor in sorted(kept):
        os.closerange(first, descriptor)
        first = descriptor + 1
    os.closerange(first, _MOST_DESCRIPTORS)


def _allow_many_descriptors() -> None:
    """Take all descriptors that the system grants: a queue needs up to five, and Kong may have thousands of plugins."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _parser(environment: Mapping[str, str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kong-metering-plugin-server",
        description=f"Plugin server of {PLUGIN_NAME} for Kong Gateway.",
        epilog="Each flag that takes a value has an environment variable as second choice, named in brackets.",
    )
    for flag in _FLAGS:
        default = environment.get(flag.variable, flag.default)
        parser.add_argument(
            *flag.names,
            default=default,
            type=flag.type,
            metavar=flag.metavar,
            help=f"{flag.help} (default: {'none' if flag.default is None else flag.default}) [{flag.variable}]",
        )
    parser.add_argument(
        "--no-spool",
        action="store_true",
        default=environment.get(ENVIRONMENT_PREFIX + "NO_SPOOL", "") not in ("", "0", "false", "no"),
        help="keep events in memory only, as Kong's own queue does: they are lost when this process ends, and dropped "
        f"when delivery fails for long [{ENVIRONMENT_PREFIX}NO_SPOOL]",
    )
    parser.add_argument(
        "--protocol",
        choices=("protobuf", "msgpack"),
        default=environment.get(ENVIRONMENT_PREFIX + "PROTOCOL", "protobuf"),
        help="with --dump: what Kong is to speak with the plugin server, which understands both (default: protobuf) "
        f"[{ENVIRONMENT_PREFIX}PROTOCOL]",
    )
    parser.add_argument("--dump", "-dump", action="store_true", help="print the plugin information that Kong wants")
    parser.add_argument("-v", "--verbose", action="count", default=1, help="log more")
    parser.add_argument("--version", "-version", action="version", version=f"{PLUGIN_NAME} {__version__}")
    pdk = parser.add_argument_group("accepted for compatibility with kong-pdk's start_dedicated_server")
    pdk.add_argument("--no-lua-style", action="store_true", help="PDK errors are exceptions: they always are")
    pdk.add_argument("-m", "--multiprocessing", action="store_true", help="ignored")
    pdk.add_argument("-g", "--gevent", action="store_true", help="ignored")
    return parser


def _place(options: argparse.Namespace) -> Place:
    prefix = Path(options.kong_prefix)
    if not prefix.is_dir():
        raise StartupError(f"{prefix} is not a directory; -p/--kong-prefix must name Kong's prefix")
    return Place(prefix / options.socket_name, options.listen_queue_size)


def _spool_options(options: argparse.Namespace) -> SpoolOptions | None:
    if options.no_spool:
        return None
    return SpoolOptions(
        directory=Path(options.spool_dir) if options.spool_dir else Path(options.kong_prefix) / SPOOL,
        sync=options.spool_sync,
        max_bytes=options.spool_max_bytes,
        max_age=options.spool_max_age,
        dedupe_window=options.dedupe_window,
    )


def _parent(mode: str) -> int | None:
    parent = os.getppid()
    if mode == "watch" or (mode == "auto" and parent > 1):
        return parent
    if mode in ("auto", "ignore"):
        return None
    raise StartupError(f"--parent is auto, watch or ignore, not {mode}")


def _ca_bundle(path: str | None) -> str | None:
    if path is not None and not os.access(path, os.R_OK):
        raise StartupError(f"--ca-bundle {path} cannot be read")
    return path
