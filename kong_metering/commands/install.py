"""`kong-metering install` and `uninstall`: the plugin server beside a Kong on this host, as a service of systemd's.

Contract: nothing is asked that can be found out, nothing is changed that is right already, nothing is started or
stopped. Each change is a line on stdout; what is wrong is told on stderr, with exit status 1. The spool is never
removed.
"""

from __future__ import annotations

import contextlib
import grp
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TypeVar

import click

from kong_metering import PLUGIN_NAME, SPOOL_DIRECTORY, checks
from kong_metering.commands import reinstalling
from kong_metering.commands.health import judged
from kong_metering.commands.options import taking
from kong_metering.errors import StartupError
from kong_metering.host.kongs import running_kongs
from kong_metering.installation import kongconf
from kong_metering.installation.changes import Changes
from kong_metering.installation.earlier import NAME_FLAG, PRIORITY_FLAG, Given, given_in
from kong_metering.installation.findings import Findings, can_become, find_kong, kong_conf, user_named
from kong_metering.installation.places import DUMP, FLAGS, RUN, SOCKET, SPOOL, STATE, UNIT
from kong_metering.installation.serverflags import PROGRAM, complaints_about, meaning_of
from kong_metering.installation.unit import Service, unit_text
from kong_metering.log import printable
from kong_metering.plugin_identity import PRIORITY
from kong_metering.quantities import PluginName, WholeNumber

F = TypeVar("F", bound=Callable[..., object])

_OLDEST_KONG, _KONG_WITH_ITS_OWN = (3, 4), (3, 14)
_LARGEST_PRIORITY = 2**31 - 1
_PROBE_SECONDS = 2.0
_VERIFY_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class Where:
    """What both commands take: which kong.conf, below which directory, and whether anything is to be changed."""

    kong_conf: Path | None
    root: Path
    dry_run: bool
    write: bool

    @property
    def changes(self) -> Changes:
        """What makes the changes."""
        return Changes(self.root.absolute(), self.dry_run, reinstalling.say)


@dataclass(frozen=True, kw_only=True)
class Wish(Where):
    """What is to be installed."""

    kong_prefix: Path | None
    user: str | None
    plugin_name: str | None
    priority: int | None
    flags: str | None

    def given(self) -> Given:
        """Return what it is given, where a name and a priority may be among the flags, too.

        Raises `StartupError` when the server would not take a flag, `click.UsageError` when they are no command line,
        or say something else than the options do.
        """
        named = Given(self.plugin_name, self.priority)
        if self.flags is None:
            return named
        among_flags = given_in(_words_of(self.flags))
        given = named.or_else(among_flags)
        for option, value in among_flags.words.items():
            if given.words[option] != value:
                raise click.UsageError(f"{option} is {given.words[option]}, and {value} in --flags")
        return given


def _where_options(command: F) -> F:
    conf = click.option(
        "-c",
        "--kong-conf",
        metavar="FILE",
        type=click.Path(path_type=Path),
        help="Kong's configuration file, if it is not where Kong itself looks.",
    )
    write = click.option("--write", is_flag=True, help="Change kong.conf, too, instead of telling what it needs.")
    dry = click.option("--dry-run", is_flag=True, help="Change nothing, and tell what would be changed.")
    root = click.option(
        "--root",
        metavar="DIR",
        type=click.Path(path_type=Path, file_okay=False, exists=True),
        default="/",
        help="Write below this directory, as for an image; Kong is looked for on this machine.",
    )
    return conf(write(dry(root(command))))


@contextlib.contextmanager
def _naming_root() -> Iterator[None]:
    """Let an error about rights say what to do."""
    try:
        yield
    except PermissionError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise StartupError(f"{where}{error.strerror}: run this as root") from error


