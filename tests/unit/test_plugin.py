"""The plugin's two phases, against Kong's side of the PDK, in both styles that a PDK plugin may be run in."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import pytest

from kong_metering import PLUGIN_NAME
from kong_metering.log import LOGGER, Relay, Repeats
from kong_metering.plugin import Plugin
from kong_metering.request import ASKED
from kong_metering.runtime import Runtime, make_runtime
from tests.support.openmeter import valid_event
from tests.support.pdk import FakeKong
from tests.support.records import REQUEST_ID, answered_early, log_record
from tests.support.settings import BY_HEADER, DEPARTMENT, attribute

if TYPE_CHECKING:
    from kong_metering.config import Entity, PluginConfig
    from kong_metering.delivery.registry import Delivery
    from tests.support.clock import FakeClock

TENANT = "x-tenant-id"
BY_QUERY = {"look_up_value_in": "query", "field": "tenant"}
ALICE = {"id": "b32379d9", "username": "alice"}

GET_ID = ("kong.nginx.get_var", "kong_request_id")
GET_VARIABLE = ("kong.nginx.get_var", "http_x_tenant_id")
SHARED_KEY = PLUGIN_NAME
GET_SHARED = ("kong.ctx.shared.get", SHARED_KEY)
SERIALIZE = ("kong.log.serialize",)


@dataclass
class FakeQueue:
    """Keeps the events that it is given."""

    events: list[bytes] = field(default_factory=list)
    broken: bool = False

    @property
    def waiting(self) -> int:
        return len(self.events)

    def put(self, event: bytes) -> None:
        if self.broken:
            raise MemoryError("no room")
        self.events.append(event)


@dataclass
class FakeDelivery:
    """Gives one queue to everybody, and keeps who asked."""

    queue: FakeQueue = field(default_factory=FakeQueue)
    opened: list[tuple[Entity, PluginConfig]] = field(default_factory=list)
    released: list[FakeQueue] = field(default_factory=list)

    def open(self, entity: Entity, config: PluginConfig) -> FakeQueue:
        self.opened.append((entity, config))
        return self.queue

    def release(self, queue: FakeQueue) -> None:
        self.released.append(queue)


class Gateway:
    """The plugin in a process of its own: runs requests through its phases, and tells what came of them."""

    def __init__(self, clock: FakeClock, *, lua_style: bool = False, asks_at_once: bool = False) -> None:
        self.clock = clock
        self.delivery = FakeDelivery()
        self.relay = Relay()
        self.repeats = Repeats(clock)
        self.lua_style = lua_style
        self.asks_at_once = asks_at_once
        self.expects_errors = False
        runtime = make_runtime(clock, relay=self.relay)
        self.runtime: Runtime = replace(runtime, delivery=cast("Delivery", self.delivery))
        if asks_at_once:
            # As after its first request: until then it is not known whether this Kong tells ids.
            self.runtime.captured.are_identified = True

    def plugin(self, **settings: Any) -> Plugin:
        config = {"ingest_endpoint": "https://openmeter.example/events", "api_token": "om_token", **settings}
        plugin = Plugin({"__plugin_id": "276df434", "subject": BY_HEADER, **config}, self.runtime)
        if self.asks_at_once:
            # As after its first requests, which it asks step by step.
            for _ in range(100):
                plugin._experience.note(is_odd=False)
        return plugin

    def request(
        self, *headers: tuple[str, str], record: object = None, request_id: str | None = REQUEST_ID, **behaviour: Any
    ) -> FakeKong:
        """Begin a request with these headers; its record is that of one that reached its upstream now."""
        now = self.clock.wall() * 1000
        record = log_record(started_at=now) if record is None else record
        kong = FakeKong(headers, record, lua_style=self.lua_style, **behaviour)
        kong.request_id = request_id
        return kong

    def run(self, plugin: Plugin, phase: str, kong: FakeKong) -> None:
        """Run a phase as a host does that asks at once where it can, or as one that never does."""
        asked = getattr(plugin, f"{phase}_at_once")() if self.asks_at_once else None
        if asked is None:
            getattr(plugin, phase)(kong.kong)
            return
        answers = [kong.answer(*called) for called in asked.calls]
        if any(error for _, error in answers):
            asked.give_up()  # Kong ends the phase, and with it the connection
        else:
            asked.finish([value for value, _ in answers])

    @property
    def events(self) -> list[dict[str, Any]]:
        return [valid_event(event, attributes=frozenset({"department"})) for event in self.delivery.queue.events]

    @property
    def subjects(self) -> list[str]:
        return [event["subject"] for event in self.events]

    @property
    def skipped(self) -> dict[str, int]:
        return self.runtime.stats.snapshot().skipped


class Keeper(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@pytest.fixture
def said() -> Iterator[list[logging.LogRecord]]:
    """Collect what the package logs, whatever else its logger is set to."""
    handler = Keeper()
    LOGGER.addHandler(handler)
    yield handler.records
    LOGGER.removeHandler(handler)


@pytest.fixture(params=["python", "lua", "at once"])
def gateway(request: pytest.FixtureRequest, clock: FakeClock, said: list[logging.LogRecord]) -> Iterator[Gateway]:
    gateway = Gateway(clock, lua_style=request.param == "lua", asks_at_once=request.param == "at once")
    LOGGER.addHandler(gateway.relay)
    LOGGER.addFilter(gateway.repeats)
    yield gateway
    LOGGER.removeFilter(gateway.repeats)
    LOGGER.removeHandler(gateway.relay)
    swallowed = [record.getMessage() for record in said if record.levelno >= logging.ERROR]
    if not gateway.expects_errors:
        assert swallowed == []
        assert "error" not in gateway.skipped


@pytest.fixture
def broken_gateway(gateway: Gateway) -> Gateway:
    """Give a gateway on which something fails, as the test wants."""
    gateway.expects_errors = True
    return gateway


@pytest.fixture
def stepping(gateway: Gateway) -> Gateway:
    """Give a gateway on which the phases make one call after another."""
    if gateway.asks_at_once:
        pytest.skip("of calls that are made one after another")
    return gateway


def run(gateway: Gateway, plugin: Plugin, kong: FakeKong) -> tuple[list[tuple[object, ...]], list[tuple[object, ...]]]:
    """Run both phases, and give the calls of each."""
    gateway.run(plugin, "access", kong)
    access = list(kong.calls)
    gateway.run(plugin, "log", kong)
    return access, kong.calls[len(access) :]


# -- the calls of each phase ---------------------------------------------------------------------------------------


def test_a_subject_in_a_header_takes_three_calls_in_all(stepping: Gateway) -> None:
    access, log = run(stepping, stepping.plugin(), stepping.request((TENANT, "acme")))
    assert access == [("kong.request.get_header", TENANT), GET_ID]
    assert log == [SERIALIZE]
    assert stepping.subjects == ["acme"]


def test_a_host_that_asks_at_once_asks_for_all_lines_of_a_header(clock: FakeClock) -> None:
    gateway = Gateway(clock, asks_at_once=True)
    access, log = run(gateway, gateway.plugin(), gateway.request((TENANT, "acme")))
    assert access == [GET_VARIABLE, GET_ID]
    assert log == [SERIALIZE]
    assert gateway.subjects == ["acme"]


@pytest.mark.parametrize(
    ("subject", "record", "expected"),
    [
        ({}, {"consumer": ALICE}, "consumer:b32379d9"),
        ({"field": "username"}, {"consumer": ALICE}, "alice"),
        ({"look_up_value_in": "application"}, {"application": ALICE}, "app:b32379d9"),
        (BY_QUERY, {"request": {"uri": "/a?tenant=acme"}}, "acme"),
    ],
)
def test_any_other_subject_takes_one_call_in_all(
    gateway: Gateway, subject: object, record: dict[str, Any], expected: str
) -> None:
    access, log = run(gateway, gateway.plugin(subject=subject), gateway.request(record=log_record(**record)))
    assert access == []
    assert log == [SERIALIZE]
    assert gateway.subjects == [expected]


def test_attributes_in_headers_are_read_with_the_subject(gateway: Gateway) -> None:
    kong = gateway.request((TENANT, "acme"), ("X-Department", "engineering"))
    access, log = run(gateway, gateway.plugin(attributes=[DEPARTMENT]), kong)
    variables = [GET_VARIABLE, ("kong.nginx.get_var", "http_x_department")]
    look_ups = [("kong.request.get_header", TENANT), ("kong.request.get_header", "x-department")]
    assert access == [*(variables if gateway.asks_at_once else look_ups), GET_ID]
    assert log == [SERIALIZE]
    assert gateway.subjects == ["acme"]
    assert gateway.events[0]["data"]["department"] == "engineering"


def test_without_the_header_all_headers_are_looked_through_once_and_its_absence_is_kept(stepping: Gateway) -> None:
    record = log_record(request={"headers": {TENANT: "added"}})
    access, log = run(stepping, stepping.plugin(), stepping.request(("accept", "*/*"), record=record))
    assert access == [("kong.request.get_header", TENANT), ("kong.request.get_headers", 1000), GET_ID]
    assert [method for method, *_ in log] == ["kong.log.serialize", "kong.log.warn"]
    assert stepping.events == []
    assert stepping.skipped == {"no_subject": 1}


def test_no_phase_takes_more_than_three_calls_for_a_subject_in_a_header(gateway: Gateway) -> None:
    plugin = gateway.plugin()
    run(gateway, plugin, gateway.request())  # the first one without a subject is said
    run(gateway, plugin, gateway.request((TENANT, "acme")))
    for headers in ([], [(TENANT, "acme")], [(TENANT, "")], [(f"x-{number}", "x") for number in range(150)]):
        access, log = run(gateway, plugin, gateway.request(*headers))
        assert len(access) <= 3
        assert len(log) == 1


@pytest.mark.parametrize("settings", [{"meter_api_requests": False, "meter_ai_token_usage": False}])
def test_nothing_is_called_when_nothing_is_metered(gateway: Gateway, settings: dict[str, Any]) -> None:
    assert run(gateway, gateway.plugin(**settings), gateway.request((TENANT, "acme"))) == ([], [])
    assert gateway.events == []
    assert gateway.skipped == {}


def test_api_requests_can_be_left_unmetered(gateway: Gateway) -> None:
    run(gateway, gateway.plugin(meter_api_requests=False), gateway.request((TENANT, "acme")))
    assert gateway.events == []


# -- headers, as a client may send them ----------------------------------------------------------------------------


def many(count: int) -> list[tuple[str, str]]:
    return [(f"x-other-{number}", "x") for number in range(count)]


def test_a_header_after_150_others_is_found(gateway: Gateway) -> None:
    run(gateway, gateway.plugin(), gateway.request(*many(150), (TENANT, "acme")))
    assert gateway.subjects == ["acme"]


@pytest.mark.parametrize("others", [0, 150])
def test_a_header_that_is_sent_twice_counts_once_the_first(gateway: Gateway, others: int) -> None:
    run(gateway, gateway.plugin(), gateway.request(*many(others), (TENANT, "acme"), (TENANT, "globex")))
    assert gateway.subjects == ["acme"]


def test_a_header_that_is_sent_twice_after_many_others_takes_one_call_more(stepping: Gateway) -> None:
    kong = stepping.request(*many(150), (TENANT, "acme"), (TENANT, "globex"))
    access, _ = run(stepping, stepping.plugin(), kong)
    assert access == [("kong.request.get_header", TENANT), ("kong.request.get_headers", 1000), GET_ID]
    assert stepping.subjects == ["acme"]


def test_a_value_with_a_comma_after_many_others_is_found(stepping: Gateway) -> None:
    run(stepping, stepping.plugin(), stepping.request(*many(150), (TENANT, "Acme, Inc.")))
    assert stepping.subjects == ["Acme, Inc."]


PLAIN = log_record(request={"headers": {TENANT: "acme"}})
STEPS = [("kong.request.get_header", TENANT), GET_ID]
AT_ONCE = [GET_VARIABLE, GET_ID]


def accessed(gateway: Gateway, plugin: Plugin, *headers: tuple[str, str], record: object = PLAIN) -> object:
    """Run a request, and give the calls of its access phase."""
    return run(gateway, plugin, gateway.request(*headers, record=record))[0]


def test_a_new_instance_asks_step_by_step_until_it_has_seen_enough(clock: FakeClock) -> None:
    gateway = Gateway(clock)
    plugin = gateway.plugin()
    gateway.asks_at_once = True
    assert [accessed(gateway, plugin, (TENANT, "acme")) for _ in range(101)] == [STEPS] * 100 + [AT_ONCE]
    assert gateway.subjects == ["acme"] * 101


@pytest.mark.parametrize(
    ("headers", "shown"),
    [
        ([(TENANT, "acme"), (TENANT, "globex")], {TENANT: ["acme", "globex"]}),
        ([(TENANT, "acme, inc")], {TENANT: "acme, inc"}),
        ([(TENANT, "acme")], {TENANT: "changed"}),
        ([(TENANT, "acme")], {}),
    ],
)
def test_after_a_value_that_looks_like_several_or_was_changed_it_is_asked_step_by_step_for_a_while(
    clock: FakeClock, headers: list[tuple[str, str]], shown: dict[str, Any]
) -> None:
    gateway = Gateway(clock, asks_at_once=True)
    plugin = gateway.plugin()
    accessed(gateway, plugin, *headers, record=log_record(request={"headers": shown}))
    assert accessed(gateway, plugin, (TENANT, "acme")) == STEPS
    clock.advance(600)
    assert accessed(gateway, plugin, (TENANT, "acme")) == AT_ONCE


def test_behind_many_others_lists_are_told_from_several_once_one_was_seen(clock: FakeClock) -> None:
    gateway = Gateway(clock, asks_at_once=True)
    plugin = gateway.plugin()
    for line in ("acme", "Acme, Inc."):
        accessed(gateway, plugin, *many(150), (TENANT, line), (TENANT, "globex"))
    assert gateway.subjects == ["acme", "Acme, Inc."]


def test_a_header_that_is_sent_twice_after_1000_others_is_asked_of_nginx(stepping: Gateway) -> None:
    kong = stepping.request(*many(1000), (TENANT, "acme"), (TENANT, "globex"))
    access, _ = run(stepping, stepping.plugin(), kong)
    assert access == [
        ("kong.request.get_header", TENANT),
        ("kong.request.get_headers", 1000),
        GET_VARIABLE,
        GET_ID,
    ]
    assert stepping.subjects == ["acme"]


def test_nginx_is_not_asked_for_what_999_headers_do_not_have(stepping: Gateway) -> None:
    kong = stepping.request(*many(999))
    run(stepping, stepping.plugin(), kong)
    assert GET_VARIABLE not in kong.calls


def test_an_absent_header_among_more_than_1000_is_absent(gateway: Gateway) -> None:
    run(gateway, gateway.plugin(), gateway.request(*many(1200)))
    assert gateway.skipped == {"no_subject": 1}


@pytest.mark.parametrize("sent", ["X-TENANT-ID", "x_tenant_id", "X_Tenant-Id"])
@pytest.mark.parametrize("others", [0, 150])
def test_letter_case_and_underscores_do_not_matter(gateway: Gateway, sent: str, others: int) -> None:
    run(gateway, gateway.plugin(), gateway.request(*many(others), (sent, "acme")))
    assert gateway.subjects == ["acme"]


def test_bytes_that_are_not_utf8_are_metered(gateway: Gateway) -> None:
    kong = gateway.request((TENANT, "caf\udce9"), ("x-department", "\udcff"))
    run(gateway, gateway.plugin(attributes=[DEPARTMENT]), kong)
    assert gateway.subjects == ["café"]
    assert gateway.events[0]["data"]["department"] == "\ufffd"


def test_the_clients_own_value_counts_and_not_what_a_transformer_made_of_it(gateway: Gateway) -> None:
    record = log_record(request={"headers": {TENANT: "changed"}})
    run(gateway, gateway.plugin(), gateway.request((TENANT, "acme"), record=record))
    assert gateway.subjects == ["acme"]


def test_a_header_that_a_transformer_added_does_not_count(gateway: Gateway) -> None:
    record = log_record(request={"headers": {TENANT: "added"}}, started_at=gateway.clock.wall() * 1000)
    run(gateway, gateway.plugin(), gateway.request(record=record))
    assert gateway.skipped == {"no_subject": 1}


def test_a_request_that_was_answered_before_our_access_phase_is_metered_from_its_record(gateway: Gateway) -> None:
    kong = gateway.request((TENANT, "acme"), record=answered_early(request={"headers": {TENANT: "acme"}}))
    gateway.run(gateway.plugin(), "log", kong)
    # In a process that has met no access phase yet, Kong may have kept the headers itself.
    assert kong.calls == ([SERIALIZE] if gateway.asks_at_once else [SERIALIZE, GET_SHARED])
    assert gateway.subjects == ["acme"]


def test_a_request_from_before_this_process_is_metered_from_its_record(gateway: Gateway) -> None:
    before = gateway.clock.wall() * 1000 - 5
    record = log_record(request={"headers": {TENANT: "acme"}}, started_at=before)
    gateway.plugin().log(gateway.request(record=record).kong)
    assert gateway.subjects == ["acme"]


@pytest.mark.parametrize("shared", [None, {}, [], "x", 5, {TENANT: 5}])
def test_anything_may_stand_in_the_shared_context(gateway: Gateway, shared: object) -> None:
    record = answered_early(request={"id": None})
    kong = gateway.request(record=record, request_id=None, answers={"kong.ctx.shared.get": shared})
    gateway.plugin().log(kong.kong)
    assert gateway.skipped == {"no_subject": 1}


@pytest.mark.parametrize("headers", [None, [], {}, {TENANT: []}, {TENANT: [5]}, {TENANT: None}])
def test_anything_may_stand_in_the_headers(gateway: Gateway, headers: object) -> None:
    kong = gateway.request(answers={"kong.request.get_header": None, "kong.request.get_headers": headers})
    run(gateway, gateway.plugin(), kong)
    assert gateway.skipped == {"no_subject": 1}


def test_only_allowed_status_codes_are_metered(gateway: Gateway) -> None:
    plugin = gateway.plugin(allow_status_codes=["200-299"])
    for status in (200, 204, 404):
        run(gateway, plugin, gateway.request((TENANT, "acme"), record=log_record(response={"status": status})))
    assert [event["data"]["response_http_status"] for event in gateway.events] == [200, 204]
    assert gateway.skipped == {"status_not_allowed": 1}


# -- what the access phase captured --------------------------------------------------------------------------------


def before_3_5(gateway: Gateway, *headers: tuple[str, str], **request: Any) -> FakeKong:
    """Begin a request on a Kong that does not tell the ids of requests."""
    return gateway.request(*headers, record=log_record(request={"id": None, **request}), request_id=None)


def test_a_kong_without_ids_of_requests_keeps_the_headers_itself(gateway: Gateway) -> None:
    plugin = gateway.plugin()
    gateway.runtime.captured.are_identified = None
    for _ in range(2):
        kong = before_3_5(gateway, (TENANT, "acme"), headers={TENANT: "changed"})
        access, log = run(gateway, plugin, kong)
        assert access == [
            ("kong.request.get_header", TENANT),
            GET_ID,
            ("kong.ctx.shared.set", SHARED_KEY, {ASKED: TENANT, TENANT: "acme"}),
        ]
        assert log == [SERIALIZE, GET_SHARED]
    assert gateway.subjects == ["acme"] * 2


@pytest.mark.parametrize("headers", [[("X-Other", "acme")], [("X-Other", "acme"), (TENANT, "someone")]])
def test_a_request_whose_access_phase_ran_with_another_configuration_is_metered_by_its_record(
    gateway: Gateway, headers: list[tuple[str, str]]
) -> None:
    """While a configuration changes, Kong may run one phase of a request with each (`get_instance_id`)."""
    record = log_record(request={"headers": {name.lower(): value for name, value in headers}})
    kong = gateway.request(*headers, record=record)
    gateway.run(gateway.plugin(), "access", kong)
    gateway.run(gateway.plugin(subject={"look_up_value_in": "header", "field": "x-other"}), "log", kong)
    assert gateway.subjects == ["acme"]


def test_a_kong_without_ids_of_requests_keeps_that_there_was_no_header(gateway: Gateway) -> None:
    plugin = gateway.plugin()
    gateway.runtime.captured.are_identified = None
    kong = before_3_5(gateway, headers={TENANT: "added"})
    run(gateway, plugin, kong)
    assert kong.shared == {SHARED_KEY: {ASKED: TENANT}}
    assert gateway.skipped == {"no_subject": 1}


def test_until_this_kong_has_told_an_id_it_is_asked_step_by_step(clock: FakeClock) -> None:
    gateway = Gateway(clock, asks_at_once=True)
    gateway.runtime.captured.are_identified = None
    plugin = gateway.plugin()
    assert [accessed(gateway, plugin, (TENANT, "acme")) for _ in range(2)] == [STEPS, AT_ONCE]
    assert gateway.subjects == ["acme"] * 2


def test_log_phases_alone_show_that_this_kong_tells_ids(clock: FakeClock) -> None:
    gateway = Gateway(clock, asks_at_once=True)
    gateway.runtime.captured.are_identified = None
    plugin = gateway.plugin()
    record = answered_early(request={"headers": {TENANT: "acme"}})
    gateway.run(plugin, "log", gateway.request(record=record))
    assert plugin.log_at_once() is not None


def test_nothing_is_kept_of_a_request_that_was_metered(gateway: Gateway) -> None:
    plugin = gateway.plugin(allow_status_codes=["200-299"])
    for status in (200, 404):
        run(gateway, plugin, gateway.request((TENANT, "acme"), record=log_record(response={"status": status})))
    assert len(gateway.runtime.captured) == 0


def test_answers_that_do_not_come_cost_the_access_phase_what_it_read_and_the_log_phase_its_request(
    clock: FakeClock, said: list[logging.LogRecord]
) -> None:
    gateway = Gateway(clock, asks_at_once=True)
    plugin = gateway.plugin()
    for phase in ("access", "log"):
        asked = getattr(plugin, f"{phase}_at_once")()
        asked.give_up()
    assert gateway.skipped == {"error": 1}
    assert len(gateway.runtime.captured) == 0
    assert "Kong's connection ended before the log record came" in said[-1].getMessage()


@pytest.mark.parametrize("answered", [0, 1, 2])
def test_a_log_phase_in_steps_that_kong_does_not_go_on_with_is_counted_until_its_event_waits(
    answered: int, clock: FakeClock, said: list[logging.LogRecord]
) -> None:
    gateway = Gateway(clock)
    plugin = gateway.plugin()
    gateway.relay.handle(logging.makeLogRecord({"levelno": logging.WARNING, "msg": "to be said"}))
    kong = gateway.request((TENANT, "acme"), request_id=None)
    gateway.run(plugin, "access", kong)
    steps = plugin.log_steps()
    asked = next(steps)
    for _ in range(answered):
        asked = steps.send(kong.answer(*asked)[0])
    steps.close()
    assert asked.method == ("kong.log.serialize", "kong.ctx.shared.get", "kong.log.warn")[answered]
    assert gateway.subjects == (["acme"] if answered == 2 else [])
    assert gateway.skipped == ({} if answered == 2 else {"error": 1})
    assert len([line for line in said if "Kong did not go on with it" in line.getMessage()]) == (answered < 2)


def test_a_record_that_kong_cannot_serialise_costs_one_request_and_the_next_is_asked_for_in_pieces(
    clock: FakeClock, said: list[logging.LogRecord]
) -> None:
    """Asked at once, Kong has gone on when its empty answer comes; a later instance of the entity's knows that."""
    gateway = Gateway(clock, asks_at_once=True)
    plugin = gateway.plugin()
    for one in (plugin, plugin, gateway.plugin()):
        run(gateway, one, gateway.request((TENANT, "acme"), answers={**PIECES, "kong.log.serialize": None}))
    assert gateway.skipped == {"error": 1}
    assert gateway.subjects == ["acme"] * 2
    assert "a request was not metered" in said[0].getMessage()


