"""The process beside the servers that tells those who watch, as the supervisor sees it.

Contract: the supervisor's thread only. It serves no request, so nothing waits for it: it is started after the servers,
and again `_PAUSE_SECONDS` after it died; it is ended when this plugin server serves no more, for the next one's to
listen where it did.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from kong_metering.log import LOGGER, cause_of, flush, trouble

_PAUSE_SECONDS = 2.0


@dataclass
class Attendant:
    """Its process (0: there is none), and when the next one is started; `attend` is what it does."""

    attend: Callable[[], None]
    pid: int = 0
    due_at: float = 0.0

    @property
    def is_due(self) -> bool:
        """Whether one is to be started."""
        return self.pid == 0 and time.monotonic() >= self.due_at

    def start(self, fork: Callable[[], int | None], begin: Callable[[], None]) -> None:
        """Start the process; `fork` gives None when that cannot be, and `begin` is called in the new one."""
        self.due_at = time.monotonic() + _PAUSE_SECONDS
        pid = fork()
        if pid == 0:
            self._be_it(begin)
        self.pid = pid or 0

    def bury(self, pid: int, code: int, *, is_missed: bool) -> bool:
        """Note its death, if it was this process; say so if it is missed."""
        if pid != self.pid:
            return False
        self.pid, self.due_at = 0, time.monotonic() + _PAUSE_SECONDS
        if is_missed:
            LOGGER.error(
                "the process that serves metrics ended (%d), and is started anew", code, extra=trouble("watch")
            )
        return True

    def end(self) -> None:
        """Have it end."""
        if self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)

    def _be_it(self, begin: Callable[[], None]) -> NoReturn:
        status = 1
        try:
            begin()
            self.attend()
            status = 0
        except BaseException as error:  # noqa: BLE001 - what a process dies of
            LOGGER.error("metrics are no longer served: %s", cause_of(error))
        finally:
            flush()
            os._exit(status)
