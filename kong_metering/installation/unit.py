"""The service that systemd runs: its unit file, written and read back. Pure.

Contract: what `command_in` reads of a text that `unit_text` wrote is the command that it was given. Settings of
others', of which the template has none, are handed in to be kept.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kong_metering.errors import StartupError

# The server goes on for its --stop-timeout and three seconds; then it would be killed.
_STOP_MARGIN_SECONDS = 10
# Which kong.conf the installation was told of; systemd leaves sections that begin so to others.
_NOTES, _KONG_CONF = "X-kong-metering", "KongConf"
_TEMPLATE = """\
# Written by `kong-metering install`. Changes of your own belong into `systemctl edit kong-metering`.
[Unit]
Description=Plugin server of Kong Gateway's {plugin}
Wants=network-online.target
After=network-online.target
# It is there before Kong serves, and as systemd stops in the opposite order, Kong has ended before it ends.
Before=kong.service kong-enterprise-edition.service
StartLimitIntervalSec=0

[Service]
Type=notify
User={user}
Group={group}
ExecStart={command}
# A new version takes over without a request lost.
ExecReload=/bin/kill -HUP $MAINPID
Restart=always
RestartSec=1
TimeoutStartSec=60
TimeoutStopSec={stop_seconds}
# /run/kong-metering and /var/lib/kong-metering. The socket's path outlives a restart, so that Kong's connections wait.
RuntimeDirectory=kong-metering
RuntimeDirectoryMode=0755
RuntimeDirectoryPreserve=yes
StateDirectory=kong-metering
StateDirectoryMode=0755
UMask=0077
LimitNOFILE=65536
NoNewPrivileges=yes
ProtectSystem=full
PrivateTmp=yes

[Install]
WantedBy=multi-user.target
"""


# A word of a command: bare, or in quotes, or part of it is. Escapes that systemd knows beyond these we never write.
_PIECE = re.compile(r""""((?:[^"\\]|\\["\\])*)"|'([^'\\]*)'|([^\s"'\\]+)""")
_WORD = re.compile(rf"(?:{_PIECE.pattern})+")


@dataclass(frozen=True)
class Service:
    """What runs: the command, as which user and group, for the plugin of which name; `stop_timeout` in seconds.

    `kong_conf`: Kong's configuration file, if it was named, for the next installation.
    """

    command: Sequence[str]
    user: str
    group: str
    plugin: str
    stop_timeout: float = 5.0
    kong_conf: Path | None = None


@dataclass(frozen=True)
class Setting:
    """A line of a unit file."""

    section: str
    key: str
    value: str

    def __str__(self) -> str:
        return f"{self.key}={self.value}"


def unit_text(service: Service, kept: Sequence[Setting] = ()) -> str:
    """Return the unit file, with settings that are kept from an earlier one, each in its section."""
    text = _TEMPLATE.format(
        plugin=service.plugin,
        user=service.user,
        group=service.group,
        command=" ".join(map(_quoted, service.command)),
        stop_seconds=int(service.stop_timeout) + _STOP_MARGIN_SECONDS,
    )
    if service.kong_conf is not None:
        kept = [*kept, Setting(_NOTES, _KONG_CONF, str(service.kong_conf))]
    for setting in kept:
        text = _with(text, setting)
    return text


def settings_of(text: str) -> list[Setting]:
    """Return the settings of a unit file, as systemd reads its lines."""
    found, section = [], ""
    uncommented = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith(("#", ";")))
    for line in map(str.strip, re.sub(r"\\\n", " ", uncommented).splitlines()):
        key, equals, value = line.partition("=")
        if line.startswith("[") and line.endswith("]"):
            section = line[1:-1]
        elif equals:
            found.append(Setting(section, key.rstrip(), value.lstrip()))
    return found


def foreign_settings(text: str) -> list[Setting]:
    """Return the settings of a unit file that somebody has added: those of keys that we write none of."""
    ours = {(setting.section, setting.key) for setting in settings_of(_TEMPLATE)} | {(_NOTES, _KONG_CONF)}
    return [setting for setting in settings_of(text) if (setting.section, setting.key) not in ours]


def values_in(text: str, key: str) -> list[str]:
    """Return what a unit file says for a key, in its order."""
    return [setting.value for setting in settings_of(text) if setting.key == key]


def kong_conf_in(text: str) -> Path | None:
    """Return Kong's configuration file that the installation was told of, if it was."""
    return next(map(Path, values_in(text, _KONG_CONF)), None)


def command_in(text: str) -> list[str]:
    """Return the command that a unit file has.

    Raises `StartupError` where it says something else than a command of plain words, as somebody may have written it.
    """
    lines = values_in(text, "ExecStart")
    if len(lines) != 1:
        raise StartupError(f"it has {len(lines) or 'no'} ExecStart")
    if _PIECE.sub("", lines[0]).strip():
        raise StartupError("its quotes or backslashes are not as `install` writes them")
    return [_unquoted(match[0]) for match in _WORD.finditer(lines[0])]


def _with(text: str, setting: Setting) -> str:
    """Return a unit file with a setting at the end of its section."""
    blocks = text.rstrip("\n").split("\n\n")
    header = f"[{setting.section}]"
    if header not in text.splitlines():
        blocks.append(header)
    blocks = [f"{block}\n{setting}" if header in block.splitlines() else block for block in blocks]
    return "\n\n".join(blocks) + "\n"


def _quoted(argument: str) -> str:
    """Return an argument as systemd reads it back: it knows quotes, backslashes, `%` and `$`."""
    escaped = argument.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return escaped if re.fullmatch(r"[\w@%+=:,./$-]+", escaped, re.ASCII) else f'"{escaped}"'


def _unquoted(word: str) -> str:
    """Return the argument that systemd makes of a word. Raises `StartupError` where it puts something else in."""
    text = "".join(re.sub(r"\\(.)", r"\1", double) + single + bare for double, single, bare in _PIECE.findall(word))
    if (inserted := re.search(r"[%$]", text.replace("%%", "").replace("$$", ""))) is not None:
        raise StartupError(f"systemd puts something else in for {inserted[0]} in {word}")
    return text.replace("%%", "%").replace("$$", "$")