@click.command()
@_where_options
@click.option("-p", "--kong-prefix", metavar="DIR", type=click.Path(path_type=Path), help="Kong's prefix.")
@click.option("--user", metavar="NAME", help="The user to run as: that of Kong's workers.")
@click.option(NAME_FLAG, metavar="NAME", type=PluginName(), help=f"What Kong calls the plugin, at first {PLUGIN_NAME}.")
@click.option(
    PRIORITY_FLAG,
    metavar="N",
    type=WholeNumber(-_LARGEST_PRIORITY, _LARGEST_PRIORITY),
    help=f"The plugin's place among Kong's, at first {PRIORITY}.",
)
@click.option(
    "--flags", metavar="TEXT", help="Further flags of the plugin server, as on a command line; '' takes all away."
)
@taking(Wish)
@_naming_root()
def install(wish: Wish) -> None:
    """Have systemd run the plugin server beside Kong.

    Finds out Kong's version, prefix, kong.conf and the user of its workers; makes the directories, the service and the
    file that describes the plugin to Kong; tells what kong.conf needs, and what to do then. Doing it again changes only
    what has to be changed, and what is not given again stays as it was given before. Run it as root.
    """
    changes, anew = wish.changes, wish.given()
    former = reinstalling.Former.found(changes)
    kong = find_kong(wish.kong_prefix, wish.kong_conf or former.kong_conf, wish.user)
    _tell_findings(kong)
    workers = kong.user.pw_name
    if wish.user is None and former.user is not None:
        kong = replace(kong, user=user_named(former.user, f"User= in {UNIT}"))
    before = former.given(changes, kong.conf, anew)
    given = reinstalling.settled(anew, before)
    _refuse_what_cannot_be(wish, kong, given)
    _refuse_to_lose_lines(changes, kong, before, given)
    service = _service(kong, given, wish.kong_conf or former.kong_conf)
    unit = unit_text(service, former.foreign)
    _stop_at(checks.complaints_of_interpreter(kong.user))
    changes.directory(STATE, kong.user, 0o755)
    changes.directory(SPOOL, kong.user, 0o700)
    # systemd makes it as well, at each start: /run is empty after a reboot.
    changes.directory(RUN, kong.user, 0o755)
    _stop_at(_complaints(wish, kong, unit))
    changes.file(DUMP, _dump(given))
    changes.file(UNIT, unit)
    reinstalling.tell_what_is_kept(anew, before)
    reinstalling.tell_what_is_changed(changes, before, given)
    reinstalling.tell_of_kong_conf(changes, former.kong_conf, wish.kong_conf)
    reinstalling.tell_of_user(changes, former.user, wish.user, workers)
    reinstalling.tell_of_the_unit(changes, former, unit)
    is_configured = _configure_kong(wish, kong, given, changes)
    _tell_next(service, kong, is_configured=is_configured)
    _stop_at(_complaints_about_environment())


def _stop_at(complaints: Iterable[str]) -> None:
    """Tell what is wrong, and end the program if something is."""
    told = [printable(f"Error: {complaint}", 1000) for complaint in complaints]
    for line in told:
        click.echo(line, err=True)
    if told:
        raise click.exceptions.Exit(1)


@click.command()
@_where_options
@taking(Where)
@_naming_root()
def uninstall(where: Where) -> None:
    """Take away what `install` has made, but for the events that wait.

    Kong first: its lines go, and it is restarted, as a reload keeps them; then the service is stopped; then the rest
    goes. What is not done yet is told, and nothing that is needed until then is removed.
    """
    changes = where.changes
    conf = kong_conf(where.kong_conf or reinstalling.Former.found(changes).kong_conf)
    text = changes.text_of(conf) or ""
    is_here = kongconf.has_ours(text) or any(os.path.lexists(changes.at(path)) for path in (UNIT, STATE, RUN))
    if kongconf.has_ours(text):
        without = kongconf.without_ours(text)
        if not where.write:
            raise StartupError(f"{conf} still has our lines: take them out, or add --write")
        if without:
            changes.file(conf, without)
        else:
            changes.remove(conf)
    if where.root == Path("/") and not where.dry_run:
        for step in _still_to_do(conf):
            raise StartupError(f"nothing else is removed yet: {step}; then run this again")
    for path in (UNIT, DUMP, SOCKET, RUN):
        changes.remove(path)
    if changes.at(SPOOL).exists():
        click.echo(
            f"kept {SPOOL}: `kong-metering spool status --spool-dir {SPOOL}` tells what waits there, "
            f"`kong-metering spool deliver` sends it; remove {STATE} when nothing does"
        )
    changes.remove(STATE)
    if not is_here:
        click.echo("nothing to do: nothing that `install` makes is here")


