"""An external plugin: its phases become events for the plugin server, whose PDK calls are run until it is done."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import pdk
from .context import Answer, LuaError
from .instances import InstanceTable
from .mprpc import MessagePackRpc
from .pbrpc import ProtobufRpc
from .rpc import RpcError
from .settings import SettingsError
from .values import Table, Value, as_text

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from .connections import ConnectionPool
    from .context import Exchange, Saved
    from .errlog import ErrorLog
    from .logphases import LogPhases
    from .pdk import Function
    from .rpc import Rpc
    from .settings import PluginServerSettings

_MESSAGEPACK, _PROTOBUF = "MsgPack:1", "ProtoBuf:1"


@dataclass(frozen=True)
class PluginInfo:
    """What a plugin server's dump says of its protocol and in its first entry."""

    protocol: str
    name: str
    phases: tuple[str, ...]
    priority: int
    version: str
    schema: Table
    server: PluginServerSettings


async def query_plugin(server: PluginServerSettings) -> PluginInfo:
    """Run the `query_cmd` of a plugin server and read what it prints; only the first plugin counts.

    Raises:
        SettingsError: it prints no JSON, or none that describes a plugin.

    """
    process = await asyncio.create_subprocess_shell(server.query_cmd, stdout=asyncio.subprocess.PIPE)
    output, _ = await process.communicate()
    try:
        dump = json.loads(output)
    except ValueError as error:
        raise SettingsError(f"failed loading external plugins: failed decoding plugin info: {error}") from error
    protocol = dump.get("Protocol", _MESSAGEPACK) if isinstance(dump, dict) else _MESSAGEPACK
    if protocol not in (_MESSAGEPACK, _PROTOBUF):
        raise SettingsError(f"unknown protocol implementation: {protocol}")
    plugins = dump.get("Plugins", dump) if isinstance(dump, dict) else dump
    try:
        return _plugin_info(protocol, plugins[0], server)
    except (KeyError, TypeError, IndexError) as error:
        text = f"not a plugin info table: \n{server.query_cmd}\n{as_text(output)}"
        raise SettingsError(f"failed loading external plugins: {text}") from error


def _plugin_info(protocol: str, info: Table, server: PluginServerSettings) -> PluginInfo:
    return PluginInfo(
        protocol=protocol,
        name=info["Name"],
        phases=tuple(info["Phases"]),
        priority=int(info["Priority"]),
        version=str(info.get("Version", "")),
        schema=dict(info["Schema"]),
        server=server,
    )


class ExternalPlugin:
    """One external plugin in one worker, with the connections of its own that `pool` keeps."""

    def __init__(
        self,
        info: PluginInfo,
        pool: ConnectionPool,
        log: ErrorLog,
        log_phases: LogPhases,
        forget_everywhere: Callable[[str], None],
    ) -> None:
        self.info = info
        self._log = log
        self._log_phases = log_phases
        self._forget_everywhere = forget_everywhere
        self._server_pid: Value = None
        self._rpc: Rpc
        if info.protocol == _PROTOBUF:
            self._rpc = ProtobufRpc(info.server.socket, pool, log)
        else:
            self._rpc = MessagePackRpc(pool, log, self._notified)
        self._instances = InstanceTable(info.name, self._rpc, log, log_phases)

    async def access(self, exchange: Exchange, config: Table) -> None:
        """Run the access phase.

        Raises:
            LuaError: something raised; Kong answers the request with a 500.
            PluginExit: the plugin answered the request, or Kong did because it failed.

        """
        functions = pdk.access_functions(exchange, self._say, config)
        answer = await self._handle(config, "access", functions)
        if answer is not None:
            exchange.access_answers[self.info.name] = answer

    async def log(self, saved: Saved, config: Table) -> None:
        """Run the log phase; what raises there is logged and ends it."""
        answer = None
        try:
            answer = await self._handle(config, "log", pdk.log_functions(saved, self._say, config))
        except LuaError as error:
            self._log.write("error", f"lua entry thread aborted: runtime error: {error}, context: ngx.timer")
        finally:
            self._log_phases.note(self.info.name, saved, answer)

    def drop_log(self, saved: Saved) -> None:
        """Note that there is no log phase for a request: too many run."""
        self._log_phases.note(self.info.name, saved, None)

    def forget_instances(self) -> None:
        """Forget this worker's instances: the plugin server does not know them."""
        self._instances.forget()

    def close(self) -> None:
        """Close the idle connections to the plugin server."""
        self._rpc.close()

    async def _handle(self, config: Table, phase: str, functions: Mapping[str, Function]) -> Answer | None:
        """Run a phase; give its last answer, None when the plugin server did not answer to the end."""
        while True:
            try:
                instance = await self._instances.get(config)
                answered_at = await self._rpc.run_event(instance.id, phase, functions)
            except RpcError as error:
                if not self._rpc.needs_new_instance(error):
                    self._rpc.give_up(error, functions)
                    return None
                self._forget_everywhere(self.info.name)
                self._log.kong("warn", f"{self._rpc.source}: {error}")
            else:
                # With MessagePack a connection may change hands between two answers, but an event is known in the
                # process of its instance only.
                return Answer(answered_at, instance.server_pid)

    def _say(self, level: str, text: str) -> None:
        """Write a line of the plugin's into the error log."""
        self._log.kong(level, f"{self._rpc.source} [{self.info.name}] {text}")

    def _notified(self, label: str, argument: Value) -> None:
        if label != "serverPid":
            return
        if self._server_pid is not None and self._server_pid != argument:
            self._instances.forget()
        self._server_pid = argument
