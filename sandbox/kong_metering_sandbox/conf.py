"""The lines of kong.conf.example, with the paths of this machine."""

from __future__ import annotations

import re
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "kong.conf.example"
# What kong.conf.example has in their place.
_BIN_DIRECTORY = "/opt/kong-metering/bin"
_PREFIX = "/usr/local/kong"
# The other way is commented out, without a blank.
_LINE = re.compile(r"(#?)(\w+) = (.*)")


def read_example(
    *, bin_directory: Path, prefix: Path, example: Path = EXAMPLE, starts_server: bool = True
) -> dict[str, str]:
    """Give the settings of the example, by name, for programs in `bin_directory` and a Kong in `prefix`.

    `starts_server`: those of a Kong that starts the plugin server, else those of one that has it beside.
    """
    settings: dict[str, str] = {}
    started: dict[str, str] = {}
    for line in example.read_text(encoding="utf-8").splitlines():
        if (match := _LINE.fullmatch(line)) is not None:
            value = match[3].strip().replace(_BIN_DIRECTORY, str(bin_directory)).replace(_PREFIX, str(prefix))
            (started if match[1] else settings)[match[2]] = value
    if starts_server:
        settings |= {name: value for name, value in started.items() if name.startswith("pluginserver_")}
    return settings
