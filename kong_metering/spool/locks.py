"""The spool's locks: `flock` on a file named `lock`, in the root, in each part and in each log.

Contract: a lock ends with its process, however that dies. Everything raises the system's `OSError`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from kong_metering.eventlog import files

LOCK = "lock"

# As long as any pid, so that the holder's can be written on a full disk too.
_PID_BYTES = 20


@contextlib.contextmanager
def root_lock(root: Path) -> Iterator[None]:
    """Keep other processes from making, taking over and removing parts and logs meanwhile."""
    lock = files.open_file(root / LOCK)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


@contextlib.contextmanager
def looking(root: Path) -> Iterator[None]:
    """Look at locks meanwhile without keeping anybody from taking one; works on a read-only file system too."""
    try:
        lock = os.open(root / LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        yield
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_SH)
        yield
    finally:
        os.close(lock)


def is_locked(directory: Path) -> bool:
    """Whether a process holds this directory's lock; looking takes a shared lock, for a moment."""
    try:
        lock = os.open(directory / LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


def take_new(directory: Path) -> int:
    """Make the lock of a new directory, and take it."""
    lock = files.create_file(directory / LOCK)
    try:
        # Waits for nobody but one who just looks whether it is held.
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError:
        os.close(lock)
        raise
    return lock


def reserve(directory: Path) -> None:
    """Make a log's lock, which nobody takes as long as its part's lock is held, with room for the holder's pid."""
    lock = files.open_file(directory / LOCK)
    try:
        _write_pid(lock, "")
    finally:
        os.close(lock)


def take(directory: Path) -> int | None:
    """Take a log's lock, and write our pid into it; None when somebody else holds it, or the log is gone."""
    path = directory / LOCK
    try:
        lock = files.open_file(path)
    except FileNotFoundError:
        return None
    try:
        is_ours = _take_now(lock, path)
    except OSError:
        os.close(lock)
        raise
    if not is_ours:
        os.close(lock)
        return None
    _write_pid(lock, str(os.getpid()))
    return lock


def release(lock: int) -> None:
    """Let go of a log's lock."""
    _write_pid(lock, "")
    os.close(lock)


def holder(directory: Path) -> int | None:
    """Tell the pid of the process that holds a log's lock: 0 if it is not known, None if nobody does."""
    if not is_locked(directory):
        return None
    try:
        return int((directory / LOCK).read_bytes())
    except ValueError:
        return 0


def _take_now(lock: int, path: Path) -> bool:
    """Take the lock, and see that its file is still the one of that name."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(lock), path.stat())
    except (BlockingIOError, FileNotFoundError):
        return False


def _write_pid(lock: int, pid: str) -> None:
    # It is for people: the lock is good without it.
    with contextlib.suppress(OSError):
        files.write_at(lock, f"{pid:<{_PID_BYTES}}\n".encode("ascii"), 0)