# -- when something fails ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["kong.request.get_header", "kong.request.get_headers", "kong.nginx.get_var"])
def test_an_access_phase_that_fails_is_reported_once(
    broken_gateway: Gateway, said: list[logging.LogRecord], method: str
) -> None:
    gateway, plugin = broken_gateway, broken_gateway.plugin()
    headers = [] if method.endswith("headers") else [(TENANT, "acme")]
    for _ in range(3):
        plugin.access(gateway.request(*headers, failing={method: "no such thing"}).kong)
    (record,) = said
    message = record.getMessage()
    assert "276df434: a request's headers were not read, its access phase failed: PDKException:" in message
    assert "no such thing" in message
    gateway.clock.advance(60)
    gateway.repeats.summarise()
    assert "(and 2 more like this in the last minute)" in said[-1].getMessage()


def test_a_log_phase_that_fails_is_counted_and_reported_once(
    broken_gateway: Gateway, said: list[logging.LogRecord]
) -> None:
    gateway, plugin = broken_gateway, broken_gateway.plugin()
    gateway.delivery.queue.broken = True
    for _ in range(3):
        run(gateway, plugin, gateway.request((TENANT, "acme")))
    assert gateway.skipped == {"error": 3}
    (record,) = said
    assert "276df434: a request was not metered, its log phase failed:" in record.getMessage()


