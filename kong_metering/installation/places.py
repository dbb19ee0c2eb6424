"""Where an installation has what it makes."""

from __future__ import annotations

from pathlib import Path

SOCKET = Path("/run/kong-metering/kong-metering.sock")
RUN, STATE = SOCKET.parent, Path("/var/lib/kong-metering")
DUMP, SPOOL = STATE / "dump.json", STATE / "spool"
UNIT = Path("/etc/systemd/system/kong-metering.service")
# What systemd reads beside the unit, and `systemctl edit` writes.
DROP_INS = [Path(f"{directory}/systemd/system/{UNIT.name}.d") for directory in ("/etc", "/run")]
# The flags that say so, which nobody has to give.
FLAGS = [("--socket", str(SOCKET)), ("--dump-file", str(DUMP)), ("--spool-dir", str(SPOOL))]
