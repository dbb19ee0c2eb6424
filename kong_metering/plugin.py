"""`metering-and-billing`: an ordinary plugin on the Kong Python PDK.

access: reads the headers that the events need, before another plugin can change them, and keeps them for the log phase.
log: works out who pays, builds the events and hands them to the queue. Neither phase does I/O or raises: whatever goes
wrong here is said in the log and counted, and the request goes on.

It runs in this package's own host and, unchanged, under kong-pdk's server.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

from kong_pdk.exception import PDKException

from kong_metering import __version__
from kong_metering.config import parse_config, parse_entity
from kong_metering.errors import ConfigError
from kong_metering.events import Meter
from kong_metering.log import LOGGER, cause_of, printable
from kong_metering.record import Record, header_values, is_blank, parse_record
from kong_metering.request import FinishedRequest
from kong_metering.runtime import Runtime, default_runtime
from kong_metering.schema import PRIORITY, config_fields
from kong_metering.stats import Skipped

# The names that kong-pdk's server looks for in a plugin's module.
Schema = config_fields()
version = __version__
priority = PRIORITY

SHARED_KEY = "metering-and-billing"
_MAX_HEADERS = 1000  # the most that kong.request.get_headers gives


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
        if not self._headers:
            return
        try:
            captured = capture_headers(kong, self._headers)
            if captured:
                _result(kong.ctx.shared.set(SHARED_KEY, captured))
        except Exception as error:  # noqa: BLE001 - metering fails open
            self._report("access", error)

    def log(self, kong: Any) -> None:
        """Meter the finished request."""
        try:
            self._meter_request(kong)
        except Exception as error:  # noqa: BLE001 - metering fails open
            self._runtime.stats.skip(Skipped.ERROR)
            self._report("log", error)
        try:
            self._relay_troubles(kong)
        except Exception as error:  # noqa: BLE001 - what could not be said here is in our own log
            self._runtime.troubles.report("relay", f"warnings could not be said through Kong: {cause_of(error)}")

    def _meter_request(self, kong: Any) -> None:
        if self._meter is None or not self._meter.meters_anything:
            return
        captured, serving_since = self._captured(kong)
        record = parse_record(_attempt(kong.log.serialize))
        if record is None:
            record = piecewise_record(kong)
            self._runtime.troubles.report(
                "record",
                f"plugin {self._entity.name}: Kong could not serialise the log record of a request (a number in it "
                "that JSON does not know?); it is metered with what else Kong tells",
                logging.WARNING,
            )
        events = self._meter.events(FinishedRequest(record, captured, serving_since))
        if isinstance(events, Skipped):
            self._runtime.stats.skip(events)
            return
        for event in events:
            self._queue.put(event)

    def _captured(self, kong: Any) -> tuple[object, float]:
        """Get what the access phase kept, and since when it can have; where Kong fails to, the record has to do."""
        if not self._headers:
            return None, 0
        try:
            return _result(kong.ctx.shared.get(SHARED_KEY)), self._runtime.serving_since_ms
        except PDKException as error:
            self._report("access", error)
            return None, math.inf

    def _relay_troubles(self, kong: Any) -> None:
        """Say warnings and errors through Kong, which by default hides what this process logs by itself."""
        while (kept := self._runtime.relay.take()) is not None:
            level, message = kept
            _result((kong.log.err if level >= logging.ERROR else kong.log.warn)(message))

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


def capture_headers(kong: Any, names: tuple[str, ...]) -> dict[str, str]:
    """Read request headers by name; those that the request does not have are left out."""
    values = {name: _result(kong.request.get_header(name)) for name in names}
    missing = [name for name, value in values.items() if value is None]
    if missing:
        values |= hidden_headers(kong, missing)
    return {name: value for name, value in values.items() if isinstance(value, str)}


def hidden_headers(kong: Any, names: list[str]) -> dict[str, str]:
    """Find headers that `kong.request.get_header` does not see.

    Kong 3.9 looks up a header that was sent twice, or that contains a comma and a space, only among the first 100
    (`kong/tools/http.lua`): without this, a client with many headers would not be billed.
    """
    headers = _result(kong.request.get_headers(_MAX_HEADERS))
    if not isinstance(headers, dict):
        return {}
    record: Record = {"request": {"headers": headers}}
    found = {name: _first(values) for name in names if (values := header_values(record, name))}
    if sum(len(values) if isinstance(values, list) else 1 for values in headers.values()) >= _MAX_HEADERS:
        for name in (name for name in names if name not in found):
            value = _result(kong.nginx.get_var("http_" + name.lower().replace("-", "_")))
            if isinstance(value, str):
                found[name] = _first(value.split(", "))
    return found


def _first(values: list[str]) -> str:
    """Give the first value of a header that was sent several times; a blank one does not hide the next."""
    return next((value for value in values if not is_blank(value)), values[0])


def piecewise_record(kong: Any) -> Record:
    """Put together what is billable of a request whose log record Kong could not serialise."""
    return {
        "request": {
            "id": _attempt(kong.response.get_header, "x-kong-request-id"),
            "headers": _attempt(kong.request.get_headers),
        },
        "response": {"status": _attempt(kong.response.get_status)},
        "route": _attempt(kong.router.get_route),
        "service": _attempt(kong.router.get_service),
        "consumer": _attempt(kong.client.get_consumer),
    }


def _attempt(function: Callable[..., Any], *arguments: object) -> Any:
    try:
        return _result(function(*arguments))
    except PDKException:
        return None


def _result(answer: Any) -> Any:
    """Take a PDK function's value; kong-pdk's server without --no-lua-style gives a pair of value and error."""
    if isinstance(answer, tuple):
        value, error = answer
        if error:
            raise PDKException(error)
        return value
    return answer
