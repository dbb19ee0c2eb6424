"""The same plugin on kong-pdk's own server, for comparison: `-g` with gevent, without it with threads."""

from kong_pdk.cli import start_dedicated_server

from kong_metering import PLUGIN_NAME
from kong_metering.plugin import Plugin, Schema, priority, version

if __name__ == "__main__":
    start_dedicated_server(PLUGIN_NAME, Plugin, version, priority, Schema)
