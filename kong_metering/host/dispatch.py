"""What each RPC of `MsgPack:1` does: starts and closes instances, takes events step by step through their phases.

Contract: one `Dispatcher` for a process, used from the event loop's thread only. `answer` never waits and always
answers: plugin code runs in it up to its next PDK call. Steps of one event may come over any connection.

Ids of events begin at a random number and are never used twice, not even by the next process: Kong keeps using those
of a process that is gone. For the same reason an instance that is not there is answered with `no plugin instance`: Kong
then starts one and sends the event again. A phase that Kong does not go on with is
forgotten after `phase_timeout` seconds.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kong_pdk.exception import PDKException

from kong_metering.host.errors import RPCError
from kong_metering.host.instances import Instance, Instances, Phase, PluginDefinition
from kong_metering.host.pdk import TERMINAL_METHODS
from kong_metering.log import LOGGER, cause_of, printable, trouble

if TYPE_CHECKING:
    from kong_metering.clock import Clock
    from kong_metering.host.renewal import Renewal
    from kong_metering.steps import Steps

# Kong's Lua numbers are doubles, exact up to 2^53.
_LARGEST_FIRST_ID = 2**52
_STEPS = (
    "Step",
    "StepMultiMap",
    "StepConsumer",
    "StepRoute",
    "StepService",
    "StepCredential",
    "StepMemoryStats",
)
_RETURN = {"Data": "ret"}


class _Event:
    """One phase under way: its steps, and the PDK function that it waits for; slots, for it is made for each."""

    __slots__ = ("begun_at", "instance", "method", "phase", "steps", "touched_at")

    def __init__(self, steps: Steps[None], instance: Instance, phase: Phase, begun_at: float) -> None:
        self.steps = steps
        self.instance = instance
        self.phase = phase
        self.method = ""
        self.begun_at = self.touched_at = begun_at


@dataclass(frozen=True)
class Limits:
    """How long what Kong forgot is kept, in seconds."""

    phase_timeout: float = 60.0
    instance_ttl: float = 3600.0


class Dispatcher:
    """Answers RPCs."""

    def __init__(self, plugin: PluginDefinition, *, clock: Clock, limits: Limits | None = None) -> None:
        limits = limits or Limits()
        self.instances = Instances(plugin, clock, limits.instance_ttl)
        self._plugin = plugin
        self._now = clock.monotonic
        self._phase_timeout = limits.phase_timeout
        self._ids = _ids()
        self._events: dict[int, _Event] = {}
        self._methods: dict[str, Callable[[Any], object]] = {
            "plugin.StartInstance": self._start_instance,
            "plugin.CloseInstance": self._close_instance,
            "plugin.HandleEvent": self._handle_event,
            "plugin.StepError": self._step_error,
            "plugin.GetStatus": self._get_status,
            "plugin.GetPluginInfo": self._get_plugin_info,
            **{f"plugin.{step}": self._step for step in _STEPS},
        }

    def answer(self, method: str, argument: Any) -> object:
        """Do what an RPC asks for and give its result; raises `RPCError` with the text that Kong is to get."""
        function = self._methods.get(method)
        if function is None:
            raise RPCError(f"RPC method {printable(method)} is not supported")
        return function(argument)

    @property
    def renewal(self) -> Renewal:
        """What Kong is told for it to start instances anew."""
        return self.instances.renewal

    @property
    def events_under_way(self) -> int:
        """How many phases wait for what Kong will send."""
        return len(self._events)

    def sweep(self) -> None:
        """Forget what Kong has forgotten; to be called every few seconds."""
        now = self._now()
        expired = [key for key, event in self._events.items() if now - event.touched_at >= self._phase_timeout]
        for event_id in expired:
            event = self._events.pop(event_id)
            LOGGER.error(
                "a pending %s phase was forgotten: Kong did not go on with it for %.0f s",
                event.phase.name,
                self._phase_timeout,
                extra=trouble(f"abandoned:{event.phase.name}"),
            )
            self._abandon(event)
        self.instances.close_unused()
        self.instances.renew()

    def close(self) -> None:
        """Forget all events and instances; the process ends."""
        for event in self._events.values():
            self._abandon(event)
        self._events.clear()
        self.instances.close_all()

    # -- instances --------------------------------------------------------------------------------------------------

    def _start_instance(self, argument: Any) -> object:
        name, config = _member(argument, "Name"), _member(argument, "Config")
        instance_id = self.instances.start(name, config)
        # The configuration is not given back: it holds the token, and Kong does not read it.
        return {"Name": name, "Id": instance_id, "Config": {}, "StartTime": int(self.instances.times.last_start)}

    def _close_instance(self, instance_id: Any) -> object:
        self._instance(instance_id)
        self.instances.close(instance_id)
        return {"Name": self._plugin.name, "Id": instance_id, "Config": {}}

    def _instance(self, instance_id: Any) -> Instance:
        instance = self.instances.get(instance_id)
        if instance is None:
            # Kong looks for these very words, and then starts the instance again.
            raise RPCError(f"no plugin instance #{printable(str(instance_id))}")
        return instance

    # -- events -----------------------------------------------------------------------------------------------------

    def _handle_event(self, argument: Any) -> object:
        # When two configurations of an entity meet, Kong 3.9 sends the event without `InstanceId` (measured).
        instance = self._instance(_member(argument, "InstanceId", required=False))
        name = _member(argument, "EventName")
        phase = instance.phases.get(name) if isinstance(name, str) else None
        if phase is None:
            raise RPCError(f"{self._plugin.name} has no phase {printable(str(name))}")
        self.instances.enter(instance)
        event_id, event = next(self._ids), _Event(phase.steps(), instance, phase, instance.used_at)
        self._events[event_id] = event
        answer = self._gone_on(event_id, event, None)
        # Kong reads the id of an event from this first answer only.
        return answer if answer is _RETURN else {"EventId": event_id, **answer}

    def _step(self, argument: Any) -> object:
        try:
            event_id = argument["EventId"]
            event = self._events[event_id]
        except (KeyError, TypeError):
            raise self._unknown_event(argument) from None
        event.touched_at = self._now()
        return self._gone_on(event_id, event, argument.get("Data"))

    def _step_error(self, argument: Any) -> object:
        event_id = _member(argument, "EventId")
        event = self._events.get(event_id) if isinstance(event_id, int) else None
        if event is None:
            raise self._unknown_event(argument)
        event.touched_at = self._now()
        error = PDKException(f"exception from {event.method}: {argument.get('Data') or 'unknown error'}")
        return self._gone_on(event_id, event, None, error)

    def _unknown_event(self, argument: Any) -> RPCError:
        return RPCError(f"event id {printable(str(_member(argument, 'EventId')))} not found")

    def _gone_on(
        self, event_id: int, event: _Event, value: object, error: PDKException | None = None
    ) -> Mapping[str, object]:
        """Let a phase go on with what Kong sent; answer with the PDK call that it makes, or that it is over."""
        try:
            method, arguments = event.steps.send(value) if error is None else event.steps.throw(error)
        except StopIteration:
            return self._finished(event_id, event)
        except BaseException as raised:  # noqa: BLE001 - sys.exit() in a plugin must not end the host
            LOGGER.error(
                "the %s phase failed, the request goes on: %s",
                event.phase.name,
                cause_of(raised),
                extra=trouble(f"phase:{event.phase.name}:{type(raised).__name__}"),
            )
            return self._finished(event_id, event)
        event.method = method
        if method in TERMINAL_METHODS:
            self._abandon(self._events.pop(event_id))
        return {"Data": {"Method": method, "Args": arguments} if arguments else {"Method": method}}

    def _finished(self, event_id: int, event: _Event) -> Mapping[str, object]:
        del self._events[event_id]
        self.instances.finish(event.instance, event.phase, event.begun_at)
        return _RETURN

    def unsayable(self, argument: Any, result: Any, error: Exception) -> object:
        """Answer in place of a result that MessagePack cannot say: the arguments of a PDK call; its event ends."""
        ids = [part.get("EventId") for part in (result, argument) if isinstance(part, dict)]
        event = next((self._events.pop(event_id) for event_id in ids if event_id in self._events), None)
        if event is not None:
            self._abandon(event)
        LOGGER.error(
            "a PDK call has arguments that cannot be sent to Kong: %s", cause_of(error), extra=trouble("unsayable")
        )
        return _RETURN

    def _abandon(self, event: _Event) -> None:
        try:
            event.steps.close()
        except BaseException as error:  # noqa: BLE001 - whatever a phase does when it is ended
            LOGGER.error("a phase failed while it was ended: %s", cause_of(error), extra=trouble("abandon"))
        self.instances.leave(event.instance)

    # -- information --------------------------------------------------------------------------------------------------

    def _get_status(self, _argument: Any) -> object:
        instances = [
            {"Name": self._plugin.name, "Id": instance_id, "Config": {}, "StartTime": int(instance.started_at)}
            for instance_id, instance in self.instances.all().items()
        ]
        plugin = {
            "Name": self._plugin.name,
            "Modtime": int(self.instances.times.loaded),
            "LoadTime": int(self.instances.times.loaded),
            "Instances": instances,
            "LastStartInstance": int(self.instances.times.last_start),
            "LastCloseInstance": int(self.instances.times.last_close),
            "Events": len(self._events),
            "Status": dict(self._plugin.status()),
        }
        return {"Pid": os.getpid(), "Plugins": {self._plugin.name: plugin}}

    def _get_plugin_info(self, name: Any) -> object:
        if name != self._plugin.name:
            raise RPCError(f"plugin {printable(str(name))} is not served here, only {self._plugin.name} is")
        return self._plugin.info


def _ids() -> Iterator[int]:
    first = secrets.randbelow(_LARGEST_FIRST_ID) + 1
    return iter(range(first, 2**53))


def _member(argument: Any, name: str, *, required: bool = True) -> Any:
    value = argument.get(name) if isinstance(argument, dict) else None
    if value is None and required:
        raise RPCError(f"{name} is missing")
    return value
