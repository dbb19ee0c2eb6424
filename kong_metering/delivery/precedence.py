"""Which of the configurations that were opened for a queue rules it.

Contract: the one that was opened last, except that an old one which comes late does not take over. A request that began
before a change runs its log phase with the configuration it began with; Kong's worker then starts an instance of that
one once more, after the new one, and closes the new one's until its next request. So the newer one rules on even when
its last instance is closed and only the old one's are left.

Kong's workers number the configurations as they read them, from one counter (`Entity.sequence`): in every worker a
newer one has a higher number. A configuration comes late if another one took over from it, with a number that is higher
than its own. So going back to it is no late coming: Kong reads it again, under a higher number. Without numbers the
last one rules; and so does an old one that this process did not see before, until the worker's next request.

The counter begins anew when Kong restarts or reloads, and a plugin server under a supervisor outlives that. It shows
when a configuration comes with a number that is too low for it; what was remembered is then forgotten. One case does
not show: Kong restarts with a configuration from before a change that this process saw, and gives it a number from
before that change. It is taken for late, which is said in the log, and the newer one rules on: until Kong reads its
plugins anew (at any change of one) and the numbers are higher, until another configuration comes, or until the plugin
server restarts. Whether the newer one has instances left would not tell: those of workers that are gone stay open.

Where vault references stand in a configuration, Kong's workers may hold different values of them for a while, and no
number tells which is the newer. Of such twins the one rules that the endpoint takes: another one takes over only when
the endpoint has refused the ruling one's token, be it opened before that or afterwards. One that was refused is not
tried again until it is opened again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kong_metering.config import Queue
    from kong_metering.ingest.client import Endpoint

_MAX_SUPERSEDED = 16
_MAX_TWINS = 4


@dataclass(frozen=True)
class Configuration:
    """All that a queue takes from a plugin's configuration."""

    endpoint: Endpoint
    settings: Queue


class Precedence:
    """The configuration that rules a queue, and those that did; the caller locks.

    The written form of a configuration has the vault references in the place of what they stand for.
    """

    def __init__(self, configuration: Configuration, sequence: int, written: Configuration | None = None) -> None:
        """Begin with the configuration that opened the queue; `sequence` is 0 where there is none."""
        self.ruling = configuration
        self.is_refused = False  # the endpoint's last word on the ruling one's token
        self._written = written or configuration
        self._twins: list[Configuration] = []  # of the ruling one, not refused as far as is known; the newest last
        self._highest = sequence  # of the ruling one; its workers have a number each
        self._floor = 0  # the ruling one has only higher numbers, as long as Kong's counter goes on
        self._superseded: dict[Configuration, int] = {}  # and the number with which another one took over

    def open(self, configuration: Configuration, sequence: int, written: Configuration | None = None) -> bool:
        """Take note that a configuration is opened, and tell whether it takes over: then it is the ruling one."""
        written = written or configuration
        if written == self._written:
            if 0 < sequence <= self._floor:
                self._count_anew()
            self._highest = max(self._highest, sequence)
            return self._open_twin(configuration)
        if 0 < sequence < self._superseded.get(written, 0):
            return False
        if 0 < sequence <= self._highest:
            self._count_anew()
        elif sequence:
            # One that ruled before may still come under its numbers of that time: they tell nothing of the counter.
            self._floor = 0 if self._superseded.pop(written, 0) else self._highest
            self._superseded[self._written] = sequence
            if len(self._superseded) > _MAX_SUPERSEDED:
                del self._superseded[next(iter(self._superseded))]
        self._written, self._highest, self._twins = written, sequence, []
        self._let_rule(configuration)
        return True

    def is_twin(self, configuration: Configuration) -> bool:
        """Return whether it is the ruling one but for other values from the vault."""
        return configuration in self._twins

    def note_answer(self, endpoint: Endpoint, *, is_refused: bool) -> bool:
        """Take note of what an endpoint says to a token, and tell whether a twin takes over."""
        if endpoint != self.ruling.endpoint:
            return False
        self.is_refused = is_refused
        if not (is_refused and self._twins):
            return False
        self._let_rule(self._twins.pop())
        return True

    def _open_twin(self, configuration: Configuration) -> bool:
        if configuration == self.ruling:
            return False
        if configuration in self._twins:
            self._twins.remove(configuration)
        if self.is_refused:
            self._let_rule(configuration)
            return True
        self._twins = [*self._twins, configuration][-_MAX_TWINS:]
        return False

    def _let_rule(self, configuration: Configuration) -> None:
        self.ruling, self.is_refused = configuration, False

    def _count_anew(self) -> None:
        self._superseded.clear()
        self._highest = self._floor = 0
