"""Asking the running servers that hold logs to do something about them, and waiting for what they answer.

Contract: who is interrupted, or has waited for long enough, withdraws the request; what a server has begun by then it
carries out. A log whose holder is gone meanwhile, or that is another queue's by now, needs no answer.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kong_metering.commands import words
from kong_metering.spool.directory import Found, survey
from kong_metering.spool.requests import Answer, Asking, Kind, Request, new_id

if TYPE_CHECKING:
    from pathlib import Path

    from kong_metering.commands.interruption import Interruption
    from kong_metering.spool.identity import QueueIdentity

# A server looks once a second, a busy one less often.
TAKING_UP_SECONDS = 10.0
_PAUSE_SECONDS = 0.1
_ANSWER_SECONDS = 5.0


@dataclass(frozen=True)
class Asked:
    """What came of it: the answers; the logs of which nobody took the request up, and those that are under way still.

    `was_freed`: the holder of some is gone, so that they are for whoever takes them now.
    """

    answers: tuple[Answer, ...] = ()
    unheard: tuple[Found, ...] = ()
    under_way: tuple[Found, ...] = ()
    was_freed: bool = False

    @property
    def events(self) -> int:
        """How many events the servers have moved, or delivered."""
        return sum(answer.events for answer in self.answers)

    @property
    def is_complete(self) -> bool:
        """Whether each server did all that it was asked for."""
        is_missing = self.unheard or self.under_way or self.was_freed
        return not (is_missing or any(each.left or each.problem for each in self.answers))


def ask(  # noqa: PLR0913 - what is asked, of whom, and for how long
    root: Path,
    kind: Kind,
    queue: QueueIdentity,
    held: Sequence[Found],
    *,
    interruption: Interruption,
    seconds: float,
    target: QueueIdentity | None = None,
) -> Asked:
    """Ask the holders of these logs of a queue; wait so long at most, and less if nobody takes the request up.

    Raises `Interrupted`, and one of `DISK_ERRORS`.
    """
    request = _request(root, kind, queue, held, seconds=seconds, target=target)
    (asked,) = _asked(root, [request], [held], interruption, seconds)
    return asked


def ask_about(
    root: Path, held: Mapping[QueueIdentity, Sequence[Found]], interruption: Interruption
) -> dict[QueueIdentity, Asked]:
    """Ask the holders of logs what they know of their queues, all at the same time.

    Raises `Interrupted`, and one of `DISK_ERRORS`.
    """
    seconds = TAKING_UP_SECONDS
    requests = [_request(root, Kind.TELL, queue, logs, seconds=seconds) for queue, logs in held.items()]
    return dict(zip(held, _asked(root, requests, list(held.values()), interruption, seconds), strict=True))


def _request(  # noqa: PLR0913 - as `ask`
    root: Path,
    kind: Kind,
    queue: QueueIdentity,
    held: Sequence[Found],
    *,
    seconds: float,
    target: QueueIdentity | None = None,
) -> Request:
    expires_ms = time.time_ns() // 1_000_000 + int(seconds * 1000)
    return Request(new_id(), kind, queue, tuple(_names(root, held)), expires_ms, target)


def _asked(
    root: Path,
    requests: Sequence[Request],
    held: Sequence[Sequence[Found]],
    interruption: Interruption,
    seconds: float,
) -> list[Asked]:
    waiting = [_Waiting(_names(root, logs), seconds) for logs in held]
    with contextlib.ExitStack() as stack:
        asking = [stack.enter_context(Asking(root, request)) for request in requests]
        is_over = [False] * len(requests)
        while not all(is_over):
            with interruption.allowed():
                time.sleep(_PAUSE_SECONDS)
            found = survey(root)
            for place, request in enumerate(requests):
                is_over[place] |= waiting[place].is_over(asking[place].answers(), _holders(root, found, request.queue))
    return [each.result() for each in waiting]


def _names(root: Path, held: Sequence[Found]) -> dict[str, Found]:
    return {str(found.directory.relative_to(root)): found for found in held}


class _Waiting:
    """How the waiting for answers about some logs, by their names, stands."""

    def __init__(self, logs: Mapping[str, Found], seconds: float) -> None:
        self._logs = logs
        self._begins_at = time.monotonic()
        self._seconds = seconds
        self._answers: Sequence[Answer] = ()
        # Those that are held and in question still.
        self._open: set[str] = set(logs)
        self._was_freed = False
        self._open_at = self._begins_at

    def is_over(self, answers: Sequence[Answer], holders: Mapping[str, int | None]) -> bool:
        """Look at the answers so far, and at who holds the logs of the queue now."""
        now = time.monotonic()
        self._answers = answers
        self._was_freed |= any(log in holders and holders[log] is None for log in self._logs)
        settled = {log for answer in answers if answer.is_done for log in answer.logs}
        self._open = {log for log in self._logs if log not in settled and holders.get(log) is not None}
        if self._open:
            self._open_at = now
            waited = now - self._begins_at
            return waited > self._seconds or (waited > TAKING_UP_SECONDS and not self._open & self._taken_up)
        # A log that is moved or done is so for a moment before the answer says it.
        is_answered = all(answer.is_done for answer in answers)
        return is_answered or self._was_freed or now - self._open_at > _ANSWER_SECONDS

    @property
    def _taken_up(self) -> set[str]:
        return {log for answer in self._answers for log in answer.logs}

    def result(self) -> Asked:
        """Return what has come of it."""
        return Asked(
            tuple(self._answers),
            tuple(self._logs[log] for log in sorted(self._open - self._taken_up)),
            tuple(self._logs[log] for log in sorted(self._open & self._taken_up)),
            self._was_freed,
        )


def _holders(root: Path, logs: Sequence[Found], queue: QueueIdentity) -> dict[str, int | None]:
    """Find the logs of a queue and who holds them, by their names."""
    return {
        str(found.directory.relative_to(root)): found.holder
        for found in logs
        if found.identity is not None and found.identity.key == queue.key
    }


def told_problems(answers: Sequence[Answer]) -> list[str]:
    """Return what the servers say went wrong, fit for a terminal."""
    return [f"{words.process(each.process)}: {words.shown(each.problem)}" for each in answers if each.problem]
