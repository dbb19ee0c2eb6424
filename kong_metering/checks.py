"""What will not work at a start: looked at by `--dump`, which Kong runs before it starts anything, and by the start.

Contract: nothing here changes anything, but for the file that it makes and removes to see whether one can be made. Run
as root, Kong has its workers, and with them the plugin server, run as somebody else: what that user may do is found out
in a child process that has become that user.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import re
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from kong_metering.host.admission import anybody_in, obstacle_on_the_way, user_name
from kong_metering.host.paths import MOST_BYTES

# nginx's own `user`, as Kong writes it into its prefix before it asks for the plugin.
_USER = re.compile(r"^\s*user\s+([^\s;]+)", re.MULTILINE)
_ERROR_LOG = re.compile(r"^\s*error_log\s+([^\s;]+)", re.MULTILINE)
_APPEND = os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
# Who Kong's workers are otherwise.
_USUAL_USERS = ("kong", "nobody")


@dataclass(frozen=True)
class Places:
    """What a start needs: Kong's prefix, the socket, the spool's directory if there is one, and a CA bundle.

    `group`: the number of the group that may connect, too.
    """

    prefix: Path
    socket: Path
    spool: Path | None
    ca_bundle: str | None
    group: int | None = None


def complaints(places: Places) -> list[str]:
    """Tell what will not work in this process, each in a sentence with what to do; nothing if all is well."""
    return list(_complaints(places, f"user {user_name(os.geteuid())}"))


def complaints_for_workers(places: Places) -> list[str]:
    """Tell what will not work in a process that one of Kong's workers starts."""
    user = _other_user(places.prefix)
    if user is None:
        return complaints(places)
    return _as_user(user, lambda: list(_complaints(places, _worker(user))))


def complaints_of_user(user: pwd.struct_passwd, places: Places) -> list[str]:
    """Tell what will not work in a process of a user's, as whom this one can run."""
    if os.geteuid() == user.pw_uid:
        return complaints(places)
    return _as_user(user, lambda: list(_complaints(places, _worker(user))))


def complaints_of_interpreter(user: pwd.struct_passwd) -> list[str]:
    """Tell whether a user cannot run this program; nothing where this process cannot be that user."""
    if os.geteuid() not in (0, user.pw_uid):
        return []
    if os.geteuid() == user.pw_uid:
        return list(_complaints_of_interpreter(_worker(user)))
    return _as_user(user, lambda: list(_complaints_of_interpreter(_worker(user))))


def naming(prefix: Path, directory: Path) -> str:
    """Tell which flag has to name the directory that the socket is to be in."""
    if directory == prefix:
        return "-p/--kong-prefix must name Kong's prefix"
    return "--socket must name a place in a directory that is there"


def path_complaint(path: Path) -> str | None:
    """Tell why Kong cannot connect to a path; None if it can."""
    length = len(os.fsencode(path))
    if length <= MOST_BYTES:
        return None
    return (
        f"the socket's path has {length} bytes, and Kong can connect to one of {MOST_BYTES} at most: choose a shorter "
        f"--socket-name, or make a symbolic link to {path.parent} and name the socket by it in pluginserver_*_socket"
    )


def _complaints(places: Places, user: str) -> Iterator[str]:
    directory = places.socket.parent
    if not directory.is_dir():
        yield f"{directory} is no directory that {user} can see; {naming(places.prefix, directory)}"
        return
    if not os.access(directory, os.W_OK | os.X_OK):
        yield f"{user} cannot make a socket in {directory}: let that user write there"
    if places.group is not None and (hindered := obstacle_on_the_way(places.socket, anybody_in(places.group))):
        yield f"who is in the group that --socket-group names cannot connect to {places.socket}: {hindered}"
    with contextlib.suppress(OSError):
        if not stat.S_ISSOCK(places.socket.lstat().st_mode):
            yield f"{places.socket} exists and is not a socket; move it away, or choose another --socket-name"
    if (too_long := path_complaint(places.socket)) is not None:
        yield too_long
    yield from _complaints_of_interpreter(user)
    if places.spool is not None and not _can_be_kept_in(places.spool):
        yield (
            f"{user} cannot keep files in {places.spool}: events wait in memory, and are lost when the process ends; "
            "let that user write there, or choose another place with --spool-dir"
        )
    if places.ca_bundle is not None:
        yield from _complaints_of_bundle(places.ca_bundle, user)


def _complaints_of_bundle(bundle: str, user: str) -> Iterator[str]:
    from kong_metering.authorities import holds_certificates  # noqa: PLC0415 - takes long

    if not os.access(bundle, os.R_OK):
        yield f"--ca-bundle {bundle} cannot be read by {user}: nothing is delivered over TLS"
    elif not holds_certificates(Path(bundle)):
        yield f"--ca-bundle {bundle} holds no certificate (PEM): nothing is delivered over TLS"


def _complaints_of_interpreter(user: str) -> Iterator[str]:
    if not os.access(sys.executable, os.X_OK) or not os.access(__file__, os.R_OK):
        # A virtual environment's is a link; what it leads to may be in somebody's home.
        program, leads_to = sys.executable, os.path.realpath(sys.executable)
        named = program if leads_to == program else f"{program}, which is {leads_to},"
        yield (
            f"{user} cannot run {named} with {Path(__file__).parent}: let that user read both, or install the package "
            "into an environment that it can read (/usr/bin/python3 -m venv /opt/kong-metering)"
        )


def _worker(user: pwd.struct_passwd) -> str:
    return f"user {user.pw_name}, whom Kong's workers run as,"


def _can_be_kept_in(directory: Path) -> bool:
    """Tell whether the directory can be used, or made."""
    there = directory
    while not os.path.lexists(there) and there != there.parent:
        there = there.parent
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK | os.R_OK)


def _other_user(prefix: Path) -> pwd.struct_passwd | None:
    """Return the user whom Kong's workers run as, if this process is root and that one is not."""
    if os.geteuid() != 0:
        return None
    with contextlib.suppress(OSError):
        named = _USER.findall((prefix / "nginx.conf").read_text(encoding="utf-8", errors="replace"))
        for name in (*named, *_USUAL_USERS):
            with contextlib.suppress(KeyError):
                user = pwd.getpwnam(name)
                return user if user.pw_uid != 0 else None
    return None


def _as_user(user: pwd.struct_passwd, work: Callable[[], list[str]]) -> list[str]:
    """Do something as a user, in a process of its own."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            os.initgroups(user.pw_name, user.pw_gid)
            os.setgid(user.pw_gid)
            os.setuid(user.pw_uid)
            os.write(writing, json.dumps(work()).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as answer:
        text = answer.read()
    os.waitpid(child, 0)
    found: list[str] = json.loads(text or b"[]")
    return found


def say_in_error_log(prefix: Path, lines: list[str]) -> None:
    """Add lines to Kong's error log, if it is a file: `kong start` shows what we print only when it does not daemonise.

    Nothing happens where that cannot be.
    """
    with contextlib.suppress(OSError):
        named = _ERROR_LOG.search((prefix / "nginx.conf").read_text(encoding="utf-8", errors="replace"))
        if named is None:
            return
        descriptor = os.open(prefix / named[1], _APPEND)
        with os.fdopen(descriptor, "wb") as log:
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                log.write("".join(lines).encode())
