"""What a server is given by the supervisor that has forked it."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kong_metering.host.board import Slot
    from kong_metering.host.channels import Channel
    from kong_metering.host.handover import Inheritance, Sockets
    from kong_metering.host.keeping import Lent
    from kong_metering.host.workers import Workers


@dataclass(frozen=True)
class Station:
    """Where a server is, and who it has to do with.

    Of `sockets.servers` and `slots` each server has one, at its `index`. `supervisor` is the process that started it,
    `kong` the master process of the gateway that has started the supervisor, if any has. `inheritance` is its share of
    what the servers before leave, if it `takes_over` from any; `lent` the supervisor's memory, for this server's use.
    """

    path: Path
    backlog: int
    sockets: Sockets
    slots: tuple[Slot, ...]
    workers: Workers
    index: int
    supervisor: int
    kong: int | None
    takes_over: bool
    inheritance: Inheritance
    lent: Lent

    @property
    def channel(self) -> Channel:
        """What is sent to this server."""
        return self.sockets.servers[self.index]

    @property
    def slot(self) -> Slot:
        """What this server tells the others."""
        return self.slots[self.index]

    @property
    def is_orphaned(self) -> bool:
        """Whether the supervisor is gone."""
        return os.getppid() != self.supervisor

    @property
    def living_sockets(self) -> Sockets:
        """What there is to share: without a supervisor if it is gone."""
        return replace(self.sockets, supervisor=None) if self.is_orphaned else self.sockets
