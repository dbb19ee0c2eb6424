"""The plugin's two phases, against Kong's side of the PDK, in both styles that a PDK plugin may be run in."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import pytest

from kong_metering.log import LOGGER, Relay
from kong_metering.plugin import SHARED_KEY, Plugin
from kong_metering.request import NO_HEADERS
from kong_metering.runtime import Runtime, make_runtime
from tests.support.openmeter import valid_event
from tests.support.pdk import FakeKong
from tests.support.records import answered_early, log_record
from tests.support.settings import BY_HEADER, DEPARTMENT, attribute

if TYPE_CHECKING:
    from kong_metering.config import Entity, PluginConfig
    from kong_metering.delivery.registry import Delivery
    from tests.support.clock import FakeClock

TENANT = "x-tenant-id"
BY_QUERY = {"look_up_value_in": "query", "field": "tenant"}
ALICE = {"id": "b32379d9", "username": "alice"}

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

    def __init__(self, clock: FakeClock, *, lua_style: bool) -> None:
        self.clock = clock
        self.delivery = FakeDelivery()
        self.relay = Relay()
        self.lua_style = lua_style
        self.expects_errors = False
        runtime = make_runtime(clock, relay=self.relay)
        self.runtime: Runtime = replace(runtime, delivery=cast("Delivery", self.delivery))

    def plugin(self, **settings: Any) -> Plugin:
        config = {"ingest_endpoint": "https://openmeter.example/events", "api_token": "om_token", **settings}
        return Plugin({"__plugin_id": "276df434", "subject": BY_HEADER, **config}, self.runtime)

    def request(self, *headers: tuple[str, str], record: object = None, **behaviour: Any) -> FakeKong:
        """Begin a request with these headers; its record is that of one that reached its upstream now."""
        now = self.clock.wall() * 1000
        record = log_record(started_at=now) if record is None else record
        return FakeKong(headers, record, lua_style=self.lua_style, **behaviour)

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


@pytest.fixture(params=["python", "lua"])
def gateway(request: pytest.FixtureRequest, clock: FakeClock, said: list[logging.LogRecord]) -> Iterator[Gateway]:
    gateway = Gateway(clock, lua_style=request.param == "lua")
    LOGGER.addHandler(gateway.relay)
    yield gateway
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


def run(plugin: Plugin, kong: FakeKong) -> tuple[list[tuple[object, ...]], list[tuple[object, ...]]]:
    """Run both phases, and give the calls of each."""
    plugin.access(kong.kong)
    access = list(kong.calls)
    plugin.log(kong.kong)
    return access, kong.calls[len(access) :]


# -- the calls of each phase ---------------------------------------------------------------------------------------


def test_a_subject_in_a_header_takes_two_calls_in_each_phase(gateway: Gateway) -> None:
    access, log = run(gateway.plugin(), gateway.request((TENANT, "acme")))
    assert access == [
        ("kong.request.get_header", TENANT),
        ("kong.ctx.shared.set", SHARED_KEY, {TENANT: "acme"}),
    ]
    assert log == [GET_SHARED, SERIALIZE]
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
    access, log = run(gateway.plugin(subject=subject), gateway.request(record=log_record(**record)))
    assert access == []
    assert log == [SERIALIZE]
    assert gateway.subjects == [expected]


def test_attributes_in_headers_are_read_with_the_subject(gateway: Gateway) -> None:
    kong = gateway.request((TENANT, "acme"), ("X-Department", "engineering"))
    access, log = run(gateway.plugin(attributes=[DEPARTMENT]), kong)
    assert access == [
        ("kong.request.get_header", TENANT),
        ("kong.request.get_header", "x-department"),
        ("kong.ctx.shared.set", SHARED_KEY, {TENANT: "acme", "x-department": "engineering"}),
    ]
    assert log == [GET_SHARED, SERIALIZE]
    assert gateway.events[0]["data"]["department"] == "engineering"


def test_without_the_header_all_headers_are_looked_through_once_and_its_absence_is_kept(gateway: Gateway) -> None:
    access, log = run(gateway.plugin(), gateway.request(("accept", "*/*")))
    assert access == [
        ("kong.request.get_header", TENANT),
        ("kong.request.get_headers", 1000),
        ("kong.ctx.shared.set", SHARED_KEY, NO_HEADERS),
    ]
    assert log == [GET_SHARED, SERIALIZE]
    assert gateway.events == []
    assert gateway.skipped == {"no_subject": 1}


def test_no_phase_takes_more_than_three_calls_for_a_subject_in_a_header(gateway: Gateway) -> None:
    plugin = gateway.plugin()
    for headers in ([], [(TENANT, "acme")], [(TENANT, "")], [(f"x-{number}", "x") for number in range(150)]):
        access, log = run(plugin, gateway.request(*headers))
        assert len(access) <= 3
        assert len(log) <= 3


@pytest.mark.parametrize("settings", [{"meter_api_requests": False, "meter_ai_token_usage": False}])
def test_nothing_is_called_when_nothing_is_metered(gateway: Gateway, settings: dict[str, Any]) -> None:
    assert run(gateway.plugin(**settings), gateway.request((TENANT, "acme"))) == ([], [])
    assert gateway.events == []
    assert gateway.skipped == {}


def test_api_requests_can_be_left_unmetered(gateway: Gateway) -> None:
    run(gateway.plugin(meter_api_requests=False), gateway.request((TENANT, "acme")))
    assert gateway.events == []


# -- headers, as a client may send them ----------------------------------------------------------------------------


def many(count: int) -> list[tuple[str, str]]:
    return [(f"x-other-{number}", "x") for number in range(count)]


def test_a_header_after_150_others_is_found(gateway: Gateway) -> None:
    access, _ = run(gateway.plugin(), gateway.request(*many(150), (TENANT, "acme")))
    assert len(access) == 2
    assert gateway.subjects == ["acme"]


@pytest.mark.parametrize("others", [0, 150])
def test_a_header_that_is_sent_twice_counts_once_the_first(gateway: Gateway, others: int) -> None:
    run(gateway.plugin(), gateway.request(*many(others), (TENANT, "acme"), (TENANT, "globex")))
    assert gateway.subjects == ["acme"]


def test_a_header_that_is_sent_twice_after_many_others_takes_one_call_more(gateway: Gateway) -> None:
    kong = gateway.request(*many(150), (TENANT, "acme"), (TENANT, "globex"))
    access, _ = run(gateway.plugin(), kong)
    assert access == [
        ("kong.request.get_header", TENANT),
        ("kong.request.get_headers", 1000),
        ("kong.ctx.shared.set", SHARED_KEY, {TENANT: "acme"}),
    ]


def test_a_value_with_a_comma_after_many_others_is_found(gateway: Gateway) -> None:
    run(gateway.plugin(), gateway.request(*many(150), (TENANT, "Acme, Inc.")))
    assert gateway.subjects == ["Acme, Inc."]


@pytest.mark.parametrize("blank", ["", " ", "\udca0"])
@pytest.mark.parametrize("others", [0, 150, 1000])
def test_a_blank_first_value_does_not_hide_a_second_one(gateway: Gateway, others: int, blank: str) -> None:
    headers = [*many(others), (TENANT, blank), (TENANT, "acme")]
    early_headers: dict[str, Any] = {}
    for name, value in headers[:100]:
        early_headers.setdefault(name, []).append(value)
    record = log_record(request={"headers": early_headers}, started_at=gateway.clock.wall() * 1000)
    run(gateway.plugin(), gateway.request(*headers, record=record))
    assert gateway.subjects == ["acme"]


def test_a_header_that_is_sent_twice_after_1000_others_is_asked_of_nginx(gateway: Gateway) -> None:
    kong = gateway.request(*many(1000), (TENANT, "acme"), (TENANT, "globex"))
    access, _ = run(gateway.plugin(), kong)
    assert access == [
        ("kong.request.get_header", TENANT),
        ("kong.request.get_headers", 1000),
        ("kong.nginx.get_var", "http_x_tenant_id"),
        ("kong.ctx.shared.set", SHARED_KEY, {TENANT: "acme"}),
    ]
    assert gateway.subjects == ["acme"]


def test_nginx_is_not_asked_for_what_999_headers_do_not_have(gateway: Gateway) -> None:
    kong = gateway.request(*many(999))
    run(gateway.plugin(), kong)
    assert "kong.nginx.get_var" not in kong.methods()


def test_an_absent_header_among_more_than_1000_is_absent(gateway: Gateway) -> None:
    run(gateway.plugin(), gateway.request(*many(1200)))
    assert gateway.skipped == {"no_subject": 1}


@pytest.mark.parametrize("sent", ["X-TENANT-ID", "x_tenant_id", "X_Tenant-Id"])
@pytest.mark.parametrize("others", [0, 150])
def test_letter_case_and_underscores_do_not_matter(gateway: Gateway, sent: str, others: int) -> None:
    run(gateway.plugin(), gateway.request(*many(others), (sent, "acme")))
    assert gateway.subjects == ["acme"]


def test_bytes_that_are_not_utf8_are_metered(gateway: Gateway) -> None:
    kong = gateway.request((TENANT, "caf\udce9"), ("x-department", "\udcff"))
    run(gateway.plugin(attributes=[DEPARTMENT]), kong)
    assert gateway.subjects == ["café"]
    assert gateway.events[0]["data"]["department"] == "\ufffd"


def test_the_clients_own_value_counts_and_not_what_a_transformer_made_of_it(gateway: Gateway) -> None:
    record = log_record(request={"headers": {TENANT: "changed"}})
    run(gateway.plugin(), gateway.request((TENANT, "acme"), record=record))
    assert gateway.subjects == ["acme"]


def test_a_header_that_a_transformer_added_does_not_count(gateway: Gateway) -> None:
    record = log_record(request={"headers": {TENANT: "added"}}, started_at=gateway.clock.wall() * 1000)
    run(gateway.plugin(), gateway.request(record=record))
    assert gateway.skipped == {"no_subject": 1}


def test_a_request_that_was_answered_before_our_access_phase_is_metered_from_its_record(gateway: Gateway) -> None:
    kong = gateway.request((TENANT, "acme"), record=answered_early(request={"headers": {TENANT: "acme"}}))
    gateway.plugin().log(kong.kong)
    assert kong.calls == [GET_SHARED, SERIALIZE]
    assert gateway.subjects == ["acme"]


def test_a_request_from_before_this_process_is_metered_from_its_record(gateway: Gateway) -> None:
    before = gateway.clock.wall() * 1000 - 5
    record = log_record(request={"headers": {TENANT: "acme"}}, started_at=before)
    gateway.plugin().log(gateway.request(record=record).kong)
    assert gateway.subjects == ["acme"]


@pytest.mark.parametrize("shared", [None, {}, [], "x", 5, {TENANT: 5}])
def test_anything_may_stand_in_the_shared_context(gateway: Gateway, shared: object) -> None:
    kong = gateway.request(record=answered_early(), answers={"kong.ctx.shared.get": shared})
    gateway.plugin().log(kong.kong)
    assert gateway.skipped == {"no_subject": 1}


@pytest.mark.parametrize("headers", [None, [], {}, {TENANT: []}, {TENANT: [5]}, {TENANT: None}])
def test_anything_may_stand_in_the_headers(gateway: Gateway, headers: object) -> None:
    kong = gateway.request(answers={"kong.request.get_header": None, "kong.request.get_headers": headers})
    run(gateway.plugin(), kong)
    assert kong.shared == {SHARED_KEY: NO_HEADERS}
    assert gateway.skipped == {"no_subject": 1}


def test_only_allowed_status_codes_are_metered(gateway: Gateway) -> None:
    plugin = gateway.plugin(allow_status_codes=["200-299"])
    for status in (200, 204, 404):
        run(plugin, gateway.request((TENANT, "acme"), record=log_record(response={"status": status})))
    assert [event["data"]["response_http_status"] for event in gateway.events] == [200, 204]
    assert gateway.skipped == {"status_not_allowed": 1}


# -- when something fails ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["kong.request.get_header", "kong.request.get_headers", "kong.ctx.shared.set"])
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
    gateway.runtime.troubles.summarise()
    assert "(and 2 more like this in the last minute)" in said[-1].getMessage()


def test_a_log_phase_that_fails_is_counted_and_reported_once(
    broken_gateway: Gateway, said: list[logging.LogRecord]
) -> None:
    gateway, plugin = broken_gateway, broken_gateway.plugin()
    gateway.delivery.queue.broken = True
    for _ in range(3):
        run(plugin, gateway.request((TENANT, "acme")))
    assert gateway.skipped == {"error": 3}
    (record,) = said
    assert "276df434: a request was not metered, its log phase failed:" in record.getMessage()


def test_without_what_access_kept_the_records_header_counts(
    broken_gateway: Gateway, said: list[logging.LogRecord]
) -> None:
    gateway, plugin = broken_gateway, broken_gateway.plugin()
    record = log_record(request={"headers": {TENANT: "acme"}})
    for _ in range(3):
        plugin.log(gateway.request(record=record, failing={"kong.ctx.shared.get": "no such thing"}).kong)
    assert gateway.subjects == ["acme"] * 3
    (line,) = said
    assert "its access phase failed: PDKException:" in line.getMessage()


def test_a_serialize_that_raises_is_replaced_by_pieces(gateway: Gateway, said: list[logging.LogRecord]) -> None:
    kong = gateway.request((TENANT, "acme"), answers=PIECES, failing={"kong.log.serialize": "no such thing"})
    gateway.plugin().log(kong.kong)
    assert gateway.subjects == ["acme"]
    assert "could not serialise" in said[0].getMessage()


def test_a_request_without_any_due_event_is_not_counted_as_without_subject(gateway: Gateway) -> None:
    run(gateway.plugin(meter_api_requests=False), gateway.request())
    assert gateway.skipped == {}


def test_any_exception_is_caught(broken_gateway: Gateway) -> None:
    broken_gateway.delivery.queue.broken = True
    run(broken_gateway.plugin(), broken_gateway.request((TENANT, "acme")))
    assert broken_gateway.skipped == {"error": 1}


def test_the_next_request_is_metered_again(broken_gateway: Gateway) -> None:
    gateway, plugin = broken_gateway, broken_gateway.plugin()
    gateway.delivery.queue.broken = True
    run(plugin, gateway.request((TENANT, "lost")))
    gateway.delivery.queue.broken = False
    run(plugin, gateway.request((TENANT, "acme")))
    assert gateway.subjects == ["acme"]


def test_client_bytes_in_an_error_are_escaped(broken_gateway: Gateway, said: list[logging.LogRecord]) -> None:
    hostile = "\x1b[2J\nforged: line" + "x" * 1000
    broken_gateway.plugin().access(broken_gateway.request(failing={"kong.request.get_header": hostile}).kong)
    message = said[0].getMessage()
    assert message.isprintable()
    assert len(message) < 500


PIECES = {
    "kong.request.get_headers": {TENANT: ["acme"], "user-agent": ["curl"]},
    "kong.response.get_header": "f37e446f",
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
    assert event["id"] == "f37e446f:api_request"
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


def test_captured_headers_count_for_such_a_request_too(gateway: Gateway) -> None:
    kong = gateway.request(
        (TENANT, "own"), answers={"kong.log.serialize": None, "kong.request.get_headers": {}, **PIECES}
    )
    run(gateway.plugin(), kong)
    assert gateway.subjects == ["own"]


def test_a_consumer_counts_for_such_a_request_too(gateway: Gateway) -> None:
    kong = gateway.request(answers={**PIECES, "kong.log.serialize": None})
    gateway.plugin(subject={}).log(kong.kong)
    assert gateway.subjects == ["consumer:b32379d9"]


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
    plugin = gateway.plugin(api_token="s3cr3t\n", plugin_instance_name="orders")
    kong = gateway.request((TENANT, "acme"))
    plugin.access(kong.kong)
    assert kong.calls == []
    plugin.log(kong.kong)
    (record,) = said
    message = record.getMessage()
    assert record.levelno == logging.ERROR
    assert "plugin orders (276df434): THIS CONFIGURATION CANNOT BE USED, NOTHING IS METERED" in message
    assert "config.api_token: a token is printable ASCII" in message
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
    run(plugin, kong)
    assert kong.said == [("warn", "the endpoint is slow"), ("err", "the endpoint is gone")]
    assert broken_gateway.subjects == ["acme"]


def test_what_cannot_be_said_does_not_count_as_a_request_that_was_not_metered(
    broken_gateway: Gateway, said: list[logging.LogRecord]
) -> None:
    gateway, plugin = broken_gateway, broken_gateway.plugin()
    LOGGER.warning("the endpoint is slow")
    for _ in range(3):
        run(plugin, gateway.request((TENANT, "acme"), failing={"kong.log.warn": "no", "kong.log.err": "no"}))
    assert gateway.subjects == ["acme"] * 3
    assert gateway.skipped == {}
    assert len(said) == 2
    assert "warnings could not be said through Kong: PDKException:" in said[1].getMessage()


# -- its queue -----------------------------------------------------------------------------------------------------


def test_the_queue_is_that_of_kongs_plugin_entity(gateway: Gateway) -> None:
    gateway.plugin(plugin_instance_name="orders")
    ((entity, config),) = gateway.delivery.opened
    assert (entity.id, entity.name) == ("276df434", "orders (276df434)")
    assert config.api_token == "om_token"


def test_an_instance_is_busy_while_events_wait(gateway: Gateway) -> None:
    plugin = gateway.plugin()
    busy = [plugin.busy]
    run(plugin, gateway.request((TENANT, "acme")))
    busy.append(plugin.busy)
    gateway.delivery.queue.events.clear()
    busy.append(plugin.busy)
    assert busy == [False, True, False]


def test_closing_lets_go_of_the_queue(gateway: Gateway) -> None:
    gateway.plugin().close()
    assert gateway.delivery.released == [gateway.delivery.queue]


def test_the_same_request_gives_the_same_event_in_every_instance(gateway: Gateway) -> None:
    for plugin in (gateway.plugin(), gateway.plugin()):
        run(plugin, gateway.request((TENANT, "acme")))
    first, second = gateway.delivery.queue.events
    assert json.loads(first) == json.loads(second)


@pytest.fixture
def default(monkeypatch: pytest.MonkeyPatch, clock: FakeClock) -> Callable[[], Gateway]:
    def make() -> Gateway:
        gateway = Gateway(clock, lua_style=False)
        monkeypatch.setattr("kong_metering.plugin.default_runtime", lambda: gateway.runtime)
        return gateway

    return make


def test_a_foreign_host_gives_no_runtime(default: Callable[[], Gateway]) -> None:
    gateway = default()
    plugin = Plugin({"ingest_endpoint": "https://openmeter.example", "api_token": "t", "subject": BY_HEADER})
    run(plugin, gateway.request((TENANT, "acme")))
    assert gateway.subjects == ["acme"]


def test_an_attribute_with_a_reserved_name_is_said_when_the_instance_starts(
    gateway: Gateway, said: list[logging.LogRecord]
) -> None:
    gateway.plugin(attributes=[attribute("header", "x-model", "model")])
    (line,) = said
    assert line.levelno == logging.WARNING
    assert "the attribute model is left out of kong.llm_request events" in line.getMessage()
