"""`kong-metering spool`: the group of commands about what is kept on disk."""

from __future__ import annotations

import click

from kong_metering.commands.lazygroup import LazyGroup

_PLACES = {
    "deliver": "deliver:deliver",
    "export": "export:export",
    "list": "listing:list_events",
    "purge": "purge:purge",
    "redirect": "redirect:redirect",
    "replay": "replay:replay",
    "restore": "restore:restore",
    "show": "listing:show",
    "status": "spoolstatus:status",
}


@click.group(cls=LazyGroup, places=_PLACES)
def spool() -> None:
    """Look after the events that are kept on disk.

    The servers of the metering plugin keep each event in the spool until its endpoint took it. What they cannot deliver
    becomes a dead letter: 'rejected' (the endpoint refused the event for itself), 'too_large' (for the endpoint's own
    storage), 'ambiguous' (sent without an answer longer ago than the deduplication window, so that sending it again
    could bill it twice) or 'unreadable' (its bytes on disk are damaged).

    All commands work beside running servers. Run them as the user that Kong runs as.
    """
