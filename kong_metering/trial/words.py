"""A number of events in words, for the account: plain, as programs read it. Pure."""

from __future__ import annotations

from kong_metering.plurals import form


def events(count: int) -> str:
    """Tell a number of events."""
    return f"{count} {form(count, 'event')}"
