"""What a person asks of the servers that hold a spool's logs: a file for each request, and one for each answer.

    ROOT/requests/ID.json              the request, locked (`flock`) by who asks for as long as that waits
    ROOT/requests/ID.TOKEN.done.json   what a server did, or does; TOKEN is that server's own

Contract: `Asking` is the asker's. A `RequestBox` is a server's janitor's, who looks once a round; that costs a look at
a directory which is mostly not there. A request names the logs that it is about: servers that hold one of them answer.
It counts as long as its asker lives and its time is not over; then whoever looks first removes it and its answers.
Files are 0600, appear as a whole, and survive a power cut; one that another user owns, or may read, is no request.
Everything raises the system's `OSError`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import stat
import time
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kong_metering.eventlog import files
from kong_metering.eventlog.format import FORMAT_VERSION
from kong_metering.spool.identity import NO_RESOURCES, QueueIdentity

if TYPE_CHECKING:
    from types import TracebackType

REQUESTS = "requests"

_REQUEST = ".json"
_ANSWER = ".done.json"
_DRAFT = ".new"
_MAX_BYTES = 4 * 1024 * 1024
_DRAFT_MS = 60_000


class Kind(str, Enum):
    """What can be asked for."""

    # That all that waits in a queue's logs goes to another endpoint.
    REDIRECT = "redirect"
    # That a queue tries to deliver at once, whatever pause it makes.
    TRY = "try"
    # What is known of a queue that is not on disk.
    TELL = "tell"


@dataclass(frozen=True)
class Request:
    """What is asked: of which queue, whose `logs` (below the root) were held when it was asked; where to `redirect`.

    `expires_ms` is the wall clock's, in milliseconds since 1970.
    """

    id: str
    kind: Kind
    queue: QueueIdentity
    logs: tuple[str, ...]
    expires_ms: int
    target: QueueIdentity | None = None


@dataclass(frozen=True)
class Answer:
    """What one server did about its `logs`; while it is not done with it, what it has done so far.

    `events`: how many were moved, or delivered (to `TELL`: since the server started). `left`: how many wait where they
    waited. `problem`: why, for people.
    """

    process: int
    logs: tuple[str, ...]
    is_done: bool = False
    events: int = 0
    left: int = 0
    problem: str = ""


class RequestBox:
    """The requests that a server sees."""

    def __init__(self, root: Path) -> None:
        self._directory = root / REQUESTS
        self._token = f"{os.getpid()}-{secrets.token_hex(4)}"
        # Those that are no requests, for whoever says so.
        self.refused: list[str] = []

    def look(self, now_ms: int) -> list[Request]:
        """Return the requests that count, in the order of their names; remove what is left of others."""
        names = self._names()
        requests = [request for name in names if _is_request(name) and (request := self._counting(name, now_ms))]
        living = {request.id for request in requests}
        for name in names:
            if _id_of(name) not in living and not _is_request(name):
                self._remove(name, now_ms)
        return requests

    def answer(self, request: Request, answer: Answer) -> None:
        """Write an answer in place of the one before; none where nobody waits for it any more."""
        if (self._directory / f"{request.id}{_REQUEST}").exists():
            _write(self._directory / f"{request.id}.{self._token}{_ANSWER}", asdict(answer))

    def _names(self) -> list[str]:
        try:
            return sorted(path.name for path in self._directory.iterdir())
        except (FileNotFoundError, NotADirectoryError):  # where the spool cannot be used its owner says so
            return []

    def _counting(self, name: str, now_ms: int) -> Request | None:
        """Read a request; None, and it is removed, if it does not count."""
        path, is_asked = self._directory / name, False
        try:
            data, is_asked = _read_private(path)
            request = _decode_request(data)
            if request.id == _id_of(name) and is_asked and now_ms < request.expires_ms:
                return request
        except FileNotFoundError:
            return None
        except ValueError as error:
            self.refused.append(f"{path} is no request: {error}")
            if is_asked:  # another version's, and somebody waits for a server of that
                return None
        path.unlink(missing_ok=True)
        return None

    def _remove(self, name: str, now_ms: int) -> None:
        """Remove what is left of a request; a draft only when nobody can be at it any more."""
        path = self._directory / name
        with contextlib.suppress(FileNotFoundError, IsADirectoryError):
            if not name.endswith(_DRAFT) or path.stat().st_mtime * 1000 < now_ms - _DRAFT_MS:
                path.unlink()


class Asking:
    """A request for as long as somebody waits for its answers; it is withdrawn when that ends."""

    def __init__(self, root: Path, request: Request) -> None:
        self._directory = root / REQUESTS
        self._request = request
        self._lock = -1

    def __enter__(self) -> Asking:  # noqa: PYI034 - no Self before Python 3.11
        is_new = files.make_directory(self._directory)
        draft = self._directory / f"{self._request.id}{_REQUEST}{_DRAFT}"
        self._lock = files.create_file(draft)
        try:
            # Before it has its name: one that nobody locks has an asker that is gone.
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            files.write_at(self._lock, _encode(_request_members(self._request)), 0)
            os.fsync(self._lock)
            draft.replace(self._path)
            files.sync(self._directory)
            if is_new:
                files.sync(self._directory.parent)
        except OSError:
            self._withdraw(draft)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._withdraw(self._path)
        # What a server writes in this moment it removes itself.
        for path in self._answer_paths():
            path.unlink(missing_ok=True)

    def answers(self) -> list[Answer]:
        """Return what the servers have answered so far, one for each."""
        found: list[Answer] = []
        for path in self._answer_paths():
            with contextlib.suppress(FileNotFoundError, ValueError):
                found.append(_decode_answer(_read_private(path)[0]))
        return found

    @property
    def _path(self) -> Path:
        return self._directory / f"{self._request.id}{_REQUEST}"

    def _answer_paths(self) -> list[Path]:
        return sorted(self._directory.glob(f"{self._request.id}.*{_ANSWER}"))

    def _withdraw(self, path: Path) -> None:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        os.close(self._lock)


def new_id() -> str:
    """Return an id for a request: nobody else has it, and later ones are greater."""
    return f"{time.time_ns() // 1_000_000:014d}-{secrets.token_hex(4)}"


def _is_request(name: str) -> bool:
    return name.endswith(_REQUEST) and not name.endswith(_ANSWER)


def _id_of(name: str) -> str:
    return name.partition(".")[0]


def _read_private(path: Path) -> tuple[bytes, bool]:
    """Read a file of ours, and whether somebody holds its lock. Raises `ValueError` for anything else."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno in NO_RESOURCES:
            raise
        raise ValueError(f"it cannot be opened: {error.strerror}") from error
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
            raise ValueError("it is no file of this user alone")
        if status.st_size > _MAX_BYTES:
            raise ValueError("it is too large")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            is_locked = False
        except BlockingIOError:
            is_locked = True
        return file.read(_MAX_BYTES), is_locked


