"""Whose turn it is: which events in hand are sent next, and when more are taken. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, TypeVar

from kong_metering.reasons import Dropped
from kong_metering.trial.decisions import Answered, Decision, Pause, Send, Take
from kong_metering.trial.parts import Part, in_order
from kong_metering.trial.probing import IN_A_ROW

if TYPE_CHECKING:
    from kong_metering.trial.hand import Hand
    from kong_metering.trial.retrying import Standing

T = TypeVar("T")

# How many events are held besides a batch: under suspicion, or to reach behind bad ones in a row.
REACH = 100
# While an event is under suspicion what waits is sent in so many parts at least: each is a witness.
_WITNESSES = 32
# Where others fail as often as this, there are enough of them.
_MANY_FAILURES = 0.5
# How far behind the last event in doubt the next one is that joins: no divisor of the first distance, or one bad event
# in ten would hide all good ones.
_FURTHER = 7
# One in so many events under suspicion is tried for each request of others that gets through, but one at least.
_SUSPECTS_A_TURN = 10


class Turns(Generic[T]):
    """Decides for one trial; takes what is sent out of its place in the hand."""

    def __init__(self, hand: Hand[T], standing: Standing) -> None:
        self._hand = hand
        self._standing = standing
        self._of_suspects = 0
        self._generation = 0
        self._is_closing = False
        self._is_over = False
        # How many events could still be taken when it was asked last.
        self._ready = 0

    @property
    def is_closing(self) -> bool:
        """Whether each part is sent once more at most."""
        return self._is_closing

    @property
    def is_at_the_last(self) -> bool:
        """Whether no more events could be taken when it was asked last."""
        return not self._ready

    def is_of_now(self, part: Part[T]) -> bool:
        """Return whether a part was sent under the configuration of now."""
        return part.generation == self._generation

    def begin_generation(self) -> None:
        """Take what is out for sent under a configuration that holds no more."""
        self._generation += 1

    def close(self) -> None:
        """Send each part once more at most."""
        self._is_closing = True

    def end(self) -> None:
        """Send nothing more."""
        self._is_over = True

    def next(self, now: float, ready: int) -> Decision[T]:
        """Return what to do now; `ready`: how many events may leave the queue by the batching rule."""
        hand, standing, self._ready = self._hand, self._standing, ready
        if len(hand.out) >= standing.rules.in_flight or self._is_over:
            return Pause(None)
        if self._is_closing:
            return self._at_the_end(now, ready)
        if standing.sheds:
            return self._behind_breaker(now, ready)
        if standing.free_at > now:
            return Pause(standing.free_at) if hand.events or ready else Pause(None)
        if standing.silence.is_probing and hand.line:
            return self._probe(now, ready)
        return self._in_turn(now, ready)

    def let_suspects_in(self) -> None:
        """Let events under suspicion have a turn, after a request of others that got through."""
        self._of_suspects = max(1, len(self._hand.suspects) // _SUSPECTS_A_TURN)

    def _send(self, part: Part[T], now: float) -> Send[T]:
        rounds = self._standing.silence.rounds
        part.sent(now, generation=self._generation, round=rounds, is_last_try=self._is_closing)
        self._standing.breaker.probe(now)
        self._hand.out.append(part)
        return Send(part)

    def _from_line(self, part: Part[T], now: float) -> Send[T]:
        self._hand.line.remove(part)
        return self._send(part, now)

    def _take(self, limit: int, ready: int) -> Take | None:
        rules = self._standing.rules
        room = rules.batch_size * rules.in_flight + REACH - self._hand.events
        count = min(limit, ready, room)
        return Take(count) if count > 0 else None

    # -- something gets through ---------------------------------------------------------------------------------------

    def _in_turn(self, now: float, ready: int) -> Decision[T]:
        line, in_flight = self._hand.line, self._standing.rules.in_flight
        suspect = self._suspect_in_turn(now)
        if suspect is not None:
            self._of_suspects -= 1
            self._hand.suspects.remove(suspect)
            return self._send(suspect, now)
        size = self._size(ready)
        part = self._first_free(now)
        if part is not None:
            return self._from_line(self._hand.at_most(part, size), now)
        more = self._take(size * (in_flight - len(self._hand.out)), ready) if not line or in_flight > 1 else None
        if more is not None:
            return more
        if line:
            return Pause(line.front.not_before if in_flight == 1 else min(part.not_before for part in line))
        return self._without_others(now)

    def _first_free(self, now: float) -> Part[T] | None:
        """Return the oldest part that may go now; in order, none overtakes it."""
        line = self._hand.line
        parts = line if self._standing.rules.in_flight > 1 else list(line)[:1]
        return next((part for part in parts if part.not_before <= now), None)

    def _size(self, ready: int) -> int:
        """Return how many events may go in a request: few while an event is under suspicion and few others wait."""
        size = self._standing.rules.batch_size
        if not self._hand.suspects or self._hand.evidence.failure_share >= _MANY_FAILURES:
            return size
        return max(1, min(size, (self._hand.line.events + ready) // _WITNESSES))

    def _suspect_in_turn(self, now: float) -> Part[T] | None:
        passes = self._hand.evidence.passes
        suspects = self._hand.suspects if self._of_suspects > 0 else []
        return next((part for part in suspects if part.suspicion and part.suspicion.may_go(passes, now)), None)

    def _without_others(self, now: float) -> Decision[T]:
        """Try an event under suspicion once in a while where nothing else waits."""
        if not self._hand.suspects:
            return Pause(None)
        part = min(self._hand.suspects, key=lambda part: part.not_before)
        if part.not_before > now:
            return Pause(part.not_before)
        self._hand.suspects.remove(part)
        return self._send(part, now)

    # -- nothing gets through -----------------------------------------------------------------------------------------

    def _probe(self, now: float, ready: int) -> Decision[T]:
        hand, silence = self._hand, self._standing.silence
        if any(part.round == silence.rounds for part in hand.out):
            return Pause(None)
        if not silence.is_others_turn:
            return self._from_line(hand.alone(0), now)
        depth = self._depth_of_other(now)
        more = self._take(depth + 1 - hand.line.events, ready)
        if more is not None:
            return more
        depth = min(depth, hand.line.events - 1)
        if depth == 0 and not silence.is_about_the_sender:
            self._standing.end_round(now, None, hand.evidence)
            return Pause(silence.until)
        other = hand.alone(depth)
        silence.other_is_sent(joins=silence.leaves_doubt and not other.may_have_arrived)
        return self._from_line(other, now)

    def _depth_of_other(self, now: float) -> int:
        """Return how far behind the oldest event the other one of this round stands; 0: there is none."""
        silence = self._standing.silence
        if not self._standing.rules.keeps:
            return silence.careful_depth()
        if not silence.leaves_doubt:
            return silence.depth()
        in_doubt = [depth for depth in self._hand.line.depths_in_doubt() if depth > 0]
        # Those of a small batch may all be bad: they count only where they reach behind bad ones in a row.
        reaches_far = bool(in_doubt) and in_doubt[-1] >= IN_A_ROW
        silence.joined_of(len(in_doubt), reaches_far=reaches_far)
        if silence.lets_join(now):
            return in_doubt[-1] + _FURTHER if reaches_far else IN_A_ROW
        return in_doubt[silence.choice(len(in_doubt))] if in_doubt else 0

    def _behind_breaker(self, now: float, ready: int) -> Decision[T]:
        """Give up what comes, until it is time for a probe: the oldest batch, tried once."""
        line = self._hand.line
        if not line:
            return self._take(self._standing.rules.batch_size, ready) or Pause(None)
        if self._standing.breaker.probe_at(self._standing.rules) <= now:
            return self._from_line(line.front, now)
        shed = line.clear()
        self._hand.forget(shed)
        words = "the circuit breaker is open, events are dropped"
        return Answered(given_up=in_order(shed), reason=Dropped.BREAKER_OPEN, words=words)

    # -- the end ------------------------------------------------------------------------------------------------------

    def _at_the_end(self, now: float, ready: int) -> Decision[T]:
        size = self._standing.rules.batch_size
        part = next((part for part in self._hand.line if not part.is_last_try), None)
        if part is not None:
            return self._from_line(self._hand.at_most(part, size), now)
        return self._take(size, ready) or Pause(None)
