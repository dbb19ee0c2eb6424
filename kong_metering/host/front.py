"""Where a server accepts connections: it serves those of its own workers, and passes the others on to theirs.

Contract: used from the event loop's thread only. No connection goes to another server than its worker's, as long as
that one lives or is going to be replaced: what does not fit into its channel waits here, and goes to the next servers
when these take over. Without a free descriptor, but for a reserve that delivery and the disk need, none is accepted;
connections wait in the backlog, idle ones are closed (`idle.py`), and it is tried again soon.
"""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import socket
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from kong_metering.host.channels import Kind
from kong_metering.host.handover import process_of
from kong_metering.host.workers import is_living
from kong_metering.log import LOGGER, trouble
from kong_metering.plurals import counted

if TYPE_CHECKING:
    from kong_metering.host.board import State
    from kong_metering.host.connection import Connection
    from kong_metering.host.station import Station

_RETRY_SECONDS = 0.002
NO_DESCRIPTOR_SECONDS = 0.1
# Descriptors that are left to delivery and the disk: of a limit of 1,024 so many, of a lower one less, or none.
_RESERVE = 64
_RESERVE_BEGINS_AT, _SHARE_OF_RESERVE = 128, 8
# So many in one turn of the loop, which has others to answer.
_MOST_AT_ONCE = 100
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Front:
    """What a server serves at."""

    def __init__(
        self, station: Station, adopt: Callable[[socket.socket], None], spare: Callable[[Collection[Connection]], int]
    ) -> None:
        """Serve there: `adopt` serves a connection that is to be served here, from its first byte on.

        `spare` closes connections that nobody uses, but for the given ones, and tells how many.
        """
        self.station = station
        # The connections to those that are going to take over.
        self.shared_with: set[Connection] = set()
        self._adopt = adopt
        self._spare = spare
        self._loop = asyncio.get_running_loop()
        self._is_accepting = False
        self._later: asyncio.TimerHandle | None = None
        self._is_exhausted = False
        self._unsent: list[tuple[int, int]] = []

    @property
    def _listener(self) -> socket.socket:
        return self.station.sockets.listener

    def start_accepting(self) -> None:
        """Accept connections from now on."""
        self._is_accepting = True
        self._loop.add_reader(self._listener.fileno(), self.accept)

    def stop_accepting(self) -> None:
        """Accept none."""
        if self._is_accepting:
            self._is_accepting = False
            self._loop.remove_reader(self._listener.fileno())
        if self._later is not None:
            self._later.cancel()
            self._later = None

    def listen_at(self, listener: socket.socket) -> None:
        """Accept from another socket from now on, after those who wait at the one before, which nobody can reach."""
        if self._is_accepting:
            self.accept()
            self.stop_accepting()
            self._replace(listener)
            self.start_accepting()
        else:
            self._replace(listener)

    def _replace(self, listener: socket.socket) -> None:
        former = self._listener
        self.station = replace(self.station, sockets=replace(self.station.sockets, listener=listener))
        former.close()

    def accept(self) -> None:
        """Accept who waits: the event loop's call."""
        for _ in range(_MOST_AT_ONCE):
            try:
                if not has_room():
                    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))  # noqa: TRY301 - as if there were none
                accepted, _ = self._listener.accept()
            except (BlockingIOError, ConnectionAbortedError, InterruptedError):
                break
            except OSError as error:
                self._pause(error)
                return
            self._serve(accepted)
        if self._is_exhausted:
            self._is_exhausted = False
            LOGGER.warning("connections are accepted again", extra=trouble("accept again"))

    def _pause(self, error: OSError) -> None:
        """Let connections wait for a moment: the socket stays readable, and the loop would come round for nothing."""
        if error.errno in _EXHAUSTED:
            self._is_exhausted = True
            self._spare(self.shared_with)
        _say_that_none_is_accepted(error.strerror or str(error))
        if self._is_accepting:
            self.stop_accepting()
            self._later = self._loop.call_later(NO_DESCRIPTOR_SECONDS, self._go_on)

    def note_exhaustion(self) -> None:
        """Say that there is no free descriptor: for connections that other servers pass on, too."""
        self._is_exhausted = True
        self._spare(self.shared_with)
        _say_that_none_is_accepted(os.strerror(errno.EMFILE))

    def _go_on(self) -> None:
        self._later = None
        self.start_accepting()

    def _serve(self, accepted: socket.socket) -> None:
        """Serve a connection that was just accepted, or pass it on before anything is read from it."""
        is_alone = len(self.station.slots) == 1
        if not is_alone and self._is_passed_on(accepted):
            accepted.close()
        else:
            self._adopt(accepted)

    def leave(self, state: State) -> None:
        """Accept none, and take none from others, for good."""
        self._loop.remove_reader(self.station.channel.outlet.fileno())
        self.stop_accepting()
        self._listener.close()
        self.station.slot.tell(state)

    def take_unsent(self) -> list[int]:
        """Give the descriptors of the connections that could not be passed on yet; the caller closes them."""
        unsent, self._unsent = self._unsent, []
        return [descriptor for _, descriptor in unsent]

    def serve_unsent(self, descriptors: Iterable[int]) -> None:
        """Look once more whose these connections are."""
        for descriptor in descriptors:
            self._serve(socket.socket(fileno=descriptor))

    def _is_passed_on(self, accepted: socket.socket) -> bool:
        """Pass a connection on, now or soon, if it is not of a worker of this server."""
        process = process_of(accepted)
        if process == 0 and self.station.workers.meets_unknown():
            LOGGER.warning(
                "Kong runs in another PID namespace, so its workers cannot be told apart: all connections go to the "
                "first of %s",
                counted(len(self.station.slots), "server"),
            )
        index = self.station.workers.server_of(process)
        if index == self.station.index or self._is_lost(index):
            return False
        return self._send(index, accepted)

    def _is_lost(self, index: int) -> bool:
        """Whether a server is gone, and nobody is left to replace it."""
        return self.station.is_orphaned and not is_living(self.station.slots[index].pid)

    def _send(self, index: int, accepted: socket.socket) -> bool:
        try:
            self.station.sockets.servers[index].send(Kind.CONNECTION, accepted.fileno())
        except BlockingIOError:
            if not self._unsent:
                self._loop.call_later(_RETRY_SECONDS, self._send_unsent)
            # It is kept, and the caller closes what it has.
            self._unsent.append((index, accepted.detach()))
        except OSError:
            return False
        return True

    def _send_unsent(self) -> None:
        unsent, self._unsent = self._unsent, []
        for index, descriptor in unsent:
            accepted = socket.socket(fileno=descriptor)
            if self._is_lost(index) or not self._send(index, accepted):
                self._adopt(accepted)
            else:
                accepted.close()


def has_room() -> bool:
    """Tell whether one more connection leaves delivery and the disk the descriptors that they need."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        next_one = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    os.close(next_one)
    reserve = min(_RESERVE, max(0, limit - _RESERVE_BEGINS_AT) // _SHARE_OF_RESERVE)
    return limit == resource.RLIM_INFINITY or next_one < limit - reserve


def _say_that_none_is_accepted(why: str) -> None:
    LOGGER.error(
        "connections wait, none can be accepted: %s; see the limit of open files (LimitNOFILE, ulimit -n)",
        why,
        extra=trouble("accept"),
    )
