"""How a plugin server takes the place of the one before it, at a reload, without a request noticing.

At a reload Kong starts a new plugin server on the same path, and lets the old one live for ten seconds more. Its
workers keep connections in a pool, which does not know whose they are: steps of one event would reach both servers, and
those that the old one has not answered when Kong ends it are lost (seen on Kong 3.9.1). So the new one takes over the
sockets of the old one, in two steps: the socket that listens, while the old one goes on, as soon as the new process is
there; and all connections, with what came over them and was not looked at yet, once it can serve. For Kong nothing
changes: what it sends meanwhile waits in the sockets' buffers. Whatever dies in between, somebody holds the socket that
listens.

Contract: `Predecessor` is the new one's part; it blocks, for some seconds at most, and makes the best of an old one
that does not answer or dies. `share` and `hand_over` are the old one's parts; `hand_over` blocks as well, and is called
at a moment at which no event is under way. Both are for processes of the same user only.

1. `[0, 1, "plugin.ShareListener", [nil]]` over a connection is answered with `_SHARED`, the count of servers and
   whether there is a supervisor, and with descriptors: the socket that listens, the two ends of the supervisor's
   channel if it lives, and of each server's. The connection is held until the end: servers without a supervisor wait
   for that.
2. `RETIRE` goes into the supervisor's channel, with a socket; the answer is one byte. It starts no server from then on;
   it lets go when `_DONE` comes over that socket, and goes on when it is closed before. The socket stays open: with
   `_BACK` over it the new one, which ends, gives all back, and when it is closed without that, the old one looks
   whether anybody else serves.
3. `PART` goes into each server's channel, with a socket, over which come `_GIVEN`, the length of what the server kept
   for its requests, and that; the count of connections, and for each one the length of its unread bytes and these, with
   the socket itself at the first byte of its record.
4. What is left in the servers' channels is the new one's.

A plugin server of version 0.1.0 before November 2026 knows only one step: `[0, 1, "plugin.HandOver", [nil]]`, answered
with `_GIVEN_AT_ONCE`, the count of connections, and a record for each socket, the one that listens first.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kong_metering.errors import StartupError
from kong_metering.host.channels import Channel, Kind, duplicate
from kong_metering.host.paths import reachable
from kong_metering.log import LOGGER
from kong_metering.plurals import counted

METHOD = "plugin.ShareListener"

_SHARED = b"kong-metering-share-1\n"
_GIVEN = b"kong-metering-handover-2\n"
_GIVEN_AT_ONCE = b"kong-metering-handover-1\n"
_DONE = b"D"
_READY = b"R"
_BACK = b"B"
_REQUEST = b"\x94\x00\x01%s\x91\xc0"  # MessagePack: [0, 1, method, [nil]]
_SHARED_HEAD = struct.Struct("<I?")
_COUNT = struct.Struct("<I")
_CREDENTIALS = struct.Struct("3i")  # process, user, group
_PATIENCE_SECONDS = 2.0
# A busy machine; the old one goes on meanwhile.
_SHARE_SECONDS = 5.0
_READ_BYTES = 65_536
_MAX_DESCRIPTORS = 250  # that the system takes in one message: SCM_MAX_FD is 253


@dataclass(frozen=True)
class Sockets:
    """What the processes of a plugin server have in common: the socket that listens, and their channels.

    `servers` has a channel for each server; `supervisor` is None when none lives.
    """

    listener: socket.socket
    servers: tuple[Channel, ...]
    supervisor: Channel | None

    def close(self) -> None:
        """Close everything in this process."""
        self.listener.close()
        for channel in self.servers:
            channel.close()
        if self.supervisor is not None:
            self.supervisor.close()


@dataclass(frozen=True)
class Inheritance:
    """What servers leave to the next ones.

    `connections`, each with bytes that came and wait; what each server `kept` for the requests that are under way; and
    the `former` socket that listens, if the next ones have another one: who waits there has to be accepted.
    """

    connections: tuple[tuple[socket.socket, bytes], ...] = ()
    kept: tuple[bytes, ...] = ()
    former: socket.socket | None = None

    def close(self) -> None:
        """Close the sockets in this process."""
        for connection, _ in self.connections:
            connection.close()
        if self.former is not None:
            self.former.close()


# -- the old one's part -----------------------------------------------------------------------------------------------


def share(new: socket.socket, sockets: Sockets) -> None:
    """Give the socket that listens and the channels to the one at the other end of `new`. Raises `OSError`."""
    channels = [sockets.supervisor, *sockets.servers] if sockets.supervisor is not None else sockets.servers
    ends = [end.fileno() for channel in channels for end in (channel.inlet, channel.outlet)]
    head = _SHARED_HEAD.pack(len(sockets.servers), sockets.supervisor is not None)
    new.settimeout(_PATIENCE_SECONDS)
    socket.send_fds(new, [_SHARED + head], [sockets.listener.fileno(), *ends])


def hand_over(new: socket.socket, connections: Sequence[tuple[int, bytes]], kept: bytes) -> bool:
    """Give connections, by their descriptors, to the one at the other end of `new`; they are to be closed here then.

    False when it broke off, and nobody can tell how many have arrived. Raises the system's `OSError` when none has.
    """
    new.settimeout(_PATIENCE_SECONDS)
    new.sendall(_GIVEN + _COUNT.pack(len(kept)) + kept + _COUNT.pack(len(connections)))
    try:
        for descriptor, unread in connections:
            # The descriptor goes with the first byte. The other one may be gone once it has the last.
            socket.send_fds(new, [_COUNT.pack(len(unread))], [descriptor])
            if unread:
                new.sendall(unread)
    except OSError:
        return False
    return True


def is_own_user(connection: socket.socket) -> bool:
    """Whether the process at the other end is of the user that this one is."""
    return _credentials(connection)[1] == os.geteuid()


def process_of(connection: socket.socket) -> int:
    """Tell the process at the other end; 0 when it is in another namespace of processes."""
    return _credentials(connection)[0]


def _credentials(connection: socket.socket) -> tuple[int, int, int]:
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    process, user, group = _CREDENTIALS.unpack(raw)
    return process, user, group


class Successor:
    """The supervisor of the next plugin server, at the other end of the socket that came with `RETIRE`."""

    def __init__(self, connection: socket.socket) -> None:
        """Tell it that no more servers are started."""
        connection.setblocking(False)  # noqa: FBT003 - the standard library's signature
        self._connection = connection
        self.process = process_of(connection)
        with contextlib.suppress(OSError):
            connection.send(_READY)

    def fileno(self) -> int:
        """Give the descriptor that is readable when there is something to ask `is_done` about."""
        return self._connection.fileno()

    def is_done(self) -> bool | None:
        """Whether it serves now: None if that is still open, False when it has broken off."""
        try:
            return self._connection.recv(1) == _DONE
        except BlockingIOError:
            return None
        except OSError:
            return False

    def gives_back(self) -> bool | None:
        """Whether it, which serves, leaves that to this one: None if it lives, False when it is gone without a word."""
        try:
            return self._connection.recv(1) == _BACK
        except BlockingIOError:
            return None
        except OSError:
            return False

    def close(self) -> None:
        """Close the connection to it."""
        self._connection.close()


# -- the new one's part -----------------------------------------------------------------------------------------------


class Elder:
    """The supervisor that this one has taken over from, as long as both live."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    @property
    def is_gone(self) -> bool:
        """Whether it has ended: it never says anything else."""
        try:
            return not self._connection.recv(1, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def give_back(self) -> None:
        """Have it serve again: this one ends."""
        with contextlib.suppress(OSError):
            self._connection.send(_BACK, socket.MSG_DONTWAIT)

    def close(self) -> None:
        """Close the connection to it, in this process."""
        self._connection.close()


class Predecessor:
    """The plugin server that serves at a path until now."""

    def __init__(self, connection: socket.socket | None, sockets: Sockets | None) -> None:
        """Take the connection to it, None if it was started by this process; and what it has shared.

        That is None if it knows of one step only.
        """
        # The servers that did not answer when they were to hand over.
        self.silent: tuple[int, ...] = ()
        self._connection = connection
        self._sockets = sockets
        self._supervisor: socket.socket | None = None

    @classmethod
    def find(cls, path: Path) -> Predecessor | None:
        """Ask who serves at `path` for the socket that listens; None when nobody does, or nobody who can be asked.

        Raises `StartupError` when it is another user's: that one must not lose its place.
        """
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.settimeout(_SHARE_SECONDS)
            with reachable(path) as address:
                connection.connect(address)
            user = _credentials(connection)[1]
            if user == os.geteuid():
                connection.sendall(_request(METHOD))
                return cls(connection, _shared_over(connection))
        except (OSError, EOFError):
            connection.close()
            return None
        connection.close()
        raise StartupError(f"user {user} serves on {path}; end that one first, or start this one as that user")

    @property
    def listener(self) -> socket.socket | None:
        """The socket that listens, if it is shared already."""
        return None if self._sockets is None else self._sockets.listener

    def take_over(self) -> Inheritance:
        """Take the connections over; the servers accept none from then on. What does not answer is left behind."""
        if self._sockets is None:
            return Inheritance() if self._connection is None else _taken_at_once(self._connection)
        if self._sockets.supervisor is not None:
            self._supervisor = _retire(self._sockets.supervisor)
        received = _collect(map(_ask_to_part, self._sockets.servers), _PATIENCE_SECONDS)
        self.silent = tuple(index for index, (data, _) in enumerate(received) if not data)
        parted = [_inheritance_in(data, descriptors) for data, descriptors in received]
        left = [
            (message.socket, b"")
            for channel in self._sockets.servers
            for message in channel.messages()
            if message.socket is not None and _is_kept(message.kind, message.socket)
        ]
        connections = [connection for inheritance in parted for connection in inheritance.connections]
        return Inheritance((*connections, *left), tuple(kept for inheritance in parted for kept in inheritance.kept))

    def release(self) -> Elder | None:
        """Let it go: somebody else serves. Gives its supervisor, if it has one."""
        elder, self._supervisor = self._supervisor, None
        if elder is not None:
            with contextlib.suppress(OSError):
                elder.send(_DONE)
        self.close()
        return None if elder is None else Elder(elder)

    def close(self) -> None:
        """Close all that it is asked over, in this process."""
        if self._supervisor is not None:
            self._supervisor.close()
        if self._connection is not None:
            self._connection.close()
        if self._sockets is not None:
            for channel in (*self._sockets.servers, self._sockets.supervisor):
                if channel is not None:
                    channel.close()


def status_request() -> bytes:
    """Give the question that every plugin server of ours answers."""
    return _request("plugin.GetStatus")


def _request(method: str) -> bytes:
    return _REQUEST % (bytes([0xA0 | len(method)]) + method.encode("ascii"))


def _shared_over(connection: socket.socket) -> Sockets | None:
    """Read the answer to the first step; None if it is an error. Raises `OSError` or `EOFError` when it breaks off."""
    wanted = len(_SHARED) + _SHARED_HEAD.size
    answer, descriptors, _, _ = socket.recv_fds(connection, _READ_BYTES, _MAX_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC)
    sockets = [socket.socket(fileno=descriptor) for descriptor in descriptors]
    if not answer:
        raise EOFError
    if not answer.startswith(_SHARED) or len(answer) != wanted or not sockets:
        for one in sockets:
            one.close()
        return None
    _, has_supervisor = _SHARED_HEAD.unpack(answer[len(_SHARED) :])
    listener, *ends = sockets
    channels = [Channel.of(inlet, outlet) for inlet, outlet in zip(ends[::2], ends[1::2], strict=True)]
    supervisor = channels.pop(0) if has_supervisor else None
    return Sockets(listener, tuple(channels), supervisor)


def _retire(supervisor: Channel) -> socket.socket | None:
    """Have a supervisor start no more servers; gives the socket to tell it over that all is done."""
    ours, theirs = socket.socketpair()
    with theirs:
        try:
            supervisor.send(Kind.RETIRE, theirs.fileno())
        except OSError:
            ours.close()
            return None
    ours.settimeout(_PATIENCE_SECONDS)
    with contextlib.suppress(OSError):
        ours.recv(1)
    return ours


def _ask_to_part(server: Channel) -> socket.socket:
    """Have a server hand over; gives the socket that it does so over, which is at its end if nobody ever will."""
    ours, theirs = socket.socketpair()
    with theirs, contextlib.suppress(OSError):
        server.send(Kind.PART, theirs.fileno())
    return ours


def _is_kept(kind: Kind, given: socket.socket) -> bool:
    if kind is Kind.CONNECTION:
        return True
    given.close()  # what nobody has read who should have
    return False


@dataclass
class _Received:
    data: bytearray = field(default_factory=bytearray)
    descriptors: deque[int] = field(default_factory=deque)


def _collect(sockets: Iterable[socket.socket], seconds: float) -> list[tuple[bytes, deque[int]]]:
    """Read each socket to its end, for that many seconds altogether."""
    received = {one.fileno(): (one, _Received()) for one in sockets}
    waiting, poll, deadline = set(received), select.poll(), time.monotonic() + seconds
    for descriptor in received:
        poll.register(descriptor, select.POLLIN)
    while waiting and (left := deadline - time.monotonic()) > 0:
        for descriptor, _ in poll.poll(left * 1000):
            if not _read_into(*received[descriptor]):
                poll.unregister(descriptor)
                waiting.discard(descriptor)
    if waiting:
        servers = counted(len(waiting), "server")
        LOGGER.warning("%s of the previous process did not hand over within %g s", servers, seconds)
    for one, _ in received.values():
        one.close()
    return [(bytes(into.data), into.descriptors) for _, into in received.values()]


def _read_into(connection: socket.socket, into: _Received) -> bool:
    """Read what is there; False at the end."""
    try:
        data, descriptors, _, _ = socket.recv_fds(
            connection, _READ_BYTES, _MAX_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
        )
    except OSError:
        return False
    into.data += data
    into.descriptors.extend(descriptors)
    return bool(data)


def _inheritance_in(data: bytes, descriptors: deque[int]) -> Inheritance:
    """Read what a server gave; what came before it died is good."""
    if not data.startswith(_GIVEN):
        return _unreadable(descriptors)
    kept, at = _counted(data, len(_GIVEN))
    if kept is None:
        return _unreadable(descriptors)
    return Inheritance(tuple(_records(data, at, 0, descriptors)), (kept,) if kept else ())


def _taken_at_once(connection: socket.socket) -> Inheritance:
    """Take over from a plugin server that knows of one step only."""
    connection.settimeout(_PATIENCE_SECONDS)
    try:
        connection.sendall(_request("plugin.HandOver"))
        data, first, _, _ = socket.recv_fds(connection, len(_GIVEN_AT_ONCE), _MAX_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC)
    except OSError:
        return Inheritance()
    if data != _GIVEN_AT_ONCE:
        return _unreadable(first)
    ((rest, descriptors),) = _collect([duplicate(connection.fileno())], _PATIENCE_SECONDS)
    records = _records(rest, 0, 1, deque([*first, *descriptors]))
    return Inheritance(tuple(records[1:]), former=records[0][0] if records else None)


def _unreadable(descriptors: Iterable[int]) -> Inheritance:
    for descriptor in descriptors:
        os.close(descriptor)
    return Inheritance()


def _counted(data: bytes, at: int) -> tuple[bytes | None, int]:
    """Read a length and that many bytes; None if they are not all there, and where the next ones are."""
    begin = at + _COUNT.size
    if begin > len(data):
        return None, at
    end = begin + _COUNT.unpack_from(data, at)[0]
    return (data[begin:end], end) if end <= len(data) else (None, at)


def _records(data: bytes, at: int, more: int, descriptors: deque[int]) -> list[tuple[socket.socket, bytes]]:
    """Read as many records as are announced, and `more`, as far as they are there."""
    records: list[tuple[socket.socket, bytes]] = []
    if at + _COUNT.size <= len(data):
        (count,) = _COUNT.unpack_from(data, at)
        at += _COUNT.size
        while len(records) < count + more and descriptors:
            unread, at = _counted(data, at)
            if unread is None:
                break
            records.append((socket.socket(fileno=descriptors.popleft()), unread))
    _unreadable(descriptors)
    return records