def test_without_what_access_kept_the_records_header_counts(
    broken_gateway: Gateway, said: list[logging.LogRecord]
) -> None:
    gateway, plugin = broken_gateway, broken_gateway.plugin()
    record = log_record(request={"id": None, "headers": {TENANT: "acme"}})
    for _ in range(3):
        kong = gateway.request(record=record, request_id=None, failing={"kong.ctx.shared.get": "no such thing"})
        gateway.runtime.captured.are_identified = False
        plugin.log(kong.kong)
    assert gateway.subjects == ["acme"] * 3
    (line,) = said
    assert "its access phase failed: PDKException:" in line.getMessage()


def test_a_serialize_that_raises_is_replaced_by_pieces(gateway: Gateway, said: list[logging.LogRecord]) -> None:
    kong = gateway.request((TENANT, "acme"), answers=PIECES, failing={"kong.log.serialize": "no such thing"})
    gateway.plugin().log(kong.kong)
    assert gateway.subjects == ["acme"]
    assert "could not serialise" in said[0].getMessage()


def test_a_request_without_any_due_event_is_not_counted_as_without_subject(gateway: Gateway) -> None:
    run(gateway, gateway.plugin(meter_api_requests=False), gateway.request())
    assert gateway.skipped == {}


def test_any_exception_is_caught(broken_gateway: Gateway) -> None:
    broken_gateway.delivery.queue.broken = True
    run(broken_gateway, broken_gateway.plugin(), broken_gateway.request((TENANT, "acme")))
    assert broken_gateway.skipped == {"error": 1}


