"""What is wrong in a kong.conf for the metering plugin, and what is surely not meant. Pure.

The plugin server's command line is read by the program that Kong would start (`kong_metering/cli.py`): its flags are
declared there only.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath

import click
from click.core import ParameterSource

from kong_metering.checks import path_complaint
from kong_metering.cli import program
from kong_metering.commands.check.entities import nearest
from kong_metering.commands.check.findings import Finding, Level
from kong_metering.lenient import complaints_of
from kong_metering.log import printable

_LINE = re.compile(r"^\s*([A-Za-z_]\w*)\s*=\s*(.*?)\s*$")
_COMMENT = re.compile(r"\s*(?<!\\)#.*$")
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=")
_PROGRAMS = ("kong-metering-plugin-server", "plugin_server.py")
_PREFIX = "/usr/local/kong"
_SUFFIXES = ("_socket", "_start_cmd", "_query_cmd")
_LISTS = ("plugins", "pluginserver_names")
# Words in `plugins` that are no plugin's name.
_NO_NAMES = ("bundled", "off")
_ANY = "pluginserver_"
_LOOKED_AT = ("kong_prefix", "socket", "socket_name", "plugin_name", "no_spool", "adaptive_batch", "dump")
# Flags that print something and end.
_ENDING = ("-h", "--help", "--version", "-version")


@dataclass(frozen=True)
class Setting:
    """One line of kong.conf."""

    name: str
    value: str
    line: int

    @property
    def items(self) -> list[str]:
        """Its value as a list."""
        return [item.strip() for item in self.value.split(",") if item.strip()]

    def find(self, level: Level, rule: str, problem: str, remedy: str) -> Finding:
        """Tell something of it."""
        return Finding(level, rule, (self.name,), problem, remedy, line=self.line)


@dataclass(frozen=True)
class Command:
    """A command line of the plugin server; `options` as the program understands them, `complaints` what it does not."""

    words: Sequence[str]
    options: Mapping[str, object]
    complaints: Sequence[str]

    @property
    def socket(self) -> FilePath:
        """Where it makes its socket."""
        if self.options["socket"] is not None:
            return FilePath(str(self.options["socket"]))
        name = self.options["socket_name"] or f"{self.options['plugin_name']}.sock"
        return FilePath(str(self.options["kong_prefix"])) / str(name)


@dataclass(frozen=True)
class Called:
    """What the plugin is called in Kong.

    `is_guess`: nothing says so, and it is the usual name; `unread` is the setting that names a dump which would say it,
    and cannot be read here.
    """

    name: str
    is_guess: bool = False
    unread: Setting | None = None


@dataclass(frozen=True)
class KongConf:
    """What a kong.conf says, by name; of a name that stands twice, the last one counts."""

    settings: Mapping[str, Setting]
    findings: tuple[Finding, ...] = ()

    @property
    def starts_server(self) -> Setting | None:
        """The setting that has Kong start the plugin server itself, if it does."""
        return next((one for one in self.settings.values() if one.name.endswith("_start_cmd") and one.value), None)

    @property
    def has_schema_in_lua(self) -> bool:
        """True if it is a control plane that knows plugins by their schemas in Lua, as far as that is to be seen.

        Only a control plane can do with a schema: elsewhere the plugin has to run.
        """
        return self.is_control_plane and bool(_setting(self, "lua_package_path").value)

    @property
    def is_control_plane(self) -> bool:
        """True if it runs no plugins, and hands out configurations."""
        return _setting(self, "role").value == "control_plane"


def read(text: str) -> KongConf:
    """Read the file's text."""
    settings: dict[str, Setting] = {}
    wrong = []
    for number, line in enumerate(text.splitlines(), 1):
        match = _LINE.match(line)
        if match:
            setting = Setting(match[1], _COMMENT.sub("", match[2]).replace("\\#", "#").strip(), number)
            if setting.name in settings and setting.name.startswith(("plugin", _ANY)):
                problem = f"it stands in line {settings[setting.name].line} already, and Kong takes the last one"
                wrong.append(setting.find(Level.WARNING, "doubled-name", problem, "remove the one that is not meant"))
            settings[setting.name] = setting
        elif line.strip() and not line.lstrip().startswith("#"):
            wrong.append(Finding(Level.ERROR, "syntax", (), "it is no setting", "write `name = value`", line=number))
    return KongConf(settings, tuple(wrong))


