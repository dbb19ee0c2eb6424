"""The service that systemd runs. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

# The server goes on for its --stop-timeout and three seconds; then it would be killed.
_STOP_MARGIN_SECONDS = 10
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


@dataclass(frozen=True)
class Service:
    """What runs: the command, as which user and group, for the plugin of which name; `stop_timeout` in seconds."""

    command: Sequence[str]
    user: str
    group: str
    plugin: str
    stop_timeout: float = 5.0


def unit_text(service: Service) -> str:
    """Return the unit file."""
    return _TEMPLATE.format(
        plugin=service.plugin,
        user=service.user,
        group=service.group,
        command=" ".join(map(_quoted, service.command)),
        stop_seconds=int(service.stop_timeout) + _STOP_MARGIN_SECONDS,
    )


def _quoted(argument: str) -> str:
    """Return an argument as systemd reads it back: it knows quotes, backslashes, `%` and `$`."""
    escaped = argument.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return escaped if re.fullmatch(r"[\w@%+=:,./$-]+", escaped, re.ASCII) else f'"{escaped}"'
