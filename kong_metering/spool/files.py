"""The few things that the spool asks of the file system: private files, whole writes, directories that last.

Contract: everything raises OSError as the system gave it. Files are 0600 and directories 0700 whatever the umask.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path

_FILE_MODE = 0o600
_DIRECTORY_MODE = 0o700


def create_file(path: Path) -> int:
    """Create a file that is not there yet and give its descriptor, for reading and writing."""
    return _private(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _FILE_MODE))


def open_file(path: Path) -> int:
    """Open a file for reading and writing; create it if need be."""
    return _private(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, _FILE_MODE))


def _private(descriptor: int) -> int:
    try:
        if os.fstat(descriptor).st_mode & 0o777 != _FILE_MODE:
            os.fchmod(descriptor, _FILE_MODE)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def make_directory(path: Path) -> None:
    """Make a directory inside one that is there; nothing happens when it is there already."""
    try:
        path.mkdir(_DIRECTORY_MODE)
    except FileExistsError:
        if not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path)) from None
        return
    path.chmod(_DIRECTORY_MODE)
    # One that we may not list is one that we cannot sync.
    with contextlib.suppress(PermissionError):
        sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make sure that the directory's list of files survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync(path: Path) -> None:
    """Make sure that what is in the file, or which files are in the directory, survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            os.fsync(descriptor)
        else:
            os.fdatasync(descriptor)
    finally:
        os.close(descriptor)


def write_at(descriptor: int, data: bytes, offset: int) -> None:
    """Write all of `data` at `offset`; the system may have written a part of it when this raises."""
    written = os.pwrite(descriptor, data, offset)
    if written == len(data):
        return
    view = memoryview(data)
    while written < len(data):
        written += os.pwrite(descriptor, view[written:], offset + written)


def write_file(path: Path, data: bytes) -> None:
    """Put `data` in place of the file, all at once: a crash leaves the old one or the new one, on the disk itself."""
    draft = path.with_name(f"{path.name}.new")
    draft.unlink(missing_ok=True)
    descriptor = create_file(draft)
    try:
        write_at(descriptor, data, 0)
        os.fsync(descriptor)
    except OSError:
        draft.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)
    draft.replace(path)
    sync_directory(path.parent)
