"""Whose events a log holds: one plugin entity and one ingest endpoint. Never a token.

Contract: it is written twice, with a checksum each, so that damage to one file does not leave events without an owner.
Writing does not wait for the disk: whoever syncs the events syncs `identity_files` first.
"""

from __future__ import annotations

import errno
import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

from kong_metering.errors import SpoolFormatError
from kong_metering.eventlog import files
from kong_metering.eventlog.format import FORMAT_VERSION

# What tells nothing about the file that was to be opened.
NO_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)

FILES = ("queue.json", "queue.json.copy")


@dataclass(frozen=True)
class QueueIdentity:
    """A queue: the id of its plugin entity, its name for people, and the URL that its events go to."""

    entity_id: str
    name: str
    endpoint: str

    @property
    def key(self) -> str:
        """The name of its directory: the same for the same entity and endpoint, whatever its name."""
        # The length in front keeps two pairs that join to the same text apart.
        text = f"{len(self.entity_id)}:{self.entity_id}{self.endpoint}"
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def identity_files(directory: Path) -> tuple[Path, ...]:
    """Tell where it is written whose events the directory holds."""
    return tuple(directory / name for name in FILES)


def save_identity(directory: Path, identity: QueueIdentity) -> None:
    """Write whose events the directory holds, unless it says so already. Raises the system's `OSError`."""
    data = encode_identity(identity)
    for path in identity_files(directory):
        if not path.exists() or path.read_bytes() != data:
            files.write_file(path, data)


def load_identity(directory: Path) -> QueueIdentity | None:
    """Read whose events the directory holds; None when neither file can be read.

    Raises `SpoolFormatError` when they are of a format that this version does not know; and the system's `OSError` when
    it has no room to open them, which tells nothing about them.
    """
    for path in identity_files(directory):
        try:
            data = path.read_bytes()
        except OSError as error:
            if error.errno in NO_RESOURCES:
                raise
            continue
        if identity := decode_identity(data):
            return identity
    return None


def encode_identity(identity: QueueIdentity) -> bytes:
    """Make the file's bytes: JSON for people, with a checksum over the other members."""
    members: dict[str, Any] = {"format_version": FORMAT_VERSION, **asdict(identity)}
    return json.dumps(members | {"checksum": _checksum(members)}, indent=2).encode("ascii") + b"\n"


def decode_identity(data: bytes) -> QueueIdentity | None:
    """Read the file's bytes; None for damage. Raises `SpoolFormatError` for a format that is not known."""
    try:
        members = json.loads(data)
        checksum = members.pop("checksum")
        if checksum != _checksum(members):
            return None
        if members.pop("format_version") != FORMAT_VERSION:
            raise SpoolFormatError(f"queue.json is not of version {FORMAT_VERSION} of the format: update kong-metering")
        return QueueIdentity(**members)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _checksum(members: dict[str, Any]) -> int:
    return crc32(json.dumps(members, sort_keys=True).encode("ascii"))
