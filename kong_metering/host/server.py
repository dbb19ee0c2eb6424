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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import uvloop

from kong_metering.host import handover
from kong_metering.host.board import State
from kong_metering.host.channels import Kind
from kong_metering.host.connection import Connection
from kong_metering.host.conversation import Conversations
from kong_metering.host.front import NO_DESCRIPTOR_SECONDS, Front, has_room
from kong_metering.host.idle import IdleConnections
from kong_metering.host.lifetime import Lifetime, ignore_signals
from kong_metering.log import LOGGER, cause_of, printable, trouble
from kong_metering.plurals import counted

if TYPE_CHECKING:
    from kong_metering.host.board import Slot
    from kong_metering.host.channels import Channel
    from kong_metering.host.dispatch import Dispatcher
    from kong_metering.host.station import Station

_HOUSEKEEPING_SECONDS = 1.0
_DRAIN_SECONDS = 0.01
# A thread that waits for the interpreter is woken in vain by each of the loop's callbacks until this time is over. With
# Python's 5 ms that cost a request 20 to 30 µs under steady load, as the spool's thread writes each few milliseconds.
_SWITCH_SECONDS = 0.0005
# How long the events that are under way may take to end before sockets are handed over; Kong goes on at once.
_QUIET_SECONDS = 0.25
_QUIET_POLL_SECONDS = 0.0005
_BROKEN_OFF = "broke off handing over to process %d, with %s"
# How often the loop tells that it comes round.
_BEAT_SECONDS = 0.25


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

    def __init__(self, dispatcher: Dispatcher) -> None:
        self.connections: set[Connection] = set()
        self._dispatcher = dispatcher
        self.conversations = Conversations(dispatcher)
        self._front: Front | None = None
        self._parting: Callable[[], bytes] = bytes
        self._successor: socket.socket | None = None
        # What must not be cut short: connections of other servers that are not served yet, for one.
        self._arriving: set[asyncio.Task[None]] = set()

    def serve_at(self, station: Station, parting: Callable[[], bytes]) -> None:
        """Accept connections, and look at what other processes send."""
        self._parting = parting
        idle = IdleConnections(self.connections, asyncio.get_running_loop().time)
        self._front = Front(station, self.adopt_soon, idle.close_some)
        self._front.start_accepting()
        self._watch_channel(station.channel)

    def _watch_channel(self, channel: Channel) -> None:
        if self._front is not None:
            asyncio.get_running_loop().add_reader(channel.outlet.fileno(), self._read_channel, channel)

    def _read_channel(self, channel: Channel) -> None:
        for message in channel.messages(has_room):
            if message.socket is None:
                self._take_note(message.kind)
            elif message.kind is Kind.PART:
                self.begin_to_hand_over(message.socket)
            elif message.kind is Kind.CONNECTION:
                self.adopt_soon(message.socket)
            elif message.kind is Kind.LISTENER and self._front is not None:
                self._front.listen_at(message.socket)
                self._take_note(message.kind)
            else:
                message.socket.close()
        if self._front is not None and not has_room():
            self._front.note_exhaustion()
            # The channel stays readable, and the loop would come round for nothing.
            loop = asyncio.get_running_loop()
            loop.remove_reader(channel.outlet.fileno())
            loop.call_later(NO_DESCRIPTOR_SECONDS, self._watch_channel, channel)

    def _take_note(self, kind: Kind) -> None:
        """Say what the supervisor has found out, for Kong's own log: one of the servers does."""
        if self._front is None or self._front.station.index != 0:
            return
        path = self._front.station.path
        if kind is Kind.LISTENER:
            LOGGER.error("somebody removed or replaced %s; it is there again", path, extra=trouble("path"))
        elif kind is Kind.UNREACHABLE:
            LOGGER.error("somebody removed or replaced %s, and it cannot be mended", path, extra=trouble("unreachable"))

    def adopt_soon(self, accepted: socket.socket) -> None:
        """Serve a connection that another process has accepted."""
        task = asyncio.get_running_loop().create_task(self.adopt(accepted))
        self._arriving.add(task)
        task.add_done_callback(self._arriving.discard)

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
    def is_quiet(self) -> bool:
        """Whether no event is under way, and no connection on its way here."""
        return not (self._dispatcher.events_under_way or self._arriving) and all(
            one.is_quiet for one in self.connections
        )

    @property
    def is_handing_over(self) -> bool:
        """Whether nothing new may begin: all connections are just being given to the next servers."""
        return self._successor is not None

    def share(self, asked: Connection) -> None:
        """Give the socket that listens to the next plugin server, which will ask for the connections later."""
        try:
            if self._front is None:
                raise ConnectionAbortedError("this process is ending")
            with _borrowed(asked.descriptor()) as new:
                if not handover.is_own_user(new):
                    raise PermissionError("it is another user's")
                handover.share(new, self._front.station.living_sockets)
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
        if self._front is None or self.is_quiet or loop.time() >= deadline:
            if self._front is not None:
                self._front.stop_accepting()
            self._hand_over_when_arrived(loop)
        else:
            loop.call_later(_QUIET_POLL_SECONDS, self._hand_over_when_quiet, loop, deadline)

    def _hand_over_when_arrived(self, loop: asyncio.AbstractEventLoop) -> None:
        """Hand over once those are known that were accepted a moment ago, which takes some turns of the loop."""
        if self._arriving:
            loop.call_soon(self._hand_over_when_arrived, loop)
        else:
            loop.call_soon(self._hand_over)

    def _hand_over(self) -> None:
        to, self._successor = self._successor, None
        if to is None:
            return
        # Closed last: the next process takes us for one that still serves until we say otherwise.
        with to:
            if self._front is not None:
                self._hand_all_over(to, self._front)
        for connection in tuple(self.connections):
            connection.go_on()

    def _hand_all_over(self, to: socket.socket, front: Front) -> None:
        given: dict[Connection, tuple[int, bytes]] = {}
        for connection in self.connections - front.shared_with:
            if (detached := connection.detach()) is not None:
                given[connection] = detached
        unsent = front.take_unsent()
        try:
            whole = handover.hand_over(to, [*given.values(), *((one, b"") for one in unsent)], self._kept())
        except OSError as error:
            LOGGER.warning("could not hand over to the next process: %s", cause_of(error))
            front.serve_unsent(unsent)
            front.start_accepting()
        else:
            message = "handed over to process %d, with %s" if whole else _BROKEN_OFF
            level = logging.INFO if whole else logging.WARNING
            connections = counted(len(given) + len(unsent), "connection")
            LOGGER.log(level, message, handover.process_of(to), connections)
            self._part(front, given)
            for descriptor in unsent:
                os.close(descriptor)

    def _kept(self) -> bytes:
        """Give what the next servers need to know of the requests that are under way."""
        try:
            return self._parting()
        except Exception as error:  # noqa: BLE001 - the connections are worth more
            LOGGER.error(
                "what is known of the requests under way could not be handed over: %s",
                cause_of(error),
                extra=trouble(f"parting:{type(error).__name__}"),
            )
            return b""

    def _part(self, front: Front, given: Iterable[Connection]) -> None:
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


