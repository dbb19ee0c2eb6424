"""Where the rings of one spool and one user are, and whose they are.

    DIRECTORY/kong-metering-UID-DEV-INO/          0700; DEV and INO are those of the spool's root
    DIRECTORY/kong-metering-UID-DEV-INO/PID-RANDOM.ring    one for each process, and `.PID-RANDOM.new` while it is made

A file is a ring (`ring.py`) and, behind it, its list (`queues.py`). DIRECTORY is one that everybody may write to, so
what is in it is believed only when it is ours and nobody else may write there.

Contract: a ring's file has its name only after it is locked (`flock`) and all of its space is taken; the lock ends with
its process, however that dies. The lock belongs to the open file, which a fork shares: the process that makes a ring
must not fork children that outlive it without executing another program. Everything may be called from any thread;
besides `Place.create` and the reading of rings, it costs a few system calls, or as many for each ring that is there.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Protocol

from kong_metering.errors import InboxError, SpoolFormatError
from kong_metering.inbox.ring import HEADER_BYTES, Ring, read_header

RING_BYTES = 8 * 1024 * 1024

_SUFFIX = ".ring"
_RING = re.compile(r"[0-9]+-[0-9a-f]+\.ring")
_DRAFT = re.compile(r"\.[0-9]+-[0-9a-f]+\.new")
_FILE_MODE = 0o600
_DIRECTORY_MODE = 0o700
_CREATE = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_OPEN = os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_LOOK = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_ATTEMPTS = 10


class Rings(Protocol):
    """Where rings are that outlive their processes: a `Place`, or what the supervisor keeps (`lent.py`)."""

    def create(self, capacity: int = RING_BYTES) -> tuple[RingFile, Ring]:
        """Make a ring whose space is taken. Raises `InboxError`, which tells why that cannot be."""
        ...

    def orphans(self) -> Iterator[RingFile]:
        """Take the rings whose processes are dead, one after the other. Raises `InboxError`."""
        ...

    def lists(self) -> Iterator[tuple[str, bytes]]:
        """Give the list of each ring, with PID-RANDOM of its process. Raises `InboxError`."""
        ...


class RingFile:
    """A ring's file that nobody else uses: we hold its lock, or it was lent to us."""

    def __init__(self, directory: Path, stem: str, descriptor: int, remove: Callable[[], None]) -> None:
        """Take where it is, PID-RANDOM, which no other ring was ever called, a descriptor, and what removes the file.

        `release` closes the descriptor. `remove` raises `InboxError`.
        """
        self.stem = stem
        self.name = stem + _SUFFIX
        self.path = directory / self.name
        self.descriptor = descriptor
        self._remove = remove

    def read(self) -> bytes:
        """Read all of it. Raises the system's `OSError`."""
        return read_from(self.descriptor, 0)

    def add_line(self, line: bytes) -> None:
        """Add a line to the list, for all processes to see. Raises the system's `OSError`."""
        if os.write(self.descriptor, line) < len(line):
            # What is there of it is passed over when the list is read.
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def remove(self) -> None:
        """Remove the file, before letting go of it. Raises `InboxError`."""
        self._remove()

    def release(self) -> None:
        """Let go of the file."""
        # A copy of the descriptor, in a process that was forked, would keep the lock.
        fcntl.flock(self.descriptor, fcntl.LOCK_UN)
        os.close(self.descriptor)

    def become(self, other: RingFile) -> None:
        """Be another file, which nobody else uses, from now on. What this was is let go of, and removed if it can be.

        A line that is added meanwhile goes into one of the two.
        """
        remove = self._remove
        # The same number, as others may be about to write to it.
        os.dup2(other.descriptor, self.descriptor, inheritable=False)
        os.close(other.descriptor)
        self.stem, self.name, self.path, self._remove = other.stem, other.name, other.path, other.remove
        with contextlib.suppress(InboxError):
            remove()


