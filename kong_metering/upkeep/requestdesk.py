"""What this process does about requests of people (`spool/requests.py`) that are about logs which it holds.

Contract: on the janitor's thread, once a round; nothing here waits for an endpoint. A request that cannot be begun now,
because its queue is just being taken over, is looked at again in the next round. What was begun is carried out, also if
its asker goes: nothing is ever moved by half. An answer that cannot be written is tried again.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from kong_metering.log import LOGGER, cause_of, printable, trouble
from kong_metering.spool.requests import Answer, Kind, RequestBox

if TYPE_CHECKING:
    from kong_metering.backlog.spooled import SpooledBacklog
    from kong_metering.clock import EpochClock
    from kong_metering.delivery.requestfigures import LastRequest
    from kong_metering.spool.accepted import Acceptances
    from kong_metering.spool.identity import QueueIdentity
    from kong_metering.spool.requests import Request
    from kong_metering.upkeep.redirection import Redirection

# A try that has come to nothing is answered; one that goes on is, after so many seconds.
_TRYING_SECONDS = 20.0


class Queue(Protocol):
    """A queue that is open here."""

    @property
    def waiting(self) -> int:
        """How many events are in it."""
        ...

    @property
    def delivered(self) -> int:
        """How many events the endpoint has taken."""
        ...

    @property
    def last_request(self) -> LastRequest:
        """What came of the last request."""
        ...

    def try_now(self) -> None:
        """Do at once what a pause keeps from being done."""
        ...


class Queues(Protocol):
    """Those that are open here."""

    def find(self, key: str) -> Queue | None:
        """Return the queue with this key."""
        ...

    def renew(self, key: str, carry_out: Callable[[SpooledBacklog, SpooledBacklog], None]) -> bool:
        """Have a new queue go on in the place of one; `carry_out` is called when nothing of that is under way."""
        ...


BeginRedirection = Callable[["SpooledBacklog", "SpooledBacklog", "QueueIdentity"], "Redirection"]


class _Task(Protocol):
    """What was begun for a request."""

    def answer(self) -> Answer:
        """Return what it has come to so far."""
        ...


class RequestDesk:
    """The requests that this process is working on."""

    def __init__(
        self, root: Path, queues: Queues, begin: BeginRedirection, *, clock: EpochClock, acceptances: Acceptances
    ) -> None:
        """`begin` begins a redirection from one backlog, which another one goes on for; on a courier's thread."""
        self._root = root
        self._box = RequestBox(root)
        self._queues = queues
        self._begin = begin
        self._clock = clock
        self._acceptances = acceptances
        self._tasks: dict[str, _Task] = {}
        self._told: dict[str, Answer] = {}

    def look(self, backlogs: list[SpooledBacklog]) -> None:
        """Begin what is asked for, and answer what has come to something; `backlogs` are open here."""
        requests = self._box.look(self._clock.wall_ms())
        self._say_refused()
        for request in requests:
            if request.id not in self._tasks and (task := self._begun(request, backlogs)):
                self._tasks[request.id] = task
            if request.id in self._tasks:
                self._tell(request, self._tasks[request.id].answer())
        asked = {request.id for request in requests}
        self._tasks = {key: task for key, task in self._tasks.items() if key in asked}
        self._told = {key: answer for key, answer in self._told.items() if key in asked}

    def _tell(self, request: Request, answer: Answer) -> None:
        if self._told.get(request.id) == answer:
            return
        try:
            self._box.answer(request, answer)
            self._told[request.id] = answer
        except OSError as error:
            LOGGER.error("a request cannot be answered, for now: %s", cause_of(error), extra=trouble("request"))

    def _say_refused(self) -> None:
        refused, self._box.refused = self._box.refused, []
        for told in refused:
            LOGGER.error("%s", printable(told), extra=trouble("no request"))

    def _begun(self, request: Request, backlogs: list[SpooledBacklog]) -> _Task | None:
        """Begin what is asked for; None if it is about no log of this process, or cannot begin now."""
        logs = self._held(request, backlogs)
        if not logs:
            return None
        if request.kind is Kind.REDIRECT and request.target is not None:
            return self._begun_redirect(request.queue, request.target, logs)
        queue = self._queues.find(request.queue.key)
        if queue is None:
            return None
        return _Told(queue, logs) if request.kind is Kind.TELL else _Try(queue, logs, self._clock)

    def _held(self, request: Request, backlogs: list[SpooledBacklog]) -> tuple[str, ...]:
        """Return which of the logs that a request is about this process holds for that queue."""
        held = {
            str(each.log.held.directory.relative_to(self._root))
            for backlog in backlogs
            if backlog.identity.key == request.queue.key
            for each in backlog.chores.bounded()
        }
        return tuple(log for log in request.logs if log in held)

    def _begun_redirect(self, queue: QueueIdentity, target: QueueIdentity, logs: tuple[str, ...]) -> _Task | None:
        try:
            # So that it stays there: what never accepted an event is given to where the plugin sends now.
            self._acceptances.note(target.key)
        except OSError as error:
            return _Refusal(logs, f"where the events go cannot be written down: {cause_of(error)}")
        task = _Redirect(logs)

        def carry_out(old: SpooledBacklog, new: SpooledBacklog) -> None:
            task.redirection = self._begin(old, new, target)

        return task if self._queues.renew(queue.key, carry_out) else None


