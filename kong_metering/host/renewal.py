"""When Kong is made to start instances anew, with what its configuration holds now.

Kong starts an instance when a configuration changes. When a value changes that comes from a vault, it puts that into
its own copy and starts none. A plugin tells by `outdated` that it has reason to think so.

Contract: used from the event loop's thread only; `look` is called about once a second. It happens once in
`_INTERVAL_SECONDS` at most, and never while the youngest of the instances that it is about is younger than
`_YOUNGEST_SECONDS`. How Kong is made to is for the protocols: over ProtoBuf an event of an instance that is marked ends
its connection; over MessagePack Kong is told a new `number` before the next answer.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Protocol

from kong_metering.log import LOGGER, printable, trouble

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kong_metering.clock import Clock

_INTERVAL_SECONDS = 60.0
_YOUNGEST_SECONDS = 10.0
_MAX_REASON = 500


class Renewable(Protocol):
    """A plugin instance: `born_at` and `used_at` are monotonic."""

    @property
    def plugin(self) -> object:
        """The plugin, which may tell by `outdated` why Kong should start it anew."""
        ...

    born_at: float
    used_at: float
    is_outdated: bool


class Renewal:
    """What Kong is told of it.

    `number` changes with each renewal; `first` is the one before all of them.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._last = -_INTERVAL_SECONDS + clock.monotonic()
        self.first = self.number = os.getpid()

    def look(self, instances: Iterable[Renewable]) -> None:
        """Mark an instance that is in use and outdated, if it is time."""
        now = self._clock.monotonic()
        if now - self._last < _INTERVAL_SECONDS:
            return
        # Kong does not close the instances that it has forgotten: those are not used any more.
        in_use = [one for one in instances if now - one.used_at < _INTERVAL_SECONDS]
        outdated = [(one, reason) for one in in_use if (reason := getattr(one.plugin, "outdated", None))]
        if not outdated or any(now - one.born_at < _YOUNGEST_SECONDS for one, _ in outdated):
            return
        newest, reason = max(outdated, key=lambda item: item[0].used_at)
        self._last = now
        newest.is_outdated = True
        self.number += 1
        LOGGER.warning("%s", printable(str(reason), _MAX_REASON), extra=trouble("renewal"))
