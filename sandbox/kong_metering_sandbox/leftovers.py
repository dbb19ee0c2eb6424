"""What killed plugin servers leave in shared memory, for a next one that never comes where the spool is thrown away."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from kong_metering.errors import InboxError
from kong_metering.inbox.place import Place
from kong_metering.spool.options import INBOX_DIRECTORY


def remove_shared_memory(directory: Path) -> None:
    """Remove it for each spool in or below a directory; nothing of them runs any more."""
    left = {path for path in INBOX_DIRECTORY.glob("kong-metering-*") if path.is_dir()}
    for path in os.walk(directory) if left else ():
        with suppress(InboxError):
            place = Place(INBOX_DIRECTORY, Path(path[0])).path
            if place in left:
                shutil.rmtree(place, ignore_errors=True)
