"""Changes of files that are only made where they are needed, each told in a line, or only told.

Contract: whatever is there already as it is to be is left alone, so that doing it again changes nothing. A file is
there in whole or not at all. Raises the system's `OSError`.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import secrets
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_FOR_EVERYBODY = 0o644
_PARTICIPLES = {"wrote": "written", "gave": "given"}


@dataclass(frozen=True)
class Changes:
    """Makes changes below `root`, a directory that stands for the root of the file system, or tells them only.

    `tell` is called with a line for each change.
    """

    root: Path
    is_dry: bool
    tell: Callable[[str], None]

    def at(self, path: Path) -> Path:
        """Return where a path is."""
        return self.root / path.relative_to("/")

    def text_of(self, path: Path) -> str | None:
        """Return what a file says, None if it is not there."""
        with contextlib.suppress(FileNotFoundError):
            return self.at(path).read_bytes().decode("utf-8", "surrogateescape")
        return None

    def directory(self, path: Path, owner: pwd.struct_passwd, mode: int) -> None:
        """Make a directory that is somebody's, or make it his. Nothing is done to what a link leads to."""
        place = self.at(path)
        is_new = not os.path.lexists(place)
        if not is_new and _is_right(place.lstat(), owner, mode):
            return
        if not self.is_dry:
            if is_new:
                place.mkdir(parents=True)
            _give(place, owner, mode)
        done, to = ("made", "for") if is_new else ("gave", "to")
        self.told(done, f"{path} {to} user {owner.pw_name}, {mode:04o}")

    def file(self, path: Path, text: str) -> bool:
        """Write a file that everybody may read; tells whether that changed anything.

        One that is there keeps whose it is, and who may read it.
        """
        if self.text_of(path) == text:
            return False
        if not self.is_dry:
            place = self.at(path)
            place.parent.mkdir(parents=True, exist_ok=True)
            # A link stays one.
            _write(place.resolve(), text)
        self.told("wrote", f"{path}")
        return True

    def remove(self, path: Path) -> None:
        """Remove a file, or a directory that is empty."""
        place = self.at(path)
        if not os.path.lexists(place):
            return
        if place.is_dir():
            if not self.is_dry:
                try:
                    place.rmdir()
                except OSError:
                    return
        elif not self.is_dry:
            place.unlink()
        self.told("removed", f"{path}")

    def told(self, done: str, what: str) -> None:
        """Tell of a change, that it was made or would have been."""
        self.tell(f"would have {_PARTICIPLES.get(done, done)} {what}" if self.is_dry else f"{done} {what}")


def _is_right(found: os.stat_result, owner: pwd.struct_passwd, mode: int) -> bool:
    wanted = (owner.pw_uid, owner.pw_gid, mode)
    return stat.S_ISDIR(found.st_mode) and (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == wanted


def _give(place: Path, owner: pwd.struct_passwd, mode: int) -> None:
    directory = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if not _is_right(os.fstat(directory), owner, mode):
            os.fchown(directory, owner.pw_uid, owner.pw_gid)
            os.fchmod(directory, mode)
    finally:
        os.close(directory)


def _write(place: Path, text: str) -> None:
    """Write a file; the directory may be another user's, whose links are not followed."""
    draft = place.with_name(f".{place.name}.{secrets.token_hex(4)}")
    try:
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        # Of the file that was asked for; nobody knows of the draft.
        error.filename = str(place)
        raise
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(text.encode("utf-8", "surrogateescape"))
            file.flush()
            try:
                found = place.lstat()
            except FileNotFoundError:
                os.fchmod(descriptor, _FOR_EVERYBODY)
            else:
                os.fchown(descriptor, found.st_uid, found.st_gid)
                os.fchmod(descriptor, stat.S_IMODE(found.st_mode))
        draft.replace(place)
    finally:
        with contextlib.suppress(FileNotFoundError):
            draft.unlink()
