"""How the spool is kept, as the command line says."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

INBOX_DIRECTORY = Path("/dev/shm")  # noqa: S108 - what is in there is checked to be ours


class Sync(str, Enum):
    """When what was written is made to survive a power cut as well."""

    COMMIT = "commit"
    SECOND = "second"
    OFF = "off"


@dataclass(frozen=True)
class SpoolOptions:
    """How the spool is kept; sizes in bytes, times in seconds.

    `inbox_directory` is where shared memory is to be had for what is not written yet; None to have it in this process's
    memory alone. `keep_delivered` is for how long what was delivered stays to be read back; `verify_every`, how
    often that is done here, 0 for never, and `verify_resend`, whether what is missing then is sent again.
    """

    directory: Path
    sync: Sync = Sync.SECOND
    max_bytes: int = 1024**3
    max_age: float = 30 * 86_400
    dedupe_window: float = 86_400
    keep_delivered: float = 0.0
    verify_every: float = 0.0
    verify_resend: bool = False
    inbox_directory: Path | None = INBOX_DIRECTORY

    @property
    def syncs_each_write(self) -> bool:
        """Whether what is written has to survive a power cut at once."""
        return self.sync is Sync.COMMIT
