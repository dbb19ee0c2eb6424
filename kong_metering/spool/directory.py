"""The spool's directory: a part for each process, held by a lock for as long as the process lives.

    ROOT/lock                        held for moments, while parts are made, taken over or removed
    ROOT/proc-PID-RANDOM/lock        held by the process that delivers what is in there
    ROOT/proc-PID-RANDOM/KEY/        a queue's log, and `queue.json`, which tells whose it is
    ROOT/damaged/proc-PID-RANDOM-KEY/   what is left of a log that is done, but for bytes that nobody could read

Contract: one thread at a time; processes keep each other out by `flock`. No two processes hold the same part, and a
part whose process is dead, however it died, can be taken over at once. A forked child inherits the locks: it has to
`abandon` them, or they outlive its parent. Directories are 0700, files 0600.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kong_metering.errors import SpoolError, SpoolFormatError
from kong_metering.spool import files
from kong_metering.spool.identity import FILES as IDENTITY_FILES
from kong_metering.spool.identity import QueueIdentity, load_identity, save_identity
from kong_metering.spool.log import DAMAGED, POSITION, Damage, EventLog

_PART = "proc-"
_LOCK = "lock"

_REMEDIES = {
    errno.EACCES: "let the user that Kong runs as write there, or choose another place with --spool-dir",
    errno.EPERM: "let the user that Kong runs as write there, or choose another place with --spool-dir",
    errno.EROFS: "mount it writable, or choose another place with --spool-dir",
    errno.ENOENT: "make the directory above it, or choose another place with --spool-dir",
    errno.ENOTDIR: "move the file that is in its place away, or choose another place with --spool-dir",
    errno.ENOSPC: "free space there, or choose another place with --spool-dir",
}
_REMEDY = "choose another place with --spool-dir"


@dataclass(frozen=True, eq=False)
class HeldLog:
    """A log that this process holds; `identity` is None when damage left nothing to tell whose it is."""

    log: EventLog
    identity: QueueIdentity | None

    @property
    def directory(self) -> Path:
        """Where it is."""
        return self.log.directory


@dataclass(frozen=True)
class Refused:
    """A log that was found and cannot be opened, and why; it stays as it is."""

    directory: Path
    reason: str


@dataclass(frozen=True)
class Adoption:
    """What a process took over from dead ones; `damage` is that of logs in which nothing waits, removed by now."""

    logs: tuple[HeldLog, ...] = ()
    refused: tuple[Refused, ...] = ()
    damage: tuple[Damage, ...] = ()


@dataclass(frozen=True)
class Found:
    """A log on disk, for people to look at: whose it is, None if unknown, and whether a living process holds it."""

    directory: Path
    identity: QueueIdentity | None
    is_held: bool


class SpoolDirectory:
    """The spool of this process."""

    def __init__(self, root: Path) -> None:
        """Make the directory if need be; the part of this process is made with its first log.

        Raises `SpoolError`, which tells why it cannot be and what to do.
        """
        self.root = root
        self._own: Path | None = None
        # The locks of the parts that this process holds, and the logs that it has open in each.
        self._locks: dict[Path, int] = {}
        self._open: dict[Path, set[HeldLog]] = {}
        try:
            _prepare_root(root)
            with _root_lock(root):
                pass
        except OSError as error:
            raise unusable(root, error) from error

    def log_for(self, identity: QueueIdentity) -> HeldLog:
        """Open this process's own log of a queue; the caller keeps it, and opens none twice.

        Raises `SpoolError`, which tells why it cannot be and what to do.
        """
        try:
            if self._own is None:
                self._own = self._new_part()
            directory = self._own / identity.key
            files.make_directory(directory)
            save_identity(directory, identity)
            return self._held(EventLog.open(directory), identity)
        except OSError as error:
            raise unusable(self.root, error) from error

    def adoptable(self) -> int:
        """Tell how many parts there are that no living process holds. Raises `SpoolError`."""
        try:
            return sum(1 for part in _parts(self.root) if not _is_held(part))
        except OSError as error:
            raise unusable(self.root, error) from error

    def adopt(self) -> Adoption:
        """Take over all parts that no living process holds, and open their logs; empty ones are removed.

        A part that another process takes at the same moment is left to that one. A log that cannot be opened does not
        keep the others from being adopted. Works on a full disk. Raises `SpoolError` when the directory cannot be used.
        """
        logs: list[HeldLog] = []
        refused: list[Refused] = []
        damage: list[Damage] = []
        for part in self._taken(refused):
            for directory in _log_directories(part):
                try:
                    logs.append(self._held(EventLog.open(directory), load_identity(directory)))
                except (OSError, SpoolFormatError) as error:
                    refused.append(Refused(directory, str(error)))
            self._release_unused(part)
        for held in [held for held in logs if held.log.waiting == 0]:
            damage += held.log.take_damage()
            logs.remove(held)
            self.retire(held)
        return Adoption(tuple(logs), tuple(refused), tuple(damage))

    def retire(self, held: HeldLog) -> None:
        """Close a log for good, and remove it if nothing waits in it; its part as well when that was the last one.

        Bytes that nobody could read are kept in `ROOT/damaged`. A log in which something waits stays for the next one
        who adopts it. Never raises for the disk's sake: what cannot be removed now is removed when it is adopted.
        """
        is_done = held.log.waiting == 0
        held.log.close()
        with contextlib.suppress(OSError):
            if is_done:
                self._remove(held.directory)
        part = held.directory.parent
        self._open[part].discard(held)
        self._release_unused(part)

    def close(self) -> None:
        """Let others take over what is left, at once; all logs are closed or retired before."""
        for part in self._locks:
            with contextlib.suppress(OSError):
                _remove_if_empty(self.root, part)
        self.abandon()

    def abandon(self) -> None:
        """Let go of all locks and change nothing: for a forked child, whose parent goes on holding them."""
        # Closing, not unlocking: to unlock here would be to unlock for the parent too.
        for lock in self._locks.values():
            os.close(lock)
        self._locks.clear()
        self._open.clear()
        self._own = None

    def _new_part(self) -> Path:
        part = self.root / f"{_PART}{os.getpid()}-{secrets.token_hex(4)}"
        with _root_lock(self.root):
            files.make_directory(part)
            try:
                lock = files.create_file(part / _LOCK)
            except OSError:
                part.rmdir()
                raise
            # Waits for nobody but one who just looks whether it is held.
            fcntl.flock(lock, fcntl.LOCK_EX)
        self._locks[part] = lock
        return part

    def _taken(self, refused: list[Refused]) -> list[Path]:
        """Take the locks of all parts that are free."""
        taken: list[Path] = []
        try:
            with _root_lock(self.root):
                for part in _parts(self.root):
                    try:
                        if self._takes(part):
                            taken.append(part)
                    except OSError as error:
                        refused.append(Refused(part, str(error)))
        except OSError as error:
            raise unusable(self.root, error) from error
        return taken

    def _takes(self, part: Path) -> bool:
        """Take a part's lock unless somebody holds it, we ourselves for one."""
        lock = files.open_file(part / _LOCK)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return False
        self._locks[part] = lock
        return True

    def _held(self, log: EventLog, identity: QueueIdentity | None) -> HeldLog:
        held = HeldLog(log, identity)
        self._open.setdefault(log.directory.parent, set()).add(held)
        return held

    def _remove(self, directory: Path) -> None:
        if (directory / DAMAGED).is_dir():
            files.make_directory(self.root / DAMAGED)
            name = f"{directory.parent.name}-{directory.name}-{secrets.token_hex(4)}"
            directory.replace(self.root / DAMAGED / name)
            return
        for name in (POSITION, *IDENTITY_FILES):
            (directory / name).unlink(missing_ok=True)
        # Not emptied by force: what else is in there is not ours to delete.
        directory.rmdir()

    def _release_unused(self, part: Path) -> None:
        """Let go of a part that was taken over, and in which no log is open any more; remove it when it is empty."""
        if part == self._own or self._open.get(part):
            return
        self._open.pop(part, None)
        with contextlib.suppress(OSError):
            _remove_if_empty(self.root, part)
        os.close(self._locks.pop(part))


