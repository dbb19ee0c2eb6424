"""The program: flags and environment to a running plugin server.

Kong starts it with no environment at all, umask 0000 and file descriptors that are not ours; so the settings are flags
first, each with an environment variable as second choice, the umask is set here, and inherited descriptors are closed.
What takes long to import is imported once the socket is there: Kong's connections wait then, instead of being refused.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import resource
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import click
from click.core import ParameterSource

from kong_metering import ENVIRONMENT_PREFIX, PLUGIN_NAME, SPOOL_DIRECTORY, __version__, checks, dumpfile
from kong_metering.clock import SystemClock
from kong_metering.errors import StartupError
from kong_metering.host.admission import group_named
from kong_metering.host.opening import Opening, Place, open_again, open_at
from kong_metering.host.reexec import Restart
from kong_metering.lenient import LenientCommand, LenientOption, complaints_of
from kong_metering.log import LOGGER, ProcessLog, Relay, Repeats, cause_of, configure, printable
from kong_metering.plugin_identity import PRIORITY, PluginIdentity
from kong_metering.quantities import DirectoryOrNone, Duration, Listen, ListenAddress, PluginName, Size, WholeNumber
from kong_metering.spool.options import INBOX_DIRECTORY, SpoolOptions, Sync
from kong_metering.trial.batching import ADAPTIVE_BATCH

F = TypeVar("F", bound=Callable[..., Any])

_FIRST_INHERITED = 3
_MOST_DESCRIPTORS = 65_536
_LARGEST_COUNT = 65_535
# The ends of all their channels fit into one message.
_MOST_SERVERS = 100
# Kong's protocol has 32 bits for it.
_LARGEST_PRIORITY = 2**31 - 1
_INTERRUPTED = 130


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line says; the fields are named as its flags are, times are in seconds, sizes in bytes."""

    plugin_name: str
    priority: int
    kong_prefix: Path
    socket_name: str | None
    socket: Path | None
    socket_group: str | None
    servers: int
    listen_queue_size: int
    phase_timeout: float
    instance_ttl: float
    stop_timeout: float
    parent: str
    ca_bundle: str | None
    adaptive_batch: int
    spool_dir: Path | None
    inbox_dir: Path | None
    spool_sync: Sync
    spool_max_bytes: int
    spool_max_age: float
    dedupe_window: float
    keep_delivered: float
    verify_every: float
    verify_resend: bool
    no_spool: bool
    metrics_listen: Listen | None
    dump: bool
    dump_file: Path | None
    protocol: Literal["protobuf", "msgpack"]
    verbose: int
    multiprocessing: bool
    gevent: bool

    @property
    def identity(self) -> PluginIdentity:
        """What Kong is to call the plugin."""
        return PluginIdentity(self.plugin_name, self.priority)

    @property
    def socket_path(self) -> Path:
        """Where the socket is."""
        return self.socket or self.kong_prefix / (self.socket_name or f"{self.plugin_name}.sock")

    @property
    def group(self) -> int | None:
        """The number of the group that may connect. Raises `StartupError`."""
        return None if self.socket_group is None else group_named(self.socket_group)


def _setting(*names: str, former: Sequence[str] = (), **attributes: Any) -> Callable[[F], F]:
    """Declare a flag that takes a value; its variable is its long name in capitals behind `KONG_METERING_`."""
    long = [name.removeprefix("--") for name in (names[0], *former)]
    variables = [ENVIRONMENT_PREFIX + name.replace("-", "_").upper() for name in long]
    attributes |= {"envvar": variables, "show_envvar": True, "show_default": True}
    return click.option(*names, *former, cls=_Setting, former=former, **attributes)


