"""`metering-and-billing`: an ordinary plugin on the Kong Python PDK.

access: reads the headers that the events need, before another plugin can change them, and keeps them for the log phase.
log: works out who pays, builds the events and hands them to the queue. Neither phase does I/O or raises: whatever goes
wrong here is said in the log and counted, and the request goes on.

It runs under kong-pdk's server; in this package's own host it runs in steps or, where Kong's protocol allows it, asks
all at once (`steps.py`), which costs less.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from kong_pdk.exception import PDKException

from kong_metering import __version__
from kong_metering.capture import (
    GET_REQUEST_ID,
    HeaderExperience,
    capture_headers,
    header_calls,
    headers_in,
    piecewise_record,
)
from kong_metering.config import parse_config, parse_entity, remarks
from kong_metering.errors import ConfigError
from kong_metering.events import Meter
from kong_metering.log import LOGGER, cause_of, printable, trouble
from kong_metering.plugin_identity import PRIORITY
from kong_metering.reasons import Skipped
from kong_metering.record import Record, parse_record
from kong_metering.request import ASKED, FinishedRequest
from kong_metering.runtime import Runtime, default_runtime
from kong_metering.schema import config_fields
from kong_metering.steps import AtOnce, Steps, call, run_steps

# The names that kong-pdk's server looks for in a plugin's module.
Schema = config_fields()
version = __version__
priority = PRIORITY

_SERIALIZE = call("kong.log.serialize")
_NOTHING_TO_DO = AtOnce((), lambda _: None)
_UNUSABLE_SAID_SECONDS = 3600.0


class Plugin:
    """One instance of the plugin: one configuration of one plugin entity."""

    def __init__(self, config: Mapping[str, Any], runtime: Runtime | None = None) -> None:
        self._runtime = runtime or default_runtime()
        self._entity = parse_entity(config)
        self._headers: tuple[str, ...] = ()
        self._experience = HeaderExperience(self._runtime.clock)
        self._requests = self._runtime.requests.of(self._entity)
        try:
            settings = parse_config(config)
        except ConfigError as error:
            self._meter = None
            self._unusable = str(error)
            self._count_at_once = AtOnce((), lambda _: self._count_unusable())
            self._say_unusable()
            return
        for remark in remarks(config, settings):
            if self._runtime.once.is_first(f"{self._entity.id}:{remark}"):
                LOGGER.warning("plugin %s: %s", self._entity.name, remark)
        self._meter = Meter(settings, self._runtime.clock)
        for name, event_types in self._meter.reserved_attributes.items():
            LOGGER.warning(
                "plugin %s: the attribute %s is left out of %s events: it is the name of a field of theirs",
                self._entity.name,
                printable(name),
                " and ".join(event_types),
            )
        self._headers = self._meter.header_names
        self._asked = ",".join(self._headers)
        self._ask_headers = AtOnce((*header_calls(self._headers), GET_REQUEST_ID), self._keep_answers)
        self._ask_record = AtOnce((_SERIALIZE,), self._meter_answer, self._miss_answer)
        self._queue = self._runtime.delivery.open(self._entity, settings)

    def access(self, kong: Any) -> None:
        """Keep the client's own values of the headers that the events need."""
        run_steps(self.access_steps(), kong)

    def log(self, kong: Any) -> None:
        """Meter the finished request."""
        run_steps(self.log_steps(), kong)

    # -- access ---------------------------------------------------------------------------------------------------

    def access_steps(self) -> Steps[None]:
        """Do what `access` does, in steps."""
        if not self._headers:
            return
        try:
            headers = {ASKED: self._asked, **(yield from capture_headers(self._headers))}
            request_id = yield GET_REQUEST_ID
            if not self._runtime.captured.keep(request_id, headers):
                yield call("kong.ctx.shared.set", self._runtime.shared_key, headers)
        except Exception as error:  # noqa: BLE001 - metering fails open
            self._report("access", error)

    def access_at_once(self) -> AtOnce | None:
        """Tell what `access` asks, where all of that is known beforehand."""
        if not self._headers:
            return _NOTHING_TO_DO
        is_enough = self._experience.are_plain and self._runtime.captured.are_identified
        return self._ask_headers if is_enough else None

    def _keep_answers(self, answers: Sequence[Any]) -> None:
        try:
            headers = headers_in(self._headers, answers[:-1])
            headers[ASKED] = self._asked
            self._runtime.captured.keep(answers[-1], headers)
        except Exception as error:  # noqa: BLE001 - metering fails open
            self._report("access", error)

    # -- log ------------------------------------------------------------------------------------------------------

    def log_steps(self) -> Steps[None]:
        """Do what `log` does, in steps."""
        try:
            yield from self._meter_request()
        except GeneratorExit:
            self._fail(ConnectionError("Kong did not go on with it"))
            raise
        except Exception as error:  # noqa: BLE001 - metering fails open
            self._fail(error)
        try:
            if self._runtime.relay.holds_any:
                yield from self._relay_troubles()
        except Exception as error:  # noqa: BLE001 - what could not be said here is in our own log
            LOGGER.error("warnings could not be logged through Kong: %s", cause_of(error), extra=trouble("relay"))

    def log_at_once(self) -> AtOnce | None:
        """Tell what `log` asks, where all of that is known beforehand."""
        if self._runtime.relay.holds_any or self._entity.id in self._runtime.unserialisable:
            return None
        if self._meter is None:
            return self._count_at_once
        if not self._meter.meters_anything:
            return _NOTHING_TO_DO
        return None if self._headers and not self._runtime.captured.are_identified else self._ask_record

    def _meter_answer(self, answers: Sequence[Any]) -> None:
        try:
            record = parse_record(answers[0])
            if record is None:
                # Kong has gone on: for the next one of this kind there will be other questions.
                self._runtime.unserialisable.add(self._entity.id)
                raise ValueError("Kong could not serialise the log record")  # noqa: TRY301 - counted like any failure
            self._queue_events(record, self._captured(record))
        except Exception as error:  # noqa: BLE001 - metering fails open
            self._fail(error)

    def _miss_answer(self) -> None:
        self._fail(ConnectionError("Kong's connection ended before the log record came"))

    def _meter_request(self) -> Steps[None]:
        if self._meter is None:
            self._count_unusable()
            return
        if not self._meter.meters_anything:
            return
        try:
            record = parse_record((yield _SERIALIZE))
        except PDKException:
            record = None
        if record is None:
            record = yield from self._piecewise_record()
        captured = self._captured(record)
        if captured is None and self._headers and not self._runtime.captured.are_identified:
            captured = yield from self._shared(record)
        self._queue_events(record, captured)

    def _shared(self, record: Record) -> Steps[object]:
        """Take what the access phase kept in Kong, for want of an id."""
        try:
            captured = yield call("kong.ctx.shared.get", self._runtime.shared_key)
        except PDKException as error:  # the record's headers have to do
            self._report("access", error)
            return None
        if captured is None and self._runtime.captured.are_identified is None:
            # A Kong whose record has an id tells it an access phase as well.
            self._runtime.captured.are_identified = bool(record.request.id) or None
        return captured

    def _captured(self, record: Record) -> object:
        """Take what the access phase of this request kept in this process."""
        request_id = record.request.id
        return self._runtime.captured.take(request_id) if self._headers and request_id else None

    def _queue_events(self, record: Record, captured: object) -> None:
        if self._meter is None:
            return
        request = FinishedRequest(record, captured)
        events = self._meter.events(request)
        if captured is not None:
            self._experience.note(is_odd=request.has_odd_headers)
        if isinstance(events, Skipped):
            self._skip(events, self._meter.subject_place)
            return
        for event in events:
            self._queue.put(event)
        api_events = int(self._meter.meters_api_requests)
        self._requests.meter(api_events, len(events) - api_events)

    def _skip(self, reason: Skipped, subject_place: str) -> None:
        if reason is Skipped.NO_SUBJECT and self._runtime.once.is_first(f"{self._entity.id}:{subject_place}"):
            LOGGER.warning(
                "plugin %s: a request is billed to nobody, it has %s; the next ones are counted as no_subject",
                self._entity.name,
                subject_place,
            )
        self._count(reason)

    def _count(self, reason: Skipped) -> None:
        self._runtime.stats.skip(reason)
        self._requests.skip(reason)

    def _count_unusable(self) -> None:
        if self._runtime.clock.monotonic() - self._unusable_said_at >= _UNUSABLE_SAID_SECONDS:
            self._say_unusable()
        self._count(Skipped.UNUSABLE_CONFIGURATION)

    def _say_unusable(self) -> None:
        self._unusable_said_at = self._runtime.clock.monotonic()
        LOGGER.error(
            "plugin %s: THIS CONFIGURATION CANNOT BE USED, NOTHING IS METERED with it: %s",
            self._entity.name,
            self._unusable,
            extra=trouble(f"unusable:{self._entity.id}"),
        )

    def _piecewise_record(self) -> Steps[Record]:
        LOGGER.warning(
            "plugin %s: Kong could not serialise the log record of a request (perhaps a number in it that JSON cannot "
            "express); the request is metered from what else Kong knows of it",
            self._entity.name,
            extra=trouble("record"),
        )
        return (yield from piecewise_record())

    def _relay_troubles(self) -> Steps[None]:
        """Say warnings and errors through Kong, which by default hides what this process logs by itself."""
        while (kept := self._runtime.relay.take()) is not None:
            level, message = kept
            yield call("kong.log.err" if level >= logging.ERROR else "kong.log.warn", message)

    # -- its life -------------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether events of this instance still wait, so that the host must not close it yet."""
        return self._meter is not None and self._queue.waiting > 0

    @property
    def outdated(self) -> str | None:
        """Why Kong is to start this instance anew with what its configuration holds now; None while there is no reason.

        Kong puts a new value of a vault's into its configuration, and tells no plugin server.
        """
        references = ", ".join(self._entity.references)
        if self._meter is None or not references or not self._runtime.delivery.is_refused(self._queue):
            return None
        return (
            f"plugin {self._entity.name}: the endpoint refuses the token, and {references} comes from a vault: Kong is "
            "asked for the value that it has now (of the env vault it reads a new one only when it is restarted)"
        )

    def close(self) -> None:
        """Let go of the queue; the host calls it when Kong does not need this instance any more."""
        if self._meter is not None:
            self._runtime.delivery.release(self._queue)

    def _fail(self, error: Exception) -> None:
        self._count(Skipped.ERROR)
        self._report("log", error)

    def _report(self, phase: str, error: Exception) -> None:
        loss = "a request was not metered" if phase == "log" else "a request's headers were not read"
        LOGGER.error(
            "plugin %s: %s, its %s phase failed: %s",
            self._entity.name,
            loss,
            phase,
            cause_of(error),
            extra=trouble(f"{phase}:{type(error).__name__}"),
        )