def survey(root: Path) -> list[Found]:
    """Find all logs, beside the processes that hold them; nothing is changed.

    Raises `SpoolError` when the directory cannot be read.
    """
    found: list[Found] = []
    try:
        for part in _parts(root):
            is_held = _is_held(part)
            found += [Found(directory, _known_identity(directory), is_held) for directory in _log_directories(part)]
    except OSError as error:
        raise unusable(root, error) from error
    return found


def _known_identity(directory: Path) -> QueueIdentity | None:
    try:
        return load_identity(directory)
    except SpoolFormatError:
        return None


def unusable(path: Path, error: OSError) -> SpoolError:
    """Make the error that tells, in the system's own words, why the spool cannot be used and what to do."""
    words = error.strerror or str(error)
    return SpoolError(f"{path} cannot be used for the spool: {words} ({_REMEDIES.get(error.errno or 0, _REMEDY)})")


def _prepare_root(root: Path) -> None:
    files.make_directory(root)
    # Somebody else's directory, a mounted volume for one, can be good enough: what is inside is 0700.
    with contextlib.suppress(PermissionError):
        root.chmod(0o700)


@contextlib.contextmanager
def _root_lock(root: Path) -> Iterator[None]:
    """Keep other processes from making, taking over and removing parts meanwhile."""
    lock = files.open_file(root / _LOCK)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _is_held(part: Path) -> bool:
    """Whether a process holds this part; looking takes a shared lock, for a moment."""
    try:
        lock = os.open(part / _LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


def _parts(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.name.startswith(_PART) and path.is_dir())


def _log_directories(part: Path) -> list[Path]:
    try:
        return sorted(path for path in part.iterdir() if path.is_dir())
    except FileNotFoundError:
        return []


def _remove_if_empty(root: Path, part: Path) -> None:
    with _root_lock(root):
        if not _log_directories(part):
            (part / _LOCK).unlink(missing_ok=True)
            part.rmdir()
