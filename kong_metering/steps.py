"""Phases that a host can run without a thread of their own: in steps, or at once.

In steps, a phase is a generator that yields the PDK call it wants made, and is sent its result. A phase that knows
beforehand all that it will ask, and needs Kong for nothing afterwards, can say so (`AtOnce`): over `ProtoBuf:1`, which
lets all calls of a phase go out together, it then takes one round trip, and Kong does not wait for the plugin at all.

A host that knows of steps, as this package's does, sends each result with Kong's next RPC, and needs no greenlet or
thread for a phase: that takes a sixth to a fifth off the CPU of a whole request (`docs/benchmarks.md`). For every other
host `run_steps` makes the calls on the `kong` object, so that the same code is an ordinary phase of an ordinary plugin.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple, TypeVar

from kong_pdk.exception import PDKException

T = TypeVar("T")


class PDKCall(NamedTuple):
    """A PDK function that Kong is to run, such as `kong.request.get_header`, with its arguments."""

    method: str
    arguments: tuple[object, ...] = ()


Steps = Generator[PDKCall, Any, T]


@dataclass(frozen=True, eq=False)
class AtOnce:
    """A phase that knows beforehand what it asks.

    `finish` gets the results of `calls`, in their order, and does the rest of the phase; Kong may have gone on long
    before. `give_up` is called in its place when the results do not come.
    """

    calls: tuple[PDKCall, ...]
    finish: Callable[[Sequence[Any]], None]
    give_up: Callable[[], None] = lambda: None


def call(method: str, *arguments: object) -> PDKCall:
    """Name a PDK call; yielded in a phase, it gives its result or raises `PDKException`."""
    return PDKCall(method, arguments)


def run_steps(steps: Steps[None], kong: Any) -> None:
    """Run a phase in steps as an ordinary one, on the `kong` object of whatever host it is."""
    try:
        wants = next(steps)
        while True:
            try:
                value = _value(_function(kong, wants.method)(*wants.arguments))
            except PDKException as error:
                wants = steps.throw(error)
            else:
                wants = steps.send(value)
    except StopIteration:
        return


def _function(kong: Any, method: str) -> Any:
    return reduce(getattr, method.split(".")[1:], kong)


def _value(answer: Any) -> Any:
    """Take a PDK function's value; kong-pdk's server without --no-lua-style gives a pair of value and error."""
    if isinstance(answer, tuple):
        value, error = answer
        if error:
            raise PDKException(error)
        return value
    return answer
