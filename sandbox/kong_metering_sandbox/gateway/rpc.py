"""What Kong's two protocols have in common: how a worker starts and closes instances, and runs their phases."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .pdk import Function
    from .values import Table, Value


class RpcError(Exception):
    """The plugin server could not be reached, did not answer, or answered with an error; the text says which."""


class Rpc(Protocol):
    """One worker's way to call one plugin server.

    Every method raises `RpcError` where Kong's code gets an error back, and `LuaError` where it raises.
    """

    source: str
    """The file of Kong's that does this, for the log."""

    async def start_instance(self, plugin: str, config: Table) -> int | None:
        """Start an instance and return its id; None when the answer has none."""
        ...

    async def close_instance(self, instance_id: int) -> None:
        """Close an instance."""
        ...

    async def run_event(self, instance_id: int | None, phase: str, functions: Mapping[str, Function]) -> float:
        """Run a phase, with the PDK functions that it may call; return when it ended (monotonic clock)."""
        ...

    def needs_new_instance(self, error: RpcError) -> bool:
        """Whether an event that failed so is sent again, to a new instance."""
        ...

    def give_up(self, error: RpcError, functions: Mapping[str, Function]) -> None:
        """Deal with an event that failed for good.

        Raises:
            PluginExit: this is the client's answer.
            LuaError: there is no client any more who could be answered.

        """
        ...

    async def ask(self, method: str, argument: Value) -> Value:
        """Make a MessagePack call that Kong does not make, for the notes of log phases."""
        ...

    def close(self) -> None:
        """Close the idle connections."""
        ...
