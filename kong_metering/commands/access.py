"""Whether this user may look at a spool, or change it; told before anything is touched.

Contract: nothing is made. Who changes a spool has to be the user that owns it: what anybody else writes there, root for
one, the servers could not read, and would not deliver.
"""

from __future__ import annotations

import os
import pwd
from pathlib import Path

from kong_metering.errors import SpoolError
from kong_metering.spool.free import PART

_LOCK = "lock"
# Where a spool is below a directory that is easily taken for it: Kong's prefix, or a service's state directory.
_USUAL = (Path("metering-spool"), Path("spool"))


def check_readable(root: Path) -> None:
    """See that the spool is there and can be looked at. Raises `SpoolError`."""
    _check_there(root)
    if not os.access(root, os.R_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        raise SpoolError(f"{root} may be read by {_name(owner_of(root))} only, and you are {_me()}: {_as_owner(root)}")


def check_writable(root: Path) -> None:
    """See that the spool is there and is ours to change. Raises `SpoolError`."""
    _check_there(root)
    owner = owner_of(root)
    if os.geteuid() != owner:
        raise SpoolError(
            f"{root} belongs to {_name(owner)}, and you are {_me()}: {_as_owner(root)}, "
            "because the servers could not read what another user writes there"
        )


def _check_there(root: Path) -> None:
    try:
        root.stat()
    except FileNotFoundError:
        raise SpoolError(
            f"there is no spool at {root}: name Kong's prefix with -p, or the server's --spool-dir with --spool-dir; "
            "a server makes the directory when it starts, unless it runs with --no-spool"
        ) from None
    except PermissionError:
        raise SpoolError(f"{root} may not be looked at by {_me()}: run this as the user that Kong runs as") from None
    if not root.is_dir():
        raise SpoolError(f"{root} is not a directory: name the spool's with --spool-dir, or Kong's prefix with -p")
    _check_is_spool(root)


def _check_is_spool(root: Path) -> None:
    """See that a server has kept its spool there: of any other directory it would be said that nothing waits."""
    may_look = os.access(root, os.R_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids)
    # Without its lock it may be one that was copied from somewhere.
    if not may_look or (root / _LOCK).exists() or any(root.glob(f"{PART}*")):
        return
    inside = next((root / path for path in _USUAL if (root / path / _LOCK).exists()), None)
    hint = (
        f"is it {inside}? Name" if inside else "either it is another directory, or no server has run with it yet: name"
    )
    raise SpoolError(
        f"{root} is no spool, none of its files is in there; {hint} the server's --spool-dir with --spool-dir, or "
        "Kong's prefix with -p"
    )


def owner_of(root: Path) -> int:
    """Tell who owns the spool: whoever made what is inside, where the directory itself was provided by another."""
    try:
        return (root / _LOCK).stat().st_uid
    except OSError:
        return root.stat().st_uid


def _as_owner(root: Path) -> str:
    name = _name(owner_of(root))
    return f"run this as {name}, for example with `sudo -u '{name}'`"


def _me() -> str:
    return _name(os.geteuid())


def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"#{uid}"
