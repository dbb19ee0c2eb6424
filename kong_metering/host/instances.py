"""Plugin instances: started and closed by Kong, kept while their events run, closed when Kong has forgotten them.

Contract: one `Instances` for a process, used from the event loop's thread only, whichever protocol Kong speaks. Ids
begin at a random number and go up, so that no id is used twice by a process, and an id that Kong still has from a
process that is gone means nothing to the next one. They fit into 31 bits, all that `ProtoBuf:1` has for them. An
instance that Kong does not use for `ttl` seconds is closed once it is not busy: Kong never closes the instances of a
deleted plugin.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from kong_metering.host.errors import RPCError
from kong_metering.host.pdk import Greenlets
from kong_metering.host.renewal import Renewal
from kong_metering.log import LOGGER, cause_of, printable, trouble

if TYPE_CHECKING:
    from kong_metering.clock import Clock
    from kong_metering.steps import AtOnce, Steps

_LARGEST_ID = 2**31 - 1


@dataclass(frozen=True)
class PluginDefinition:
    """The plugin that is hosted.

    `create` makes an instance from the configuration that Kong sent. An instance has a method for each phase, such as
    `access(kong)`, or the phase in steps, as `access_steps()`, or both. It may have `access_at_once()`, which gives the
    phase as an `AtOnce` when it knows beforehand what it will ask, and None otherwise; `busy` (it must not be closed
    yet), `outdated` (why Kong is to start it anew, or None; asked once a second) and `close()`. `info` is what
    `plugin.GetPluginInfo` answers; `status` gives figures of the plugin's own for `plugin.GetStatus`; `observers` are
    told, by the name of a phase, how many seconds each one took that came to its end.
    """

    name: str
    phases: tuple[str, ...]
    create: Callable[[Mapping[str, Any]], object]
    info: Mapping[str, Any]
    status: Callable[[], Mapping[str, Any]] = dict
    observers: Mapping[str, Callable[[float], None]] = field(default_factory=dict)


@dataclass(frozen=True)
class Phase:
    """A phase of one instance, in steps, and at once where it can be; `observe` is told how many seconds one took."""

    name: str
    steps: Callable[[], Steps[None]]
    at_once: Callable[[], AtOnce | None]
    observe: Callable[[float], None]


@dataclass(eq=False)
class Instance:
    """A plugin instance; `events` are those under way, `started_at` is wall clock, `born_at` and `used_at` monotonic.

    `is_outdated`: Kong is to start another one in its place.
    """

    plugin: object
    phases: Mapping[str, Phase]
    started_at: float
    born_at: float
    used_at: float
    events: int = 0
    is_closed: bool = False
    is_outdated: bool = False


@dataclass
class Times:
    """When (wall clock) the plugin was loaded, and an instance of it last started and closed; 0: never.

    `starts`: how many were started.
    """

    loaded: float
    starts: int = 0
    last_start: float = 0
    last_close: float = 0


@dataclass
class Instances:
    """All instances of the process."""

    plugin: PluginDefinition
    clock: Clock
    ttl: float
    times: Times = field(init=False)

    def __post_init__(self) -> None:
        self.times = Times(loaded=self.clock.wall())
        self._by_id: dict[int, Instance] = {}
        self._last_id = secrets.randbelow(_LARGEST_ID)
        self._greenlets = Greenlets()
        self.renewal = Renewal(self.clock)

    def __contains__(self, instance_id: object) -> bool:
        return instance_id in self._by_id

    def get(self, instance_id: object) -> Instance | None:
        """Return an instance, None where there is none of that id."""
        return self._by_id.get(instance_id) if type(instance_id) is int else None

    def all(self) -> dict[int, Instance]:
        """Return all instances by their ids."""
        return dict(self._by_id)

    def start(self, name: object, config: object) -> int:
        """Start an instance with a configuration, in JSON, and return its id.

        Raises `RPCError` for another plugin's name, and whatever the plugin raises.
        """
        if name != self.plugin.name:
            raise RPCError(f"plugin {printable(str(name))} is not served here, only {self.plugin.name} is")
        plugin = self.plugin.create(_parsed(config))
        phases = {phase: self._phase_of(plugin, phase) for phase in self.plugin.phases}
        now = self.times.last_start = self.clock.wall()
        self.times.starts += 1
        instance_id = self._next_id()
        born_at = self.clock.monotonic()
        self._by_id[instance_id] = Instance(plugin, phases, now, born_at, born_at)
        LOGGER.debug("instance %d started", instance_id)
        return instance_id

    def close(self, instance_id: int) -> None:
        """Close an instance that is there, as Kong wants."""
        self._close(instance_id)
        self.times.last_close = self.clock.wall()
        LOGGER.debug("instance %d closed", instance_id)

    def close_unused(self) -> None:
        """Close the instances that Kong has not used for long."""
        now = self.clock.monotonic()
        unused = [
            instance_id
            for instance_id, instance in self._by_id.items()
            if now - instance.used_at >= self.ttl and not getattr(instance.plugin, "busy", False)
        ]
        for instance_id in unused:
            LOGGER.info("instance %d has not been used for a long time and is closed", instance_id)
            self._close(instance_id)

    def renew(self) -> None:
        """Have Kong start instances anew, if there is reason to and it is time; to be called about once a second."""
        self.renewal.look(self._by_id.values())

    def close_all(self) -> None:
        """Close all instances; the process ends."""
        for instance_id in list(self._by_id):
            self._close(instance_id)

    def enter(self, instance: Instance) -> None:
        """Count an event that begins in an instance."""
        instance.used_at = self.clock.monotonic()
        instance.events += 1

    def finish(self, instance: Instance, phase: Phase, begun_at: float) -> None:
        """Count an event as over that came to its end, and began then (monotonic)."""
        phase.observe(self.clock.monotonic() - begun_at)
        self.leave(instance)

    def leave(self, instance: Instance) -> None:
        """Count an event as over."""
        instance.events -= 1
        if instance.is_closed:
            self._close_when_over(instance)

    def _close(self, instance_id: int) -> None:
        """Close an instance, once its last event is over: Kong may close it while a phase still runs."""
        instance = self._by_id.pop(instance_id)
        instance.is_closed = True
        self._close_when_over(instance)

    def _close_when_over(self, instance: Instance) -> None:
        """Let a closed instance go, unless it waits for the last of its events."""
        if instance.events:
            return
        try:
            getattr(instance.plugin, "close", lambda: None)()
        except Exception as error:  # noqa: BLE001 - whatever a plugin does when it is closed
            LOGGER.error("an instance failed while it was closed: %s", cause_of(error), extra=trouble("close"))

    def _phase_of(self, plugin: object, name: str) -> Phase:
        steps = getattr(plugin, f"{name}_steps", None) or partial(self._greenlets.steps, getattr(plugin, name))
        at_once = getattr(plugin, f"{name}_at_once", lambda: None)
        return Phase(name, steps, at_once, self.plugin.observers.get(name, lambda _seconds: None))

    def _next_id(self) -> int:
        self._last_id = self._last_id % _LARGEST_ID + 1
        return self._last_id


def _parsed(config: object) -> Mapping[str, Any]:
    """Read the configuration that Kong sent; an unreadable one counts as empty, which the plugin refuses loudly."""
    try:
        parsed = json.loads(config)  # type: ignore[arg-type] # that it is text is found out here
    except (ValueError, TypeError, RecursionError):
        return {}
    return parsed if isinstance(parsed, dict) else {}