def serve(dispatcher: Dispatcher, station: Station, hooks: Hooks) -> None:
    """Serve Kong until the process is told to end; further signals are ignored from then on."""
    sys.setswitchinterval(_SWITCH_SECONDS)
    loop = uvloop.new_event_loop()
    try:
        loop.run_until_complete(_serve(_Server(dispatcher), station, hooks))
    finally:
        ignore_signals()
        loop.close()


async def _serve(shared: _Server, station: Station, hooks: Hooks) -> None:
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: _report_loop_trouble(context))
    lifetime = Lifetime(station.supervisor, station.kong, lambda: shared.has_parted, lambda: shared.is_awaited)
    for kept in station.inheritance.kept:
        _guarded("arriving", hooks.arriving, kept)
    for accepted, unread in station.inheritance.connections:
        await shared.adopt(accepted, unread)
    shared.serve_at(station, hooks.parting)
    lifetime.heed_signals()
    station.slot.tell(State.SERVING)
    LOGGER.info("serving on %s%s", station.path, ", taken over from the previous process" if station.takes_over else "")
    keepers = [loop.create_task(_beat(station.slot)), loop.create_task(_keep_house(shared, lifetime, hooks))]
    why = await lifetime.wait()
    hooks.ending()
    LOGGER.info("ending: %s", why)
    for keeper in keepers:
        keeper.cancel()
    shared.end()
    if lifetime.is_orphaned:
        station.channel.shut_down()
    elif station.sockets.supervisor is not None:
        with contextlib.suppress(OSError):
            station.sockets.supervisor.send(Kind.ENDING)
    # One more turn of the loop answers what has arrived; what Kong was asked for then, and has not answered yet, would
    # be a request that is not billed.
    await asyncio.sleep(_DRAIN_SECONDS)
    deadline = loop.time() + _QUIET_SECONDS
    while not shared.is_quiet and loop.time() < deadline:  # noqa: ASYNC110 - of many connections, each by itself
        await asyncio.sleep(_QUIET_POLL_SECONDS)
    for one in list(shared.connections):
        one.close()
    await asyncio.sleep(0)


@contextlib.contextmanager
def _borrowed(descriptor: int) -> Iterator[socket.socket]:
    """Give a socket by its descriptor, which stays the owner's."""
    lent = socket.socket(fileno=descriptor)
    try:
        yield lent
    finally:
        lent.detach()


async def _beat(slot: Slot) -> None:
    while True:
        slot.beat()
        await asyncio.sleep(_BEAT_SECONDS)


async def _keep_house(shared: _Server, lifetime: Lifetime, hooks: Hooks) -> None:
    while True:
        await asyncio.sleep(_HOUSEKEEPING_SECONDS)
        lifetime.look()
        _guarded("housekeeping", shared.sweep)
        _guarded("housekeeping", hooks.housekeeping)


def _guarded(name: str, function: Callable[..., None], *arguments: object) -> None:
    """Call something that must not end what goes on around it."""
    try:
        function(*arguments)
    except Exception as error:  # noqa: BLE001 - it is told of
        LOGGER.error("%s failed: %s", name, cause_of(error), extra=trouble(f"{name}:{type(error).__name__}"))


def _report_loop_trouble(context: dict[str, Any]) -> None:
    error = context.get("exception")
    cause = cause_of(error) if isinstance(error, BaseException) else printable(str(context.get("message")))
    LOGGER.error("the event loop caught an error: %s", cause, extra=trouble(f"loop:{type(error).__name__}"))
