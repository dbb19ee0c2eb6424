"""What Kong is told of the plugin: the answer to its query command, and to `plugin.GetPluginInfo`.

Kong runs the query command at each of its starts and waits for it; nothing of the server is imported here.
"""

from __future__ import annotations

from typing import Any, Literal

from kong_metering.plugin_identity import PluginIdentity
from kong_metering.schema import plugin_info

PHASES = ("access", "log")
_OURS = PluginIdentity()


def plugin_information(identity: PluginIdentity = _OURS) -> dict[str, Any]:
    """Give what Kong wants to know of the plugin."""
    return plugin_info(PHASES, identity)


def dump(protocol: Literal["protobuf", "msgpack"], identity: PluginIdentity = _OURS) -> object:
    """Give what Kong's query command is to print; Kong speaks the protocol that it names, MessagePack if it names none.

    The plugin server understands both, on the same socket.
    """
    plugins = [plugin_information(identity)]
    return plugins if protocol == "msgpack" else {"Protocol": "ProtoBuf:1", "Plugins": plugins}
