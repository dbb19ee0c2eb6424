"""The few things that the spool asks of the file system: private files, whole writes, and to make both last.

Contract: everything raises OSError as the system gave it. Files are 0600 and directories 0700 whatever the umask. Only
what says so waits for the disk.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections import deque
from pathlib import Path

from kong_metering.descriptors import most_of_descriptors

_FILE_MODE = 0o600
_DIRECTORY_MODE = 0o700
# How a file system answers that does not know how to do something.
_CANNOT = (errno.EINVAL, errno.EOPNOTSUPP)
# With the files that are read, the positions, and those that are appended to, that is some 400 descriptors, of 1,024.
_MAX_OPEN_LOGS, _SHARE_OF_DESCRIPTORS = 128, 8


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


def make_directory(path: Path) -> bool:
    """Make a directory inside one that is there; False when it is there already."""
    try:
        path.mkdir(_DIRECTORY_MODE)
    except FileExistsError:
        if not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path)) from None
        return False
    path.chmod(_DIRECTORY_MODE)
    return True


def above(path: Path) -> tuple[Path, ...]:
    """Give the directory that has to be synced so that this one survives a power cut; none when that cannot be done."""
    parent = path.parent
    # What is mounted there was not made by us, and its file system need not know how to sync. A directory that we may
    # not list is one that we cannot open to sync it.
    is_ours = parent.stat().st_dev == path.stat().st_dev
    return (parent,) if is_ours and os.access(parent, os.R_OK) else ()


def sync(path: Path) -> None:
    """Wait until what is in the file, or which files are in the directory, survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            _sync_directory(descriptor)
        else:
            os.fdatasync(descriptor)
    finally:
        os.close(descriptor)


def _sync_directory(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems, those of FUSE and networks for some, have nothing to sync there.
        if error.errno not in _CANNOT:
            raise


def take_space(descriptor: int, size: int) -> None:
    """Make the file as large as this, if it is not yet, so that writing within it needs no space any more.

    Raises the system's `OSError`, for a full disk for one.
    """
    have = os.fstat(descriptor).st_size
    if have >= size:
        return
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
        write_at(descriptor, bytes(size - have), have)


def write_at(descriptor: int, data: bytes, offset: int) -> None:
    """Write all of `data` at `offset`; the system may have written a part of it when this raises."""
    written = os.pwrite(descriptor, data, offset)
    if written == len(data):
        return
    view = memoryview(data)
    while written < len(data):
        written += os.pwrite(descriptor, view[written:], offset + written)


def write_file(path: Path, data: bytes, *, is_lasting: bool = False) -> None:
    """Put `data` in place of the file, all at once: the death of the process leaves the old one or the new one.

    A power cut can leave an empty one, or none, until the file and its directory are synced; with `is_lasting` this
    waits until they are.
    """
    draft = path.with_name(f"{path.name}.new")
    draft.unlink(missing_ok=True)
    descriptor = create_file(draft)
    try:
        write_at(descriptor, data, 0)
        if is_lasting:
            os.fsync(descriptor)
    except OSError:
        draft.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)
    draft.replace(path)
    if is_lasting:
        sync(path.parent)


class Unsynced:
    """Files and directories to be synced in this order, once; false when there are none.

    `take` and `sync` may run in any thread and hold no lock, while the log is appended to, read, done and closed. A
    path is noted after it was written, so that whoever takes it syncs what was written. What could not be synced goes
    back to the log, whose next `unsynced` gives it again.
    """

    def __init__(self, paths: tuple[Path, ...], failed: deque[Path]) -> None:
        """Take the paths, and where to put those that could not be synced: a deque, which threads can share."""
        self._paths = paths
        self._failed = failed

    @classmethod
    def take(cls, written: dict[Path, None], failed: deque[Path]) -> Unsynced:
        """Take all out of both: what failed goes first, since what was written later may be of no use without it."""
        paths: dict[Path, None] = {}
        with contextlib.suppress(IndexError):
            while True:
                paths[failed.popleft()] = None
        # Others go on noting: a copy is one step, and a path that is noted again before it is taken out is synced yet.
        noted = written.copy()
        for path in noted:
            written.pop(path, None)
        return cls(tuple(paths | noted), failed)

    def __bool__(self) -> bool:
        return bool(self._paths)

    def sync(self) -> None:
        """Have all of them survive a power cut.

        Raises the system's `OSError` of the first one that could not be synced; the others are synced even so.
        """
        errors: list[OSError] = []
        for path in self._paths:
            try:
                # By name: the log may close its descriptors meanwhile.
                sync(path)
            except FileNotFoundError:
                # Whoever unlinked it did not need it any more.
                continue
            except OSError as error:
                errors.append(error)
                self._failed.append(path)
        if errors:
            raise errors[0]


class Allowance:
    """How many logs of a process may keep files open between two uses: its free places, which any thread may take.

    A log that got no place works as well: it opens its files for each use.
    """

    def __init__(self) -> None:
        # Of a deque, which threads can share.
        self._free = deque([None] * most_of_descriptors(_MAX_OPEN_LOGS, _SHARE_OF_DESCRIPTORS))

    def take(self) -> bool:
        """Take a place; False when none is free."""
        with contextlib.suppress(IndexError):
            self._free.pop()
            return True
        return False

    def give_back(self) -> None:
        """Give a place back that was taken."""
        self._free.append(None)
