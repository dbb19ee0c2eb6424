"""The file that a Kong reads which does not run our program: what its query command is to print.

Contract: it is there in whole or not at all, and every user may read it: Kong may run as another one.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

_FOR_EVERYBODY = 0o644


def written(path: Path, text: str) -> list[str]:
    """Write the file, unless it says the same already; tells why it cannot be written, in a sentence."""
    try:
        if not _says(path, text):
            _write(path, text)
    except OSError as error:
        complaint = (
            f"{path} cannot be written, which Kong is to read: {error.strerror or error}; let the user that this runs "
            "as write there, or see to it that the file holds what --dump prints"
        )
        return [complaint]
    return []


def _says(path: Path, text: str) -> bool:
    try:
        return path.read_bytes() == text.encode()
    except FileNotFoundError:
        return False


def _write(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.name}.{os.getpid():x}")
    try:
        with draft.open("w", encoding="utf-8") as file:
            os.fchmod(file.fileno(), _FOR_EVERYBODY)
            file.write(text)
        draft.replace(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            draft.unlink()
