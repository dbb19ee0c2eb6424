"""Kong's side of `MsgPack:1`: each call takes a connection from the pool and gives it back, also within one event."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgpack

from .context import LuaError
from .headers import multi_map
from .rpc import RpcError
from .values import Table, Value, as_text, encode_json, from_wire, to_wire

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from .connections import Connection, ConnectionPool
    from .errlog import ErrorLog
    from .pdk import Function

_REQUEST, _RESPONSE, _NOTIFICATION = 0, 1, 2
_DONE = b"ret"
_MULTI_MAPS = (
    "kong.request.get_query",
    "kong.request.get_headers",
    "kong.response.get_headers",
    "kong.service.response.get_headers",
)
_STEPS = {
    "kong.client.get_credential": "plugin.StepCredential",
    "kong.client.load_consumer": "plugin.StepConsumer",
    "kong.client.get_consumer": "plugin.StepConsumer",
    "kong.client.authenticate": "plugin.StepCredential",
    "kong.node.get_memory_stats": "plugin.StepMemoryStats",
    "kong.router.get_route": "plugin.StepRoute",
    "kong.router.get_service": "plugin.StepService",
    **dict.fromkeys(_MULTI_MAPS, "plugin.StepMultiMap"),
}


class MessagePackRpc:
    """Calls one plugin server for one worker; each has its own message ids."""

    source = "mp_rpc.lua"

    def __init__(self, pool: ConnectionPool, log: ErrorLog, notify: Callable[[str, Value], None]) -> None:
        self._pool = pool
        self._log = log
        self._notify = notify
        self._message_id = 0

    async def start_instance(self, plugin: str, config: Table) -> int | None:
        """Do what `Rpc` says."""
        status = await self.ask("plugin.StartInstance", {"Name": plugin, "Config": encode_json(config)})
        if status is None:
            raise RpcError("nil")
        instance_id: int | None = _member(status, b"Id")
        return instance_id

    async def close_instance(self, instance_id: int) -> None:
        """Do what `Rpc` says."""
        await self.ask("plugin.CloseInstance", instance_id)

    async def run_event(self, instance_id: int | None, phase: str, functions: Mapping[str, Function]) -> float:
        """Do what `Rpc` says."""
        instance = {} if instance_id is None else {"InstanceId": instance_id}
        step, answered_at = await self._call("plugin.HandleEvent", {**instance, "EventName": phase})
        event = None if step is None else _member(step, b"EventId")
        while step is not None and _member(step, b"Data") != _DONE:
            data = _member(step, b"Data")
            name = as_text(_member(data, b"Method") or b"")
            result = self._run(functions, name, _member(data, b"Args"))
            argument = {"EventId": event} if result is None else {"EventId": event, "Data": result}
            step, answered_at = await self._call(_STEPS.get(name, "plugin.Step"), argument)
        return answered_at

    def needs_new_instance(self, error: RpcError) -> bool:
        """Do what `Rpc` says."""
        return "no plugin instance" in str(error).lower()

    def give_up(self, error: RpcError, functions: Mapping[str, Function]) -> None:  # noqa: ARG002 - the protocol's
        """Log the error: the request goes on without the plugin."""
        self._report(str(error))

    async def ask(self, method: str, argument: Value) -> Value:
        """Send a request and return its result; strings in it are bytes."""
        return (await self._call(method, argument))[0]

    def close(self) -> None:
        """Do what `Rpc` says."""
        self._pool.close()

    def _run(self, functions: Mapping[str, Function], name: str, arguments: Value) -> Value:
        function = functions.get(name)
        if function is None:
            self._report(f"could not find pdk method: {name}")
            return None
        given = from_wire(arguments)
        if isinstance(given, dict):
            # nil among the arguments leaves holes; what is after them still has its place.
            given = [given.get(i) for i in range(1, max((k for k in given if isinstance(k, int)), default=0) + 1)]
        result = function(given if isinstance(given, list) else [given])
        return multi_map(result) if name in _MULTI_MAPS else result

    async def _call(self, method: str, argument: Value) -> tuple[Value, float]:
        """Send a request; return its result, and when it had been read."""
        self._message_id += 1
        message_id = self._message_id
        connection = self._pool.take(self._report)
        try:
            request = [_REQUEST, message_id, method, [to_wire(argument)]]
            await connection.send(msgpack.packb(request, use_bin_type=False))
            answer = await self._answer(connection)
            _check(answer, message_id)
        except RpcError as error:
            # Kong keeps a connection also when nothing came in time; whatever comes later closes it.
            if str(error) == "timeout":
                self._pool.put(connection)
                raise RpcError("no data") from error
            connection.close()
            raise
        except BaseException:
            connection.close()
            raise
        self._pool.put(connection)
        if answer[2] is not None:
            raise RpcError(as_text(answer[2]) if isinstance(answer[2], (bytes, str)) else str(answer[2]))
        return answer[3], connection.received_at

    async def _answer(self, connection: Connection) -> list[Value]:
        messages = _Messages(connection)
        while True:
            message = await messages.next()
            if not isinstance(message, list) or not message or message[0] != _NOTIFICATION:
                return message if isinstance(message, list) else []
            self._notify(as_text(message[1]), message[2])

    def _report(self, text: str) -> None:
        self._log.error(f"{self.source}: {text}")


def _check(answer: list[Value], message_id: int) -> None:
    if not answer or answer[0] != _RESPONSE:
        raise LuaError("RPC response expected from Go plugin server")
    if answer[1] != message_id:
        raise LuaError("unexpected RPC response ID from Go plugin server")


class _Messages:
    """Reads messages from a connection, for one call."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._unpacker = msgpack.Unpacker(raw=True, strict_map_key=False, max_buffer_size=0)
        self._received = 0
        self._read = 0

    async def next(self) -> Value:
        """Return the next message; it is an error if none comes, but Kong's library raises if one breaks off."""
        while True:
            try:
                message = self._unpacker.unpack()
            except msgpack.OutOfData:
                await self._receive()
            else:
                self._read = self._unpacker.tell()
                return message

    async def _receive(self) -> None:
        try:
            data = await self._connection.receive_any()
        except RpcError as error:
            if self._received > self._read:
                raise LuaError("missing bytes") from error
            raise RpcError("timeout" if str(error) == "timeout" else "no data") from error
        self._received += len(data)
        self._unpacker.feed(data)


def _member(table: Value, name: bytes) -> Value:
    if not isinstance(table, dict):
        raise LuaError(f"attempt to index field '{as_text(name)}' (a {type(table).__name__} value)")
    return table.get(name)
