"""How long somebody at a terminal is kept waiting for an endpoint that takes nothing. Pure, but for the clock.

It ends

- at once where trying again is of no use and no event can be the reason: 401, a certificate that is not trusted;
- after `TRIES` requests in a row that failed for no event's fault: no connection, 429;
- after `ROUNDS` pauses without anything getting through, about half a minute, for whatever else it says. In each round
  the trial sends the oldest event alone, and another one: up to 256 bad ones in a row in front do not keep it from good
  ones behind them. Where requests failed now and then before, it goes on until so many failures in a row are no chance.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from kong_metering.trial import outcome as outcomes
from kong_metering.trial.outcome import Delivered, Failed

if TYPE_CHECKING:
    from kong_metering.clock import Clock
    from kong_metering.trial.outcome import Failure, Outcome

TRIES = 5
ROUNDS = 10
LONGEST_ASKED_PAUSE = 60.0
_CHANCE = 1e-6


class Endurance:
    """What the endpoint has answered so far."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._passed = 0
        # Requests that failed before something got through; and since then: all, for no event's fault, and pauses.
        self._failed_before = 0
        self._failed = 0
        self._for_no_event = 0
        self._pauses = 0
        self._last: Failure | None = None
        self._asked_until = -math.inf

    def count(self, outcome: Outcome) -> None:
        """Count the answer to a request."""
        if isinstance(outcome, Delivered):
            self._passed += 1
            self._failed_before += self._failed
            self._failed = self._for_no_event = self._pauses = 0
            return
        self._last = outcome
        self._failed += 1
        self._for_no_event = self._for_no_event + 1 if outcomes.is_about_no_event(outcome) else 0
        asked = min(LONGEST_ASKED_PAUSE, outcome.retry_after or 0.0)
        self._asked_until = max(self._asked_until, self._clock.monotonic() + asked)

    def count_pause(self) -> None:
        """Count a pause that is about to be made."""
        self._pauses += 1

    def pause_until(self, until: float) -> float:
        """Return until when to pause: as long as the endpoint asked for, a minute at most, if that is longer."""
        return max(until, self._asked_until)

    @property
    def has_ended(self) -> bool:
        """True if it is not tried any longer."""
        if self._last is None or not self._failed:
            return False
        is_of_no_use = isinstance(self._last, Failed) and self._last.is_misconfigured
        if is_of_no_use and outcomes.is_about_no_event(self._last):
            return True
        if self._for_no_event:
            return self._for_no_event >= TRIES
        return self._pauses >= ROUNDS and self._is_no_chance

    @property
    def reason(self) -> str:
        """What to tell of the end."""
        told = self._last.reason if self._last else ""
        return f"nothing gets through any more: {told}" if self._passed else f"nothing gets through: {told}"

    @property
    def _is_no_chance(self) -> bool:
        share = self._failed_before / (self._passed + self._failed_before) if self._passed else 0.0
        return share**self._failed < _CHANCE
