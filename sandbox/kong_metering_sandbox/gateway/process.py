"""The plugin server's process: started the way nginx workers start it, watched, logged, respawned, stopped."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .errlog import ErrorLog

_RESPAWN_DELAY = 1.0  # seconds from one start to the next at the least
_KILL_DELAY = 0.03  # seconds from SIGTERM to SIGKILL
_DRAIN_TIME = 1.0  # seconds to wait for the last lines of a process that has been killed
_COMMAND_NOT_FOUND = 127
_READ_SIZE = 65536


class PluginServerProcess:
    """Keeps one plugin server running until `stop`.

    It gets no environment at all, umask 0, `/dev/null` to read from, and `inherited` file descriptors that
    are none of its business; what it prints goes to the error log line by line.
    """

    def __init__(self, name: str, command: str, log: ErrorLog, inherited: Sequence[int]) -> None:
        self._name = name
        self._command = command
        self._log = log
        self._inherited = tuple(inherited)
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = False
        self._supervisor: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start the process, without waiting until it is ready for anything."""
        self._supervisor = asyncio.create_task(self._supervise())

    async def stop(self) -> None:
        """Send SIGTERM, and SIGKILL 30 ms later if the process still lives."""
        self._stopping = True
        process, supervisor = self._process, self._supervisor
        if supervisor is None:
            return
        if process is None or process.returncode is not None:
            supervisor.cancel()  # it only waits for the time to respawn
            return
        await self._terminate(process)
        await asyncio.wait({supervisor}, timeout=_DRAIN_TIME)
        supervisor.cancel()

    async def _terminate(self, process: asyncio.subprocess.Process) -> None:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        self._log.notice(f"[pluginserver] successfully stopped pluginserver '{self._name}', pid {process.pid}")
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(process.wait(), _KILL_DELAY)
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()

    async def _supervise(self) -> None:
        next_spawn = 0.0
        while not self._stopping:
            await asyncio.sleep(max(0.0, next_spawn - time.monotonic()))
            self._log.notice(f"[pluginserver] starting pluginserver process for {self._name}")
            process = self._process = await self._spawn()
            next_spawn = time.monotonic() + _RESPAWN_DELAY
            self._log.notice(f"[pluginserver] started, pid {process.pid}")
            await self._grab_lines(process)
            self._report(await process.wait())
        self._log.notice(f"[pluginserver] exiting: pluginserver '{self._name}' not respawned.")

    async def _spawn(self) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            "/bin/sh",
            "-c",
            f"exec {self._command}",
            env={},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            umask=0,
            pass_fds=self._inherited,
        )

    async def _grab_lines(self, process: asyncio.subprocess.Process) -> None:
        if process.stdout is None:
            return
        rest = b""
        while True:
            data = await process.stdout.read(_READ_SIZE)
            *lines, rest = (rest + data).split(b"\n")
            for line in lines if data else [rest]:
                if line:
                    text = line.decode("utf-8", "replace")
                    self._log.write("info", f"[{self._name}:{process.pid}] {text}")
            if not data:
                return

    def _report(self, code: int) -> None:
        if code == _COMMAND_NOT_FOUND:
            self._log.error(
                f'[pluginserver] external pluginserver "{self._name}" start command "{self._command}"'
                ' exited with "command not found"'
            )
            return
        how = f"signal {-code}" if code < 0 else f"exit {code}"
        self._log.notice(f"external pluginserver '{self._name}' terminated: {how}")