def test_the_next_request_is_metered_again(broken_gateway: Gateway) -> None:
    gateway, plugin = broken_gateway, broken_gateway.plugin()
    gateway.delivery.queue.broken = True
    run(gateway, plugin, gateway.request((TENANT, "lost")))
    gateway.delivery.queue.broken = False
    run(gateway, plugin, gateway.request((TENANT, "acme")))
    assert gateway.subjects == ["acme"]


def test_client_bytes_in_an_error_are_escaped(broken_gateway: Gateway, said: list[logging.LogRecord]) -> None:
    hostile = "\x1b[2J\nforged: line" + "x" * 1000
    broken_gateway.plugin().access(broken_gateway.request(failing={"kong.request.get_header": hostile}).kong)
    message = said[0].getMessage()
    assert message.isprintable()
    assert len(message) < 500


PIECES = {
    "kong.request.get_headers": {TENANT: ["acme"], "user-agent": ["curl"]},
    "kong.response.get_header": REQUEST_ID,
    "kong.response.get_status": 200,
    "kong.router.get_route": {"id": "21f7817b", "name": "anything"},
    "kong.router.get_service": {"id": "adbd70b3", "name": "echo", "port": 9000, "protocol": "http"},
    "kong.client.get_consumer": ALICE,
}


@pytest.mark.parametrize("answer", [None, "", "{", "[]", "null", '{"a": NaN, "b": }'])
def test_a_request_whose_record_kong_cannot_serialise_is_metered(gateway: Gateway, answer: str | None) -> None:
    kong = gateway.request((TENANT, "acme"), answers={**PIECES, "kong.log.serialize": answer})
    gateway.plugin().log(kong.kong)
    (event,) = gateway.events
    assert event["id"] == f"{REQUEST_ID}:api_request"
    assert event["source"] == "echo"
    assert event["subject"] == "acme"
    assert event["data"] == {
        "request_user_agent": "curl",
        "response_http_status": 200,
        "route_id": "21f7817b",
        "route_name": "anything",
        "service_id": "adbd70b3",
        "service_name": "echo",
        "service_port": 9000,
        "service_protocol": "http",
        "subject_type": "header",
    }
    assert ("kong.response.get_header", "x-kong-request-id") in kong.calls


