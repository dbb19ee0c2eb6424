"""What ends undelivered: refused for itself, or given up for its time, for the breaker, at the process's end. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Generic, TypeVar

from kong_metering.plurals import counted
from kong_metering.reasons import Dropped
from kong_metering.trial.decisions import BREAKER_OPENED, Note
from kong_metering.trial.outcome import Failed, Rejected, is_about_no_event
from kong_metering.trial.parts import Part, in_order, thirds

if TYPE_CHECKING:
    from kong_metering.trial.decisions import Answered
    from kong_metering.trial.hand import Hand
    from kong_metering.trial.outcome import Failure
    from kong_metering.trial.retrying import Standing

T = TypeVar("T")

_WHY_LOST = {
    Dropped.PROCESS_ENDED: "the process ended before they were delivered",
    Dropped.BREAKER_OPEN: "the circuit breaker is open",
    Dropped.RETRY_TIME_EXCEEDED: "max_retry_time is exceeded",
}


class Endings(Generic[T]):
    """Writes it into what is answered; with a spool only what is refused ends so."""

    def __init__(self, hand: Hand[T], standing: Standing) -> None:
        self._hand = hand
        self._standing = standing

    def refuse(self, part: Part[T], words: str, answered: Answered[T]) -> None:
        """Refuse events for themselves, with the endpoint's words."""
        self._hand.forget([part])
        answered.refused += [(item, words) for item in part.items]

    def is_last_to_blame(self, part: Part[T], failure: Failure) -> bool:
        """Return whether an event is to blame where no others will come to be compared with it; nothing waits any more.

        All that are left have failed alone, while others got through since this one first failed.
        """
        hand = self._hand
        if self._standing.rules.expects_more or hand.out or is_about_no_event(failure):
            return False
        left = [part, *hand.line, *hand.suspects]
        if any(len(each.items) > 1 or not each.failures for each in left):
            return False
        return part.seen is not None and hand.evidence.blames_last(part.failures, part.refusals, part.seen)

    def gives_up(self, part: Part[T], failure: Failure, now: float, answered: Answered[T]) -> bool:
        """Count a batch that failed for too long; True if it is given up."""
        standing = self._standing
        exceeded = standing.had_its_time(part.since, now)
        was_open = standing.breaker.is_open
        if not (exceeded or was_open) or (isinstance(failure, Rejected) and len(part.items) > 1):
            return False
        is_refused = isinstance(failure, Rejected) and self._others_got_through_since(part)
        if not is_refused and standing.breaker.failed(standing.rules, now):
            answered.notes.append(BREAKER_OPENED)
        if standing.rules.keeps:
            if exceeded:
                standing.measure_anew(now)
                answered.notes.append(Note.kept(failure))
            return False
        standing.silence.end()
        if is_refused:
            self.refuse(part, failure.explanation, answered)
        else:
            reason = Dropped.BREAKER_OPEN if was_open else Dropped.RETRY_TIME_EXCEEDED
            self.lose([part, *self._hand.batch_mates(part)], reason, failure, answered)
        return True

    def _others_got_through_since(self, part: Part[T]) -> bool:
        return part.seen is not None and self._hand.evidence.passes > part.seen.passes

    def at_the_end(self, part: Part[T], failure: Failure, answered: Answered[T]) -> bool:
        """Decide about a part that failed while the trial was closing; True if all else is left as it is."""
        part.is_last_try = True
        if isinstance(failure, Rejected) and len(part.items) > 1:
            part.is_last_try = False  # each piece is another part
            self._hand.cut(part, *thirds(len(part.items)))
        elif self._standing.rules.keeps:
            self._hand.line.add(part)
            return isinstance(failure, Failed)
        elif isinstance(failure, Rejected) and self._hand.evidence.passes:
            self.refuse(part, failure.explanation, answered)
        else:
            self.lose([part], Dropped.PROCESS_ENDED, failure, answered)
        return False

    def lose(self, parts: Sequence[Part[T]], reason: Dropped, failure: Failure, answered: Answered[T]) -> None:
        """Give events up for a reason."""
        self._hand.forget(parts)
        answered.given_up = in_order(parts)
        answered.reason = reason
        lost = counted(len(answered.given_up), "event was", "events were")
        answered.words = f"{lost} lost, {_WHY_LOST[reason]}: {failure.reason}"
