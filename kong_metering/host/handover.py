"""How a plugin server takes the place of the one before it, at a reload, without a request noticing.

At a reload Kong starts a new plugin server on the same path, and lets the old one live for ten seconds more. Its
workers keep connections in a pool, which does not know whose they are: steps of one event would reach both servers, and
those that the old one has not answered when Kong ends it are lost (seen on Kong 3.9.1). So the new one asks the old one
for its sockets: the one that listens and all connections, with what came over them and was not looked at yet. For Kong
nothing changes: what it sends meanwhile waits in the sockets' buffers.

Contract: `take_over` is the new one's part, before it puts a socket of its own in the place. It blocks, for
`_PATIENCE_SECONDS` at most, and gives None when nobody is there, or nobody who knows of this. `hand_over` is the old
one's part, which blocks as well; it is called at a moment at which no event is under way.

The request is an RPC, `[0, 1, "plugin.HandOver", [nil]]`, from a process of the same user. The answer is `_MAGIC`, the
count of connections, and for each socket the length of its unread bytes and these, with the socket itself at the first
byte of its record; the socket that listens comes first.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgpack

METHOD = "plugin.HandOver"

_MAGIC = b"kong-metering-handover-1\n"
_COUNT = struct.Struct("<I")
_CREDENTIALS = struct.Struct("3i")  # process, user, group
_PATIENCE_SECONDS = 2.0
_READ_BYTES = 65_536
_MAX_DESCRIPTORS = 250  # that the system takes in one message: SCM_MAX_FD is 253


@dataclass(frozen=True)
class Inheritance:
    """The sockets of a server: the one that listens, and its connections, each with bytes that came and wait."""

    listener: socket.socket
    connections: tuple[tuple[socket.socket, bytes], ...]


def take_over(path: Path) -> Inheritance | None:
    """Ask the server at `path` for its sockets."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as old:
        old.settimeout(_PATIENCE_SECONDS)
        old.connect(str(path))
        if _user_of(old) == os.geteuid():
            old.sendall(msgpack.packb([0, 1, METHOD, [None]]))
            return _Receiver().receive(old)
    return None


def hand_over(new: socket.socket, listener: int, connections: Sequence[tuple[int, bytes]]) -> bool:
    """Give sockets, by their descriptors, to the one at the other end of `new`; they are to be closed here then.

    False when it broke off, and nobody can tell how many have arrived. Raises the system's `OSError` when none has.
    """
    new.settimeout(_PATIENCE_SECONDS)
    new.sendall(_MAGIC + _COUNT.pack(len(connections)))
    try:
        for descriptor, unread in ((listener, b""), *connections):
            # The descriptor goes with the first byte. The other one may be gone once it has the last.
            socket.send_fds(new, [_COUNT.pack(len(unread))], [descriptor])
            if unread:
                new.sendall(unread)
    except OSError:
        return False
    return True


def process_of(connection: socket.socket) -> int:
    """Tell the process at the other end."""
    return _credentials(connection)[0]


def _user_of(connection: socket.socket) -> int:
    return _credentials(connection)[1]


def _credentials(connection: socket.socket) -> tuple[int, int, int]:
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    process, user, group = _CREDENTIALS.unpack(raw)
    return process, user, group


class _Receiver:
    """Reads what `hand_over` writes."""

    def __init__(self) -> None:
        self._bytes = b""
        self._descriptors: deque[int] = deque()

    def receive(self, old: socket.socket) -> Inheritance | None:
        """Read all; what came before the other one died is good, None if the socket that listens is not among it."""
        sockets: list[tuple[socket.socket, bytes]] = []
        try:
            if self._take(old, len(_MAGIC)) != _MAGIC:
                return None
            (count,) = _COUNT.unpack(self._take(old, _COUNT.size))
            for _ in range(count + 1):
                (length,) = _COUNT.unpack(self._take(old, _COUNT.size))
                unread = self._take(old, length)
                sockets.append((socket.socket(fileno=self._descriptors.popleft()), unread))
        except (OSError, EOFError, IndexError):
            pass
        finally:
            while self._descriptors:
                os.close(self._descriptors.popleft())
        return Inheritance(sockets[0][0], tuple(sockets[1:])) if sockets else None

    def _take(self, old: socket.socket, length: int) -> bytes:
        while len(self._bytes) < length:
            data, descriptors, _, _ = socket.recv_fds(old, _READ_BYTES, _MAX_DESCRIPTORS)
            self._descriptors.extend(descriptors)
            if not data:
                raise EOFError
            self._bytes += data
        taken, self._bytes = self._bytes[:length], self._bytes[length:]
        return taken
