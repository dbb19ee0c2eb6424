"""The disk that the spool is on in a soak, which can be made full.

Where the system lets us, it is a small tmpfs of our own: `enter_namespace` starts the program again in a mount
namespace (as root, or as anybody in a user namespace), so that the mount is gone with the last process of the soak.
Elsewhere the spool is on an ordinary directory, and the plugin server is refused what makes files longer.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from kong_metering_sandbox.faulty_server import DiskFault, Faults
from kong_metering_sandbox.leftovers import remove_shared_memory

_MARK = "SOAK_HAS_ITS_OWN_MOUNTS"
_NAMESPACES = (("--mount",), ("--user", "--map-root-user", "--mount"))
_TMPFS_SIZE = "128m"
_CHUNK_BYTES = 1024 * 1024
_PAGE_BYTES = 4096


class Disk(Protocol):
    """A place for the spool; `kind` says in words how it gets full."""

    directory: Path
    kind: str

    def fill(self) -> None:
        """Take all space that is left; to be called again and again, as space comes free."""
        ...

    def free(self) -> None:
        """Give the space back."""
        ...

    def close(self) -> None:
        """Let go of it, and of all that is on it."""
        ...


class TmpfsDisk:
    """A tmpfs, filled by a file."""

    kind = f"a tmpfs of {_TMPFS_SIZE}"

    def __init__(self, directory: Path) -> None:
        """Mount it; raises `OSError` if that is not allowed."""
        directory.mkdir()
        self.directory = directory
        self._filler = directory / "filler"
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={_TMPFS_SIZE}", "soak", str(directory)],  # noqa: S607
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise OSError(f"no tmpfs on {directory}: {done.stderr.strip()}")

    def fill(self) -> None:
        """Write until the system says that it is full."""
        descriptor = os.open(self._filler, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            for size in (_CHUNK_BYTES, _PAGE_BYTES):
                _write_until_full(descriptor, bytes(size))
        finally:
            os.close(descriptor)

    def free(self) -> None:
        """Remove what was written."""
        self._filler.unlink()

    def close(self) -> None:
        """Unmount it."""
        remove_shared_memory(self.directory)
        subprocess.run(["umount", "--lazy", str(self.directory)], check=True)  # noqa: S607


class InjectedDisk:
    """A directory whose files cannot grow, as far as the plugin server can tell."""

    kind = "injected: what makes a file longer fails with ENOSPC"

    def __init__(self, directory: Path, faults: Faults) -> None:
        directory.mkdir()
        self.directory = directory
        self._faults = faults

    def fill(self) -> None:
        """Say that it is full."""
        self._faults.set_disk(DiskFault.FULL)

    def free(self) -> None:
        """Say that it is not."""
        self._faults.set_disk(None)

    def close(self) -> None:
        """Leave the directory to whoever made the one that it is in."""


def make_disk(directory: Path, faults: Faults) -> Disk:
    """Make the best disk that this process may make."""
    if os.environ.get(_MARK):
        return TmpfsDisk(directory)
    return InjectedDisk(directory, faults)


def enter_namespace(package: str, arguments: Sequence[str]) -> None:
    """Start the program again where it may mount a tmpfs; return if it runs there already, or that is not to be had."""
    unshare = shutil.which("unshare")
    if unshare is None or os.environ.get(_MARK):
        return
    for flags in _NAMESPACES:
        probe = [unshare, *flags, "mount", "-t", "tmpfs", "soak", "/tmp"]  # noqa: S108 - seen by the probe alone
        if subprocess.run(probe, capture_output=True, check=False).returncode == 0:
            os.environ[_MARK] = "1"
            os.execv(unshare, [unshare, *flags, sys.executable, "-m", package, *arguments])  # noqa: S606


def _write_until_full(descriptor: int, data: bytes) -> None:
    while True:
        try:
            os.write(descriptor, data)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            return
