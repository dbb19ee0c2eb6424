"""The plugin under kong-pdk's own server, the way its documentation says; run as a script, with that server's flags."""

from kong_pdk.cli import start_dedicated_server

from kong_metering.plugin import Plugin, Schema, priority, version

if __name__ == "__main__":
    start_dedicated_server("metering-and-billing", Plugin, version, priority, Schema)
