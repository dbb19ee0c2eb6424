"""Ctrl-C and its likes: at once where it does no harm, else as soon as the step that is under way is done.

Contract: one at a time, in the main thread. Nothing on disk is ever cut short between two writes that belong together.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

import click

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(KeyboardInterrupt):
    """Somebody wants the command to end; no `except Exception` on the way keeps it from that."""


class Interruption:
    """Takes the signals that ask a command to end, for as long as it is entered."""

    def __init__(self) -> None:
        self._signal = 0
        self._may_break = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:  # noqa: PYI034 - no Self before Python 3.11
        self._before = {number: signal.signal(number, self._asked) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def is_asked(self) -> bool:
        """Whether the command is to end."""
        return self._signal != 0

    def check(self) -> None:
        """End here, if the command is to end. Raises `Interrupted`."""
        if self.is_asked:
            raise Interrupted

    @contextlib.contextmanager
    def allowed(self) -> Iterator[None]:
        """Let it happen anywhere inside."""
        self._may_break = True
        try:
            self.check()
            yield
        finally:
            self._may_break = False

    def exit(self) -> click.exceptions.Exit:
        """Make the exception that ends the program as the signal would have."""
        return click.exceptions.Exit(128 + self._signal)

    def _asked(self, number: int, _frame: FrameType | None) -> None:
        self._signal = number
        if self._may_break:
            raise Interrupted
