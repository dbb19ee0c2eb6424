"""Saying that a write hangs, and when it goes on.

Contract: one thread calls `look`, about once a second: one that waits for no disk. The janitor does wait for it, and
where a whole disk hangs it would say nothing until that is over.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kong_metering.log import LOGGER, trouble
from kong_metering.outages import in_words

if TYPE_CHECKING:
    from kong_metering.clock import Clock
    from kong_metering.upkeep.writer import Writer

_HANGING_SECONDS = 5.0


class HungWrite:
    """The write that hangs, if one does."""

    def __init__(self, writer: Writer, clock: Clock) -> None:
        self._writer = writer
        self._clock = clock
        # When it began (monotonic).
        self._since: float | None = None

    def look(self) -> None:
        """Say what is new about it."""
        now, since = self._clock.monotonic(), self._writer.writing_since
        if self._since is not None and since != self._since:
            lasted = in_words(now - self._since)
            LOGGER.warning("the disk works again after it hung for %s", lasted, extra=trouble("disk works"))
            self._since = None
        if since is not None and now - since > _HANGING_SECONDS:
            self._since = since
            LOGGER.error(
                "the disk hangs: a write has taken %.0f s by now; events wait in memory meanwhile",
                now - since,
                extra=trouble("disk hangs"),
            )
