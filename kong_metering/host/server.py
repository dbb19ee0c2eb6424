"""The Unix socket that Kong calls, the signals that end the process, and the watch over the parent.

Contract: `serve` blocks until SIGTERM, SIGINT or the parent's death, then stops accepting, answers the RPCs that have
arrived, and returns; what happens to queues afterwards is the caller's part. Bytes that are not the protocol cost the
sender its connection and nobody else anything.

The socket is made under a temporary name with mode 0600 and renamed into place, so that at a reload, when the old
process still serves the same path, there is no moment without a socket, and no other user can ever connect. The old
process hands the sockets that it has over to the new one (`handover.py`), and has none until Kong ends it.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import stat
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvloop

from kong_metering.errors import StartupError
from kong_metering.host import handover
from kong_metering.host.connection import Connection
from kong_metering.host.conversation import Conversations
from kong_metering.log import LOGGER, cause_of, printable

if TYPE_CHECKING:
    from kong_metering.host.dispatch import Dispatcher
    from kong_metering.log import TroubleLog

_MAX_PATH_BYTES = 107
_HOUSEKEEPING_SECONDS = 1.0
_DRAIN_SECONDS = 0.01
# A thread that waits for the interpreter is woken in vain by each of the loop's callbacks until this time is over. With
# Python's 5 ms that cost a request 20 to 30 µs under steady load, as the spool's thread writes each few milliseconds.
_SWITCH_SECONDS = 0.0005
# How long the events that are under way may take to end before sockets are handed over; Kong goes on at once.
_QUIET_SECONDS = 0.25
_QUIET_POLL_SECONDS = 0.0005


@dataclass(frozen=True)
class ServerOptions:
    """How the host listens, and when it ends.

    `parent` is the process id that must live on for us to go on, None if it need not.
    """

    path: Path
    backlog: int = 4096
    parent: int | None = None


class _Server:
    """What the connections share."""

    def __init__(self, dispatcher: Dispatcher, troubles: TroubleLog) -> None:
        self.troubles = troubles
        self.connections: set[Connection] = set()
        # The connection to the next process, while it waits for our sockets.
        self.handing_over: Connection | None = None
        self._listener: tuple[int, Callable[[], None]] | None = None
        self._dispatcher = dispatcher
        self.conversations = Conversations(dispatcher, troubles)

    def listen_with(self, listener: int, close: Callable[[], None]) -> None:
        """Learn the descriptor of the socket that listens, and how to end that; from now on it can be handed over."""
        self._listener = listener, close

    def stop_listening(self) -> None:
        """Accept no more connections, and hand nothing over."""
        if self._listener is not None:
            descriptor, close = self._listener
            self._listener = None
            close()
            os.close(descriptor)

    def sweep(self) -> None:
        """Forget what Kong has forgotten; to be called every few seconds."""
        self._dispatcher.sweep()
        self.conversations.sweep()

    def begin_to_hand_over(self, to: Connection) -> None:
        """Let the events that are under way end, and none begin; then give all sockets to the next process."""
        if self._listener is None or self.handing_over is not None:
            to.abort()
            return
        self.handing_over = to
        loop = asyncio.get_running_loop()
        self._hand_over_when_quiet(loop, loop.time() + _QUIET_SECONDS)

    def _hand_over_when_quiet(self, loop: asyncio.AbstractEventLoop, deadline: float) -> None:
        is_quiet = not self._dispatcher.events_under_way and all(one.is_quiet for one in self.connections)
        if not is_quiet and loop.time() < deadline:
            loop.call_later(_QUIET_POLL_SECONDS, self._hand_over_when_quiet, loop, deadline)
            return
        to, self.handing_over = self.handing_over, None
        if to is not None:
            self._hand_over(to)

    def _hand_over(self, to: Connection) -> None:
        given: dict[Connection, tuple[int, bytes]] = {}
        for connection in self.connections - {to}:
            if (detached := connection.detach()) is not None:
                given[connection] = detached
        try:
            if self._listener is None:
                raise ConnectionAbortedError("this process is ending")
            with socket.socket(fileno=to.descriptor()) as new:
                is_whole = handover.hand_over(new, self._listener[0], list(given.values()))
                process = handover.process_of(new)
        except OSError as error:
            LOGGER.warning("could not hand over to the next process: %s", cause_of(error))
            for connection in given:
                connection.go_on()
        else:
            if is_whole:
                LOGGER.info("handed over to process %d, with %d connections", process, len(given))
            else:
                LOGGER.warning("broke off handing %d connections over to process %d", len(given), process)
            # Whatever has arrived: two processes must not read from one socket. Kong connects again, to the next one.
            self.stop_listening()
            for connection in given:
                connection.abort()
        finally:
            for descriptor, _ in given.values():
                os.close(descriptor)
            to.abort()


@dataclass(frozen=True)
class Hooks:
    """What the host calls back, on the loop's thread: `housekeeping` about once a second, `ending` when the end begins.

    Kong kills 30 ms after it told to end: `ending` must start at once what is to be safe then, and not wait for it.
    """

    housekeeping: Callable[[], None]
    ending: Callable[[], None]


def serve(dispatcher: Dispatcher, options: ServerOptions, troubles: TroubleLog, hooks: Hooks) -> None:
    """Serve Kong until the process is told to end, or its parent is gone; raises `StartupError` if it cannot listen."""
    _set_aside_what_lives_long()
    sys.setswitchinterval(_SWITCH_SECONDS)
    loop = uvloop.new_event_loop()
    try:
        loop.run_until_complete(_serve(dispatcher, options, troubles, hooks))
    finally:
        loop.close()


def _set_aside_what_lives_long() -> None:
    """Leave what lives as long as the process, which is most of what there is, out of every collection."""
    gc.collect()
    gc.freeze()


async def _serve(dispatcher: Dispatcher, options: ServerOptions, troubles: TroubleLog, hooks: Hooks) -> None:
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[str] = loop.create_future()

    def end(why: str) -> None:
        if not ended.done():
            ended.set_result(why)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end, signal.Signals(number).name)
    loop.set_exception_handler(lambda _, context: _report_loop_trouble(troubles, context))
    shared = _Server(dispatcher, troubles)
    # Not before the signals are handled: whoever sees the socket may tell us to end.
    inherited = handover.take_over(options.path)
    listener = listen(options)
    inode = os.stat(options.path).st_ino  # noqa: PTH116
    descriptor = os.dup(listener.fileno())
    for accepted, unread in inherited.connections if inherited else ():
        accepted.setblocking(False)  # noqa: FBT003 - the standard library's signature
        _, connection = await loop.connect_accepted_socket(lambda: Connection(shared), accepted)
        if unread:
            connection.data_received(unread)
    server = await loop.create_unix_server(lambda: Connection(shared), sock=listener, backlog=options.backlog)
    shared.listen_with(descriptor, server.close)
    # Nobody can connect to it any more; but somebody may have, and wait.
    former = inherited and await loop.create_unix_server(lambda: Connection(shared), sock=inherited.listener)
    LOGGER.info("serving on %s%s", options.path, ", taken over from the process before" if inherited else "")
    keeper = loop.create_task(_keep_house(end, options.parent, shared.sweep, hooks.housekeeping))
    why = await ended
    hooks.ending()
    LOGGER.info("ending: %s", why)
    keeper.cancel()
    _unlink_own(options.path, inode)
    shared.stop_listening()
    if former:
        former.close()
    # One more turn of the loop answers what has arrived; Kong's SIGKILL comes 30 ms after its SIGTERM.
    await asyncio.sleep(_DRAIN_SECONDS)
    for one in list(shared.connections):
        one.close()
    await asyncio.sleep(0)


def _report_loop_trouble(troubles: TroubleLog, context: dict[str, Any]) -> None:
    error = context.get("exception")
    cause = cause_of(error) if isinstance(error, BaseException) else printable(str(context.get("message")))
    troubles.report(f"loop:{type(error).__name__}", f"the event loop caught an error: {cause}")


async def _keep_house(
    end: Callable[[str], None], parent: int | None, sweep: Callable[[], None], housekeeping: Callable[[], None]
) -> None:
    while True:
        await asyncio.sleep(_HOUSEKEEPING_SECONDS)
        if parent is not None and os.getppid() != parent:
            end("the process that started this one is gone")
        try:
            sweep()
            housekeeping()
        except Exception as error:  # noqa: BLE001 - housekeeping must go on
            LOGGER.error("housekeeping failed: %s", cause_of(error))


def listen(options: ServerOptions) -> socket.socket:
    """Make the socket, in the place of one that an earlier process left, but of nothing else.

    Raises `StartupError` that tells why it cannot be.
    """
    path = options.path
    if len(os.fsencode(path)) > _MAX_PATH_BYTES:
        # The temporary name may be short enough; then nobody could connect to the socket after it was renamed.
        raise StartupError(f"cannot serve on {path}: a Unix socket's path has at most {_MAX_PATH_BYTES} bytes")
    temporary = path.with_name(f".{os.getpid():x}")
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise StartupError(f"{path} exists and is not a socket; move it away, or choose another --socket-name")
    except FileNotFoundError:
        pass
    except OSError as error:
        raise StartupError(f"cannot look at {path}: {error}; see -p/--kong-prefix") from error
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        temporary.unlink(missing_ok=True)
        listener.bind(str(temporary))
        temporary.chmod(0o600)
        listener.listen(options.backlog)
        temporary.rename(path)
    except OSError as error:
        listener.close()
        temporary.unlink(missing_ok=True)
        raise StartupError(f"cannot serve on {path}: {error}; see -p/--kong-prefix") from error
    listener.setblocking(False)  # noqa: FBT003 - the standard library's signature
    return listener


def _unlink_own(path: Path, inode: int) -> None:
    """Remove the socket, unless another process has put its own in the place (at a reload it has)."""
    try:
        if path.lstat().st_ino == inode:
            path.unlink()
    except OSError as error:
        LOGGER.debug("the socket was not removed: %s", error)