class Place:
    """The directory with the rings of one spool and one user.

    Everything raises `InboxError`, which tells why it cannot be used.
    """

    def __init__(self, directory: Path, root: Path, *, uid: int | None = None) -> None:
        """Name it: below `directory`, for the spool at `root`, and for this user, whose own it has to be."""
        self._directory = directory
        self._root = root
        self.uid = os.geteuid() if uid is None else uid

    @property
    def path(self) -> Path:
        """Where it is."""
        try:
            found = self._root.stat()
        except OSError as error:
            raise _unusable(self._root, error) from error
        return self._directory / f"kong-metering-{self.uid}-{found.st_dev}-{found.st_ino}"

    def create(self, capacity: int = RING_BYTES) -> tuple[RingFile, Ring]:
        """Make a ring in a file that is locked and has all of its space, so that writing to it cannot fail."""
        for _ in range(_ATTEMPTS):
            # Whoever clears up, drafts or the directory, may be faster.
            path = self.path
            with self._opened(path, is_new=True) as directory, contextlib.suppress(FileNotFoundError, BlockingIOError):
                return self._created(path, directory, HEADER_BYTES + capacity)
        raise InboxError(f"{self.path} cannot be used: each file that was made there was removed at once")

    def holds(self, file: RingFile) -> bool:
        """Tell whether a ring's file of ours still is where the next process looks for it."""
        path = self.path / file.name
        with contextlib.suppress(OSError):
            return os.path.samestat(path.lstat(), os.fstat(file.descriptor))
        return False

    def orphans(self) -> Iterator[RingFile]:
        """Take the rings whose processes are dead, one after the other; each is let go of before the next one.

        What a process left that died while it made one is removed.
        """
        for name in self._names():
            if found := self._taken(name):
                try:
                    if _RING.fullmatch(name):
                        yield found
                    elif _DRAFT.fullmatch(name):
                        found.remove()
                finally:
                    found.release()

    def lists(self) -> Iterator[tuple[str, bytes]]:
        """Give the list of each ring, of living processes too, with PID-RANDOM of its process.

        One of a format that this version does not know is passed over; one with a damaged header has an empty list.
        """
        for name in filter(_RING.fullmatch, self._names()):
            with self._opened(self.path) as directory, contextlib.suppress(FileNotFoundError, SpoolFormatError):
                descriptor = os.open(name, _OPEN, dir_fd=directory)
                try:
                    found = read_list(descriptor)
                finally:
                    os.close(descriptor)
                yield name.removesuffix(_SUFFIX), found

    def look(self) -> Iterator[tuple[str, bytes]]:
        """Give all of each ring whose process is dead, with PID-RANDOM of that process; needs no right to write.

        One that is just being poured is passed over.
        """
        for name in filter(_RING.fullmatch, self._names()):
            with self._opened(self.path) as directory, contextlib.suppress(FileNotFoundError, BlockingIOError):
                descriptor = os.open(name, _LOOK, dir_fd=directory)
                try:
                    # Nobody waits for it: who would pour it meanwhile comes again.
                    fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    found = read_from(descriptor, 0)
                finally:
                    os.close(descriptor)
                yield name.removesuffix(_SUFFIX), found

    def _unlink(self, file: Path) -> None:
        """Remove a file, if it is still there, and the directory after the last one.

        It may not be the place's any more: who removed the spool has made that another one.
        """
        try:
            with self._opened(file.parent) as directory, contextlib.suppress(FileNotFoundError):
                os.unlink(file.name, dir_fd=directory)
        except InboxError as error:
            # Somebody has removed all of the directory.
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
        with contextlib.suppress(OSError):
            file.parent.rmdir()

    def _created(self, path: Path, directory: int, size: int) -> tuple[RingFile, Ring]:
        stem = f"{os.getpid()}-{secrets.token_hex(4)}"
        draft, name = f".{stem}.new", stem + _SUFFIX
        descriptor = os.open(draft, _CREATE, _FILE_MODE, dir_fd=directory)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.fchmod(descriptor, _FILE_MODE)
            # A page that cannot be had when it is written to would end the process.
            os.posix_fallocate(descriptor, 0, size)
            ring = Ring(mmap.mmap(descriptor, size))
            os.rename(draft, name, src_dir_fd=directory, dst_dir_fd=directory)
        except OSError:
            os.close(descriptor)
            with contextlib.suppress(OSError):
                os.unlink(draft, dir_fd=directory)
                path.rmdir()
            raise
        return RingFile(path, stem, descriptor, partial(self._unlink, path / name)), ring

    def _names(self) -> list[str]:
        # The place of a spool that is not there is not known, and nothing can be poured into it.
        if not os.path.lexists(self._root) or not os.path.lexists(self.path):
            return []
        with self._opened(self.path) as directory:
            return sorted(os.listdir(directory))  # noqa: PTH208 - by the descriptor that was checked

    def _taken(self, name: str) -> RingFile | None:
        """Take a file that nobody holds."""
        path = self.path
        with self._opened(path) as directory, contextlib.suppress(FileNotFoundError, BlockingIOError):
            descriptor = os.open(name, _OPEN, dir_fd=directory)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # It may have been removed, and its lock with it, before we had ours.
                if os.path.samestat(os.fstat(descriptor), os.stat(name, dir_fd=directory, follow_symlinks=False)):
                    return RingFile(path, Path(name).stem, descriptor, partial(self._unlink, path / name))
            except OSError:
                os.close(descriptor)
                raise
            os.close(descriptor)
        return None

    @contextlib.contextmanager
    def _opened(self, path: Path, *, is_new: bool = False) -> Iterator[int]:
        try:
            above = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                directory = _open_directory(path.name, above, is_new=is_new)
            finally:
                os.close(above)
            try:
                self._check(path, os.fstat(directory))
                yield directory
            finally:
                os.close(directory)
        except OSError as error:
            raise _unusable(path, error) from error

    def _check(self, path: Path, found: os.stat_result) -> None:
        if found.st_uid != self.uid:
            raise InboxError(f"{path} cannot be used: it belongs to user {found.st_uid}, not to {self.uid}; remove it")
        if stat.S_IMODE(found.st_mode) != _DIRECTORY_MODE:
            mode = stat.S_IMODE(found.st_mode)
            raise InboxError(f"{path} cannot be used: its mode is {mode:04o}, not {_DIRECTORY_MODE:04o}; remove it")