def _still_to_do(conf: Path) -> Iterator[str]:
    """Tell what has to happen before the server may go."""
    for kong in running_kongs():
        if SOCKET in (kong.sockets() or ()):
            restart = _restart(conf if conf.exists() else None, kong.prefix)
            yield f"Kong in {kong.prefix} runs with the plugin: delete its entities, then {restart}"
    if judged(SOCKET, _PROBE_SECONDS, only_serving=True).status == 0:
        yield "the server runs: systemctl disable --now kong-metering"


def _restart(conf: Path | None, prefix: Path) -> str:
    """Tell how Kong is rid of a line: a reload adds kong.conf to what Kong runs with, and takes nothing away."""
    named = "" if conf is None else f"-c {conf} "
    return (
        f"kong restart {named}-p {prefix} (or systemctl restart kong, where systemd runs it; after a reload Kong would "
        "still have the lines that are gone)"
    )


def _tell_findings(kong: Findings) -> None:
    version = "Kong's program is not here" if kong.version is None else kong.version.text
    state = "runs" if kong.is_running else "does not run"
    workers = f"workers are user {kong.user.pw_name} ({kong.user_source})"
    click.echo(f"{version}; prefix {kong.prefix}, which {state}; {workers}")


def _refuse_what_cannot_be(wish: Wish, kong: Findings, given: Given) -> None:
    version = kong.version
    if version is not None and version.number < _OLDEST_KONG:
        raise StartupError(f"{version.text} is too old: Kong 3.4 and later take such a plugin")
    is_shadowed = version is not None and version.is_enterprise and version.number >= _KONG_WITH_ITS_OWN
    if is_shadowed and given.identity.name == PLUGIN_NAME:
        raise StartupError(
            f"Kong Enterprise from 3.14 on has a plugin of its own named {PLUGIN_NAME}, and would never ask this one: "
            "choose another name, such as --plugin-name kong-metering"
        )
    if not wish.dry_run and not can_become(kong.user):
        raise StartupError(f"run this as root, to make files for user {kong.user.pw_name}; or look with --dry-run")


def _group_of(kong: Findings) -> str:
    try:
        return grp.getgrgid(kong.user.pw_gid).gr_name
    except KeyError:
        return str(kong.user.pw_gid)


def _refuse_to_lose_lines(changes: Changes, kong: Findings, before: Mapping[Path, Given], given: Given) -> None:
    """See that what stands between our marks in kong.conf is ours. Raises `StartupError`."""
    former = next((found.plugin_name for found in before.values() if found.plugin_name), PLUGIN_NAME)
    lost = kongconf.lost_by(changes.text_of(kong.conf) or "", _connection(given), former)
    if lost:
        raise StartupError(
            f"{kong.conf} would lose what somebody has written between our marks: {', '.join(lost)}. Nothing is "
            "changed: write it into a line of your own right above them (plugins and pluginserver_names are put "
            "together from that line and ours), and run this again"
        )


def _words_of(flags: str) -> list[str]:
    try:
        words = shlex.split(flags)
    except ValueError as error:
        raise click.UsageError(f"--flags: {str(error).lower()} in {printable(flags)}") from None
    for complaint in complaints_about(words):
        raise StartupError(f"--flags: {complaint}")
    return words


def _service(kong: Findings, given: Given, conf: Path | None) -> Service:
    """Return what systemd is to run: the program beside this one."""
    directories = (Path(sys.argv[0]).absolute().parent, Path(sys.executable).absolute().parent)
    program = next((path for one in directories if os.access(path := one / PROGRAM, os.X_OK)), None)
    if program is None:
        raise StartupError(f"{PROGRAM} is not beside this program in {directories[0]}; install the package again")
    name, priority = given.identity.name, given.identity.priority
    named = [] if name == PLUGIN_NAME else [NAME_FLAG, name]
    placed = [] if priority == PRIORITY else [PRIORITY_FLAG, str(priority)]
    flags = given.flags or ()
    return Service(
        [str(program), *chain.from_iterable(FLAGS), *named, *placed, *flags],
        kong.user.pw_name,
        _group_of(kong),
        name,
        meaning_of(flags)["stop_timeout"],
        None if conf is None else conf.absolute(),
    )


