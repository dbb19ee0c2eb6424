"""Kong's side of `MsgPack:1`: one request at a time on each connection, connections from a pool per worker."""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgpack

from .context import LuaError
from .values import Value, as_text, to_wire

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from .errlog import ErrorLog

_REQUEST, _RESPONSE, _NOTIFICATION = 0, 1, 2
_TIMEOUT = 60.0  # seconds, nginx's default for connecting, sending and reading
_READ_SIZE = 65536


@dataclass(frozen=True)
class Answered:
    """The result of a call, and when it had been read (monotonic clock)."""

    result: Value
    at: float


class RpcError(Exception):
    """The plugin server could not be reached, did not answer, or answered with an error; the text says which."""


class RpcClient:
    """Calls one plugin server for one worker; each has its own message ids and its own pool."""

    def __init__(self, socket: Path, log: ErrorLog, notify: Callable[[str, Value], None]) -> None:
        self._socket = socket
        self._log = log
        self._notify = notify
        self._message_id = 0
        self._idle: list[_Connection] = []

    async def call(self, method: str, argument: Value) -> Value:
        """Send a request and return its result; strings in it are bytes. Raises what `ask` raises."""
        return (await self.ask(method, argument)).result

    async def ask(self, method: str, argument: Value) -> Answered:
        """Do what `call` does, and tell when the answer came.

        Raises:
            RpcError: see there.
            LuaError: the answer is not one to this request.

        """
        self._message_id += 1
        message_id = self._message_id
        connection = await self._connection()
        try:
            answer = await asyncio.wait_for(self._exchange(connection, message_id, method, argument), _TIMEOUT)
        except (OSError, asyncio.TimeoutError, EOFError) as error:
            connection.close()
            raise RpcError("no data") from error
        except BaseException:
            connection.close()
            raise
        self._idle.append(connection)
        return Answered(_result(answer, message_id), connection.received_at)

    async def _connection(self) -> _Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                return connection
            connection.close()
        try:
            return _Connection(*await asyncio.wait_for(asyncio.open_unix_connection(self._socket), _TIMEOUT))
        except (OSError, asyncio.TimeoutError) as error:
            number = getattr(error, "errno", None)
            reason = os.strerror(number).lower() if number else "timeout"
            self._log.error(f"mp_rpc.lua: trying to connect: {reason}")
            raise RpcError(reason) from error

    async def _exchange(self, connection: _Connection, message_id: int, method: str, argument: Value) -> list[Value]:
        request = [_REQUEST, message_id, method, [to_wire(argument)]]
        await connection.send(msgpack.packb(request, use_bin_type=False))
        while True:
            message = await connection.receive()
            if not isinstance(message, list) or not message or message[0] != _NOTIFICATION:
                return message if isinstance(message, list) else []
            self._notify(as_text(message[1]), message[2])

    def close(self) -> None:
        """Close the idle connections; the ones in use are closed by their users' end."""
        while self._idle:
            self._idle.pop().close()


def _result(answer: list[Value], message_id: int) -> Value:
    if not answer or answer[0] != _RESPONSE:
        raise LuaError("RPC response expected from Go plugin server")
    if answer[1] != message_id:
        raise LuaError("unexpected RPC response ID from Go plugin server")
    error = answer[2]
    if error is not None:
        raise RpcError(as_text(error) if isinstance(error, (bytes, str)) else str(error))
    return answer[3]


class _Connection:
    """One connection to a plugin server."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._unpacker = msgpack.Unpacker(raw=True, strict_map_key=False, max_buffer_size=0)
        self.received_at = 0.0

    @property
    def usable(self) -> bool:
        """Whether the server has kept its end open while the connection lay in the pool."""
        return not (self._reader.at_eof() or self._writer.is_closing())

    async def send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def receive(self) -> Value:
        while True:
            try:
                return self._unpacker.unpack()
            except msgpack.OutOfData:
                data = await self._reader.read(_READ_SIZE)
                if not data:
                    raise EOFError from None
                self.received_at = time.monotonic()
                self._unpacker.feed(data)

    def close(self) -> None:
        self._writer.close()
