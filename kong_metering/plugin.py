"""`metering-and-billing`: an ordinary plugin on the Kong Python PDK.

access: reads the headers that the events need, before another plugin can change them, and keeps them for the log phase.
log: works out who pays, builds the events and hands them to the queue. Neither phase does I/O or raises: whatever goes
wrong here is said in the log and counted, and the request goes on.

It runs under kong-pdk's server; in this package's own host it runs in steps (`steps.py`), which cost less.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from kong_pdk.exception import PDKException

from kong_metering import __version__
from kong_metering.capture import capture_headers, piecewise_record
from kong_metering.config import parse_config, parse_entity
from kong_metering.errors import ConfigError
from kong_metering.events import Meter
from kong_metering.log import LOGGER, cause_of, printable
from kong_metering.record import Record, parse_record
from kong_metering.request import NO_HEADERS, FinishedRequest
from kong_metering.runtime import Runtime, default_runtime
from kong_metering.schema import PRIORITY, config_fields
from kong_metering.stats import Skipped
from kong_metering.steps import Steps, call, run_steps

# The names that kong-pdk's server looks for in a plugin's module.
Schema = config_fields()
version = __version__
priority = PRIORITY

SHARED_KEY = "metering-and-billing"
_GET_CAPTURED = call("kong.ctx.shared.get", SHARED_KEY)
_SERIALIZE = call("kong.log.serialize")


class Plugin:
    """One instance of the plugin: one configuration of one plugin entity."""

    def __init__(self, config: Mapping[str, Any], runtime: Runtime | None = None) -> None:
        self._runtime = runtime or default_runtime()
        self._entity = parse_entity(config)
        try:
            settings = parse_config(config)
        except ConfigError as error:
            LOGGER.error(
                "plugin %s: THIS CONFIGURATION CANNOT BE USED, NOTHING IS METERED with it: %s", self._entity.name, error
            )
            self._meter = None
            self._headers: tuple[str, ...] = ()
            return
        self._meter = Meter(settings, self._runtime.clock)
        for name, event_types in self._meter.reserved_attributes.items():
            LOGGER.warning(
                "plugin %s: the attribute %s is left out of %s events: it is the name of a field of theirs",
                self._entity.name,
                printable(name),
                " and ".join(event_types),
            )
        self._headers = self._meter.header_names
        self._queue = self._runtime.delivery.open(self._entity, settings)

    def access(self, kong: Any) -> None:
        """Keep the client's own values of the headers that the events need."""
        run_steps(self.access_steps(), kong)

    def log(self, kong: Any) -> None:
        """Meter the finished request."""
        run_steps(self.log_steps(), kong)

    def access_steps(self) -> Steps[None]:
        """Do what `access` does, in steps."""
        if not self._headers:
            return
        try:
            captured = yield from capture_headers(self._headers)
            yield call("kong.ctx.shared.set", SHARED_KEY, captured or NO_HEADERS)
        except Exception as error:  # noqa: BLE001 - metering fails open
            self._report("access", error)

    def log_steps(self) -> Steps[None]:
        """Do what `log` does, in steps."""
        try:
            yield from self._meter_request()
        except Exception as error:  # noqa: BLE001 - metering fails open
            self._runtime.stats.skip(Skipped.ERROR)
            self._report("log", error)
        try:
            if self._runtime.relay.holds_any:
                yield from self._relay_troubles()
        except Exception as error:  # noqa: BLE001 - what could not be said here is in our own log
            self._runtime.troubles.report("relay", f"warnings could not be said through Kong: {cause_of(error)}")

    def _meter_request(self) -> Steps[None]:
        if self._meter is None or not self._meter.meters_anything:
            return
        captured = None
        if self._headers:
            try:
                captured = yield _GET_CAPTURED
            except PDKException as error:  # the record's headers have to do
                self._report("access", error)
        try:
            record = parse_record((yield _SERIALIZE))
        except PDKException:
            record = None
        if record is None:
            record = yield from self._piecewise_record()
        events = self._meter.events(FinishedRequest(record, captured))
        if isinstance(events, Skipped):
            self._runtime.stats.skip(events)
            return
        for event in events:
            self._queue.put(event)

    def _piecewise_record(self) -> Steps[Record]:
        self._runtime.troubles.report(
            "record",
            f"plugin {self._entity.name}: Kong could not serialise the log record of a request (a number in it "
            "that JSON does not know?); it is metered with what else Kong tells",
            logging.WARNING,
        )
        return (yield from piecewise_record())

    def _relay_troubles(self) -> Steps[None]:
        """Say warnings and errors through Kong, which by default hides what this process logs by itself."""
        while (kept := self._runtime.relay.take()) is not None:
            level, message = kept
            yield call("kong.log.err" if level >= logging.ERROR else "kong.log.warn", message)

    @property
    def busy(self) -> bool:
        """Whether events of this instance still wait, so that the host must not close it yet."""
        return self._meter is not None and self._queue.waiting > 0

    def close(self) -> None:
        """Let go of the queue; the host calls it when Kong does not need this instance any more."""
        if self._meter is not None:
            self._runtime.delivery.release(self._queue)

    def _report(self, phase: str, error: Exception) -> None:
        loss = "a request was not metered" if phase == "log" else "a request's headers were not read"
        self._runtime.troubles.report(
            f"{phase}:{type(error).__name__}",
            f"plugin {self._entity.name}: {loss}, its {phase} phase failed: {cause_of(error)}",
        )
