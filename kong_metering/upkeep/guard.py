"""Doing one thing on a thread that has to live on."""

from __future__ import annotations

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
