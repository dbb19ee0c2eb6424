"""What is valid in a plugin's configuration and surely not meant. Pure.

Each rule takes what the settings come to, defaults included, and yields what it finds; a setting whose value is not
known here (a vault reference, a Secret) is passed over. No text holds a token, or a value that could be one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from kong_metering.commands.check import endpoint, metered
from kong_metering.commands.check.view import Settings

if TYPE_CHECKING:
    from kong_metering.commands.check.entities import Plugin
    from kong_metering.commands.check.findings import Finding

_RULES: tuple[Callable[[Settings], Iterator[Finding]], ...] = (
    endpoint.token,
    endpoint.address,
    endpoint.times,
    metered.queue,
    metered.what,
    metered.subject,
    metered.attributes,
)


def meaning_findings(plugin: Plugin) -> Iterator[Finding]:
    """Find what is valid, and surely not meant."""
    if isinstance(plugin.config, Mapping):
        settings = Settings.of(plugin)
        for rule in _RULES:
            yield from rule(settings)
