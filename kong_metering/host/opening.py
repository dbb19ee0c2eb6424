"""The socket that a plugin server listens with, from its first moment on.

Contract: `open_at` is called before everything that takes long, so that Kong's connections wait instead of being
refused: it makes the socket, or shares that of the plugin server that serves at the path until now. `Opening.take_over`
is called when all is ready, `Opening.finish` when the servers are there. Plugin servers that start at the same time do
so one after the other: a lock on the directory keeps them apart, which ends with its process.

The socket is made under a temporary name with mode 0600 and renamed into place, so that no other user can ever connect;
with a group, whoever is in that may (0660).
Its path is never removed: where nobody serves any more, connections are refused, until the next one renames its own
socket over it. Only where the disk has no room for a second name is it made in the place of the one that nobody serves
at.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from kong_metering.errors import StartupError
from kong_metering.host.admission import admit
from kong_metering.host.handover import Elder, Inheritance, Predecessor
from kong_metering.host.paths import reachable
from kong_metering.host.watch import Identity, identity_of

if TYPE_CHECKING:
    from kong_metering.host.reexec import Restart

# As long as others may take to start; then it begins all the same.
_LOCK_SECONDS = 30.0
_LOCK_POLL_SECONDS = 0.01


@dataclass(frozen=True)
class Place:
    """Where Kong connects to; `backlog` connections may wait to be accepted.

    `group`: whoever is in it may connect, too; None: the own user only.
    """

    path: Path
    backlog: int = 4096
    group: int | None = None


@dataclass(frozen=True)
class Listener:
    """A socket that listens, and the identity that it has at its path; None if it is not there."""

    socket: socket.socket
    identity: Identity | None


class Opening:
    """A plugin server that starts."""

    def __init__(
        self,
        place: Place,
        predecessor: Predecessor | None,
        listener: Listener | None,
        *,
        lock: int = -1,
        restart: Restart | None = None,
    ) -> None:
        self.place = place
        # What this very process has left to itself.
        self.restart = restart
        self._predecessor = predecessor
        self._listener = listener
        self._lock = lock

    @property
    def takes_over(self) -> bool:
        """Whether another plugin server serves until now."""
        return self._predecessor is not None

    @property
    def silent(self) -> tuple[int, ...]:
        """Those of the servers before, by their index, that did not hand over."""
        return () if self._predecessor is None else self._predecessor.silent

    def take_over(self) -> tuple[Listener, Inheritance]:
        """Give the socket that listens, and what the plugin server before leaves. Raises `StartupError`."""
        inheritance = Inheritance() if self._predecessor is None else self._predecessor.take_over()
        if self._listener is None:
            # Not before: an old one of one step only would remove it from the path, as its own.
            self._listener = listen(self.place)
        return self._listener, emptied(inheritance)

    def finish(self) -> Elder | None:
        """Let go of the plugin server before, and let others start; gives the supervisor before, if there is one."""
        elder = None if self._predecessor is None else self._predecessor.release()
        if self._lock >= 0:
            # By hand: the servers have the descriptor too.
            with contextlib.suppress(OSError):
                fcntl.flock(self._lock, fcntl.LOCK_UN)
        self.leave()
        return elder

    def leave(self) -> None:
        """Close what only the start needs, in this process."""
        if self._predecessor is not None:
            self._predecessor.close()
            self._predecessor = None
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def open_at(place: Place) -> Opening:
    """Get hold of the socket that listens. Raises `StartupError` that tells why that cannot be."""
    check(place.path)
    lock = _lock(place.path.parent)
    identity = identity_of(place.path)
    predecessor = Predecessor.find(place.path)
    if predecessor is None:
        listener: Listener | None = listen(place)
    else:
        # Whoever answered there shares the socket that is there.
        listener = None if predecessor.listener is None else Listener(predecessor.listener, identity)
        _admit_anew(place)
    return Opening(place, predecessor, listener, lock=lock)


def _admit_anew(place: Place) -> None:
    """Have a socket that is shared be open to whom it is to be open now. Raises `StartupError`."""
    try:
        admit(place.path, place.group)
    except FileNotFoundError:
        # It is made anew within a second.
        pass
    except OSError as error:
        raise StartupError(f"cannot serve on {place.path}: {error.strerror or error}") from error


def open_again(place: Place, restart: Restart) -> Opening:
    """Go on with the socket that this process has listened with before it was started anew."""
    sockets = restart.sockets()
    listener = Listener(sockets.listener, identity_of(place.path))
    return Opening(place, Predecessor(None, sockets), listener, restart=restart)


def check(path: Path) -> None:
    """See that a socket can be at this path, in the place of one that is there or of nothing. Raises `StartupError`."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise StartupError(f"{path} exists and is not a socket; move it away, or choose another --socket-name")
    except FileNotFoundError:
        pass
    except OSError as error:
        raise StartupError(f"cannot look at {path}: {error}; see -p/--kong-prefix") from error


def listen(place: Place) -> Listener:
    """Make the socket, in the place of one that an earlier process left, but of nothing else.

    Raises `StartupError` that tells why it cannot be.
    """
    path = place.path
    check(path)
    temporary = path.with_name(f".{os.getpid():x}")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        temporary.unlink(missing_ok=True)
        bound = _bind(listener, temporary, path)
        admit(bound, place.group)
        listener.listen(place.backlog)
        identity = identity_of(bound)
        bound.rename(path)
    except OSError as error:
        listener.close()
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise StartupError(f"cannot serve on {path}: {error}; see -p/--kong-prefix") from error
    listener.setblocking(False)  # noqa: FBT003 - the standard library's signature
    return Listener(listener, identity)


def _bind(listener: socket.socket, temporary: Path, path: Path) -> Path:
    """Bind under the temporary name; without room for one more name, under the one that nobody serves at."""
    try:
        with reachable(temporary) as address:
            listener.bind(address)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        path.unlink()
        with reachable(path) as address:
            listener.bind(address)
        return path
    return temporary


def emptied(inheritance: Inheritance) -> Inheritance:
    """Accept who waits at the former socket that listens, to which nobody can connect any more, and close it."""
    former = inheritance.former
    if former is None:
        return inheritance
    waiting = []
    former.setblocking(False)  # noqa: FBT003 - the standard library's signature
    with former, contextlib.suppress(OSError):
        while True:
            waiting.append((former.accept()[0], b""))
    return replace(inheritance, connections=(*inheritance.connections, *waiting), former=None)


def _lock(directory: Path) -> int:
    """Wait for others that start here; -1 where there are no locks."""
    try:
        lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return -1
    deadline = time.monotonic() + _LOCK_SECONDS
    while time.monotonic() < deadline:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_LOCK_POLL_SECONDS)
        except OSError:
            break
        else:
            return lock
    os.close(lock)
    return -1
