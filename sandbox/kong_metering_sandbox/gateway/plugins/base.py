"""What a bundled plugin looks like to the gateway."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kong_metering_sandbox.gateway.context import Exchange
    from kong_metering_sandbox.gateway.values import Table


@dataclass(frozen=True)
class Identities:
    """Who may call: consumers by id, and the key-auth credentials by key; entities without nulls."""

    consumers: Mapping[str, Table] = field(default_factory=dict)
    credentials: Mapping[str, Table] = field(default_factory=dict)

    def consumer(self, key: str) -> Table | None:
        """Return a consumer by id or by username."""
        found = self.consumers.get(key)
        if found is not None:
            return found
        return next((one for one in self.consumers.values() if one.get("username") == key), None)


class BundledPlugin(Protocol):
    """A plugin that runs inside the gateway; it has an access phase only."""

    priority: int

    async def access(self, exchange: Exchange, config: Table, identities: Identities) -> None:
        """Run the access phase.

        Raises:
            PluginExit: the plugin answers the request.

        """
