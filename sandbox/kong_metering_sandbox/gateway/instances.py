"""One worker's table of plugin instances: started at the first request, replaced when the configuration changes.

What the table holds is shared by all requests of the worker and changes while they wait, exactly as in Kong: somebody
who has started an instance may find that another request, with another configuration, is starting the next one already,
and gets no instance then.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .context import LuaError
from .logphases import UNKNOWN_PROCESS
from .rpc import RpcError

if TYPE_CHECKING:
    from .errlog import ErrorLog
    from .logphases import LogPhases
    from .rpc import Rpc
    from .values import Table

_STEP = 0.1  # seconds between two looks at an instance that somebody else is starting, as in Kong
_MAX_STEPS = 100


@dataclass(frozen=True)
class Instance:
    """A plugin instance, or none (`id` is None) where another request took it away.

    `server_pid` is the process that it lives in, as far as the notes of log phases need it.
    """

    id: int | None
    server_pid: int


@dataclass
class _Record:
    """What is known of an entity's instance; while `id` is None, somebody starts one (or has failed to say so)."""

    sequence: int
    id: int | None = None
    server_pid: int = UNKNOWN_PROCESS
    was_started: bool = False


class InstanceTable:
    """The instances of one external plugin in one worker, by the id of the plugin entity."""

    def __init__(self, plugin: str, rpc: Rpc, log: ErrorLog, log_phases: LogPhases) -> None:
        self._plugin = plugin
        self._rpc = rpc
        self._log = log
        self._log_phases = log_phases
        self._running: dict[str, _Record] = {}

    async def get(self, config: Table) -> Instance:
        """Return the instance for a configuration; the first to ask starts it, the others wait.

        Raises:
            RpcError: nobody managed to start it within ten seconds.
            LuaError: it could not be started by this call.

        """
        key = config["__plugin_id"]
        record = await self._wait_for_others(key)
        if record is not None and record.id is not None and record.sequence == config["__seq__"]:
            return Instance(record.id, record.server_pid)
        old_id = None
        if record is None:
            record = self._running[key] = _Record(config["__seq__"])
        else:
            old_id, record.id = record.id, None
        await self._start(record, key, config)
        if old_id is not None:
            with contextlib.suppress(RpcError):
                await self._rpc.close_instance(old_id)
        return Instance(record.id, record.server_pid)

    async def _wait_for_others(self, key: str) -> _Record | None:
        steps = 0
        record = self._running.get(key)
        while record is not None and record.id is None:
            await asyncio.sleep(_STEP)
            steps += 1
            if steps > _MAX_STEPS:
                self._running.pop(key, None)
                raise RpcError(f"Could not claim instance_id for {self._plugin} (key: {key})")
            record = self._running.get(key)
        return record

    async def _start(self, record: _Record, key: str, config: Table) -> None:
        """Start an instance and put it into the record.

        What raises leaves the record without an id: others wait for it in vain. An error takes the record away.
        """
        try:
            started = await self._rpc.start_instance(self._plugin, config)
        except RpcError as error:
            self._log.error(f"plugin.lua: starting instance: {error}")
            self._running.pop(key, None)
            raise LuaError(str(error)) from error
        if started is not None:
            # Before others see the instance, so that what they note names the process, too.
            record.server_pid = await self._log_phases.process_of(started, self._rpc.ask)
        record.id = started
        record.sequence = config["__seq__"]
        record.was_started = True

    def forget(self) -> None:
        """Forget every instance that has been started, also one that is being replaced; the next event starts one."""
        self._running = {key: record for key, record in self._running.items() if not record.was_started}
