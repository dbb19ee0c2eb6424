"""Whether the socket's path still leads to our socket: anybody who may write to Kong's prefix can change that.

Contract: one thread calls `look`, about once a second; it never waits. Somebody else's socket at the path is asked
whether a plugin server is behind it, and has `_PATIENT_LOOKS` looks to answer.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from enum import Enum
from pathlib import Path

from kong_metering.host.handover import status_request
from kong_metering.host.paths import reachable

_PATIENT_LOOKS = 3
_ANSWER_BYTES = 65_536
_ANSWERED = b"\x94\x01"

# A file's device and inode.
Identity = tuple[int, int]


class Found(Enum):
    """What is at the path."""

    OURS = "our socket"
    # Another plugin server has taken the path, and answers there.
    OTHERS = "another plugin server"
    UNKNOWN = "something that may answer yet"
    NOTHING = "nothing that serves"


def identity_of(path: Path) -> Identity | None:
    """Return the identity of what is at a path, itself and not what it links to; None if nothing is."""
    try:
        found = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_dev, found.st_ino


class PathWatch:
    """Looks at the path; `identity` is that of our socket there, None if it is not there any more."""

    def __init__(self, path: Path, identity: Identity | None) -> None:
        self.path = path
        self.identity = identity
        self._probe: Probe | None = None

    def look(self) -> Found:
        """Tell what is there."""
        try:
            identity = identity_of(self.path)
        except OSError:
            # Nobody can tell; a directory that may not be searched hides it from Kong, but making it anew fails too.
            return Found.OURS
        if identity is not None and identity == self.identity:
            self.forget()
            return Found.OURS
        return self.look_who_serves() if identity is not None else Found.NOTHING

    def look_who_serves(self) -> Found:
        """Tell whether a plugin server answers at the path, whoever it is."""
        if self._probe is None:
            self._probe = Probe.sent_to(self.path)
            return Found.UNKNOWN if self._probe is not None else Found.NOTHING
        found = self._probe.look()
        if found is not Found.UNKNOWN:
            self.forget()
        return found

    def forget(self) -> None:
        """Ask nobody any more; for a process that was forked as well."""
        if self._probe is not None:
            self._probe.close()
            self._probe = None


class Probe:
    """A question to who serves at a path."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._looks = 0

    @classmethod
    def sent_to(cls, path: Path) -> Probe | None:
        """Ask; None when nobody can be asked: what refuses us refuses Kong, which has the same user."""
        connection = socket.socket(socket.AF_UNIX)
        connection.setblocking(False)  # noqa: FBT003 - the standard library's signature
        try:
            with reachable(path) as address:
                connection.connect(address)
            connection.send(status_request())
        except BlockingIOError:
            # Its backlog is full: it may be busy, and has as long as the others.
            pass
        except OSError:
            connection.close()
            return None
        return cls(connection)

    def look(self) -> Found:
        """Tell what came of it by now."""
        try:
            answer = self._connection.recv(_ANSWER_BYTES)
        except BlockingIOError:
            self._looks += 1
            return Found.UNKNOWN if self._looks < _PATIENT_LOOKS else Found.NOTHING
        except OSError:
            return Found.NOTHING
        return Found.OTHERS if answer.startswith(_ANSWERED) else Found.NOTHING

    def close(self) -> None:
        """Ask no more."""
        self._connection.close()


def make_way(path: Path) -> Path | None:
    """Move what is no socket away from a path; returns where it is now, None if there was no need. Raises `OSError`."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            aside = path.with_name(f"{path.name}.moved-aside-{os.getpid()}")
            path.rename(aside)
            return aside
    return None
