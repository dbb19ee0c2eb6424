"""Which endpoints take no arrays: an OpenMeter collector (its `http-server` preset) takes single events only.

Contract: learned from answers, once for each URL, and remembered as long as the process lives. It takes a small array
that was refused and whose events then each got through alone, where no array ever got through: one that did shows that
a refusal was about an event. `Lesson` is pure; `Arrays` locks for memory only, any thread may call it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kong_metering.trial.outcome import Delivered, Rejected, is_about_no_event

if TYPE_CHECKING:
    from kong_metering.trial.outcome import Outcome

# A refused array is cut up; the smallest ones, whose pieces are single events, are of two or three.
_SMALL = 3
_MOST_REFUSED = 32


class Lesson:
    """What the answers of one endpoint tell."""

    def __init__(self) -> None:
        self.are_refused = False
        self._is_over = False
        # Of each small array that was refused, the events that did not get through alone yet.
        self._refused: deque[set[int]] = deque(maxlen=_MOST_REFUSED)

    def note(self, events: Sequence[bytes], outcome: Outcome) -> bool:
        """Take note of the answer to a request; True if it shows that arrays are refused, which was not known."""
        if self._is_over:
            return False
        if isinstance(outcome, Delivered):
            if len(events) > 1:
                self._end()
                return False
            self.are_refused = self._got_through(hash(events[0]))
            if self.are_refused:
                self._end()
            return self.are_refused
        if 1 < len(events) <= _SMALL and _is_refusal(outcome):
            self._refused.append({hash(event) for event in events})
        return False

    def _got_through(self, event: int) -> bool:
        """Note that an event got through alone; True if it was the last one of an array that was refused."""
        are_all_through = False
        for left in self._refused:
            if event in left:
                left.remove(event)
                are_all_through = are_all_through or not left
        return are_all_through

    def _end(self) -> None:
        self._is_over = True
        self._refused.clear()


class Arrays:
    """What is known of the endpoints of this process, by their URLs."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lessons: dict[str, Lesson] = {}

    def are_refused_by(self, url: str) -> bool:
        """Return whether an endpoint takes single events only, as far as is known."""
        with self._lock:
            lesson = self._lessons.get(url)
            return lesson is not None and lesson.are_refused

    def note(self, url: str, events: Sequence[bytes], outcome: Outcome) -> bool:
        """Take note of an answer; True if it shows that the endpoint refuses arrays, which was not known."""
        with self._lock:
            return self._lessons.setdefault(url, Lesson()).note(events, outcome)


def _is_refusal(outcome: Outcome) -> bool:
    """Return whether an answer of the class 4xx is about what was sent."""
    if isinstance(outcome, Rejected):
        return True
    return not (isinstance(outcome, Delivered) or is_about_no_event(outcome)) and outcome.kind.startswith("4")
