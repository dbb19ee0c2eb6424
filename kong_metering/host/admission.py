"""Who may connect to the socket: the own user, and with a group whoever is in that.

Contract: nothing here waits. What is told of others is what users, groups and modes say; lists of further rights (ACLs)
and namespaces of users are not looked at.
"""

from __future__ import annotations

import grp
import os
import pwd
import stat
from dataclasses import dataclass
from pathlib import Path

from kong_metering.errors import StartupError

_FOR_ONE_USER = 0o600
_FOR_A_GROUP = 0o660
_NOBODY_WE_KNOW = -1


@dataclass(frozen=True)
class Party:
    """A user and its groups, as a process has them."""

    uid: int
    groups: frozenset[int]

    @property
    def name(self) -> str:
        """The user's name, or its number if it has none here."""
        return user_name(self.uid)


def group_named(name: str) -> int:
    """Return a group's number. Raises `StartupError` when there is none of that name."""
    if name.isascii() and name.isdigit():
        return int(name)
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise StartupError(f"there is no group {name}, which --socket-group names") from None


def user_name(uid: int) -> str:
    """Return a user's name; its number if it has none here."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def group_name(gid: int) -> str:
    """Return a group's name; its number if it has none here."""
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def admit(path: Path, group: int | None) -> None:
    """Let the own user connect to a socket, and a group if there is one. Raises `OSError`."""
    found = path.stat()
    wanted = _FOR_ONE_USER if group is None else _FOR_A_GROUP
    if stat.S_IMODE(found.st_mode) == wanted and group in (None, found.st_gid):
        return  # which also works where the disk takes no changes
    if group is None:
        path.chmod(_FOR_ONE_USER)
        return
    try:
        os.chown(path, -1, group)
    except PermissionError as error:
        raise PermissionError(
            error.errno,
            f"user {user_name(os.geteuid())} cannot give it to the group {group_name(group)}, which --socket-group "
            "names: make that user a member of it",
        ) from error
    path.chmod(_FOR_A_GROUP)


def obstacle(path: Path, party: Party) -> str | None:
    """Tell what keeps somebody from connecting to a socket, in words; None if nothing is seen that does.

    Raises `OSError` when it cannot be looked at.
    """
    if party.uid == 0:
        return None
    if (hindered := obstacle_on_the_way(path, party)) is not None:
        return hindered
    found = path.stat()
    if _is_granted(found, party, stat.S_IWUSR):
        return None
    whom = f"user {user_name(found.st_uid)}"
    if found.st_mode & stat.S_IWGRP:
        whom += f" and group {group_name(found.st_gid)}"
    return f"it is open to {whom} only"


def obstacle_on_the_way(path: Path, party: Party) -> str | None:
    """Tell which directory keeps somebody from a file, in words; as `obstacle`, and the file need not be there."""
    for directory in reversed(path.absolute().parents):
        if not _is_granted(directory.stat(), party, stat.S_IXUSR):
            return f"{directory} may not be passed by that user"
    return None


def anybody_in(group: int) -> Party:
    """Return a user who is in this group and has no other right."""
    return Party(_NOBODY_WE_KNOW, frozenset([group]))


def _is_granted(found: os.stat_result, party: Party, right: int) -> bool:
    """Whether a right, given as its owner's bit, is the party's: the system looks at one of the three classes only."""
    if found.st_uid == party.uid:
        return bool(found.st_mode & right)
    if found.st_gid in party.groups:
        return bool(found.st_mode & right >> 3)
    return bool(found.st_mode & right >> 6)
