"""kong-metering: the `metering-and-billing` plugin for Kong Gateway, as an external plugin."""

__version__ = "0.1.0"
PLUGIN_NAME = "metering-and-billing"
# Of the spool, in Kong's prefix.
SPOOL_DIRECTORY = "metering-spool"
# Of the environment variables that stand for flags.
ENVIRONMENT_PREFIX = "KONG_METERING_"
