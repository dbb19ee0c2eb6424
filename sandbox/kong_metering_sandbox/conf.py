"""The lines of kong.conf.example, with the paths of this machine."""

from __future__ import annotations

from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "kong.conf.example"
# What kong.conf.example has in their place.
_BIN_DIRECTORY = "/opt/kong-metering/bin"
_PREFIX = "/usr/local/kong"


def read_example(*, bin_directory: Path, prefix: Path, example: Path = EXAMPLE) -> dict[str, str]:
    """Give the settings of the example, by name, for programs in `bin_directory` and a Kong in `prefix`."""
    settings = {}
    for line in example.read_text(encoding="utf-8").splitlines():
        name, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            settings[name.strip()] = (
                value.strip().replace(_BIN_DIRECTORY, str(bin_directory)).replace(_PREFIX, str(prefix))
            )
    return settings