def test_captured_headers_count_for_such_a_request_too(stepping: Gateway) -> None:
    kong = stepping.request(
        (TENANT, "own"), answers={"kong.log.serialize": None, "kong.request.get_headers": {}, **PIECES}
    )
    run(stepping, stepping.plugin(), kong)
    assert stepping.subjects == ["own"]


def test_a_consumer_counts_for_such_a_request_too(gateway: Gateway) -> None:
    kong = gateway.request(answers={**PIECES, "kong.log.serialize": None})
    gateway.plugin(subject={}).log(kong.kong)
    assert gateway.subjects == ["consumer:b32379d9"]


def test_a_query_argument_counts_for_such_a_request_too(gateway: Gateway) -> None:
    plugin = gateway.plugin(subject=BY_QUERY)
    kong = gateway.request(record="")
    kong.request_uri = "/a?tenant=acme"
    for method in ("get_status", "get_header"):
        kong.answers[f"kong.response.{method}"] = None
    for method in ("router.get_route", "router.get_service", "client.get_consumer"):
        kong.answers[f"kong.{method}"] = None
    plugin.log(kong.kong)
    assert [(event["subject"], event["data"]["request_uri"]) for event in gateway.events] == [("acme", "/a")]


def test_pieces_that_fail_are_left_out(gateway: Gateway) -> None:
    failing = dict.fromkeys(PIECES.keys() - {"kong.client.get_consumer"}, "not in a timer")
    kong = gateway.request(answers={**PIECES, "kong.log.serialize": None}, failing=failing)
    gateway.plugin(subject={}).log(kong.kong)
    (event,) = gateway.events
    assert event["data"] == {"subject_type": "consumer_id"}
    assert event["source"] == "kong-gateway"


