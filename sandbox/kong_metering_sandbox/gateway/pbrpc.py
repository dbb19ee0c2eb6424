"""Kong's side of `ProtoBuf:1`: an event is one call on one connection, on which the plugin then makes its PDK calls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from google.protobuf.message import DecodeError

from .connections import ConnectionPool
from .context import LuaError
from .mprpc import MessagePackRpc
from .pbvalues import arguments, encode_result
from .pluginsocket import SIGNATURES, decode, message
from .rpc import RpcError
from .values import Table, Value, as_text, encode_json

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from .connections import Connection
    from .errlog import ErrorLog
    from .pdk import Function

_LENGTH_SIZE = 4
_NEEDS_NEW_INSTANCE = ("no plugin instance", "closed")


class ProtobufRpc:
    """Calls one plugin server for one worker; each numbers its calls itself."""

    source = "pb_rpc.lua"

    def __init__(self, path: Path, pool: ConnectionPool, log: ErrorLog) -> None:
        self._path = path
        self._pool = pool
        self._log = log
        self._message_id = 0

    async def start_instance(self, plugin: str, config: Table) -> int | None:
        """Do what `Rpc` says."""
        command = message("CmdStartInstance", name=plugin.encode(), config=encode_json(config))
        answer, _ = await self._call({"cmd_start_instance": command}, None)
        if not answer.HasField("instance_status"):
            raise LuaError("attempt to index field 'instance_status' (a nil value)")
        instance_id: int = answer.instance_status.instance_id
        return instance_id

    async def close_instance(self, instance_id: int) -> None:
        """Do what `Rpc` says."""
        await self._call({"cmd_close_instance": message("CmdCloseInstance", instance_id=instance_id)}, None)

    async def run_event(self, instance_id: int | None, phase: str, functions: Mapping[str, Function]) -> float:
        """Do what `Rpc` says."""
        command = message("CmdHandleEvent", instance_id=instance_id, event_name=phase.encode())
        _, answered_at = await self._call({"cmd_handle_event": command}, functions)
        return answered_at

    def needs_new_instance(self, error: RpcError) -> bool:
        """Do what `Rpc` says."""
        return any(words in str(error).lower() for words in _NEEDS_NEW_INSTANCE)

    def give_up(self, error: RpcError, functions: Mapping[str, Function]) -> None:
        """Log the error, and answer the client with a 500."""
        self._report(f"pluginserver error: {error}")
        functions["kong.response.error"]([500])

    async def ask(self, method: str, argument: Value) -> Value:
        """Do what `Rpc` says, on a connection for this call only."""
        pool = ConnectionPool(self._path, size=1)
        try:
            return await MessagePackRpc(pool, self._log, lambda _label, _argument: None).ask(method, argument)
        finally:
            pool.close()

    def close(self) -> None:
        """Do what `Rpc` says."""
        self._pool.close()

    async def _call(self, command: Mapping[str, Any], functions: Mapping[str, Function] | None) -> tuple[Any, float]:
        """Make a call, and the PDK calls that the plugin makes meanwhile; return its answer, and when it had come."""
        self._message_id += 1
        sequence = self._message_id + 1
        connection = self._pool.take(self._report)
        try:
            await _write_frame(connection, message("RpcCall", sequence=sequence, **command).SerializeToString())
            if functions is not None:
                await _serve_pdk_calls(connection, functions)
            data = await _read_frame(connection)
        except BaseException:
            connection.close()
            raise
        self._pool.put(connection)
        return _answer(data, sequence), connection.received_at

    def _report(self, text: str) -> None:
        self._log.error(f"{self.source}: {text}")


async def _serve_pdk_calls(connection: Connection, functions: Mapping[str, Function]) -> None:
    while name := await _read_frame(connection):
        argument = await _read_frame(connection)
        await _write_frame(connection, _run(functions, as_text(name), argument))


def _run(functions: Mapping[str, Function], name: str, argument: bytes) -> bytes:
    signature = SIGNATURES.get(name)
    if signature is None:
        raise RpcError(f'method "{name}" not found')
    given = arguments(signature.takes, argument)
    function = functions.get(name)
    if function is None:
        raise LuaError(f"the stand-in has no {name}")
    return encode_result(signature.gives, function(given))


async def _read_frame(connection: Connection) -> bytes:
    size = int.from_bytes(await connection.receive(_LENGTH_SIZE), "little")
    return await connection.receive(size)


async def _write_frame(connection: Connection, data: bytes) -> None:
    """Send a frame, its length first; Kong asserts that this works."""
    try:
        await connection.send(len(data).to_bytes(_LENGTH_SIZE, "little"))
        await connection.send(data)
    except RpcError as error:
        raise LuaError(str(error)) from error


def _answer(data: bytes, sequence: int) -> Any:
    try:
        answer = decode("RpcReturn", data)
    except DecodeError as error:
        raise LuaError("assertion failed!") from error
    if answer.sequence != sequence:
        raise LuaError("assertion failed!")
    return answer
