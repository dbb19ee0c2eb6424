"""One server: the connections of Kong that it serves, until it is told to end or hands them over.

Contract: `serve` runs in a process of its own, which a supervisor (`supervisor.py`) has forked and given its `Station`.
It blocks until SIGTERM or SIGINT, then stops accepting, answers the RPCs that have arrived, and returns; what happens
to queues afterwards is the caller's part. Bytes that are not the protocol cost the sender its connection and nobody
else anything.

When the next plugin server asks for its connections it lets the events that are under way end, gives the connections
away (`handover.py`), and has nothing more to do until it is told to end. When the supervisor dies it goes on, so that
no request is lost (`lifetime.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvloop

from kong_metering.host import handover
from kong_metering.host.board import Slot, State
from kong_metering.host.channels import Channel, Kind, duplicate
from kong_metering.host.connection import Connection
from kong_metering.host.conversation import Conversations
from kong_metering.host.lifetime import Lifetime, ignore_signals
from kong_metering.log import LOGGER, cause_of, printable

if TYPE_CHECKING:
    from kong_metering.host.dispatch import Dispatcher
    from kong_metering.host.handover import Front, Inheritance
    from kong_metering.log import TroubleLog

_HOUSEKEEPING_SECONDS = 1.0
_DRAIN_SECONDS = 0.01
# A thread that waits for the interpreter is woken in vain by each of the loop's callbacks until this time is over. With
# Python's 5 ms that cost a request 20 to 30 µs under steady load, as the spool's thread writes each few milliseconds.
_SWITCH_SECONDS = 0.0005
# How long the events that are under way may take to end before sockets are handed over; Kong goes on at once.
_QUIET_SECONDS = 0.25
_QUIET_POLL_SECONDS = 0.0005
_BROKEN_OFF = "broke off handing over to process %d, with %d connections"


# How often the loop tells that it comes round.
_BEAT_SECONDS = 0.25


@dataclass(frozen=True)
class Station:
    """What a server is given by the supervisor that has forked it.

    `index` is that of its channel in `front`, and `supervisor` the process that started it. `inheritance` is what it
    takes over from the servers before, if it `takes_over` from any.
    """

    path: Path
    backlog: int
    front: Front
    index: int
    slot: Slot
    supervisor: int
    takes_over: bool
    inheritance: Inheritance

    @property
    def channel(self) -> Channel:
        """What is sent to this server."""
        return self.front.servers[self.index]

    @property
    def living_front(self) -> Front:
        """What there is to share: without a supervisor if it is gone."""
        return self.front if os.getppid() == self.supervisor else replace(self.front, supervisor=None)


@dataclass(frozen=True)
class Hooks:
    """What the host calls back, on the loop's thread.

    `housekeeping` about once a second; `ending` when the end begins: Kong kills 30 ms after it told to end, so it must
    start at once what is to be safe then, and not wait for it. `parting` gives what the next servers need to know of
    the requests that are under way, when all connections are given to them; `arriving` takes what a server before this
    one gave so, before the first connection is served.
    """

    housekeeping: Callable[[], None]
    ending: Callable[[], None]
    parting: Callable[[], bytes] = bytes
    arriving: Callable[[bytes], None] = lambda _: None


class _Server:
    """What the connections share."""

    def __init__(self, dispatcher: Dispatcher, troubles: TroubleLog) -> None:
        self.troubles = troubles
        self.connections: set[Connection] = set()
        self._dispatcher = dispatcher
        self.conversations = Conversations(dispatcher, troubles)
        self._front: _Front | None = None
        self._successor: socket.socket | None = None

    def serve_at(self, front: _Front) -> None:
        """Learn what there is to share and to hand over, and look at what other processes send."""
        self._front = front
        channel = front.station.channel
        asyncio.get_running_loop().add_reader(channel.outlet.fileno(), self._read_channel, channel)

    def _read_channel(self, channel: Channel) -> None:
        for message in channel.messages():
            if message.socket is None:
                continue
            if message.kind is Kind.PART:
                self.begin_to_hand_over(message.socket)
            else:
                message.socket.close()

    async def adopt(self, accepted: socket.socket, unread: bytes = b"") -> None:
        """Serve a connection that another process has accepted, from these bytes on."""
        accepted.setblocking(False)  # noqa: FBT003 - the standard library's signature
        loop = asyncio.get_running_loop()
        _, connection = await loop.connect_accepted_socket(lambda: Connection(self), accepted)
        if unread:
            connection.data_received(unread)

    @property
    def has_parted(self) -> bool:
        """Whether all is handed over, or about to end."""
        return self._front is None

    @property
    def is_awaited(self) -> bool:
        """Whether a process that is going to take over is still there."""
        return self._front is not None and not self._front.shared_with.isdisjoint(self.connections)

    def sweep(self) -> None:
        """Forget what Kong has forgotten."""
        self._dispatcher.sweep()
        self.conversations.sweep()

    @property
    def is_handing_over(self) -> bool:
        """Whether nothing new may begin: all connections are just being given to the next servers."""
        return self._successor is not None

    def share(self, asked: Connection) -> None:
        """Give the socket that listens to the next plugin server, which will ask for the connections later."""
        try:
            if self._front is None:
                raise ConnectionAbortedError("this process is ending")
            with socket.socket(fileno=asked.descriptor()) as new:
                if not handover.is_own_user(new):
                    raise PermissionError("it is another user's")
                handover.share(new, self._front.station.living_front)
                self._front.shared_with.add(asked)
                LOGGER.info("process %d is going to take over", handover.process_of(new))
        except OSError as error:
            LOGGER.warning("could not share the socket with the next process: %s", cause_of(error))
            asked.abort()

    def begin_to_hand_over(self, to: socket.socket) -> None:
        """Let the events that are under way end, and none begin; then give all connections to the next servers."""
        if self._front is None or self._successor is not None:
            to.close()
            return
        self._successor = to
        loop = asyncio.get_running_loop()
        self._hand_over_when_quiet(loop, loop.time() + _QUIET_SECONDS)

    def _hand_over_when_quiet(self, loop: asyncio.AbstractEventLoop, deadline: float) -> None:
        is_quiet = not self._dispatcher.events_under_way and all(one.is_quiet for one in self.connections)
        if not is_quiet and loop.time() < deadline:
            loop.call_later(_QUIET_POLL_SECONDS, self._hand_over_when_quiet, loop, deadline)
            return
        to, self._successor = self._successor, None
        if to is not None:
            with to:
                self._hand_over(to)

    def _hand_over(self, to: socket.socket) -> None:
        front = self._front
        if front is None:
            return
        given: dict[Connection, tuple[int, bytes]] = {}
        for connection in self.connections - front.shared_with:
            if (detached := connection.detach()) is not None:
                given[connection] = detached
        try:
            is_whole = handover.hand_over(to, list(given.values()), front.parting())
        except OSError as error:
            LOGGER.warning("could not hand over to the next process: %s", cause_of(error))
        else:
            message = "handed over to process %d, with %d connections" if is_whole else _BROKEN_OFF
            LOGGER.log(logging.INFO if is_whole else logging.WARNING, message, handover.process_of(to), len(given))
            self._part(front, given)
        finally:
            for descriptor, _ in given.values():
                os.close(descriptor)
        for connection in tuple(self.connections):
            connection.go_on()

    def _part(self, front: _Front, given: Iterable[Connection]) -> None:
        """Have nothing to do any more with the socket that listens, and with what was given, whatever has arrived.

        Two processes must not read from one socket; Kong connects again, to the next one.
        """
        self._front = None
        front.leave(State.PARTED)
        for connection in given:
            connection.abort()
            self.connections.discard(connection)

    def end(self) -> None:
        """Accept no more connections, and hand nothing over."""
        front, self._front = self._front, None
        if front is not None:
            front.leave(State.ENDING)


class _Front:
    """What a server serves at: the socket that listens and its channel, from which it takes what others send it."""

    def __init__(self, station: Station, parting: Callable[[], bytes], stop_accepting: Callable[[], None]) -> None:
        self.station = station
        self.parting = parting
        # The connections to those that are going to take over.
        self.shared_with: set[Connection] = set()
        self._stop_accepting = stop_accepting

    def leave(self, state: State) -> None:
        """Stop accepting, for good."""
        asyncio.get_running_loop().remove_reader(self.station.channel.outlet.fileno())
        self._stop_accepting()
        self.station.front.listener.close()
        self.station.slot.tell(state)


def serve(dispatcher: Dispatcher, station: Station, troubles: TroubleLog, hooks: Hooks) -> None:
    """Serve Kong until the process is told to end; further signals are ignored from then on."""
    sys.setswitchinterval(_SWITCH_SECONDS)
    loop = uvloop.new_event_loop()
    try:
        loop.run_until_complete(_serve(_Server(dispatcher, troubles), station, hooks))
    finally:
        ignore_signals()
        loop.close()


async def _serve(shared: _Server, station: Station, hooks: Hooks) -> None:
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: _report_loop_trouble(shared.troubles, context))
    lifetime = Lifetime(station.supervisor, lambda: shared.has_parted, lambda: shared.is_awaited)
    for kept in station.inheritance.kept:
        _guarded(shared.troubles, "arriving", hooks.arriving, kept)
    for accepted, unread in station.inheritance.connections:
        await shared.adopt(accepted, unread)
    # A descriptor of the loop's own: it closes it.
    listener = duplicate(station.front.listener.fileno())
    server = await loop.create_unix_server(lambda: Connection(shared), sock=listener, backlog=station.backlog)
    shared.serve_at(_Front(station, hooks.parting, server.close))
    lifetime.heed_signals()
    station.slot.tell(State.SERVING)
    LOGGER.info("serving on %s%s", station.path, ", taken over from the process before" if station.takes_over else "")
    keepers = [loop.create_task(_beat(station.slot)), loop.create_task(_keep_house(shared, lifetime, hooks))]
    why = await lifetime.wait()
    hooks.ending()
    LOGGER.info("ending: %s", why)
    for keeper in keepers:
        keeper.cancel()
    shared.end()
    if lifetime.is_orphaned:
        station.channel.shut_down()
    elif station.front.supervisor is not None:
        with contextlib.suppress(OSError):
            station.front.supervisor.send(Kind.ENDING)
    # One more turn of the loop answers what has arrived; Kong's SIGKILL comes 30 ms after its SIGTERM.
    await asyncio.sleep(_DRAIN_SECONDS)
    for one in list(shared.connections):
        one.close()
    await asyncio.sleep(0)


async def _beat(slot: Slot) -> None:
    while True:
        slot.beat()
        await asyncio.sleep(_BEAT_SECONDS)


async def _keep_house(shared: _Server, lifetime: Lifetime, hooks: Hooks) -> None:
    while True:
        await asyncio.sleep(_HOUSEKEEPING_SECONDS)
        lifetime.look()
        _guarded(shared.troubles, "housekeeping", shared.sweep)
        _guarded(shared.troubles, "housekeeping", hooks.housekeeping)


def _guarded(troubles: TroubleLog, name: str, function: Callable[..., None], *arguments: object) -> None:
    """Call something that must not end what goes on around it."""
    try:
        function(*arguments)
    except Exception as error:  # noqa: BLE001 - it is told of
        troubles.report(f"{name}:{type(error).__name__}", f"{name} failed: {cause_of(error)}")


def _report_loop_trouble(troubles: TroubleLog, context: dict[str, Any]) -> None:
    error = context.get("exception")
    cause = cause_of(error) if isinstance(error, BaseException) else printable(str(context.get("message")))
    troubles.report(f"loop:{type(error).__name__}", f"the event loop caught an error: {cause}")