# -- a configuration that cannot be used ---------------------------------------------------------------------------


def test_an_unusable_configuration_meters_nothing_and_says_so(
    broken_gateway: Gateway, said: list[logging.LogRecord]
) -> None:
    gateway = broken_gateway
    plugin = gateway.plugin(api_token="s3cr3t\nx", plugin_instance_name="orders")
    kong = gateway.request((TENANT, "acme"))
    plugin.access(kong.kong)
    assert kong.calls == []
    plugin.log(kong.kong)
    (record,) = said
    message = record.getMessage()
    assert record.levelno == logging.ERROR
    assert "plugin orders (276df434): THIS CONFIGURATION CANNOT BE USED, NOTHING IS METERED" in message
    assert "config.api_token: it cannot stand in a header" in message
    assert "s3cr3t" not in message
    assert kong.calls == [("kong.log.err", message)]
    assert gateway.events == []
    assert gateway.delivery.opened == []


def test_it_is_said_through_kong_once(broken_gateway: Gateway) -> None:
    plugin = broken_gateway.plugin(api_token=None)
    first, second = broken_gateway.request(), broken_gateway.request()
    plugin.log(first.kong)
    plugin.log(second.kong)
    assert len(first.said) == 1
    assert second.said == []


def test_each_request_under_it_is_counted_and_it_is_said_again_each_hour(
    broken_gateway: Gateway, said: list[logging.LogRecord]
) -> None:
    gateway = broken_gateway
    plugin = gateway.plugin(api_token=None)
    for _ in range(3):
        run(gateway, plugin, gateway.request())
    assert gateway.skipped == {"unusable_configuration": 3}
    assert len(said) == 1
    gateway.clock.advance(3600)
    for _ in range(3):
        run(gateway, plugin, gateway.request())
    assert gateway.skipped == {"unusable_configuration": 6}
    assert ["THIS CONFIGURATION CANNOT BE USED" in record.getMessage() for record in said] == [True, True]


