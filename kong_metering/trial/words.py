"""Numbers of events in words, for the log. Pure."""

from __future__ import annotations


def events(count: int) -> str:
    """Tell a number of events."""
    return "1 event" if count == 1 else f"{count} events"


def events_were(count: int) -> str:
    """Tell of how many events something was so."""
    return "1 event was" if count == 1 else f"{count} events were"
