"""What a trial is told, what it decides, and what it says in the log: plain records. Pure."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from kong_metering.plurals import counted
from kong_metering.trial.outcome import Failed

if TYPE_CHECKING:
    from kong_metering.config import Queue
    from kong_metering.reasons import Dropped
    from kong_metering.trial.outcome import Failure
    from kong_metering.trial.parts import Part

T = TypeVar("T")

# Kong sets no bound and starts a timer for each event. An endpoint that answers in 50 ms takes 640 events a second so.
UNLIMITED_IN_FLIGHT = 32


@dataclass(frozen=True)
class Rules:
    """How events are sent and tried again; times in seconds.

    `in_flight`: how many requests may be out at once; with more than one, each event goes alone and in any order.
    `keeps`: nothing is given up but what is refused for itself. Without it a batch is given up after `max_retry_time`,
    and while the circuit breaker is open. `expects_more`: others will come after those that wait, and an event under
    suspicion waits to be compared with them. `asks_first`: an endpoint that has taken nothing so far is asked with one
    event, so that no batch is in doubt where it does not work.
    """

    batch_size: int
    in_flight: int
    initial_retry_delay: float
    max_retry_delay: float
    max_retry_time: float
    failure_threshold: int
    breaker_cooldown: float
    keeps: bool
    expects_more: bool = True
    asks_first: bool = False

    @classmethod
    def of(cls, settings: Queue, *, batch_size: int, keeps: bool) -> Rules:
        """Read them from a plugin's configuration; `batch_size` is for the batching rule to say."""
        in_flight = 1 if settings.concurrency_limit == 1 else UNLIMITED_IN_FLIGHT
        return cls(
            batch_size=batch_size,
            in_flight=in_flight,
            initial_retry_delay=settings.initial_retry_delay,
            max_retry_delay=settings.max_retry_delay,
            max_retry_time=settings.max_retry_time,
            failure_threshold=settings.failure_threshold,
            breaker_cooldown=settings.breaker_cooldown,
            keeps=keeps,
            asks_first=keeps and in_flight == 1,
        )


@dataclass(frozen=True)
class Send(Generic[T]):
    """Send these events in one request, and hand the outcome to `Trial.answer`."""

    part: Part[T]


@dataclass(frozen=True)
class Take:
    """Take up to `limit` of the next events out of the queue, and hand them to `Trial.take`."""

    limit: int


@dataclass(frozen=True)
class Pause:
    """Do nothing until a moment (monotonic), or, with None, until an answer, an event or a call comes."""

    until: float | None


class Note(NamedTuple):
    """Something to say in the log; the same `kind` may be summarised when it repeats."""

    kind: str
    text: str
    level: int = logging.ERROR

    @classmethod
    def failed(cls, events: int, failure: Failure) -> Note:
        """Say that a request failed."""
        is_misconfigured = isinstance(failure, Failed) and failure.is_misconfigured
        kind = failure.kind if isinstance(failure, Failed) else "refused"
        text = f"could not deliver {counted(events, 'event')}, will try again: {failure.reason}"
        return cls(f"failed:{kind}", text, logging.ERROR if is_misconfigured else logging.WARNING)

    @classmethod
    def suspected(cls, failure: Failure) -> Note:
        """Say that an event is set apart, and tried on."""
        return cls("suspect", f"an event fails while others are delivered: {failure.reason}", logging.WARNING)

    @classmethod
    def kept(cls, failure: Failure) -> Note:
        """Say that events have failed for longer than they would be tried for, if they were not kept."""
        return cls("kept", f"max_retry_time is exceeded, events are kept until it works again: {failure.reason}")


BREAKER_CLOSED = Note("breaker closed", "the endpoint works again, the circuit breaker closed", logging.INFO)
BREAKER_OPENED = Note("breaker opened", "too many batches failed in a row, the circuit breaker opened")


@dataclass
class Answered(Generic[T]):
    """What became of events: each one is in one of the three lists, or still in the trial's hands.

    `settled` were delivered. `refused` were found to be bad themselves, each with the endpoint's last words. `given_up`
    had their time, or came while the breaker was open, for `reason`; `words` says so for the log.
    """

    settled: Sequence[T] = ()
    refused: list[tuple[T, str]] = field(default_factory=list)
    given_up: list[T] = field(default_factory=list)
    reason: Dropped | None = None
    words: str = ""
    notes: list[Note] = field(default_factory=list)


Decision = Send[T] | Take | Pause | Answered[T]
