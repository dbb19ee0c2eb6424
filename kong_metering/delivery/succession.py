"""How a queue hands over to another one: between two requests, and not at all where the endpoint accepts events.

Contract: couriers `enter` for each step and `leave` after it; the registry shuts the gate, or opens it again. While it
is shut nobody enters; when the last step is over one courier finds the succession `due`, asks whether it was cancelled,
and carries it out if `settle` says so. At the end of the queue it is closed for good. The lock is held for memory only.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import NamedTuple, Protocol


class Heir(Protocol):
    """The queue that takes over."""

    @property
    def moved_to(self) -> Heir | None:
        """The queue that has taken over from it, if one has."""
        ...

    def put(self, event: bytes) -> None:
        """Take an event for delivery."""
        ...


class Succession(NamedTuple):
    """How a queue hands over to another one: `is_off` tells whether it may not after all, `carry_out` moves events."""

    heir: Heir
    is_off: Callable[[], bool]
    carry_out: Callable[[], None]


class StepGate:
    """Lets the steps of a queue begin, until it is to hand over, or ends."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_quiet = threading.Condition(self._lock)
        self._is_closed = False
        self._steps = 0
        self._succession: Succession | None = None
        # The queue that has taken over, if one has.
        self.moved_to: Heir | None = None

    @property
    def is_shut(self) -> bool:
        """Whether the queue is to hand over, or has."""
        return self._succession is not None

    @property
    def is_empty(self) -> bool:
        """Whether no step is under way."""
        return not self._steps

    def shut(self, succession: Succession) -> None:
        """Let no step begin: all goes to another queue."""
        with self._lock:
            if self.moved_to is None:
                self._succession = succession

    def open(self) -> bool:
        """Let steps begin; False where the other queue has taken over already."""
        with self._lock:
            if self.moved_to is not None:
                return False
            self._succession = None
        return True

    def enter(self) -> bool:
        """Begin a step; False while none may."""
        with self._lock:
            if self._is_closed or self._succession is not None:
                return False
            self._steps += 1
        return True

    def leave(self) -> None:
        """End a step."""
        with self._lock:
            self._steps -= 1
            if self._is_closed and not self._steps:
                self._is_quiet.notify_all()

    def close(self, timeout: float) -> None:
        """Let no step begin any more, and wait for those under way, `timeout` seconds at most."""
        with self._lock:
            self._is_closed = True
            self._is_quiet.wait_for(lambda: not self._steps, timeout)

    def due(self) -> Succession | None:
        """Return what is to be done now that no step is under way, if that is so."""
        with self._lock:
            return None if self._steps or self.moved_to is not None else self._succession

    def settle(self, succession: Succession, *, is_off: bool) -> bool:
        """Hand over from now on, or not; False too where that was decided otherwise meanwhile."""
        with self._lock:
            if self.moved_to is not None or self._succession is not succession:
                return False
            if is_off:
                self._succession = None
            else:
                self.moved_to = succession.heir
            return not is_off
