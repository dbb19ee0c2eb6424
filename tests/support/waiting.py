"""Waiting without guessing how long: a condition is polled until it holds, or a deadline passes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

_PATIENCE_SECONDS = 60.0
_PAUSE_SECONDS = 0.002
# A condition that costs much, such as one that reads all events, leaves the core to those that it waits for.
_PAUSE_TO_COST = 4


def wait_until(
    condition: Callable[[], T | None], what: str, seconds: float = _PATIENCE_SECONDS, pause: float = _PAUSE_SECONDS
) -> T:
    """Give the first true value of `condition`; fail the test, naming `what`, when there is none in time."""
    deadline = time.monotonic() + seconds
    while True:
        begun = time.thread_time()
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {seconds:.0f} s in vain: {what}")
        time.sleep(max(pause, _PAUSE_TO_COST * (time.thread_time() - begun)))
