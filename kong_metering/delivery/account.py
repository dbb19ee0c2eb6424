"""What one queue counts, and what it says in the log."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kong_metering.log import TroubleLog
    from kong_metering.stats import Buried, Dropped, Stats


@dataclass(frozen=True)
class QueueAccount:
    """A queue's name, over the account and the log of its process; any thread may use it.

    What is counted was said before: who sees a count finds its reason in the log.
    """

    name: str
    stats: Stats
    troubles: TroubleLog

    def drop(self, reason: Dropped, events: int, message: str) -> None:
        """Say that events are given up, and count them."""
        self.say(f"dropped:{reason.value}", message)
        self.stats.drop(reason, events)

    def bury(self, reason: Buried, events: int, message: str) -> None:
        """Say that events became dead letters, and count them."""
        self.say(f"dead letters:{reason.value}", message)
        self.stats.bury(reason, events)

    def say(self, kind: str, message: str, level: int = logging.ERROR) -> None:
        """Log a trouble, or its end; the same kind is summarised when it repeats."""
        self.troubles.report(f"{kind}:{self.name}", f"queue {self.name}: {message}", level)
