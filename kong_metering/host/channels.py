"""Messages between the processes of one plugin server: one byte that tells the kind, and at most one socket with it.

Contract: a channel is a pair of sockets that never block. All processes of a plugin server hold both ends of all of
them, so that what is in a channel is kept when its reader dies, and the next one reads it; only one process reads from
a channel at a time. A full channel takes nothing more; one that was shut down takes nothing any more.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum

_MESSAGE_BYTES = 16


class Kind(bytes, Enum):
    """What a message means; whether a socket comes with it."""

    # To a server: a connection from Kong that belongs to it.
    CONNECTION = b"C"
    # To a server, from the next plugin server: give all connections over this socket.
    PART = b"P"
    # To a supervisor, from the next plugin server, which holds the other end of this socket: start no more servers.
    RETIRE = b"R"
    # To a supervisor, from one of its servers, without a socket: it is ending.
    ENDING = b"E"
    # To a server, from its supervisor: the socket that listens from now on.
    LISTENER = b"L"
    # To a server, from its supervisor, without a socket: nobody can connect, and that cannot be mended now.
    UNREACHABLE = b"U"


@dataclass(frozen=True)
class Message:
    """What came out of a channel."""

    kind: Kind
    socket: socket.socket | None


@dataclass(frozen=True)
class Channel:
    """The two ends: what goes into `inlet` comes out of `outlet`."""

    inlet: socket.socket
    outlet: socket.socket

    @classmethod
    def make(cls) -> Channel:
        """Make a new one."""
        return cls.of(*socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))

    @classmethod
    def of(cls, inlet: socket.socket, outlet: socket.socket) -> Channel:
        """Put one together from its ends."""
        for end in (inlet, outlet):
            end.setblocking(False)  # noqa: FBT003 - the standard library's signature
        return cls(inlet, outlet)

    def send(self, kind: Kind, given: int | None = None) -> None:
        """Put a message in, with a socket by its descriptor, which stays open here.

        Raises `BlockingIOError` when the channel is full, another `OSError` when nobody will ever read from it.
        """
        socket.send_fds(self.inlet, [kind.value], [] if given is None else [given])

    def messages(self, has_room: Callable[[], bool] | None = None) -> Iterator[Message]:
        """Take out what is there; what this version does not know is closed and left out.

        Without a free descriptor for its socket a message stays where it is; a connection without `has_room` as well,
        and what is behind it.
        """
        with contextlib.suppress(OSError):
            while has_free_descriptor() and (has_room is None or has_room() or not self._next_is_connection()):
                data, descriptors, _, _ = socket.recv_fds(self.outlet, _MESSAGE_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
                if not data:
                    return
                given = socket.socket(fileno=descriptors[0]) if descriptors else None
                try:
                    kind = Kind(data)
                except ValueError:
                    if given is not None:
                        given.close()
                    continue
                yield Message(kind, given)

    def _next_is_connection(self) -> bool:
        return self.outlet.recv(_MESSAGE_BYTES, socket.MSG_PEEK) == Kind.CONNECTION.value

    def shut_down(self) -> None:
        """Let nothing more in, for whoever holds it; what is in there can still be taken out."""
        with contextlib.suppress(OSError):
            self.inlet.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Close both ends in this process."""
        self.inlet.close()
        self.outlet.close()


def has_free_descriptor() -> bool:
    """Tell whether this process can have one more descriptor."""
    try:
        os.close(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def duplicate(descriptor: int) -> socket.socket:
    """Give another descriptor of a socket, as a socket."""
    return socket.socket(fileno=os.dup(descriptor))
