"""When to try again after a failure, and when to stop trying for a while: numbers in, a decision out. Pure."""

from __future__ import annotations

import math
from enum import Enum
from typing import TYPE_CHECKING

from kong_metering.trial.blame import OUTAGE_CHANCE
from kong_metering.trial.probing import Silence

if TYPE_CHECKING:
    from kong_metering.trial.blame import Evidence
    from kong_metering.trial.decisions import Rules


def retry_delay(rules: Rules, failures: int, retry_after: float | None) -> float:
    """Return the pause in seconds after the `failures`-th failure in a row (the first is 1).

    It doubles from `initial_retry_delay` up to `max_retry_delay`. What the endpoint asks for with Retry-After can make
    it longer, up to `max_retry_delay`, never shorter.
    """
    doublings = min(failures - 1, 64)
    backoff = min(rules.max_retry_delay, rules.initial_retry_delay * 2.0**doublings)
    return max(backoff, min(retry_after or 0.0, rules.max_retry_delay))


def gives_up(rules: Rules, trying_for: float) -> bool:
    """Return whether a batch that just failed, `trying_for` seconds after it was first sent, has had its time."""
    return trying_for > rules.max_retry_time


class Breaker:
    """Stops trying for a while after too many failed batches in a row."""

    def __init__(self) -> None:
        self._failures = 0
        self._opened_at: float | None = None

    @property
    def is_open(self) -> bool:
        """True if too many batches in a row have failed; a batch that is sent now is a probe, tried once."""
        return self._opened_at is not None

    def probe_at(self, rules: Rules) -> float:
        """Return when the next try may be made (monotonic); it was at any time while the breaker is closed."""
        return -math.inf if self._opened_at is None else self._opened_at + rules.breaker_cooldown

    def probe(self, now: float) -> None:
        """Note that a probe is sent, so that the next one waits for another cooldown."""
        if self._opened_at is not None:
            self._opened_at = now

    def end_cooldown(self) -> None:
        """Have the next probe at once."""
        if self._opened_at is not None:
            self._opened_at = -math.inf

    def failed(self, rules: Rules, now: float) -> bool:
        """Count a batch that had its time; True when this one opened the breaker."""
        self._failures += 1
        if rules.failure_threshold == 0 or self._failures < rules.failure_threshold:
            return False
        opened = self._opened_at is None
        self._opened_at = now
        return opened

    def succeeded(self) -> bool:
        """Count a delivered batch; True when it closed the breaker."""
        closed = self._opened_at is not None
        self._failures, self._opened_at = 0, None
        return closed


class Condition(str, Enum):
    """How it stands with an endpoint, for people."""

    WORKS = "works"
    # Requests fail, and are sent again as they are; others get through, or did a moment ago.
    FAILS_AT_TIMES = "fails_at_times"
    # All waits, and the oldest event probes.
    NOTHING_GETS_THROUGH = "nothing_gets_through"
    # Without a spool, by Kong's rules: what comes is given up, but for a probe now and then.
    BREAKER_OPEN = "breaker_open"


class Standing:
    """What a trial knows of the endpoint beside the evidence, and from when on it may be asked again (monotonic).

    `works_since`: when something got through last, a configuration came, or failing for so long was noted last.
    """

    def __init__(self, rules: Rules, now: float) -> None:
        self.rules = rules
        self.silence = Silence()
        self.breaker = Breaker()
        self.works_since = now

    def reconfigure(self, rules: Rules, now: float) -> None:
        """Go by a newer configuration: what failed before counts for nothing."""
        self.rules, self.works_since, self.breaker = rules, now, Breaker()
        self.silence.end()
        self.ask_first()

    def ask_first(self) -> None:
        """Begin with one event, if the rules say so."""
        if self.rules.asks_first:
            self.silence.ask()

    def works(self, now: float) -> bool:
        """Note that something got through; True when that closed the breaker."""
        self.silence.end()
        self.works_since = now
        return self.breaker.succeeded()

    def measure_anew(self, now: float) -> None:
        """Measure from now on how long it has failed: that it had its time was noted."""
        self.works_since = now

    def end_pauses(self, now: float) -> None:
        """Have what is next be tried from now on."""
        self.silence.end_pause(now)
        self.breaker.end_cooldown()

    @property
    def condition(self) -> Condition:
        """How it stands now."""
        if self.breaker.is_open:
            return Condition.BREAKER_OPEN
        if self.silence.is_probing and self.silence.failures:
            return Condition.NOTHING_GETS_THROUGH
        return Condition.FAILS_AT_TIMES if self.silence.failures else Condition.WORKS

    @property
    def free_at(self) -> float:
        """From when on something may be sent."""
        return max(self.silence.until, self.breaker.probe_at(self.rules))

    @property
    def sheds(self) -> bool:
        """True if what comes is given up, but for a probe now and then."""
        return self.breaker.is_open and not self.rules.keeps

    def had_its_time(self, since: float | None, now: float) -> bool:
        """Return whether what was first sent then has failed for longer than it is tried for."""
        return gives_up(self.rules, now - max(now if since is None else since, self.works_since))

    def end_round(self, now: float, retry_after: float | None, evidence: Evidence) -> None:
        """Pause before something is tried again; longer each time once this is more than failing at random."""
        silence = self.silence
        if not evidence.is_plausible(silence.failures, OUTAGE_CHANCE):
            silence.lengthen()
        asked = max(retry_after or 0.0, silence.retry_after or 0.0)
        silence.pause(now + retry_delay(self.rules, max(1, silence.pauses), asked))
