"""An external plugin: its phases become events for the plugin server, whose PDK calls are run until it is done."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import pdk
from .context import Answer, LuaError
from .instances import InstanceTable
from .rpc import RpcClient, RpcError
from .settings import SettingsError
from .values import Table, Value, as_text

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from .context import Exchange, Saved
    from .errlog import ErrorLog
    from .instances import Instance
    from .logphases import LogPhases
    from .pdk import Function
    from .settings import PluginServerSettings

_PROTOCOL = "MsgPack:1"
_DONE = b"ret"


@dataclass(frozen=True)
class PluginInfo:
    """What the first entry of a plugin server's dump says."""

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
    if isinstance(dump, dict) and dump.get("Protocol", _PROTOCOL) != _PROTOCOL:
        raise SettingsError(f"the stand-in speaks {_PROTOCOL} only, not {dump['Protocol']}")
    plugins = dump.get("Plugins", dump) if isinstance(dump, dict) else dump
    try:
        return _plugin_info(plugins[0], server)
    except (KeyError, TypeError, IndexError) as error:
        text = f"not a plugin info table: \n{server.query_cmd}\n{as_text(output)}"
        raise SettingsError(f"failed loading external plugins: {text}") from error


def _plugin_info(info: Table, server: PluginServerSettings) -> PluginInfo:
    return PluginInfo(
        name=info["Name"],
        phases=tuple(info["Phases"]),
        priority=int(info["Priority"]),
        version=str(info.get("Version", "")),
        schema=dict(info["Schema"]),
        server=server,
    )


class ExternalPlugin:
    """One external plugin in one worker."""

    def __init__(
        self, info: PluginInfo, log: ErrorLog, log_phases: LogPhases, forget_everywhere: Callable[[str], None]
    ) -> None:
        self.info = info
        self._log = log
        self._log_phases = log_phases
        self._forget_everywhere = forget_everywhere
        self._server_pid: Value = None
        self._rpc = RpcClient(info.server.socket, log, self._notified)
        self._instances = InstanceTable(info.name, self._rpc, log, log_phases)

    async def access(self, exchange: Exchange, config: Table) -> None:
        """Run the access phase.

        Raises:
            LuaError: something raised; Kong answers the request with a 500.
            PluginExit: the plugin answered the request.

        """
        functions = pdk.access_functions(exchange, self._log, self.info.name, config)
        answer = await self._handle(config, "access", functions)
        if answer is not None:
            exchange.access_answers[self.info.name] = answer

    async def log(self, saved: Saved, config: Table) -> None:
        """Run the log phase; what raises there is logged and ends it."""
        answer = None
        try:
            answer = await self._handle(config, "log", pdk.log_functions(saved, self._log, self.info.name, config))
        except LuaError as error:
            self._log.write("error", f"lua entry thread aborted: runtime error: {error}, context: ngx.timer")
        finally:
            self._log_phases.note(self.info.name, saved, answer)

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
                return await self._run_event(instance, phase, functions)
            except RpcError as error:
                if "no plugin instance" not in str(error).lower():
                    self._log.error(f"mp_rpc.lua: {error}")
                    return None
                self._log.kong("warn", f"mp_rpc.lua: {error}")
                self._forget_everywhere(self.info.name)

    async def _run_event(self, instance: Instance, phase: str, functions: Mapping[str, Function]) -> Answer:
        answered = await self._rpc.ask("plugin.HandleEvent", {"InstanceId": instance.id, "EventName": phase})
        step = answered.result
        event = None if step is None else _member(step, b"EventId")
        while step is not None and _member(step, b"Data") != _DONE:
            data = _member(step, b"Data")
            name = as_text(_member(data, b"Method") or b"")
            result = pdk.call(functions, self._log, name, _member(data, b"Args"))
            argument = {"EventId": event} if result is None else {"EventId": event, "Data": result}
            answered = await self._rpc.ask(pdk.step_method(name), argument)
            step = answered.result
        # A connection may change hands between two answers, but an event is known in the process of its instance only.
        return Answer(answered.at, instance.server_pid)

    def _notified(self, label: str, argument: Value) -> None:
        if label != "serverPid":
            return
        if self._server_pid is not None and self._server_pid != argument:
            self._instances.forget()
        self._server_pid = argument


def _member(table: Value, name: bytes) -> Value:
    if not isinstance(table, dict):
        raise LuaError(f"attempt to index field '{as_text(name)}' (a {type(table).__name__} value)")
    return table.get(name)
