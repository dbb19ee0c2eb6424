"""kong-metering: the `metering-and-billing` plugin for Kong Gateway, as an external plugin."""

__version__ = "0.1.0"
PLUGIN_NAME = "metering-and-billing"
