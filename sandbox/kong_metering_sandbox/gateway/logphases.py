"""What became of the log phases of external plugins: for those who compare it with what was delivered.

Contract: a line of JSON for each log phase that is over, written with one `write` at the end of the file, so that a
gateway that starts again goes on where the one before it ended.

Who answers is whoever has the instance. The connection does not tell: at a reload the next plugin server takes over the
connections of the one before, and the system goes on naming the process that listened when a connection was made.
"""

from __future__ import annotations

import json
import os
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias

from .context import LuaError
from .rpc import RpcError

if TYPE_CHECKING:
    from .context import Answer, Saved
    from .values import Value

    Call: TypeAlias = Callable[[str, Value], Awaitable[Value]]

# No process has this id, so no process's SIGKILL can excuse an event that an unknown one had taken.
UNKNOWN_PROCESS = 0


@dataclass(frozen=True)
class LogPhase:
    """One log phase; `answered_at` (monotonic clock) and `server_pid` are None when it was not answered to its end.

    `access_pid` is the process that answered the access phase of the request, None when it had none, or no answer.
    Either is `UNKNOWN_PROCESS` when there was an answer, and it could not be found out whose.
    """

    target: str
    request_id: str
    plugin: str
    answered_at: float | None
    server_pid: int | None
    access_pid: int | None


class LogPhases(Protocol):
    """Where log phases are noted."""

    async def process_of(self, instance_id: int, call: Call) -> int:
        """Tell the process of an instance that has just been started, if that is to be noted."""
        ...

    def note(self, plugin: str, saved: Saved, answer: Answer | None) -> None:
        """Note a log phase that is over; None for one that was not answered to its end."""
        ...


class NoLogPhases:
    """Notes nothing."""

    async def process_of(self, instance_id: int, call: Call) -> int:  # noqa: ARG002 - the protocol's signature
        """Ask nobody: without notes a plugin server gets the same RPCs as from Kong."""
        return UNKNOWN_PROCESS

    def note(self, plugin: str, saved: Saved, answer: Answer | None) -> None:
        """Forget it."""


class LogPhaseFile:
    """Notes log phases in a file."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    async def process_of(self, instance_id: int, call: Call) -> int:
        """Ask whoever answers now for its process; it counts only if it has the instance.

        Between the two answers another process may have taken over, or the one with the instance been killed. Nobody is
        asked again then: the next event hears that there is no such instance, and starts one.
        """
        try:
            status = await call("plugin.GetStatus", None)
        except (RpcError, LuaError):
            return UNKNOWN_PROCESS
        instances = (one[b"Id"] for plugin in status[b"Plugins"].values() for one in plugin[b"Instances"])
        pid: int = status[b"Pid"] if instance_id in instances else UNKNOWN_PROCESS
        return pid

    def note(self, plugin: str, saved: Saved, answer: Answer | None) -> None:
        """Write the line."""
        exchange = saved.exchange
        answered_at, pid = (answer.at, answer.server_pid) if answer else (None, None)
        access = exchange.access_answers.get(plugin)
        phase = LogPhase(
            target=exchange.head.target.decode("latin-1"),
            request_id=exchange.request_id,
            plugin=plugin,
            answered_at=answered_at,
            server_pid=pid,
            access_pid=access.server_pid if access else None,
        )
        os.write(self._file, json.dumps(asdict(phase)).encode("ascii") + b"\n")


def read_log_phases(path: Path) -> Iterator[LogPhase]:
    """Read the file, in the order in which the log phases ended."""
    with path.open(encoding="ascii") as lines:
        for line in lines:
            yield LogPhase(**json.loads(line))
