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

_STEP = 0.1  # seconds between two looks at an instance that somebody else is starting, as in Kong
_MAX_STEPS = 100


@dataclass
class _Instance:
    sequence: int
    id: int | None = None


class InstanceTable:
    """The instances of one external plugin in one worker, by the id of the plugin entity."""

    def __init__(self, plugin: str, rpc: RpcClient, log: ErrorLog) -> None:
        self._plugin = plugin
        self._rpc = rpc
        self._log = log
        self._running: dict[str, _Instance] = {}

    async def get_id(self, config: Table) -> int:
        """Return the instance for a configuration; the first to ask starts it, the others wait.

        Raises:
            RpcError: nobody managed to start it within ten seconds.
            LuaError: it could not be started by this call.

        """
        key = config["__plugin_id"]
        instance = await self._wait_for_others(key)
        if instance is not None and instance.id is not None and instance.sequence == config["__seq__"]:
            return instance.id
        old_id = instance.id if instance is not None else None
        claim = self._running[key] = _Instance(config["__seq__"])
        claim.id = await self._start(key, config)
        if old_id is not None:
            await self._close(old_id)
        return claim.id

    async def _wait_for_others(self, key: str) -> _Instance | None:
        steps = 0
        instance = self._running.get(key)
        while instance is not None and instance.id is None:
            await asyncio.sleep(_STEP)
            steps += 1
            if steps > _MAX_STEPS:
                self._running.pop(key, None)
                raise RpcError(f"Could not claim instance_id for {self._plugin} (key: {key})")
            instance = self._running.get(key)
        return instance

    async def _start(self, key: str, config: Table) -> int:
        argument = {"Name": self._plugin, "Config": encode_json(config)}
        try:
            status = await self._rpc.call("plugin.StartInstance", argument)
        except RpcError as error:
            self._log.error(f"plugin.lua: starting instance: {error}")
            self._running.pop(key, None)
            raise LuaError(str(error)) from error
        except BaseException:
            self._running.pop(key, None)
            raise
        if not isinstance(status, dict) or not isinstance(status.get(b"Id"), int):
            self._running.pop(key, None)
            raise LuaError("attempt to index a nil value (the answer to StartInstance has no Id)")
        found: int = status[b"Id"]
        return found

    async def _close(self, instance_id: int) -> None:
        try:
            await self._rpc.call("plugin.CloseInstance", instance_id)
        except RpcError as error:
            self._log.notice(f"closing instance {instance_id}: {error}")

    def forget(self) -> None:
        """Forget every instance that has been started; the next event starts a new one."""
        self._running = {key: instance for key, instance in self._running.items() if instance.id is None}
