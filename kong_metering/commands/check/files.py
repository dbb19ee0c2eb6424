"""Files with configurations, as text."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from kong_metering.commands import words

# Beyond it no configuration is written by hand, and reading one takes minutes.
_MAX_BYTES = 20 * 1024 * 1024
_STDIN = "-"


class UnreadableFile(click.ClickException):
    """A file that cannot be read: as with a wrong call, nothing can be said of the configuration."""

    exit_code = 2


def read_file(file: str) -> str:
    """Read a file, or with `-` stdin. Raises `UnreadableFile`."""
    if file == _STDIN:
        data = sys.stdin.buffer.read(_MAX_BYTES + 1)
    else:
        try:
            with Path(file).open("rb") as stream:
                data = stream.read(_MAX_BYTES + 1)
        except OSError as error:
            raise UnreadableFile(words.shown(f"{file}: {error.strerror or error}")) from error
    if len(data) > _MAX_BYTES:
        raise UnreadableFile(f"{words.shown(file)} has more than {words.size(_MAX_BYTES)}: is it the right file?")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnreadableFile(
            f"{words.shown(file)} is not in UTF-8, from byte {error.start} on: save it in UTF-8; is it the right file?"
        ) from error


def read_if_there(file: Path) -> str | None:
    """Read a file that another one names; None where it cannot be read."""
    try:
        return read_file(str(file)) if file.is_absolute() and file.is_file() else None
    except (UnreadableFile, OSError):
        # Such as a directory of another user's, in which it cannot be looked for.
        return None


def name_of(file: str) -> str:
    """Name a file for people."""
    return "stdin" if file == _STDIN else words.shown(file)
