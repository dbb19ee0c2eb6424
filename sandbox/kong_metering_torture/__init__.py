"""Processes killed again and again over one spool, and whether an event is lost: `python -m kong_metering_torture`."""
