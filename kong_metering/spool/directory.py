"""The spool's directory: a part for each process, locked for as long as the process lives, with a log for each queue.

    ROOT/lock                        held for moments, while parts and logs are made, taken over or removed
    ROOT/clock                       how the clock was set: `times.py`
    ROOT/proc-PID-RANDOM/lock        held by the process that made the part, and by nobody else, ever
    ROOT/proc-PID-RANDOM/KEY/        a queue's log, and `queue.json`, which tells whose it is; `KEY-2` and so on are
                                     further ones of the same queue
    ROOT/proc-PID-RANDOM/KEY/lock    held by the process that adopted the log when the first one was dead; has its pid
    ROOT/delivered/                  what was delivered, for a while: see `delivered.py`
    ROOT/damaged/proc-PID-RANDOM-KEY-RANDOM/   what is left of a log that is done, but for bytes that nobody could read

Contract: `log_for` is one thread's, everything else another one's, at the same time; `close` comes last. Processes keep
each other out by `flock`. No two processes hold the same log. A log
whose process is dead, however it died, can be taken over at once, and by itself: several processes can hold logs of one
dead part, and a log that nobody wants stays free. Directories are 0700, files 0600. Nothing here waits for the disk:
what makes a log be found again after a power cut, with its owner, is in its first `EventLog.unsynced`.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import secrets
from collections import Counter
from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kong_metering.errors import SpoolError, SpoolFormatError
from kong_metering.eventlog import files
from kong_metering.eventlog.damage import Patience
from kong_metering.eventlog.files import Allowance
from kong_metering.eventlog.log import DAMAGED, Damage, EventLog
from kong_metering.spool import locks
from kong_metering.spool.free import FIXTURES, PART, Finding, FreeLogs, Refused, log_directories, parts
from kong_metering.spool.identity import QueueIdentity, identity_files, load_identity, save_identity

if TYPE_CHECKING:
    from kong_metering.eventlog.log import Keeper
    from kong_metering.spool.delivered import Delivered

_REMEDIES = {
    errno.EACCES: "let the user that Kong runs as write there, or choose another place with --spool-dir",
    errno.EPERM: "let the user that Kong runs as write there, or choose another place with --spool-dir",
    errno.EROFS: "mount it writable, or choose another place with --spool-dir",
    errno.ENOENT: "make the directory above it, or choose another place with --spool-dir",
    errno.ENOTDIR: "move the file that is in its place away, or choose another place with --spool-dir",
    errno.ENOSPC: "free space there, or choose another place with --spool-dir",
    # No other place helps. nginx makes Kong's soft limit the hard one of its workers, and so of what they start.
    errno.EMFILE: "raise the limit of open files: LimitNOFILE=65536 in the systemd unit, or ulimit -n 65536 before the "
    "start; if Kong starts the server, Kong's own",
    errno.ENFILE: "raise fs.file-max, or see what holds so many open",
}
_REMEDY = "choose another place with --spool-dir"


@dataclass(frozen=True, eq=False)
class HeldLog:
    """A log that this process holds; `identity` is None when damage left nothing to tell whose it is."""

    log: EventLog
    identity: QueueIdentity | None
    home: SpoolDirectory

    @property
    def directory(self) -> Path:
        """Where it is."""
        return self.log.directory


# Logs of dead processes that a queue has where nothing went wrong for long: one for each server, and once more.
_A_FEW = 4


@dataclass(frozen=True)
class Adoption:
    """What a process took over from dead ones; `damage` is that of logs in which nothing waits, removed by now.

    `left` are those whose turn comes when others are done with: each that is held takes a descriptor for its lock.
    """

    logs: tuple[HeldLog, ...] = ()
    refused: tuple[Refused, ...] = ()
    damage: tuple[Damage, ...] = ()
    left: tuple[QueueIdentity | None, ...] = ()


@dataclass(frozen=True)
class Found:
    """A log on disk, for people to look at: whose it is, None if unknown, and the living process that holds it.

    `holder` is that process's id (where it runs: another container may count differently), 0 if something holds the
    log but does not tell what it is, and None when nobody does.
    """

    directory: Path
    identity: QueueIdentity | None
    holder: int | None


def _anything(_identity: QueueIdentity | None) -> bool:
    return True


class SpoolDirectory:
    """The spool of this process."""

    def __init__(
        self,
        root: Path,
        patience: Patience | None = None,
        delivered: Delivered | None = None,
    ) -> None:
        """Make the directory if need be; the part of this process is made with its first log.

        `patience` decides when what the disk does not give counts as lost; `delivered` keeps what was delivered, None
        to keep nothing.

        Raises `SpoolError`, which tells why it cannot be and what to do.
        """
        self.root = root
        self._own: Path | None = None
        self._own_lock = -1
        # The locks of the logs that were adopted, and all logs that are open.
        self._locks: dict[Path, int] = {}
        self._open: set[HeldLog] = set()
        self._free = FreeLogs(root)
        # For all logs, so that it lasts from one try to open a log to the next.
        self._patience = patience or Patience()
        self._allowance = Allowance()
        self._delivered = delivered
        try:
            _prepare_root(root)
            with locks.root_lock(root):
                pass
        except OSError as error:
            raise unusable(root, error) from error

    def log_for(self, identity: QueueIdentity) -> HeldLog:
        """Make another log of this process for a queue.

        Raises `SpoolError`, which tells why it cannot be and what to do.
        """
        try:
            directory = self._new_directory(identity)
            try:
                held = self._made(directory, identity)
            except OSError:
                # A full disk may take the directory alone, at each try another one.
                with contextlib.suppress(OSError):
                    _remove_fixtures(directory)
                raise
        except OSError as error:
            raise unusable(self.root, error) from error
        self._open.add(held)
        return held

    def adopt(
        self,
        is_wanted: Callable[[QueueIdentity | None], bool] = _anything,
        held_back: Callable[[], Container[Path]] = tuple,
        max_adopted: int | None = None,
    ) -> Adoption:
        """Take over all logs that are wanted and that no living process holds; parts without any logs are removed.

        No more than `max_adopted` are held at a time, or half as many again for queues with a few, but all of a queue's
        or none; the others are told of.

        `is_wanted` is asked with the identity of each free log, None for one that is not known any more. `held_back` is
        asked, when it is known which logs are free, which ones are to be left alone for now: see `inbox/pouring.py`.
        A log that another process takes at the same moment is left to that one. One that cannot be opened does not keep
        the others from being adopted: it is told of, and tried again when something in it changed, or after a minute if
        it was the system that refused it. Cheap when there is nothing to adopt. Works on a full disk.

        Raises `SpoolError` when the directory cannot be used.
        """
        logs: list[HeldLog] = []
        damage: list[Damage] = []
        try:
            finding = self._free.find(is_wanted, {self._own, *self._locks})
            left = [] if max_adopted is None else _leave_out(finding, self._adopted_by_queue(), max_adopted)
            taken = self._taken(finding, held_back)
        except OSError as error:
            raise unusable(self.root, error) from error
        for directory, identity in taken:
            try:
                if load_identity(directory) != identity:
                    # Somebody made it another queue's after it was found, and before it was locked.
                    self._release(directory)
                    continue
                held = self._opened(directory, identity)
            except (OSError, SpoolFormatError) as error:
                self._release(directory)
                finding.refused.append(self._free.refuse(directory, error))
                continue
            self._open.add(held)
            if held.log.waiting:
                logs.append(held)
            else:
                damage += held.log.take_damage()
                self.retire(held)
        return Adoption(tuple(logs), tuple(finding.refused), tuple(damage), tuple(left))

    def reassign(self, held: HeldLog, identity: QueueIdentity) -> HeldLog:
        """Make a log another queue's, on disk too. Raises the system's `OSError`; it is still the first one's then."""
        save_identity(held.directory, identity)
        held.log.keep_with(self._keeper(held.directory, identity))
        reassigned = HeldLog(held.log, identity, self)
        # Not `held` alone: who asks again, because something else has failed, does so with what was before.
        before = [each for each in tuple(self._open) if each.log is held.log]
        self._open.add(reassigned)
        self._open.difference_update(before)
        return reassigned

    def retire(self, held: HeldLog) -> None:
        """Close a log for good, and remove it if nothing waits in it; its part as well when nothing else is in there.

        Bytes that nobody could read are kept in `ROOT/damaged`. An adopted log in which something waits is free for
        the next one who adopts it; one of our own is when we end. Never raises for the disk's sake: what cannot be
        removed now is removed when it is adopted.
        """
        is_done = held.log.waiting == 0
        held.log.close()
        self._open.discard(held)
        if is_done:
            self._remove(held.directory)
        self._release(held.directory)

    def set_free(self, held: HeldLog) -> None:
        """Close a log for good, as `retire` does, for others to take over at once, one of our own as well.

        Raises the system's `OSError` when such a one has to stay in our part, and so ours, until we end.
        """
        self.retire(held)
        own = self._own
        if own is None or held.directory.parent != own or not held.directory.is_dir():
            return
        part = self.root / f"{PART}{os.getpid()}-{secrets.token_hex(4)}"
        with locks.root_lock(self.root):
            files.make_directory(part)
            held.directory.replace(part / held.directory.name)
        for path in (part, own, self.root):
            files.sync(path)

    def close(self) -> None:
        """Let go of everything, so that others can take over what is left at once; logs that are open are retired."""
        for held in tuple(self._open):
            self.retire(held)
        for directory in tuple(self._locks):
            self._release(directory)
        if self._own is None:
            return
        part, self._own = self._own, None
        os.close(self._own_lock)
        with contextlib.suppress(OSError), locks.root_lock(self.root):
            _remove_if_empty(part)

    def _made(self, directory: Path, identity: QueueIdentity) -> HeldLog:
        locks.reserve(directory)
        save_identity(directory, identity)
        return self._opened(directory, identity)

    def _opened(self, directory: Path, identity: QueueIdentity | None) -> HeldLog:
        # All of it for each log, one of a dead process too: nobody knows what was synced.
        part = directory.parent
        sync_first = (*identity_files(directory), directory, part, *files.above(part), *files.above(self.root))
        log = EventLog.open(
            directory,
            sync_first=sync_first,
            patience=self._patience,
            allowance=self._allowance,
            keeper=self._keeper(directory, identity),
        )
        return HeldLog(log, identity, self)

    def _keeper(self, directory: Path, identity: QueueIdentity | None) -> Keeper | None:
        return self._delivered.keeper(directory, identity) if self._delivered else None

    def _new_directory(self, identity: QueueIdentity) -> Path:
        """Make a directory in our part: one of the same queue may still be open, or be on its way out."""
        part = self._part()
        for name in itertools.chain([identity.key], (f"{identity.key}-{number}" for number in itertools.count(2))):
            if files.make_directory(part / name):
                return part / name
        raise AssertionError("numbers do not end")

    def _part(self) -> Path:
        if self._own is not None and not self._own.is_dir():
            # Somebody has cleared the directory up.
            os.close(self._own_lock)
            self._own = None
        if self._own is None:
            self._own = self._new_part()
        return self._own

    def _new_part(self) -> Path:
        part = self.root / f"{PART}{os.getpid()}-{secrets.token_hex(4)}"
        with locks.root_lock(self.root):
            files.make_directory(part)
            try:
                self._own_lock = locks.take_new(part)
            except OSError:
                part.rmdir()
                raise
        return part

    def _taken(
        self, finding: Finding, held_back: Callable[[], Container[Path]]
    ) -> list[tuple[Path, QueueIdentity | None]]:
        """Lock the logs that were found, those that are still free; remove the parts that are still empty."""
        if not finding.wanted and not finding.empty:
            return []
        with locks.root_lock(self.root):
            for part in finding.empty:
                with contextlib.suppress(OSError):
                    _remove_if_empty(part)
            left_alone = held_back()
            wanted = [one for one in finding.wanted if one[0] not in left_alone]
            return [(directory, identity) for directory, identity in wanted if self._take_for(directory, finding)]

    def _take_for(self, directory: Path, finding: Finding) -> bool:
        try:
            # A part that was just being made when we looked has a living process by now.
            lock = None if locks.is_locked(directory.parent) else locks.take(directory)
        except OSError as error:
            finding.refused.append(self._free.refuse(directory, error))
            return False
        if lock is None:
            return False
        self._locks[directory] = lock
        return True

    def _adopted_by_queue(self) -> Counter[str]:
        held = (each.identity for each in self._open if each.directory in self._locks)
        return Counter(identity.key if identity else "" for identity in held)

    def _release(self, directory: Path) -> None:
        if directory in self._locks:
            locks.release(self._locks.pop(directory))

    def _remove(self, directory: Path) -> None:
        """Remove a log that is done, while it is locked, and its part if that was the last one."""
        # Under the root's lock, so that nobody locks the log again between its lock and itself being removed.
        with contextlib.suppress(OSError), locks.root_lock(self.root):
            _remove_log(self.root, directory)
            if directory.parent != self._own:
                _remove_if_empty(directory.parent)
        if directory.exists():
            self._free.postpone(directory)


