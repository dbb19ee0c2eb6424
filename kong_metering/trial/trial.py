"""What to send next, and whose fault a failure is: answers and a clock's reading in, decisions out. Pure.

An answer says something about an event only if the endpoint is seen to take others. So:

- While nothing gets through it is the endpoint, or the configuration, whatever it answers. All waits, in order; the
  oldest event probes (`probing`), with growing pauses. When something gets through batches go again.
- While requests fail at random, as often as they did lately, what failed is sent again as it is, with short pauses.
- Where others get through, what goes on failing is cut up until one event is alone, set apart, and tried between the
  others until it gets through or is found to be to blame (`blame`). Events that the endpoint names are set apart at
  once, and tried alone when others of their batch got through: what an answer says is where to look, and no proof.

Contract: whoever drives it calls one method at a time. `next` tells what to do; what it asked for comes by `take`, a
part that was sent comes back by `answer` or `recall`, each once. It holds a batch and `REACH` events more at most
(with many in flight: those and `REACH`), whatever fails. `turns` decides what is sent, this file what an answer means.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

from kong_metering.reasons import Dropped
from kong_metering.trial.blame import Suspicion
from kong_metering.trial.decisions import BREAKER_CLOSED, Answered, Decision, Note, Pause, Rules, Send, Take
from kong_metering.trial.endings import Endings
from kong_metering.trial.hand import Hand
from kong_metering.trial.outcome import Delivered, Failure, Outcome, Rejected, is_about_no_event
from kong_metering.trial.parts import Part, thirds
from kong_metering.trial.probing import IN_A_ROW
from kong_metering.trial.retrying import Condition, Standing, retry_delay
from kong_metering.trial.turns import REACH, Turns

__all__ = ["REACH", "Answered", "Decision", "Note", "Part", "Pause", "Rules", "Send", "Take", "Trial"]

T = TypeVar("T")


class Trial(Generic[T]):
    """The events that one queue has in hand, and what is known of the endpoint; an event may be anything."""

    def __init__(self, rules: Rules, now: float) -> None:
        self._hand: Hand[T] = Hand()
        self._standing = Standing(rules, now)
        self._turns = Turns(self._hand, self._standing)
        self._endings = Endings(self._hand, self._standing)
        self._standing.ask_first()

    def next(self, now: float, ready: int) -> Decision[T]:
        """Return what to do now; `ready`: how many events may leave the queue by the batching rule.

        `Answered` comes from here too: what is given up without being sent.
        """
        return self._turns.next(now, ready)

    def take(self, items: Sequence[T], now: float) -> None:  # noqa: ARG002 - every call tells the time; this needs none
        """Take events in, in their order; those that `next` asked for, or fewer."""
        self._hand.take(items, self._standing.rules.batch_size)

    def unsettled(self) -> list[T]:
        """Return all events in hand, in order; those that are out too."""
        return self._hand.unsettled

    @property
    def condition(self) -> Condition:
        """How it stands with the endpoint."""
        return self._standing.condition

    @property
    def free_at(self) -> float:
        """From when on something may be sent (monotonic); in the past, or minus infinity, if it may be now."""
        return self._standing.free_at

    @property
    def suspects(self) -> int:
        """How many events are set apart, to be found good or bad."""
        return sum(len(part.items) for part in self._hand.suspects)

    @property
    def lined_up(self) -> int:
        """How many events in hand stand in line, to be sent."""
        return self._hand.line.events

    def withdraw(self, part: Part[T], items: Sequence[T]) -> bool:
        """Let events (by identity) of a part that was to be sent go; False if none is left: it is not answered."""
        self._hand.forget_places(part.let_go(items))
        if not part.items:
            self._hand.out.remove(part)
        return bool(part.items)

    def recall(self, part: Part[T]) -> None:
        """Line a part up again that was to be sent, whatever became of that: nobody has answered it.

        One of which nothing is left is none any more.
        """
        if part not in self._hand.out:
            return
        self._hand.out.remove(part)
        part.may_have_arrived = True
        if not self._turns.is_of_now(part):
            part.acquit()
        if part.suspicion is None:
            self._hand.line.add(part)
        else:
            self._hand.suspects.append(part)

    def reconfigure(self, rules: Rules, now: float) -> None:
        """Go by a newer configuration: what failed before counts for nothing, all stands in order again, at once."""
        self._standing.reconfigure(rules, now)
        self._turns.begin_generation()
        self._hand.acquit_all(rules.batch_size)

    def try_now(self, now: float) -> None:
        """End all pauses: what would have been tried after them is tried at once."""
        self._standing.end_pauses(now)
        self._hand.end_pauses(now)

    def close(self) -> None:
        """Send each part once more at most; with `keeps`, what fails is left, and so is all behind it."""
        self._turns.close()
        self._hand.recall_named()
        if not self._standing.rules.keeps:
            self._hand.recall_suspects()
        self._hand.join(self._standing.rules.batch_size)

    def answer(self, part: Part[T], answer: Outcome, now: float) -> Answered[T]:
        """Return what becomes of events now that a part was answered; of its own, and of others."""
        self._hand.out.remove(part)
        answered: Answered[T] = Answered()
        if isinstance(answer, Delivered):
            self._delivered(part, now, answered)
        elif not self._turns.is_of_now(part):
            part.may_have_arrived |= answer.may_have_arrived
            # What was seen of others before the configuration changed is no measure any more.
            part.acquit()
            self._hand.line.add(part)
        else:
            self._failed(part, answer, now, answered)
        return answered

    def _delivered(self, part: Part[T], now: float, answered: Answered[T]) -> None:
        answered.settled = part.items
        if not self._turns.is_of_now(part):
            return
        hand, standing = self._hand, self._standing
        hand.evidence.passed(part.places, part.failures, part.refusals)
        self._suspect_named(part)
        if standing.silence.is_probing and hand.line:
            hand.join(standing.rules.batch_size, keep_front=hand.line.front.places[0] < part.places[0])
        if standing.works(now):
            answered.notes.append(BREAKER_CLOSED)
        if part.suspicion is None:
            self._count_other()
            self._confirm(answered)
            self._turns.let_suspects_in()

    def _count_other(self) -> None:
        for suspect in self._hand.suspects:
            if suspect.suspicion is not None:
                suspect.suspicion.other_went()

    def _confirm(self, answered: Answered[T]) -> None:
        """Count failures that say that there are too many requests: others go on getting through, and it does not."""
        hand = self._hand
        for part in list(hand.suspects):
            if part.suspicion is not None and part.suspicion.unconfirmed:
                part.suspicion.confirm(passes=hand.evidence.passes)
                if hand.evidence.blames(part.suspicion):
                    hand.suspects.remove(part)
                    self._endings.refuse(part, part.suspicion.words, answered)

    def _confirm_nothing(self) -> None:
        for part in self._hand.suspects:
            if part.suspicion is not None:
                part.suspicion.drop_unconfirmed()

    # -- a part failed ------------------------------------------------------------------------------------------------

    def _failed(self, part: Part[T], failure: Failure, now: float, answered: Answered[T]) -> None:
        is_refusal = isinstance(failure, Rejected)
        seen = self._hand.evidence.seen
        part.failed(is_refusal=is_refusal, may_have_arrived=failure.may_have_arrived, seen=seen)
        answered.notes.append(Note.failed(len(part.items), failure))
        if is_refusal and not self._standing.rules.keeps and self._standing.breaker.succeeded():
            answered.notes.append(BREAKER_CLOSED)
        if part.is_last_try or self._turns.is_closing:
            if self._endings.at_the_end(part, failure, answered):
                self._turns.end()
        elif self._turns.is_at_the_last and self._endings.is_last_to_blame(part, failure):
            self._endings.refuse(part, failure.explanation, answered)
        elif part.suspicion is not None:
            self._suspect_failed(part, part.suspicion, failure, now, answered)
        else:
            self._count_other()
            self._confirm_nothing()
            self._standing.silence.failed()
            if not self._endings.gives_up(part, failure, now, answered):
                self._tries_again(part, failure, now, answered)

    def _tries_again(self, part: Part[T], failure: Failure, now: float, answered: Answered[T]) -> None:
        silence, evidence = self._standing.silence, self._hand.evidence
        if silence.is_probing and part.round < silence.rounds:
            self._hand.line.add(part)  # it was out before the probes began
        elif len(part.items) > 1 and self._is_clear(failure):
            self._search(part, failure, now)
        elif evidence.is_plausible(max(part.failures, silence.failures)):
            self._wait_as_it_is(part, failure, now)
        elif len(part.items) > 1:
            self._search(part, failure, now)
        elif self._stands_out(part, failure):
            self._set_apart(part, failure, now, answered)
        else:
            self._probe_failed(part, failure, now)

    def _is_clear(self, failure: Failure) -> bool:
        """Return whether an endpoint that works says that an event is bad."""
        return isinstance(failure, Rejected) and self._hand.evidence.passes > 0

    def _wait_as_it_is(self, part: Part[T], failure: Failure, now: float) -> None:
        asked = failure.retry_after
        part.not_before = now + retry_delay(self._standing.rules, 1, asked)
        if asked is not None:
            self._standing.silence.wait(part.not_before)
        self._hand.line.add(part)

    def _search(self, part: Part[T], failure: Failure, now: float) -> None:
        """Take a part that fails apart, or, where that is the first trouble seen, let its oldest event probe."""
        hand, silence = self._hand, self._standing.silence
        is_clear = self._is_clear(failure)
        named = failure.named(len(part.items)) if isinstance(failure, Rejected) else []
        if named and silence.failures <= IN_A_ROW:
            hand.set_named_apart(part, named, failure.explanation)
            return
        is_cut = is_clear or part.is_searched
        part.is_searched = True
        if is_cut:
            silence.search()
            hand.cut(part, *thirds(len(part.items)))
        else:
            hand.line.add(part)
            self._begin_probing(failure, now)
        if not is_clear:
            self._standing.end_round(now, failure.retry_after, hand.evidence)

    def _begin_probing(self, failure: Failure, now: float) -> None:
        self._standing.silence.begin(
            now, leaves_doubt=failure.may_have_arrived, is_about_the_sender=failure.is_about_the_sender
        )
        self._hand.recall_named()

    def _probe_failed(self, part: Part[T], failure: Failure, now: float) -> None:
        silence = self._standing.silence
        if part.passes_then is None:
            part.passes_then = self._hand.evidence.passes
        part.is_searched = False
        self._hand.line.add(part)
        was_other = silence.is_others_turn
        if was_other:
            silence.other_failed()
        self._begin_probing(failure, now)
        if was_other or is_about_no_event(failure):
            self._standing.end_round(now, failure.retry_after, self._hand.evidence)
        else:
            silence.let_other_try(failure.retry_after)

    # -- an event under suspicion -------------------------------------------------------------------------------------

    def _suspect_named(self, delivered: Part[T]) -> None:
        """Put what the endpoint named in a batch under suspicion, now that others of that batch got through."""
        evidence = self._hand.evidence
        for named, words in self._hand.named_beside(delivered.places):
            named.suspicion = Suspicion.of_named(named.seen or evidence.seen, evidence.passes - 1, words)
            self._hand.suspects.append(named)

    def _stands_out(self, part: Part[T], failure: Failure) -> bool:
        """Return whether others got through since this one failed alone: now it fails again."""
        has_failed_before = part.passes_then is not None and self._hand.evidence.passes > part.passes_then
        return has_failed_before and failure.was_seen

    def _set_apart(self, part: Part[T], failure: Failure, now: float, answered: Answered[T]) -> None:
        evidence = self._hand.evidence
        part.suspicion = suspicion = Suspicion(part.seen or evidence.seen, evidence.passes)
        self._count_failure(suspicion, failure, is_refusal=part.refusals == part.failures)
        if not suspicion.unconfirmed:  # one before the others got through, and one after
            self._count_failure(suspicion, failure, is_refusal=part.refusals == part.failures)
        self._standing.silence.end()
        answered.notes.append(Note.suspected(failure))
        self._judge(part, suspicion, failure, now, answered)

    def _suspect_failed(
        self, part: Part[T], suspicion: Suspicion, failure: Failure, now: float, answered: Answered[T]
    ) -> None:
        passes = self._hand.evidence.passes
        suspicion.tried(passes)
        if passes > suspicion.passes and failure.was_seen:
            self._count_failure(suspicion, failure, is_refusal=isinstance(failure, Rejected))
        self._judge(part, suspicion, failure, now, answered)

    def _count_failure(self, suspicion: Suspicion, failure: Failure, *, is_refusal: bool) -> None:
        passes, words = self._hand.evidence.passes, failure.explanation
        if failure.is_about_the_sender:
            suspicion.await_confirmation(passes=passes, words=words)
        else:
            suspicion.count(is_refusal=is_refusal, passes=passes, words=words)

    def _judge(self, part: Part[T], suspicion: Suspicion, failure: Failure, now: float, answered: Answered[T]) -> None:
        rules = self._standing.rules
        if self._hand.evidence.blames(suspicion):
            self._endings.refuse(part, suspicion.words, answered)
        elif not rules.keeps and self._standing.had_its_time(part.since, now):
            self._endings.lose([part], Dropped.RETRY_TIME_EXCEEDED, failure, answered)
        else:
            asked = failure.retry_after
            part.not_before = now + retry_delay(rules, suspicion.alone, asked)
            until = now if asked is None else part.not_before
            suspicion.pause(self._hand.evidence.next_wait(suspicion), until)
            self._hand.suspects.append(part)
