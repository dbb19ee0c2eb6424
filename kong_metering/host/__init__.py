"""Hosting a Kong Python PDK plugin: the plugin-server protocol on an event loop of our own."""
