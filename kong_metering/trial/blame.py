"""Whether an event is to blame for its failures: a sequential test against how the others fare. Pure.

An event that fails k times in a row is to blame once a good one would do so with a chance under one in a million. The
chance is worked out from the requests of others since the event first failed: with s that got through and f that
failed, all shares of failures that could be behind these being equally likely before (Laplace's rule of succession), it
is (f+1)…(f+k) / (f+s+2)…(f+s+k+1). So few others mean a cautious test. A failure of others counts once everything in
that request has been delivered after all: then nothing in it was to blame.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

# A good event gets blamed with this chance at most.
BLAME_CHANCE = 1e-6
# What good events do less often than this, in a row, is looked into.
CONSPICUOUS_CHANCE = 1e-2
# Where no others were refused for themselves (400, 413, 422) one in a hundred is enough, but one confirmation at least.
CLEAR_CHANCE = 1e-2
CLEAR_REFUSALS = 2
# Where no others will come, and who looks on decides what becomes of a dead letter.
LAST_CHANCE = 1e-3
# What good events do less often than this, in a row, makes the pauses grow.
OUTAGE_CHANCE = 1e-5
# How many requests that got through the share of failures is measured over, roughly.
_MEMORY = 300
_GOLDEN = (math.sqrt(5) - 1) / 2
_LONGEST_MEAN_RUN = 1000


def chance_of_run(run: int, passes: int, failures: int) -> float:
    """Return the chance that a good event fails so often in a row where others passed and failed so often."""
    others = passes + failures
    return math.exp(
        math.lgamma(failures + 1 + run)
        - math.lgamma(failures + 1)
        + math.lgamma(others + 2)
        - math.lgamma(others + 2 + run)
    )


class Seen(NamedTuple):
    """Requests of others by a moment: that got through, that failed with nothing to blame, and refused so."""

    passes: int = 0
    failures: int = 0
    refusals: int = 0


@dataclass
class Suspicion:
    """How an event under suspicion has fared alone, others getting through in between.

    `since`: what was seen of others when it first failed. `passes`: what had got through when it was counted last.
    `alone`: how often it has failed with nothing else getting through. `wait`: how
    many requests of others go before its next one; it varies, so that it does not fall into step with a limit on the
    endpoint's side that lets one request through now and then. `until`: the end of a pause it was told.
    `unconfirmed`: it failed in a way that counts only if the next request of others gets through. `is_named`: the
    endpoint refused a request that it was in, named it, and took others of that request without it.
    """

    since: Seen
    passes: int
    failures: int = 0
    refusals: int = 0
    alone: int = 1
    wait: int = 0
    until: float = -math.inf
    unconfirmed: bool = False
    is_named: bool = False
    words: str = ""

    @classmethod
    def of_named(cls, since: Seen, passes: int, words: str) -> Suspicion:
        """Make that of an event which the endpoint named; `passes`: what had got through before the others of it did.

        The refusal that it was named in is the first one.
        """
        return cls(since, passes, failures=1, refusals=1, is_named=True, words=words)

    def may_go(self, passes: int, now: float) -> bool:
        """Return whether its next try is due, now that so many requests have got through."""
        return passes > self.passes and self.wait <= 0 and self.until <= now

    def tried(self, passes: int) -> None:
        """Note that it has failed alone; `passes`: how many requests of others have got through by now."""
        self.alone = 1 if passes > self.passes else self.alone + 1

    def other_went(self) -> None:
        """Note that a request of others was answered."""
        self.wait -= 1

    def pause(self, requests: int, until: float) -> None:
        """Have so many requests of others go before its next one, and that not before a moment (monotonic)."""
        self.wait, self.until = requests, until

    def count(self, *, is_refusal: bool, passes: int, words: str) -> None:
        """Count a failure of the event alone."""
        self.failures += 1
        self.refusals += is_refusal
        self.passes = passes
        self.words = words

    def await_confirmation(self, *, passes: int, words: str) -> None:
        """Note a failure of the event alone that counts only if the next request of others gets through."""
        self.unconfirmed = True
        self.passes = passes
        self.words = words

    def drop_unconfirmed(self) -> None:
        """Forget the failure that awaits it: a request of others failed, too."""
        self.unconfirmed = False

    def confirm(self, *, passes: int) -> None:
        """Count the failure that awaits it: a request of others got through."""
        self.unconfirmed = False
        self.count(is_refusal=False, passes=passes, words=self.words)


@dataclass
class _Claim:
    """Failures of a request that was cut up since, and whose events are still to be delivered."""

    failures: int
    refusals: int
    places: set[int]


class Evidence:
    """What the requests of one endpoint have shown since it was configured."""

    def __init__(self) -> None:
        self.seen = Seen()
        self._claims: list[_Claim] = []
        self._recent_passes = 0.0
        self._recent_troubled = 0.0
        self._recent_refusals = 0.0

    @property
    def passes(self) -> int:
        """How many requests have got through."""
        return self.seen.passes

    @property
    def failure_share(self) -> float:
        """The share of requests that lately failed with nothing to blame; 0 where nothing is known.

        It is the share of what got through that had failed before: an outage counts once, however long it was.
        """
        # A request that got through after failures may have ended the trouble of others, too: that counts as two. But
        # no endpoint is taken for one that always fails: then a bad event would be tried for ever.
        passes = self._recent_passes + 1
        return min(passes / (passes + 1), self._recent_troubled / passes)

    def is_plausible(self, run: int, chance: float = CONSPICUOUS_CHANCE) -> bool:
        """Return whether good events fail so often in a row now and then, as far as was seen."""
        share = self.failure_share
        if share == 0:
            return run == 0
        # By logarithms: a power may be too small to be represented, and raise.
        return run * math.log(share) >= math.log(chance)

    def passed(self, places: Sequence[int], failures: int, refusals: int) -> None:
        """Note that a part got through after some failures of its own."""
        self._add(1, failures, refusals)
        if self._claims:
            self._settle(places)

    def shelve(self, places: Sequence[int], failures: int, refusals: int) -> None:
        """Note that a part which has failed is cut up: its failures count once all of it is delivered."""
        if failures:
            self._claims.append(_Claim(failures, refusals, set(places)))

    def forget(self, places: Sequence[int]) -> None:
        """Note that events are gone without being delivered: what they failed in says nothing about others."""
        self._claims = [claim for claim in self._claims if claim.places.isdisjoint(places)]

    def blames(self, suspicion: Suspicion) -> bool:
        """Return whether a good event would not have failed like that."""
        if suspicion.refusals >= max(CLEAR_REFUSALS, suspicion.failures) and self._recent_refusals < 1 / 2:
            # With it refused, without it taken, alone refused: that is compared with others enough.
            return suspicion.is_named or chance_of_run(suspicion.refusals, self.passes, 0) < CLEAR_CHANCE
        passes, failures = self.seen.passes - suspicion.since.passes, self.seen.failures - suspicion.since.failures
        return chance_of_run(suspicion.failures, passes, failures) < BLAME_CHANCE

    def blames_last(self, failures: int, refusals: int, since: Seen) -> bool:
        """Return whether a good event would not have failed alone so often, though no others have passed in between.

        Others have to have passed since it first failed, alone or in a batch.
        """
        passes = self.seen.passes - since.passes
        if passes == 0:
            return False
        if refusals >= max(CLEAR_REFUSALS, failures):
            return chance_of_run(refusals, self.passes, 0) < CLEAR_CHANCE
        return chance_of_run(failures, passes, self.seen.failures - since.failures) < LAST_CHANCE

    def next_wait(self, suspicion: Suspicion) -> int:
        """Return how many requests of others go before the next one of an event under suspicion.

        Two to a success on the average where others fail, so that all moments between two successes get their turn.
        """
        mean_run = min(1 / max(1e-9, 1 - self.failure_share), _LONGEST_MEAN_RUN)
        return int((suspicion.failures * _GOLDEN % 1.0) * 2 * (mean_run - 1))

    def _add(self, passes: int, failures: int, refusals: int) -> None:
        keep = 1 - passes / _MEMORY
        self._recent_passes = self._recent_passes * keep + passes
        self._recent_troubled = self._recent_troubled * keep + (failures > 0)
        self._recent_refusals = self._recent_refusals * keep + (refusals > 0)
        seen = self.seen
        self.seen = Seen(seen.passes + passes, seen.failures + failures, seen.refusals + refusals)

    def _settle(self, places: Sequence[int]) -> None:
        """Count the claims of which everything is delivered now; together they were one trouble."""
        for claim in self._claims:
            claim.places.difference_update(places)
        settled = [claim for claim in self._claims if not claim.places]
        self._claims = [claim for claim in self._claims if claim.places]
        if settled:
            self._add(0, sum(claim.failures for claim in settled), sum(claim.refusals for claim in settled))
