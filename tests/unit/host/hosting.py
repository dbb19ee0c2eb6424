"""A dispatcher with a plugin of the test's own, called as Kong's RPCs call it, without a socket."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import msgpack

from kong_metering.host.dispatch import Dispatcher, Limits
from kong_metering.host.instances import PluginDefinition
from kong_metering.host.mp_rpc import Answers
from kong_metering.log import LOGGER, Repeats
from tests.support.rpc import Answer, RPCFailedError

if TYPE_CHECKING:
    from tests.support.clock import FakeClock

NAME = "hosted"


class Lines(logging.Handler):
    """Keeps what is logged."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


class Host:
    """Hosts what `create` makes; `troubles` has the warnings and errors since the newest host was made."""

    def __init__(
        self,
        create: Callable[[Mapping[str, Any]], object],
        clock: FakeClock,
        *,
        limits: Limits | None = None,
        status: Callable[[], Mapping[str, Any]] = dict,
    ) -> None:
        lines = Lines(logging.WARNING)
        self.troubles = lines.lines
        self.repeats = Repeats(clock)
        # The process's log, which a fixture puts back as it was.
        LOGGER.handlers[:], LOGGER.filters[:] = [lines], [self.repeats]
        definition = PluginDefinition(NAME, ("access", "log"), create, {"Name": NAME, "Priority": 1}, status)
        self.dispatcher = Dispatcher(definition, clock=clock, limits=limits)
        self._answers = Answers(self.dispatcher)
        self._numbers = itertools.count(1)

    def answer(self, method: str, argument: object = None) -> Answer:
        """Do an RPC; `method` is the whole name."""
        number = next(self._numbers)
        packed = self._answers.answer(number, method, argument)
        kind, answered, error, result = msgpack.unpackb(packed, unicode_errors="surrogateescape", strict_map_key=False)
        assert (kind, answered) == (1, number)
        return Answer(answered, error, result)

    def call(self, method: str, argument: object = None) -> Any:
        """Do an RPC and give its result; raises `RPCFailedError` with the error that is answered."""
        answer = self.answer(f"plugin.{method}", argument)
        if answer.error is not None:
            raise RPCFailedError(answer.error)
        return answer.result

    def start(self, **config: object) -> int:
        return int(self.call("StartInstance", {"Name": NAME, "Config": json.dumps(config)})["Id"])

    def handle(self, instance_id: int, phase: str = "log") -> Any:
        return self.call("HandleEvent", {"InstanceId": instance_id, "EventName": phase})

    def step(self, event_id: int, data: object = None, form: str = "Step") -> Any:
        return self.call(form, {"EventId": event_id} if data is None else {"EventId": event_id, "Data": data})

    @property
    def plugin_status(self) -> dict[str, Any]:
        status: dict[str, Any] = self.call("GetStatus")["Plugins"][NAME]
        return status

    def instance_ids(self) -> list[int]:
        return [instance["Id"] for instance in self.plugin_status["Instances"]]


def hosting(phase: Callable[[Any], object], clock: FakeClock, limits: Limits | None = None) -> tuple[Host, int]:
    """Host a plugin whose phases are all this one; gives the id of its only instance as well."""

    class Plugin:
        def access(self, kong: Any) -> None:
            phase(kong)

        log = access

    host = Host(lambda _: Plugin(), clock, limits=limits)
    return host, host.start()