def conf_findings(conf: KongConf, called: Called, tool: str | None = None) -> Iterator[Finding]:
    """Find what is wrong; `tool` is what else is known to change this Kong's configuration."""
    yield from conf.findings
    yield from _misspelt(conf)
    yield from _plugins(conf, called)
    names = _setting(conf, "pluginserver_names")
    servers = [name.lower() for name in names.items] if names.value != "NONE" else []
    yield from _unnamed(conf, servers, called.name)
    for server in servers:
        yield from _server(conf, server, names)
    yield from _start_findings(conf, tool)


def _setting(conf: KongConf, name: str, default: str = "") -> Setting:
    return conf.settings.get(name) or Setting(name, default, 0)


def _missing(name: str, rule: str, problem: str, remedy: str) -> Finding:
    return Finding(Level.ERROR, rule, (name,), problem, remedy)


def _misspelt(conf: KongConf) -> Iterator[Finding]:
    for setting in conf.settings.values():
        name = setting.name
        if name in _LISTS or (name.startswith(_ANY) and name.endswith(_SUFFIXES)):
            continue
        if name.startswith(("plugin", "plugins")):
            near = _nearest_suffix(name) or nearest(name, _LISTS)
            remedy = (
                f"is it {near}?"
                if near
                else "there are pluginserver_names, and for each name _socket, _start_cmd and _query_cmd"
            )
            yield setting.find(Level.ERROR, "unknown-setting", "Kong knows no such setting, and passes over it", remedy)


def _nearest_suffix(name: str) -> str | None:
    server, _, last = name.removeprefix(_ANY).partition("_")
    near = nearest(f"_{last}", _SUFFIXES)
    return f"{_ANY}{server}{near}" if name.startswith(_ANY) and near else None


def _plugins(conf: KongConf, called: Called) -> Iterator[Finding]:
    setting, name = _setting(conf, "plugins", "bundled"), called.name
    others = [item for item in setting.items if item not in _NO_NAMES]
    wanted = f"plugins = {','.join(dict.fromkeys(['bundled', *others, name]))}"
    if name not in others and others and called.is_guess and (called.unread is not None or conf.has_schema_in_lua):
        yield _unknown_name(setting, called, others)
    elif name not in others:
        near = nearest(name, others)
        problem = f"{name} is not in it: Kong refuses configurations with the plugin"
        remedy = f"write {name} in the place of {near}" if near else f"write `{wanted}`"
        if setting.line:
            yield setting.find(Level.ERROR, "plugin-not-loaded", problem, remedy)
        else:
            yield _missing("plugins", "plugin-not-loaded", problem, remedy)
    elif "bundled" not in setting.items:
        problem = "bundled is not in it: Kong has none of its own plugins, such as key-auth"
        yield setting.find(Level.WARNING, "no-bundled-plugins", problem, f"write `{wanted}`, unless it is meant")


def _unknown_name(setting: Setting, called: Called, others: Sequence[str]) -> Finding:
    unread = called.unread
    where = "its schema in Lua says it" if unread is None else f"the file of {unread.name} says it, and is not here"
    problem = f"it is not known here what the metering plugin is called: {where}; {called.name} is not in `plugins`"
    remedy = f"if it is one of {', '.join(printable(name, 80) for name in others)}, say so with --plugin-name"
    return setting.find(Level.NOTE, "unknown-plugin-name", problem, remedy)


def _unnamed(conf: KongConf, servers: Sequence[str], plugin: str) -> Iterator[Finding]:
    """Find plugin servers that are described and not named, or none at all."""
    described: dict[str, Setting] = {}
    for name, setting in conf.settings.items():
        for suffix in _SUFFIXES:
            if name.startswith(_ANY) and name.endswith(suffix):
                described.setdefault(name.removeprefix(_ANY).removesuffix(suffix), setting)
    known = [name.replace("-", "_") for name in servers]
    for name, setting in described.items():
        if name not in known:
            near = nearest(name, known)
            problem = f"{name} is not in pluginserver_names, and Kong passes over this line and those like it"
            remedy = f"is it {_ANY}{near}_...?" if near else f"write `pluginserver_names = {name}`"
            yield setting.find(Level.ERROR, "server-not-named", problem, remedy)
    if not servers and not described and plugin in _setting(conf, "plugins").items and not conf.has_schema_in_lua:
        yield _without_server(conf, plugin)


