"""`kong-metering spool`: the group of commands about what is kept on disk."""

from __future__ import annotations

import click

from kong_metering.commands.deliver import deliver
from kong_metering.commands.export import export
from kong_metering.commands.listing import list_events, show
from kong_metering.commands.purge import purge
from kong_metering.commands.redirect import redirect
from kong_metering.commands.replay import replay
from kong_metering.commands.restore import restore
from kong_metering.commands.status import status


@click.group()
def spool() -> None:
    """Look after the events that are kept on disk.

    The servers of the metering plugin keep each event in the spool until its endpoint took it. What they cannot deliver
    becomes a dead letter: 'rejected' (the endpoint refused the event for itself), 'too_large' (for the endpoint's own
    storage), 'ambiguous' (sent without an answer longer ago than the deduplication window, so that sending it again
    could bill it twice) or 'unreadable' (its bytes on disk are damaged).

    All commands work beside running servers. Run them as the user that Kong runs as.
    """


for command in (status, list_events, show, export, replay, restore, deliver, redirect, purge):
    spool.add_command(command)