def _open_directory(name: str, above: int, *, is_new: bool) -> int:
    is_made = False
    if is_new:
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, _DIRECTORY_MODE, dir_fd=above)
            is_made = True
    try:
        directory = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=above)
    except FileNotFoundError:
        if not is_new:
            raise
        # Whoever removed the last ring was faster.
        return _open_directory(name, above, is_new=True)
    if is_made:
        # Whatever the umask.
        os.fchmod(directory, _DIRECTORY_MODE)
    return directory


def read_list(descriptor: int) -> bytes:
    """Read the list behind the ring in a file; nothing where the ring's header is damaged.

    Raises the system's `OSError`, and `SpoolFormatError` for a format that this version does not know.
    """
    header = read_header(os.pread(descriptor, HEADER_BYTES, 0))
    return read_from(descriptor, HEADER_BYTES + header.capacity) if header else b""


def read_from(descriptor: int, offset: int) -> bytes:
    """Read a file from there to its end. Raises the system's `OSError`."""
    parts: list[bytes] = []
    while part := os.pread(descriptor, RING_BYTES, offset):
        parts.append(part)
        offset += len(part)
    return b"".join(parts)


def _unusable(path: Path, error: OSError) -> InboxError:
    return InboxError(f"{path} cannot be used: {error.strerror or error}")
