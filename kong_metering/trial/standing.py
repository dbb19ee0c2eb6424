"""How it stands with the endpoint: what a trial knows of it beside the evidence, and the pauses that follow. Pure."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

from kong_metering.trial.blame import OUTAGE_CHANCE
from kong_metering.trial.probing import Silence
from kong_metering.trial.retrying import Breaker, gives_up, retry_delay

if TYPE_CHECKING:
    from kong_metering.trial.blame import Evidence
    from kong_metering.trial.decisions import Rules


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
    """Whether the endpoint works, and from when on it may be asked again; times are monotonic.

    `works_since`: when something got through last, a configuration came, or failing for so long was noted last.
    """

    def __init__(self, rules: Rules, now: float) -> None:
        self.rules = rules
        self.silence = Silence()
        self.breaker = Breaker()
        self.works_since = now

    @property
    def condition(self) -> Condition:
        """How it stands now."""
        if self.breaker.is_open:
            return Condition.BREAKER_OPEN
        if self.silence.is_probing:
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
            silence.pauses += 1
        asked = max(retry_after or 0.0, silence.retry_after or 0.0)
        silence.pause(now + retry_delay(self.rules, max(1, silence.pauses), asked))
