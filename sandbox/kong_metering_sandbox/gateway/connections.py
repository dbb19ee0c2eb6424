"""One worker's connections to a plugin server: sockets that fail with nginx's words, and the pool that keeps them.

A connection is used by one task at a time. What it cannot do within a minute has failed, as by nginx's defaults. The
pool gives the connection that came last, holds at most `size` (the one that lay longest goes), and none longer than a
minute; one that its server closed, or on which something came unasked, is not used again.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from typing import TYPE_CHECKING

from .rpc import RpcError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_TIMEOUT = 60.0  # seconds for sending and for reading
_IDLE_TIME = 60.0  # seconds in the pool
_READ_SIZE = 4096


class Connection:
    """A connection to a plugin server, which reads no more than it is asked for."""

    def __init__(self, path: Path) -> None:
        """Connect.

        Raises:
            OSError: nobody listens there, or too many wait already.

        """
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.setblocking(False)  # noqa: FBT003 - the standard library's signature
        self.received_at = 0.0
        try:
            self._socket.connect(str(path))
        except BaseException:
            self._socket.close()
            raise

    @property
    def usable(self) -> bool:
        """Whether the server has kept its end open and has sent nothing more."""
        try:
            self._socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    async def send(self, data: bytes) -> None:
        """Send all of it.

        Raises:
            RpcError: it cannot be sent.

        """
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[self._socket.send(rest) :]
            except BlockingIOError:
                loop = asyncio.get_running_loop()
                await self._wait(loop.add_writer, loop.remove_writer)
            except OSError as error:
                raise RpcError(_reason(error)) from error

    async def receive_any(self, limit: int = _READ_SIZE) -> bytes:
        """Wait for some bytes, and return what is there.

        Raises:
            RpcError: none come, because the server closed the connection or is gone, or within the time.

        """
        while True:
            try:
                data = self._socket.recv(limit)
            except BlockingIOError:
                loop = asyncio.get_running_loop()
                await self._wait(loop.add_reader, loop.remove_reader)
                continue
            except OSError as error:
                raise RpcError(_reason(error)) from error
            if not data:
                raise RpcError("closed")
            self.received_at = time.monotonic()
            return data

    async def receive(self, size: int) -> bytes:
        """Return exactly so many bytes. Raises what `receive_any` raises."""
        parts = bytearray()
        while len(parts) < size:
            parts += await self.receive_any(size - len(parts))
        return bytes(parts)

    def close(self) -> None:
        """Close it."""
        self._socket.close()

    async def _wait(self, add: Callable[..., None], remove: Callable[[int], bool]) -> None:
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[bool] = loop.create_future()
        add(self._socket.fileno(), _settle, ready, True)  # noqa: FBT003 - the future's result
        timer = loop.call_later(_TIMEOUT, _settle, ready, False)  # noqa: FBT003 - the future's result
        try:
            if not await ready:
                raise RpcError("timeout")
        finally:
            timer.cancel()
            remove(self._socket.fileno())


def _settle(future: asyncio.Future[bool], result: bool) -> None:  # noqa: FBT001 - it is what the future gives
    if not future.done():
        future.set_result(result)


def _reason(error: OSError) -> str:
    return os.strerror(error.errno or 0).lower()


class ConnectionPool:
    """The connections of one worker to one plugin server that nobody uses."""

    def __init__(self, path: Path, size: int) -> None:
        self._path = path
        self._size = size
        self._idle: dict[Connection, asyncio.TimerHandle] = {}

    def take(self, report: Callable[[str], None]) -> Connection:
        """Return a connection, a new one if there is none; what is reported is for the error log.

        Raises:
            RpcError: nobody listens.

        """
        while self._idle:
            connection, timer = self._idle.popitem()
            timer.cancel()
            if connection.usable:
                return connection
            connection.close()
        try:
            return Connection(self._path)
        except OSError as error:
            report(f"trying to connect: {_reason(error)}")
            raise RpcError(_reason(error)) from error

    def put(self, connection: Connection) -> None:
        """Keep a connection for the next one who needs it, if it can be used again."""
        if not connection.usable:
            connection.close()
            return
        while len(self._idle) >= self._size:
            self._drop(next(iter(self._idle)))
        loop = asyncio.get_running_loop()
        self._idle[connection] = loop.call_later(_IDLE_TIME, self._drop, connection)

    def close(self) -> None:
        """Close the idle connections; the ones in use are closed by their users' end."""
        while self._idle:
            self._drop(next(iter(self._idle)))

    def _drop(self, connection: Connection) -> None:
        self._idle.pop(connection).cancel()
        connection.close()