def _leave_out(finding: Finding, held_by: Counter[str], most: int) -> list[QueueIdentity | None]:
    """Leave out what there is no room for; the logs of one queue stay together, and may exceed it by themselves.

    Those with the fewest go first, into room of their own too: what is delivered at once must not wait for the hundreds
    that processes which died again and again have left for an endpoint that takes nothing.
    """
    few = sum(count for count in held_by.values() if count <= _A_FEW)
    many = held_by.total() - few
    if few + many + len(finding.wanted) <= most:
        return []
    by_queue: dict[str, list[tuple[Path, QueueIdentity | None]]] = {}
    for directory, identity in finding.wanted:
        by_queue.setdefault(identity.key if identity else "", []).append((directory, identity))
    finding.wanted.clear()
    left: list[QueueIdentity | None] = []
    for logs in sorted(by_queue.values(), key=len):
        is_few = len(logs) <= _A_FEW
        # One queue may hold more than `most` by itself: there is half as much for those with a few even so.
        has_room = few + min(many, most) < most * 3 // 2 if is_few else few + many < most
        if not has_room:
            left.append(logs[0][1])
            continue
        finding.wanted += logs
        if is_few:
            few += len(logs)
        else:
            many += len(logs)
    return left


def survey(root: Path) -> list[Found]:
    """Find all logs, beside the processes that hold them; nothing is changed.

    Raises `SpoolError` when the directory cannot be read.
    """
    try:
        with locks.looking(root):
            return [found for part in parts(root) for found in _found_in(part)]
    except OSError as error:
        raise unusable(root, error) from error


