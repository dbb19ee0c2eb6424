"""Has what was written survive a power cut, and says so where the disk does not confirm it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kong_metering.log import LOGGER, cause_of, trouble

if TYPE_CHECKING:
    from kong_metering.eventlog.files import Unsynced


def synced(unsynced: Unsynced) -> bool:
    """Sync what was written; False if the disk does not confirm it.

    It is there even so, for all but a power cut, and is not to be written again: it is synced with what comes next.
    """
    try:
        unsynced.sync()
    except OSError as error:
        LOGGER.error("the disk does not confirm what was written: %s", cause_of(error), extra=trouble("sync"))
        return False
    return True