def _write(path: Path, members: dict[str, Any]) -> None:
    files.write_file(path, _encode(members), is_lasting=True)


def _encode(members: dict[str, Any]) -> bytes:
    return json.dumps({"format_version": FORMAT_VERSION, **members}, indent=2).encode("ascii") + b"\n"


def _request_members(request: Request) -> dict[str, Any]:
    return asdict(request) | {"kind": request.kind.value}


def _decode_request(data: bytes) -> Request:
    """Read a request. Raises `ValueError` for anything else."""
    members = _members(data)
    try:
        target = members["target"]
        return Request(
            id=str(members["id"]),
            kind=Kind(members["kind"]),
            queue=QueueIdentity(**members["queue"]),
            logs=tuple(map(str, members["logs"])),
            expires_ms=int(members["expires_ms"]),
            target=None if target is None else QueueIdentity(**target),
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"it is not what a request is like: {error}") from error


def _decode_answer(data: bytes) -> Answer:
    members = _members(data)
    try:
        return Answer(**(members | {"logs": tuple(members["logs"])}))
    except (KeyError, TypeError) as error:
        raise ValueError(f"it is not what an answer is like: {error}") from error


def _members(data: bytes) -> dict[str, Any]:
    members = json.loads(data)
    if not isinstance(members, dict) or members.pop("format_version", None) != FORMAT_VERSION:
        raise ValueError("another version of kong-metering wrote it")
    return members