def test_what_is_nearly_right_is_said_once(gateway: Gateway, said: list[logging.LogRecord]) -> None:
    for _ in range(2):
        gateway.plugin(api_token="Bearer om_token\n")
    (line,) = said
    assert line.levelno == logging.WARNING
    assert "plugin 276df434: config.api_token: blanks or line breaks" in line.getMessage()
    assert [config.api_token for _, config in gateway.delivery.opened] == ["om_token"] * 2


def test_the_first_request_without_a_subject_is_said_and_the_others_are_counted(gateway: Gateway) -> None:
    plugins = [gateway.plugin(), gateway.plugin()]
    kongs = [gateway.request() for _ in range(4)]
    for plugin, kong in zip(plugins * 2, kongs, strict=True):
        run(gateway, plugin, kong)
    assert gateway.skipped == {"no_subject": 4}
    (line,) = [text for kong in kongs for level, text in kong.said if level == "warn"]
    assert "a request is billed to nobody, it has no header x-tenant-id that is not blank" in line


def test_such_an_instance_can_be_closed(broken_gateway: Gateway) -> None:
    plugin = broken_gateway.plugin(api_token=None)
    assert not plugin.busy
    plugin.close()
    assert broken_gateway.delivery.released == []


# -- saying it through Kong ----------------------------------------------------------------------------------------


