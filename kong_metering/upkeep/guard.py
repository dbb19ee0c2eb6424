"""Doing one thing on a thread that has to live on, or that cannot wait for a disk that hangs."""

from __future__ import annotations

import threading
from collections.abc import Callable

from kong_metering.errors import SpoolError
from kong_metering.log import LOGGER, cause_of, trouble


def guarded(step: Callable[[], None]) -> None:
    """Do one thing; what goes wrong in it is said, and keeps nothing else from being done."""
    try:
        step()
    except SpoolError as error:
        LOGGER.error("%s", error, extra=trouble("spool"))
    except Exception as error:  # noqa: BLE001 - the thread has to live on
        LOGGER.error("the spool: %s", cause_of(error), extra=trouble(f"spool:{type(error).__name__}"))


def within(seconds: float, step: Callable[[], None], thread: str) -> bool:
    """Do one thing on a thread of this name; False when it is not done after these seconds: it goes on there."""
    is_done = threading.Event()

    def do() -> None:
        guarded(step)
        is_done.set()

    threading.Thread(target=do, name=thread, daemon=True).start()
    return is_done.wait(seconds)
