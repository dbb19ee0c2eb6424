"""What each RPC of Kong does: plugin instances, and the events that run through them.

Contract: one `Dispatcher` for a process, used from the event loop's thread only. `answer` never waits and always
answers: plugin code runs in it up to its next PDK call. Steps of one event may come over any connection.

Ids of instances and events begin at a random number and are never used twice, not even by the next process: Kong keeps
using the ids of a process that is gone, and must be told `no plugin instance`, or another instance would run. An event
that Kong does not finish is forgotten after `event_ttl` seconds. An instance that Kong does not use for `instance_ttl`
seconds is closed once it is not busy: Kong never closes the instances of a deleted plugin.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from kong_pdk.exception import PDKException

from kong_metering.host.pdk import TERMINAL_METHODS, Greenlets
from kong_metering.log import LOGGER, cause_of, printable

if TYPE_CHECKING:
    from kong_metering.clock import Clock
    from kong_metering.log import TroubleLog
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


class RPCError(Exception):
    """An RPC that cannot be done; Kong gets the text."""


@dataclass(frozen=True)
class PluginDefinition:
    """The plugin that is hosted.

    `create` makes an instance from the configuration that Kong sent. An instance has a method for each phase, such as
    `access(kong)`, or the phase in steps, as `access_steps()`, or both; it may have `busy` (it must not be closed yet)
    and `close()`. `info` is what `plugin.GetPluginInfo` answers; `status` gives
    figures of the plugin's own for `plugin.GetStatus`.
    """

    name: str
    phases: tuple[str, ...]
    create: Callable[[Mapping[str, Any]], object]
    info: Mapping[str, Any]
    status: Callable[[], Mapping[str, Any]] = dict


@dataclass(frozen=True)
class _Phase:
    name: str
    steps: Callable[[], Steps[None]]


@dataclass
class _Instance:
    plugin: object
    phases: Mapping[str, _Phase]
    started_at: float
    used_at: float
    events: int = 0  # that are under way
    is_closed: bool = False


class _Event:
    """One phase under way: its steps, and the PDK function that it waits for; slots, for it is made for each."""

    __slots__ = ("instance", "method", "phase", "steps", "touched_at")

    def __init__(self, steps: Steps[None], instance: _Instance, phase: str, touched_at: float) -> None:
        self.steps = steps
        self.instance = instance
        self.phase = phase
        self.method = ""
        self.touched_at = touched_at


@dataclass
class _Times:
    loaded: float
    last_start: float = 0
    last_close: float = 0


@dataclass(frozen=True)
class Limits:
    """How long what Kong forgot is kept, in seconds."""

    event_ttl: float = 60.0
    instance_ttl: float = 3600.0


class Dispatcher:
    """Answers RPCs."""

    def __init__(
        self, plugin: PluginDefinition, *, clock: Clock, troubles: TroubleLog, limits: Limits | None = None
    ) -> None:
        self._plugin = plugin
        self._clock = clock
        self._now = clock.monotonic
        self._troubles = troubles
        self._limits = limits or Limits()
        self._ids = _ids()
        self._instances: dict[int, _Instance] = {}
        self._events: dict[int, _Event] = {}
        self._greenlets = Greenlets()
        self._times = _Times(loaded=clock.wall())
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
    def events_under_way(self) -> int:
        """How many phases wait for what Kong will send."""
        return len(self._events)

    def sweep(self) -> None:
        """Forget what Kong has forgotten; to be called every few seconds."""
        now = self._clock.monotonic()
        for event_id in self._expired_events(now):
            event = self._events.pop(event_id)
            self._troubles.report(
                f"abandoned:{event.phase}",
                f"an event was forgotten: Kong did not go on with its {event.phase} phase for "
                f"{self._limits.event_ttl:.0f} s",
            )
            self._abandon(event)
        for instance_id in self._unused_instances(now):
            LOGGER.info("instance %d was not used for a long time and is closed", instance_id)
            self._close(instance_id)

    def close(self) -> None:
        """Forget all events and instances; the process ends."""
        for event in self._events.values():
            self._abandon(event)
        self._events.clear()
        for instance_id in list(self._instances):
            self._close(instance_id)

    # -- instances --------------------------------------------------------------------------------------------------

    def _start_instance(self, argument: Any) -> object:
        name, config = _member(argument, "Name"), _member(argument, "Config")
        if name != self._plugin.name:
            raise RPCError(f"plugin {printable(str(name))} is not served here, only {self._plugin.name} is")
        plugin = self._plugin.create(_parsed(config))
        now, instance_id = self._clock.monotonic(), next(self._ids)
        phases = {phase: self._phase_of(plugin, phase) for phase in self._plugin.phases}
        self._instances[instance_id] = _Instance(plugin, phases, self._clock.wall(), now)
        self._times.last_start = self._clock.wall()
        LOGGER.debug("instance %d started", instance_id)
        # The configuration is not given back: it holds the token, and Kong does not read it.
        return {"Name": name, "Id": instance_id, "Config": {}, "StartTime": int(self._times.last_start)}

    def _phase_of(self, plugin: object, name: str) -> _Phase:
        steps = getattr(plugin, f"{name}_steps", None)
        return _Phase(name, steps or partial(self._greenlets.steps, getattr(plugin, name)))

    def _close_instance(self, instance_id: Any) -> object:
        self._instance(instance_id)
        self._close(instance_id)
        self._times.last_close = self._clock.wall()
        LOGGER.debug("instance %d closed", instance_id)
        return {"Name": self._plugin.name, "Id": instance_id, "Config": {}}

    def _close(self, instance_id: int) -> None:
        """Close an instance, once its last event is over: Kong may close it while a phase still runs."""
        instance = self._instances.pop(instance_id)
        instance.is_closed = True
        if instance.events == 0:
            self._close_plugin(instance)

    def _close_plugin(self, instance: _Instance) -> None:
        try:
            getattr(instance.plugin, "close", lambda: None)()
        except Exception as error:  # noqa: BLE001 - whatever a plugin does when it is closed
            self._troubles.report("close", f"an instance failed while it was closed: {cause_of(error)}")

    def _instance(self, instance_id: Any) -> _Instance:
        instance = self._instances.get(instance_id) if isinstance(instance_id, int) else None
        if instance is None:
            # Kong looks for these very words, and then starts the instance again.
            raise RPCError(f"no plugin instance #{printable(str(instance_id))}")
        return instance

    # -- events -----------------------------------------------------------------------------------------------------

    def _handle_event(self, argument: Any) -> object:
        try:
            instance = self._instances[argument["InstanceId"]]
            phase = instance.phases[argument["EventName"]]
        except (KeyError, TypeError):
            raise self._unknown_phase(argument) from None
        now = instance.used_at = self._now()
        instance.events += 1
        event_id, event = next(self._ids), _Event(phase.steps(), instance, phase.name, now)
        self._events[event_id] = event
        answer = self._gone_on(event_id, event, None)
        # Kong reads the id of an event from this first answer only.
        return answer if answer is _RETURN else {"EventId": event_id, **answer}

    def _unknown_phase(self, argument: Any) -> RPCError:
        # When two configurations of an entity meet, Kong 3.9 sends the event without `InstanceId`; these words make it
        # start one and send the event again, any others make it drop the event (measured).
        self._instance(_member(argument, "InstanceId", required=False))
        return RPCError(f"{self._plugin.name} has no phase {printable(str(_member(argument, 'EventName')))}")

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
            self._troubles.report(
                f"phase:{event.phase}:{type(raised).__name__}",
                f"the {event.phase} phase failed, the request goes on: {cause_of(raised)}",
            )
            return self._finished(event_id, event)
        event.method = method
        if method in TERMINAL_METHODS:
            self._abandon(self._events.pop(event_id))
        return {"Data": {"Method": method, "Args": arguments} if arguments else {"Method": method}}

    def _finished(self, event_id: int, event: _Event) -> Mapping[str, object]:
        del self._events[event_id]
        self._left(event)
        return _RETURN

    def unsayable(self, argument: Any, result: Any, error: Exception) -> object:
        """Answer in place of a result that MessagePack cannot say: the arguments of a PDK call; its event ends."""
        ids = [part.get("EventId") for part in (result, argument) if isinstance(part, dict)]
        event = next((self._events.pop(event_id) for event_id in ids if event_id in self._events), None)
        if event is not None:
            self._abandon(event)
        self._troubles.report("unsayable", f"a PDK call has arguments that cannot be sent to Kong: {cause_of(error)}")
        return _RETURN

    def _abandon(self, event: _Event) -> None:
        try:
            event.steps.close()
        except BaseException as error:  # noqa: BLE001 - whatever a phase does when it is ended
            self._troubles.report("abandon", f"a phase failed while it was ended: {cause_of(error)}")
        self._left(event)

    def _left(self, event: _Event) -> None:
        """Count the event as over; a closed instance waited for the last one."""
        instance = event.instance
        instance.events -= 1
        if instance.is_closed and instance.events == 0:
            self._close_plugin(instance)

    def _expired_events(self, now: float) -> list[int]:
        ttl = self._limits.event_ttl
        return [event_id for event_id, event in self._events.items() if now - event.touched_at >= ttl]

    def _unused_instances(self, now: float) -> list[int]:
        return [
            instance_id
            for instance_id, instance in self._instances.items()
            if now - instance.used_at >= self._limits.instance_ttl and not getattr(instance.plugin, "busy", False)
        ]

    # -- information --------------------------------------------------------------------------------------------------

    def _get_status(self, _argument: Any) -> object:
        instances = [
            {"Name": self._plugin.name, "Id": instance_id, "Config": {}, "StartTime": int(instance.started_at)}
            for instance_id, instance in self._instances.items()
        ]
        plugin = {
            "Name": self._plugin.name,
            "Modtime": int(self._times.loaded),
            "LoadTime": int(self._times.loaded),
            "Instances": instances,
            "LastStartInstance": int(self._times.last_start),
            "LastCloseInstance": int(self._times.last_close),
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


def _parsed(config: Any) -> Mapping[str, Any]:
    """Read the configuration that Kong sent; an unreadable one counts as empty, which the plugin refuses loudly."""
    try:
        parsed = json.loads(config)
    except (ValueError, TypeError, RecursionError):
        return {}
    return parsed if isinstance(parsed, dict) else {}
