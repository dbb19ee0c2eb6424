"""One worker's table of plugin instances: started at the first request, replaced when the configuration changes."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .context import LuaError
from .rpc import RpcClient, RpcError
from .values import Table, encode_json

if TYPE_CHECKING:
    from .errlog import ErrorLog
    from .logphases import LogPhases

_STEP = 0.1  # seconds between two looks at an instance that somebody else is starting, as in Kong
_MAX_STEPS = 100


@dataclass(frozen=True)
class Instance:
    """A plugin instance; `server_pid` is the process that it lives in, as far as the notes of log phases need it."""

    id: int
    server_pid: int


@dataclass
class _Claim:
    sequence: int
    instance: Instance | None = None


class InstanceTable:
    """The instances of one external plugin in one worker, by the id of the plugin entity."""

    def __init__(self, plugin: str, rpc: RpcClient, log: ErrorLog, log_phases: LogPhases) -> None:
        self._plugin = plugin
        self._rpc = rpc
        self._log = log
        self._log_phases = log_phases
        self._running: dict[str, _Claim] = {}

    async def get(self, config: Table) -> Instance:
        """Return the instance for a configuration; the first to ask starts it, the others wait.

        Raises:
            RpcError: nobody managed to start it within ten seconds.
            LuaError: it could not be started by this call.

        """
        key = config["__plugin_id"]
        found = await self._wait_for_others(key)
        if found is not None and found.instance is not None and found.sequence == config["__seq__"]:
            return found.instance
        claim = self._running[key] = _Claim(config["__seq__"])
        try:
            claim.instance = await self._start(config)
        except BaseException:
            self._running.pop(key, None)
            raise
        if found is not None and found.instance is not None:
            await self._close(found.instance.id)
        return claim.instance

    async def _wait_for_others(self, key: str) -> _Claim | None:
        steps = 0
        claim = self._running.get(key)
        while claim is not None and claim.instance is None:
            await asyncio.sleep(_STEP)
            steps += 1
            if steps > _MAX_STEPS:
                self._running.pop(key, None)
                raise RpcError(f"Could not claim instance_id for {self._plugin} (key: {key})")
            claim = self._running.get(key)
        return claim

    async def _start(self, config: Table) -> Instance:
        argument = {"Name": self._plugin, "Config": encode_json(config)}
        try:
            status = await self._rpc.call("plugin.StartInstance", argument)
        except RpcError as error:
            self._log.error(f"plugin.lua: starting instance: {error}")
            raise LuaError(str(error)) from error
        if not isinstance(status, dict) or not isinstance(status.get(b"Id"), int):
            raise LuaError("attempt to index a nil value (the answer to StartInstance has no Id)")
        instance_id: int = status[b"Id"]
        return Instance(instance_id, await self._log_phases.process_of(instance_id, self._rpc.call))

    async def _close(self, instance_id: int) -> None:
        try:
            await self._rpc.call("plugin.CloseInstance", instance_id)
        except RpcError as error:
            self._log.notice(f"closing instance {instance_id}: {error}")

    def forget(self) -> None:
        """Forget every instance that has been started; the next event starts a new one."""
        self._running = {key: claim for key, claim in self._running.items() if claim.instance is None}
