"""Sends missing events once more, with the same ids, in batches; one that the endpoint refuses costs only itself."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from kong_metering.trial.outcome import Failed, Outcome, Rejected

_MOST_EVENTS = 100
_TRIES = 3
_PAUSE_SECONDS = 2.0


@dataclass
class Resent:
    """How many were sent, and refused; `problem` tells why it ended before all were."""

    sent: int = 0
    refused: int = 0
    problem: str | None = None


def resend(
    events: Iterable[bytes], send: Callable[[Sequence[bytes]], Outcome], wait: Callable[[float], None]
) -> Resent:
    """Send events by `send`; `wait` waits for some seconds."""
    resent = Resent()
    rest = iter(events)
    while resent.problem is None and (batch := list(itertools.islice(rest, _MOST_EVENTS))):
        _send(batch, send, wait, resent)
    return resent


def _send(
    batch: list[bytes], send: Callable[[Sequence[bytes]], Outcome], wait: Callable[[float], None], resent: Resent
) -> None:
    outcome = send(batch)
    for _ in range(_TRIES - 1):
        if not isinstance(outcome, Failed):
            break
        wait(_PAUSE_SECONDS)
        outcome = send(batch)
    if isinstance(outcome, Failed):
        resent.problem = outcome.reason
    elif isinstance(outcome, Rejected):
        _send_parts(batch, send, wait, resent)
    else:
        resent.sent += len(batch)


def _send_parts(
    batch: list[bytes], send: Callable[[Sequence[bytes]], Outcome], wait: Callable[[float], None], resent: Resent
) -> None:
    if len(batch) == 1:
        resent.refused += 1
        return
    middle = len(batch) // 2
    for part in (batch[:middle], batch[middle:]):
        if resent.problem is None:
            _send(part, send, wait, resent)