def _found_in(part: Path) -> list[Found]:
    owner = _pid_of(part) if locks.is_locked(part) else None
    return [
        Found(directory, _known_identity(directory), locks.holder(directory) if owner is None else owner)
        for directory in log_directories(part)
    ]


def _pid_of(part: Path) -> int:
    pid = part.name.removeprefix(PART).partition("-")[0]
    return int(pid) if pid.isdecimal() else 0


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


def _remove_log(root: Path, directory: Path) -> None:
    if (directory / DAMAGED).is_dir():
        with contextlib.suppress(OSError):
            # Somebody may have removed what was in there, or taken it back in.
            (directory / DAMAGED).rmdir()
    if (directory / DAMAGED).is_dir():
        files.make_directory(root / DAMAGED)
        (directory / locks.LOCK).unlink(missing_ok=True)
        directory.replace(root / DAMAGED / f"{directory.parent.name}-{directory.name}-{secrets.token_hex(4)}")
        return
    _remove_fixtures(directory)


def _remove_fixtures(directory: Path) -> None:
    """Remove a log without events, by name: listing what is in it takes a descriptor, and none may be free."""
    for name in FIXTURES:
        (directory / name).unlink(missing_ok=True)
    # Not emptied by force: what else is in there is not ours to delete.
    directory.rmdir()


def _remove_if_empty(part: Path) -> None:
    """Remove a part without any logs, if its process is dead; under the root's lock."""
    if not locks.is_locked(part) and not log_directories(part):
        (part / locks.LOCK).unlink(missing_ok=True)
        part.rmdir()
