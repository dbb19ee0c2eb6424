"""What a trial has to say, in words for the log."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from kong_metering.stats import Dropped
from kong_metering.trial.decisions import Note
from kong_metering.trial.outcome import Failed

if TYPE_CHECKING:
    from kong_metering.trial.outcome import Failure

CLOSED = Note("breaker closed", "the endpoint works again, the circuit breaker closed", logging.INFO)
OPENED = Note("breaker opened", "too many batches failed in a row, the circuit breaker opened")
_WHY = {
    Dropped.PROCESS_ENDED: "the process ended before they were delivered",
    Dropped.BREAKER_OPEN: "the circuit breaker is open",
    Dropped.RETRY_TIME_EXCEEDED: "max_retry_time is exceeded",
}


def failed(events: int, failure: Failure) -> Note:
    """Say that a request failed."""
    is_misconfigured = isinstance(failure, Failed) and failure.is_misconfigured
    kind = failure.kind if isinstance(failure, Failed) else "refused"
    text = f"could not deliver {events} events, will try again: {failure.reason}"
    return Note(f"failed:{kind}", text, logging.ERROR if is_misconfigured else logging.WARNING)


def suspected(failure: Failure) -> Note:
    """Say that an event is set apart, and tried on."""
    return Note("suspect", f"an event fails while others are delivered: {failure.reason}", logging.WARNING)


def kept(failure: Failure) -> Note:
    """Say that events have failed for longer than they would be tried for, if they were not kept."""
    return Note("kept", f"max_retry_time is exceeded, events are kept until it works again: {failure.reason}")


def lost(events: int, reason: Dropped, failure: Failure) -> str:
    """Say that events are given up."""
    return f"{events} events were lost, {_WHY[reason]}: {failure.reason}"