class _Redirect:
    """A redirection, which begins when the requests of its queue that are under way are answered."""

    def __init__(self, logs: tuple[str, ...]) -> None:
        self._logs = logs
        self.redirection: Redirection | None = None

    def answer(self) -> Answer:
        redirection = self.redirection
        if redirection is None or not redirection.is_done:
            return Answer(os.getpid(), self._logs)
        return Answer(
            os.getpid(),
            self._logs,
            is_done=True,
            events=redirection.moved,
            left=redirection.left,
            problem=redirection.problem,
        )


class _Refusal:
    """A request that cannot be carried out."""

    def __init__(self, logs: tuple[str, ...], problem: str) -> None:
        self._answer = Answer(os.getpid(), logs, is_done=True, problem=problem)

    def answer(self) -> Answer:
        return self._answer


class _Told:
    """What is known of a queue now."""

    def __init__(self, queue: Queue, logs: tuple[str, ...]) -> None:
        self._answer = Answer(
            os.getpid(),
            logs,
            is_done=True,
            events=queue.delivered,
            left=queue.waiting,
            problem=queue.last_request.problem,
        )

    def answer(self) -> Answer:
        return self._answer


class _Try:
    """A try at once: it has come to something when all is delivered, or the endpoint fails again."""

    def __init__(self, queue: Queue, logs: tuple[str, ...], clock: EpochClock) -> None:
        self._queue = queue
        self._logs = logs
        self._clock = clock
        self._ends_at = clock.monotonic() + _TRYING_SECONDS
        self._wanted, self._delivered, self._last = queue.waiting, queue.delivered, queue.last_request
        # What was delivered at the last look: as long as that grows a failure is not the end.
        self._progress = 0
        self._result: Answer | None = None
        queue.try_now()

    def answer(self) -> Answer:
        if self._result is None:
            found = self._found()
            if not found.is_done:
                return found
            self._result = found
        return self._result

    def _found(self) -> Answer:
        queue = self._queue
        delivered, last = queue.delivered - self._delivered, queue.last_request
        words = "" if last.number == self._last.number else last.problem
        is_over = delivered >= self._wanted or not queue.waiting or self._clock.monotonic() > self._ends_at
        is_stuck = bool(words) and delivered == self._progress
        self._progress = delivered
        return Answer(
            os.getpid(),
            self._logs,
            is_done=is_over or is_stuck,
            events=delivered,
            left=queue.waiting,
            problem=words if queue.waiting else "",
        )
