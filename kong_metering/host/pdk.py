"""The `kong` object that a phase gets, and the greenlet that runs the phase.

Plugin code is synchronous: `kong.request.get_header("x")` returns the header. Here, such a call switches out of the
phase's greenlet with the call to make; Kong's next RPC brings the result, and the phase goes on. So plugin code runs
one step at a time, on the event loop's thread, and nothing is held while it waits for Kong.

The behaviour is that of kong-pdk's own `Kong` object in its python style (a test compares them); it is not used itself
because it looks every PDK function up anew, at ten times the cost. Greenlets are kept for the next phase, for a new one
costs several times what the phase does. A phase in steps (`steps.py`) needs neither.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from greenlet import GreenletExit, getcurrent, greenlet
from kong_pdk.exception import PDKException

from kong_metering.steps import PDKCall, Steps

# PDK functions that end the request in Kong: no RPC follows, and the phase never continues.
_IDLE_RUNNERS = 256
TERMINAL_METHODS = frozenset({"kong.response.exit", "kong.response.error"})


class Done(NamedTuple):
    """The phase has returned, or raised `error`."""

    error: BaseException | None = None


FINISHED = Done()


class PDKFunction:
    """`kong` and everything below it: attributes name a PDK function, calling it runs it in Kong."""

    def __init__(self, name: str, call: Callable[[str, tuple[object, ...]], Any]) -> None:
        self._name = name
        self._call = call

    def __getattr__(self, name: str) -> PDKFunction:
        if name.startswith("__"):
            raise AttributeError(name)
        # Kept, so that the next look-up does not come here.
        function = self.__dict__[name] = PDKFunction(f"{self._name}.{name}", self._call)
        return function

    def __call__(self, *arguments: object) -> Any:
        """Have Kong run this function; raises `PDKException` if Kong answers with an error."""
        return self._call(self._name, arguments)


Phase = Callable[[Any], object]


class PhaseRunner:
    """Runs phases in a greenlet of its own, one after another.

    It belongs to the thread and greenlet that made it. `start` and `resume` return what the phase wants next.
    """

    def __init__(self) -> None:
        self._host = getcurrent()
        self._kong = PDKFunction("kong", self._call)
        self._greenlet = self._started_greenlet()

    def start(self, phase: Phase) -> PDKCall | Done:
        """Run a phase up to its first PDK call, or its end."""
        return self._switched(phase)

    def resume(self, value: object, error: object = None) -> PDKCall | Done:
        """Let the phase go on with the result of its PDK call, up to the next one, or its end."""
        return self._switched((value, error))

    def abandon(self) -> None:
        """End the phase where it stands; this runner is not used again. Raises what the phase raises on its way out."""
        # Not from within another phase, where the garbage collector may end a forgotten one: the switch would come
        # back to the wrong place.
        if not self._greenlet.dead and getcurrent() is self._host:
            self._greenlet.throw(GreenletExit)

    def _switched(self, value: object) -> PDKCall | Done:
        try:
            wants = self._greenlet.switch(value)
        except BaseException as error:  # noqa: BLE001 - sys.exit() in a plugin must not end the host either
            return self._failed(error)
        if isinstance(wants, GreenletExit):  # it comes back instead of being raised
            return self._failed(wants)
        assert isinstance(wants, (PDKCall, Done))  # noqa: S101 - for the type checker; `_run` switches with nothing else
        return wants

    def _failed(self, error: BaseException) -> Done:
        """Tell of an error that has left the greenlet, which is dead now; the next phase gets another one."""
        self._greenlet = self._started_greenlet()
        return Done(error)

    def _started_greenlet(self) -> greenlet:
        """Make a greenlet that waits for its first phase as it will for others: it must not keep that one alive."""
        started = greenlet(self._run)
        started.switch()
        return started

    def _run(self) -> None:
        while True:
            phase = self._host.switch(FINISHED)
            phase(self._kong)
            del phase

    def _call(self, method: str, arguments: tuple[object, ...]) -> Any:
        if method == "kong.log" or method.startswith("kong.log."):
            arguments = tuple(item if type(item) in (str, int, list, dict) else str(item) for item in arguments)
        value, error = self._host.switch(PDKCall(method, arguments))
        if error:
            raise error if isinstance(error, PDKException) else PDKException(f"exception from {method}: {error}")
        return value


class Greenlets:
    """Lets ordinary phases run as if they came in steps; greenlets are kept for the next ones."""

    def __init__(self) -> None:
        self._idle: list[PhaseRunner] = []

    def steps(self, phase: Phase) -> Steps[None]:
        """Run a phase; raises what it raises."""
        runner = self._idle.pop() if self._idle else PhaseRunner()
        wants = runner.start(phase)
        try:
            while isinstance(wants, PDKCall):
                try:
                    value = yield wants
                except PDKException as error:
                    wants = runner.resume(None, error)
                else:
                    wants = runner.resume(value)
        except GeneratorExit:
            runner.abandon()
            raise
        if len(self._idle) < _IDLE_RUNNERS:
            self._idle.append(runner)
        if wants.error is not None:
            try:
                raise wants.error
            finally:
                # The error's traceback leads here: what the phase had at hand would wait for the garbage collector.
                del wants
