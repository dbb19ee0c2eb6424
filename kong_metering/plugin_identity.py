"""What Kong calls the plugin, and its place among Kong's plugins. Imports nothing that takes long."""

from __future__ import annotations

from dataclasses import dataclass

from kong_metering import PLUGIN_NAME

# After authentication (key-auth 1250), ACL (950) and rate limiting (910); before transformers (801): a request is
# metered with the consumer that authentication found, and with the headers that the client sent.
PRIORITY = 850


@dataclass(frozen=True)
class PluginIdentity:
    """The plugin's name in Kong, and its priority: of two plugins, the phases of that with the higher one run first."""

    name: str = PLUGIN_NAME
    priority: int = PRIORITY