def test_warnings_and_errors_are_said_through_kong_in_their_order(broken_gateway: Gateway) -> None:
    plugin = broken_gateway.plugin()
    LOGGER.warning("the endpoint is slow")
    LOGGER.error("the endpoint is gone")
    LOGGER.info("never mind")
    kong = broken_gateway.request((TENANT, "acme"))
    run(broken_gateway, plugin, kong)
    assert kong.said == [("warn", "the endpoint is slow"), ("err", "the endpoint is gone")]
    assert broken_gateway.subjects == ["acme"]


def test_what_cannot_be_said_does_not_count_as_a_request_that_was_not_metered(
    broken_gateway: Gateway, said: list[logging.LogRecord]
) -> None:
    gateway, plugin = broken_gateway, broken_gateway.plugin()
    LOGGER.warning("the endpoint is slow")
    for _ in range(3):
        run(gateway, plugin, gateway.request((TENANT, "acme"), failing={"kong.log.warn": "no", "kong.log.err": "no"}))
    assert gateway.subjects == ["acme"] * 3
    assert gateway.skipped == {}
    assert len(said) == 2
    assert "warnings could not be logged through Kong: PDKException:" in said[1].getMessage()


# -- its queue -----------------------------------------------------------------------------------------------------


def test_the_queue_is_that_of_kongs_plugin_entity(gateway: Gateway) -> None:
    gateway.plugin(plugin_instance_name="orders")
    ((entity, config),) = gateway.delivery.opened
    assert (entity.id, entity.name) == ("276df434", "orders (276df434)")
    assert config.api_token == "om_token"


def test_an_instance_is_busy_while_events_wait(gateway: Gateway) -> None:
    plugin = gateway.plugin()
    busy = [plugin.busy]
    run(gateway, plugin, gateway.request((TENANT, "acme")))
    busy.append(plugin.busy)
    gateway.delivery.queue.events.clear()
    busy.append(plugin.busy)
    assert busy == [False, True, False]


def test_closing_lets_go_of_the_queue(gateway: Gateway) -> None:
    gateway.plugin().close()
    assert gateway.delivery.released == [gateway.delivery.queue]


def test_the_same_request_gives_the_same_event_in_every_instance(gateway: Gateway) -> None:
    for plugin in (gateway.plugin(), gateway.plugin()):
        run(gateway, plugin, gateway.request((TENANT, "acme")))
    first, second = gateway.delivery.queue.events
    assert json.loads(first) == json.loads(second)


@pytest.fixture
def default(monkeypatch: pytest.MonkeyPatch, clock: FakeClock) -> Callable[[], Gateway]:
    def make() -> Gateway:
        gateway = Gateway(clock)
        monkeypatch.setattr("kong_metering.plugin.default_runtime", lambda: gateway.runtime)
        return gateway

    return make


def test_a_foreign_host_gives_no_runtime(default: Callable[[], Gateway]) -> None:
    gateway = default()
    plugin = Plugin({"ingest_endpoint": "https://openmeter.example", "api_token": "t", "subject": BY_HEADER})
    run(gateway, plugin, gateway.request((TENANT, "acme")))
    assert gateway.subjects == ["acme"]


def test_an_attribute_with_a_reserved_name_is_said_when_the_instance_starts(
    gateway: Gateway, said: list[logging.LogRecord]
) -> None:
    gateway.plugin(attributes=[attribute("header", "x-model", "model")])
    (line,) = said
    assert line.levelno == logging.WARNING
    assert "the attribute model is left out of kong.llm_request events" in line.getMessage()