def _without_server(conf: KongConf, plugin: str) -> Finding:
    path = ("pluginserver_names",)
    if conf.is_control_plane:
        problem = f"there is neither a dump to say what {plugin} is, nor a lua_package_path that leads to its schema"
        remedy = "write the lines of examples/hybrid/control-plane.conf, or control-plane-lua.conf"
        return Finding(Level.WARNING, "server-not-named", path, problem, remedy)
    problem = f"no plugin server is named, and {plugin} is none of Kong's own plugins: Kong does not start"
    if _setting(conf, "lua_package_path").value:
        problem += ", or, with a schema in Lua, meters nothing"
    remedy = "write `pluginserver_names = metering`, and the lines of kong.conf.example for it"
    return Finding(Level.ERROR, "server-not-named", path, problem, remedy)


def _server(conf: KongConf, server: str, names: Setting) -> Iterator[Finding]:
    base = f"{_ANY}{server.replace('-', '_')}"
    query, start = _setting(conf, f"{base}_query_cmd"), _setting(conf, f"{base}_start_cmd")
    prefix = _setting(conf, "prefix", _PREFIX).value
    socket = _setting(conf, f"{base}_socket", f"{prefix}/{server}.socket")
    is_ours = any(program in one.value for one in (query, start) for program in _PROGRAMS)
    if not is_ours and len(names.items) > 1:
        # Another plugin's server.
        return
    if not query.value:
        problem = "Kong does not start without it: it asks the plugin server what plugin it has"
        remedy = "write the path of kong-metering-plugin-server, `--kong-prefix` with Kong's prefix, and `--dump`"
        yield _missing(query.name, "no-query-cmd", problem, remedy)
    yield from _command(query, prefix)
    yield from _command(start, prefix)
    yield from _dump_flags(query, start)
    yield from _socket(socket, start, names)


def _command(setting: Setting, prefix: str) -> Iterator[Finding]:
    if not setting.value:
        return
    words = _words(setting.value)
    if words is None:
        problem = "a quotation mark in it is not closed"
        yield setting.find(Level.ERROR, "command-syntax", problem, "close it")
        return
    if words and _ASSIGNMENT.match(words[0]):
        problem = "Kong runs `exec` with it, which takes no variables before a program"
        remedy = "use flags, which all variables have, or write /usr/bin/env before it"
        yield setting.find(Level.ERROR, "command-variables", problem, remedy)
    elif words and not words[0].startswith("/") and _is_ours(words):
        problem = "Kong runs it without any environment, so there is no PATH to look for the program in"
        yield setting.find(Level.ERROR, "command-path", problem, "write the program's whole path, from / on")
    if re.search(r"(?<!\\)\$\w|~/", setting.value):
        problem = "Kong runs it without any environment: a variable or ~ in it is empty"
        yield setting.find(Level.WARNING, "command-variables", problem, "write the value")
    command = command_of(setting)
    if command is None:
        return
    for complaint in command.complaints:
        remedy = "all flags: kong-metering-plugin-server --help" + _near_flag(complaint)
        yield setting.find(Level.ERROR, "unknown-flag", printable(complaint, 300), remedy)
    if FilePath(str(command.options["kong_prefix"])) != FilePath(prefix) and not _is_prefix_left_open(setting, command):
        problem = f"--kong-prefix is not Kong's prefix, {printable(prefix, 200)}"
        yield setting.find(Level.WARNING, "prefix", problem, "write Kong's, or set `prefix` in kong.conf")
    yield from _options(setting, command)


def _is_prefix_left_open(setting: Setting, command: Command) -> bool:
    """Return whether the prefix is not of use: what only prints the schema needs none."""
    return bool(command.options["dump"]) and "prefix" not in setting.value


def _near_flag(complaint: str) -> str:
    flags = [name for option in program.params if isinstance(option, click.Option) for name in option.opts]
    word = complaint.split(" ", 1)[0].partition("=")[0].rstrip(":")
    near = nearest(word, [flag for flag in flags if flag.startswith("--")]) if word.startswith("-") else None
    return f"; is it {near}?" if near and near != word else ""