class _Setting(LenientOption):
    """An option with a default and a variable; former names of it are understood, and not shown."""

    def __init__(self, *arguments: Any, former: Sequence[str], **attributes: Any) -> None:
        super().__init__(*arguments, **attributes)
        self._former = former

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Return what the help says of it, without its former names."""
        names, variables = self.opts, self.envvar
        self.opts = [name for name in names if name not in self._former]
        if isinstance(variables, list):
            self.envvar = variables[:1]
        try:
            return super().get_help_record(ctx)
        finally:
            self.opts, self.envvar = names, variables


def _is_on(name: str) -> bool:
    """Return whether the environment switches a flag on; any word but those for no counts."""
    return os.environ.get(ENVIRONMENT_PREFIX + name, "") not in ("", "0", "false", "no")


@click.command(
    cls=LenientCommand,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="The last three flags are those of kong-pdk's start_dedicated_server, and change nothing.",
)
@_setting(
    "--kong-prefix",
    "-p",
    "-kong-prefix",
    type=click.Path(path_type=Path),
    default="/usr/local/kong",
    metavar="DIR",
    help="Directory to make the socket in: Kong's prefix.",
)
@_setting("--socket-name", metavar="NAME", help="Name of the socket there, if it is not the plugin's with '.sock'.")
@_setting(
    "--socket",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="Path of the socket, in place of these two: where Kong's prefix is not to be seen.",
)
@_setting(
    "--socket-group",
    metavar="GROUP",
    help="Group whose members may connect, too: where Kong's workers run as another user.",
)
@_setting(
    "--plugin-name",
    type=PluginName(),
    default=PLUGIN_NAME,
    metavar="NAME",
    help="What the plugin is called in Kong; needed where Kong has one of its own that is called so.",
)
@_setting(
    "--priority",
    type=WholeNumber(-_LARGEST_PRIORITY, _LARGEST_PRIORITY),
    default=PRIORITY,
    metavar="N",
    help="Place among Kong's plugins: those with a higher one run before.",
)
@_setting(
    "--servers",
    type=WholeNumber(1, _MOST_SERVERS),
    default=1,
    metavar="N",
    help="How many processes serve. One is enough for about two of Kong's workers; each worker stays with one.",
)
@_setting(
    "--listen-queue-size",
    type=WholeNumber(1, _LARGEST_COUNT),
    default=4096,
    metavar="N",
    help="How many connections may wait to be accepted.",
)
@_setting(
    "--phase-timeout",
    former=("--event-ttl",),
    type=Duration(),
    default="60s",
    metavar="TIME",
    help="How long a phase of a request waits for Kong to go on with it before it is abandoned.",
)
@_setting(
    "--instance-ttl",
    type=Duration(),
    default="1h",
    metavar="TIME",
    help="How long a plugin instance that Kong no longer uses is kept.",
)
@_setting(
    "--stop-timeout",
    type=Duration(may_be_zero=True),
    default="5s",
    metavar="TIME",
    help="How long to go on delivering after the server was told to stop.",
)
@_setting(
    "--parent",
    type=click.Choice(["auto", "watch", "ignore"]),
    default="auto",
    metavar="MODE",
    help="'watch': stop when the process that started this one ends; 'ignore': do not; 'auto': watch it unless it is "
    "process 1, as under systemd or in a container.",
)
@_setting(
    "--ca-bundle",
    metavar="FILE",
    help="PEM file with the certificate authorities that ingest endpoints are verified against.",
)
@_setting(
    "--adaptive-batch",
    type=WholeNumber(1, _LARGEST_COUNT),
    default=ADAPTIVE_BATCH,
    metavar="N",
    help="With a max_batch_size of 1, Kong's default: how many events that come soon one after the other leave in one "
    "request, at most; 1 sends each alone.",
)
@_setting(
    "--spool-dir",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help=f"Directory that keeps events until they are delivered, if not {SPOOL_DIRECTORY} in Kong's prefix.",
)
@_setting(
    "--inbox-dir",
    type=DirectoryOrNone(),
    default=str(INBOX_DIRECTORY),
    metavar="DIR",
    help="Directory in shared memory for events that are not on disk yet, so that they outlive a process that is "
    "killed; with 'none', or where it cannot be had, the supervisor keeps them.",
)
@_setting(
    "--spool-sync",
    type=click.Choice([sync.value for sync in Sync]),
    default=Sync.SECOND.value,
    metavar="WHEN",
    help="When events become safe from a power cut (from the death of a process they always are): 'commit', as soon as "
    "they are written; 'second', within a second; 'off', when the operating system likes.",
)
@_setting(
    "--spool-max-bytes",
    type=Size(),
    default="1G",
    metavar="SIZE",
    help="Size of the spool above which the oldest events are dropped.",
)
@_setting(
    "--spool-max-age",
    type=Duration(),
    default="30d",
    metavar="TIME",
    help="Age above which events in the spool are dropped.",
)
@_setting(
    "--dedupe-window",
    type=Duration(),
    default="24h",
    metavar="TIME",
    help="How long the endpoint recognises duplicate ids. An event that was sent without an answer is not sent again "
    "after that, but set aside as a dead letter.",
)
@_setting(
    "--keep-delivered",
    type=Duration(may_be_zero=True),
    default="24h",
    metavar="TIME",
    help="How long events stay in the spool after they were delivered, so that `kong-metering verify` can read them "
    "back; within --spool-max-bytes, for which they go first. 0 keeps none.",
)
@_setting(
    "--verify-every",
    type=Duration(may_be_zero=True),
    default="0",
    metavar="TIME",
    help="How often to read back from OpenMeter what was delivered since, by id, gently, and count what is confirmed "
    "and what is missing; 0: not at all. The token has to be one that may read events.",
)
@click.option(
    "--verify-resend",
    is_flag=True,
    default=partial(_is_on, "VERIFY_RESEND"),
    help="With --verify-every: send what is missing again, with the same ids. Only with OpenMeter's sink.dedupe: what "
    f"is merely late would be counted twice.  [env var: {ENVIRONMENT_PREFIX}VERIFY_RESEND]",
)
@click.option(
    "--no-spool",
    is_flag=True,
    default=partial(_is_on, "NO_SPOOL"),
    help="Keep events in memory only, as Kong's own queue does: they are lost when this process ends, and dropped when "
    f"delivery keeps failing.  [env var: {ENVIRONMENT_PREFIX}NO_SPOOL]",
)
@_setting(
    "--dump-file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="File to write at the start, with what --dump prints: for a Kong whose query_cmd is 'cat FILE'.",
)
@_setting(
    "--metrics-listen",
    type=ListenAddress(),
    metavar="ADDRESS",
    without="no metrics are served",
    help="Where to serve /metrics for Prometheus, /healthz, /readyz and a status page: HOST:PORT or unix:PATH; nowhere "
    "by default. Whoever can connect can read it.",
)
@_setting(
    "--protocol",
    type=click.Choice(["protobuf", "msgpack"]),
    default="protobuf",
    metavar="NAME",
    help="With --dump and --dump-file: the protocol that Kong is to speak, protobuf or msgpack; the server understands "
    "both.",
)
@click.option("--dump", "-dump", is_flag=True, help="Print the plugin information that Kong asks for, and exit.")
@click.option("-v", "--verbose", count=True, help="Log more.")
@click.version_option(__version__, "--version", "-version", prog_name=PLUGIN_NAME, message="%(prog)s %(version)s")
@click.option("--no-lua-style", is_flag=True, expose_value=False, help="PDK errors are exceptions; they always are.")
@click.option("-m", "--multiprocessing", is_flag=True, help="Ignored.")
@click.option("-g", "--gevent", is_flag=True, help="Ignored.")
@click.pass_context
def program(context: click.Context, /, spool_sync: str, **options: Any) -> int:
    """Serve the metering plugin to Kong Gateway.

    Kong starts this program without an environment, so flags are the way to set things; the variables are for systemd
    and containers. A TIME is a number of seconds, or a number with s, m, h, d or w behind it; a SIZE is a number of
    bytes, or a number with K, M or G behind it.
    """
    settings = Options(spool_sync=Sync(spool_sync), **options)
    if not settings.dump:
        return _run(settings, complaints_of(context))
    # Where the plugin server runs elsewhere, as beside a control plane, there is nothing to be looked at.
    source_of = context.get_parameter_source
    is_place_known = settings.socket is not None or source_of("kong_prefix") is not ParameterSource.DEFAULT
    return _dump(settings, complaints_of(context), is_place_known=is_place_known)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the plugin server, or print what it was asked to print; returns the exit status."""
    try:
        status: int = program.main(arguments, prog_name="kong-metering-plugin-server", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort:
        return _INTERRUPTED
    return status


def _run(options: Options, complaints: list[str]) -> int:
    restart = Restart.taken_from(os.environ)
    os.umask(0o077)
    _fill_standard_descriptors()
    _close_descriptors(restart.descriptors if restart else ())
    _allow_many_descriptors()
    log = ProcessLog(Relay(), Repeats(SystemClock()))
    configure(logging.DEBUG if options.verbose else logging.INFO, log)
    if options.multiprocessing or options.gevent:
        LOGGER.info("-m and -g are flags of kong-pdk's server; this one has a single way to run, and ignores them")
    try:
        place = _place(options)
        opening = open_at(place) if restart is None else open_again(place, restart)
        # What is wrong with the spool is said by who looks after it, and the socket is there.
        complaints += checks.complaints(replace(_places(options), spool=None))
        if options.dump_file is not None:
            complaints += dumpfile.written(options.dump_file, _dumped(options))
        for complaint in complaints:
            LOGGER.error("%s", complaint)
        _serve(opening, options, replace(log, complaints=tuple(complaints)))
    except StartupError as error:
        LOGGER.critical("cannot start: %s", error)
        return 1
    except Exception as error:  # noqa: BLE001 - a line that says why, whatever it is
        LOGGER.critical("the plugin server failed: %s", cause_of(error))
        return 1
    return 0


def _dump(options: Options, complaints: list[str], *, is_place_known: bool) -> int:
    """Print what Kong wants to know; and on standard error, and in Kong's error log, what will not work."""
    sys.stdout.write(_dumped(options))
    if is_place_known:
        complaints += _complaints_for_workers(options)
    words = [f"{options.plugin_name}: {printable(complaint, 1000)}" for complaint in complaints]
    sys.stderr.write("".join(f"error: {line}\n" for line in words))
    now = time.strftime("%Y/%m/%d %H:%M:%S")
    checks.say_in_error_log(options.kong_prefix, [f"{now} [error] {os.getpid()}#0: {line}\n" for line in words])
    return 0


def _complaints_for_workers(options: Options) -> list[str]:
    try:
        return checks.complaints_for_workers(_places(options))
    except StartupError as error:
        return [str(error)]


def _dumped(options: Options) -> str:
    from kong_metering import information  # noqa: PLC0415 - takes long

    return json.dumps(information.dump(options.protocol, options.identity)) + "\n"


def _serve(opening: Opening, options: Options, log: ProcessLog) -> None:
    from kong_metering import app  # noqa: PLC0415 - takes long
    from kong_metering.host.dispatch import Limits  # noqa: PLC0415
    from kong_metering.host.kongs import master_of  # noqa: PLC0415
    from kong_metering.host.supervisor import SupervisorOptions  # noqa: PLC0415

    limits = Limits(phase_timeout=options.phase_timeout, instance_ttl=options.instance_ttl)
    delivery = app.DeliveryOptions(
        options.stop_timeout, options.ca_bundle, _spool_options(options), options.adaptive_batch
    )
    supervisor = SupervisorOptions(
        options.servers, _parent(options.parent), master_of(os.getppid()), options.stop_timeout
    )
    app.run(opening, supervisor, app.ServerOptions(limits, delivery, options.identity, options.metrics_listen), log)


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


def _place(options: Options) -> Place:
    path = options.socket_path
    if not path.parent.is_dir():
        raise StartupError(f"{path.parent} is not a directory; {checks.naming(options.kong_prefix, path.parent)}")
    return Place(path, options.listen_queue_size, options.group)


def _places(options: Options) -> checks.Places:
    spool = _spool_options(options)
    return checks.Places(
        options.kong_prefix,
        options.socket_path,
        None if spool is None else spool.directory,
        options.ca_bundle,
        options.group,
    )


def _spool_options(options: Options) -> SpoolOptions | None:
    if options.no_spool:
        return None
    return SpoolOptions(
        directory=options.spool_dir or options.kong_prefix / SPOOL_DIRECTORY,
        sync=options.spool_sync,
        max_bytes=options.spool_max_bytes,
        max_age=options.spool_max_age,
        dedupe_window=options.dedupe_window,
        keep_delivered=options.keep_delivered,
        verify_every=options.verify_every,
        verify_resend=options.verify_resend,
        inbox_directory=options.inbox_dir,
    )


def _parent(mode: str) -> int | None:
    parent = os.getppid()
    return parent if mode == "watch" or (mode == "auto" and parent > 1) else None