def _dump(given: Given) -> str:
    from kong_metering import information  # noqa: PLC0415 - takes long

    return json.dumps(information.dump(meaning_of(given.flags or ())["protocol"], given.identity)) + "\n"


def _configure_kong(wish: Wish, kong: Findings, given: Given, changes: Changes) -> bool:
    """Write Kong's lines if that is wished, else tell those that are needed; returns whether kong.conf has them."""
    found = changes.text_of(kong.conf)
    if found is None:
        click.echo(f"{kong.conf} is not there: if Kong is started with another file, name that one with -c")
    text = found or ""
    wanted = kongconf.with_ours(text, _connection(given))
    if wish.write or wanted == text:
        changes.file(kong.conf, wanted)
        for setting, before, after in kongconf.changed_by(text, wanted):
            changes.told("changed", f"{setting} in {kong.conf}: {before} to {after}")
        return True
    click.echo(f"\n{kong.conf} needs these lines, in the place of those of the same names (--write changes it):\n")
    for line in kongconf.lines_for(_connection(given), text):
        click.echo(f"    {line}")
    if kongconf.starts_ours(text):
        click.echo(f"\nand no {kongconf.START_COMMAND}: Kong would start a server beside this one")
    return False


def _connection(given: Given) -> kongconf.Connection:
    return kongconf.Connection(given.identity.name, SOCKET, DUMP)


def _complaints(wish: Wish, kong: Findings, unit: str) -> Iterator[str]:
    """Tell why the service could not start, as far as it can be tried before it is there."""
    if wish.root != Path("/"):
        return
    if not wish.dry_run:
        yield from checks.complaints_of_user(kong.user, checks.Places(RUN, SOCKET, SPOOL, None))
    analyze = shutil.which("systemd-analyze")
    if analyze is not None:
        with tempfile.TemporaryDirectory() as directory:
            draft = Path(directory) / UNIT.name
            draft.write_text(unit, encoding="utf-8", errors="surrogateescape")
            done = subprocess.run(  # noqa: S603 - of the system
                [analyze, "verify", str(draft)], capture_output=True, text=True, timeout=_VERIFY_SECONDS, check=False
            )
            if done.returncode != 0:
                yield f"systemd-analyze verify: {done.stderr.strip().replace(str(draft), str(UNIT))}"


def _complaints_about_environment() -> Iterator[str]:
    for name in ("KONG_PLUGINS", "KONG_PLUGINSERVER_NAMES"):
        if os.environ.get(name):
            yield f"{name} is set in this environment, and Kong heeds it instead of kong.conf"


def _tell_next(service: Service, kong: Findings, *, is_configured: bool) -> None:
    steps = ["systemctl daemon-reload && systemctl enable --now kong-metering"]
    if not Path("/run/systemd/system").is_dir():
        by_hand = f"runuser -u {kong.user.pw_name} -- {shlex.join(service.command)}"
        steps = [f"systemd does not run here; where it does: {steps[0]}. By hand: {by_hand}"]
    steps.append("kong-metering health")
    if not is_configured:
        steps.append(f"the lines above into {kong.conf}")
    steps.append(_kongs_step(kong))
    steps.append(f"enable the plugin {service.plugin}: POST /plugins, decK, ...")
    click.echo("\nNext:")
    for number, step in enumerate(steps, 1):
        click.echo(f"  {number}. {step}")
    _tell_of_former_spool(kong.prefix / SPOOL_DIRECTORY)


def _kongs_step(kong: Findings) -> str:
    """Tell how Kong comes to know its lines."""
    if not kong.is_running:
        return f"kong start -c {kong.conf}"
    return _restart(kong.conf, kong.prefix) if kong.starts_server else f"kong reload -c {kong.conf} -p {kong.prefix}"


def _tell_of_former_spool(former: Path) -> None:
    if former.is_dir():
        click.echo(
            f"\nA server that Kong started kept its events in {former}. Once it has ended, look what waits there, and "
            f"send it:\n  kong-metering spool status --spool-dir {former}\n"
            f"  kong-metering spool deliver --spool-dir {former} --plugin-id ID --token-file FILE"
        )