def _options(setting: Setting, command: Command) -> Iterator[Finding]:
    if not setting.name.endswith("_start_cmd"):
        return
    if command.options["no_spool"]:
        problem = "events are in memory only: each stop, reload and kill of Kong loses what waits, unbilled"
        yield setting.find(Level.WARNING, "no-spool", problem, "leave --no-spool out")
    if command.options["adaptive_batch"] == 1:
        problem = "with Kong's default max_batch_size of 1 each event leaves alone: too slow for heavy traffic"
        yield setting.find(Level.WARNING, "no-batches", problem, "leave --adaptive-batch out, or set max_batch_size")


def _dump_flags(query: Setting, start: Setting) -> Iterator[Finding]:
    asked, started = command_of(query), command_of(start)
    if asked is not None and not asked.options["dump"]:
        problem = "it would start a server, and Kong waits for it for ever: Kong asks what plugin there is"
        yield query.find(Level.ERROR, "query-without-dump", problem, "add --dump")
    if started is not None and started.options["dump"]:
        problem = "with --dump it prints what plugin there is, and ends: no server"
        yield start.find(Level.ERROR, "start-with-dump", problem, "take --dump out; it belongs into query_cmd")


def _socket(socket: Setting, start: Setting, names: Setting) -> Iterator[Finding]:
    command, path = command_of(start), FilePath(socket.value.removeprefix("unix:"))
    told = socket if socket.line else Setting(socket.name, socket.value, names.line)
    if command is not None and command.socket != path:
        problem = (
            f"Kong connects to {printable(str(path), 200)}, and start_cmd makes {printable(str(command.socket), 200)}: "
            "every metered request is answered with 500"
        )
        yield told.find(
            Level.ERROR, "socket", problem, f"write `{socket.name} = {printable(str(command.socket), 200)}`"
        )
    if (complaint := path_complaint(path)) is not None:
        yield told.find(Level.ERROR, "socket-too-long", *_halves(complaint))


def _halves(complaint: str) -> tuple[str, str]:
    problem, _, remedy = complaint.rpartition(": ")
    return problem, remedy


def _start_findings(conf: KongConf, tool: str | None) -> Iterator[Finding]:
    """Find a plugin server that Kong starts itself, where somebody asks for what Kong then fails at."""
    start = conf.starts_server
    if start is None or _setting(conf, "admin_listen", "on").value.lower() == "off":
        return
    yield start.find(
        Level.WARNING if tool else Level.NOTE,
        "start-cmd",
        "Kong 3.9.0 to 3.9.3 answers GET / of the Admin API with 500 when it has started a plugin server itself "
        "(Kong/kong#14260), and "
        + (f"{tool} asks for it" if tool else "decK and the Kubernetes ingress controller ask for it"),
        ("" if tool else "for these ")
        + "leave start_cmd out, keep socket and query_cmd, and have systemd or a container of its own run the server",
    )


# -------------------------------------------------------------------------------------------------------- command lines


def _words(command: str) -> list[str] | None:
    try:
        return shlex.split(command)
    except ValueError:
        return None


def _is_ours(words: Sequence[str]) -> bool:
    return any(FilePath(word).name in _PROGRAMS for word in words)


def command_of(setting: Setting) -> Command | None:
    """Read the command line of our plugin server; None if it is another program's."""
    words = _words(setting.value) or []
    first = next((index for index, word in enumerate(words) if FilePath(word).name in _PROGRAMS), None)
    if first is None:
        return None
    try:
        context = program.make_context(_PROGRAMS[0], [word for word in words[first + 1 :] if word not in _ENDING])
    except (click.ClickException, click.exceptions.Exit, ValueError):
        # A zero byte in a path is a ValueError.
        return None
    with context:
        options = {str(one.name): _as_kong_starts_it(context, one) for one in program.params if one.name in _LOOKED_AT}
        return Command(words, options, tuple(complaints_of(context)))


def _as_kong_starts_it(context: click.Context, option: click.Parameter) -> object:
    """Return the value of an option without the variables of this environment, of which Kong hands on none."""
    name = str(option.name)
    if callable(option.default):
        # A default that is worked out comes from this environment, too.
        is_told = context.get_parameter_source(name) is ParameterSource.COMMANDLINE
        return context.params.get(name) if is_told else None
    if context.get_parameter_source(name) is not ParameterSource.ENVIRONMENT:
        return context.params.get(name)
    default = option.get_default(context)
    return option.type_cast_value(context, default) if isinstance(default, (str, int, float)) else None
