"""From a finished request to its CloudEvents."""

from __future__ import annotations

import json
import re
import tracemalloc
import uuid
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kong_metering.config import parse_config
from kong_metering.events import (
    API_REQUEST,
    EVENT_FIELDS,
    Meter,
    api_request_data,
    last_upstream_status,
    request_host,
    source_of,
)
from kong_metering.reasons import Skipped
from kong_metering.record import Record, parse_record, record_of
from kong_metering_sandbox.collector.formats import is_uri_reference
from tests.support.clock import FakeClock
from tests.support.openmeter import catalogue, valid_event
from tests.support.records import (
    DATA,
    STARTED_AT,
    STARTED_AT_RFC3339,
    answered_early,
    finished,
    log_record,
    recorded,
    recorded_scenarios,
)
from tests.support.settings import BY_HEADER, DEPARTMENT, attribute

ACME = {"x-tenant-id": "acme"}


def meter(clock: FakeClock | None = None, **settings: Any) -> Meter:
    settings = {"meter_ai_token_usage": False, "subject": BY_HEADER, **settings}
    raw = {"ingest_endpoint": "https://openmeter.example/events", "api_token": "om_token", **settings}
    return Meter(parse_config(raw), clock or FakeClock())


def event_of(record: dict[str, Any] | Record, captured: object = None, **settings: Any) -> dict[str, Any]:
    """Build the one event of a request, of the subject acme unless told otherwise, and check it."""
    events = meter(**settings).events(finished(record, ACME if captured is None else captured))
    assert not isinstance(events, Skipped)
    (event,) = events
    names = frozenset(item["event_property_name"] for item in settings.get("attributes", ()))
    return valid_event(event, attributes=names)


def host_of(request: dict[str, Any]) -> str | None:
    return request_host(record_of({"request": request}).request)


def data_of(record: dict[str, Any], captured: object = None, **settings: Any) -> dict[str, Any]:
    data: dict[str, Any] = event_of(record, captured, **settings)["data"]
    return data


# -- recorded on a real Kong 3.9.1 ---------------------------------------------------------------------------------

# What `kong.request.get_header("x-tenant-id")` gave in the access phase, where that is not "acme"; None where it gave
# nothing, or where there was no access phase.
CAPTURED: dict[str, str | None] = {
    "bad_request_400_malformed": None,
    "empty_subject_header": "",
    "get_no_subject": None,
    "key_auth_rejected_401": None,
    "latin1_subject_header_invalid_utf8": "caf\udce9",
    "long_subject_header_7000_bytes": "a" * 7000,
    "no_route_404": None,
    "utf8_subject_header": "Zoë-株式会社",
}


@pytest.mark.parametrize("scenario", recorded_scenarios())
def test_a_recorded_request_gives_exactly_this_event(scenario: str) -> None:
    expected = json.loads((DATA / "events" / f"{scenario}.json").read_text("utf-8"))
    captured = CAPTURED.get(scenario, "acme")
    record = parse_record(recorded(scenario))
    assert record is not None
    kept = {} if captured is None else {"x-tenant-id": captured}
    events = meter().events(finished(record, kept))
    if expected is None:
        assert events is Skipped.NO_SUBJECT
    else:
        assert not isinstance(events, Skipped)
        assert [valid_event(event) for event in events] == [expected]


def test_each_recorded_request_has_an_expected_event() -> None:
    assert recorded_scenarios() == sorted(path.stem for path in (DATA / "events").glob("*.json"))
    assert CAPTURED.keys() <= set(recorded_scenarios())


def test_a_recorded_consumer_is_the_subject() -> None:
    record = parse_record(recorded("consumer_key_auth_hidden_credentials"))
    assert record is not None
    event = event_of(record, {}, subject={"look_up_value_in": "consumer", "field": "custom_id"})
    assert event["subject"] == "alice-custom"
    assert event["data"]["subject_type"] == "consumer_custom_id"
    assert event_of(record, {}, subject={})["subject"] == "consumer:b32379d9-3d28-5683-a79c-72139be6e34f"


# -- the envelope --------------------------------------------------------------------------------------------------


def test_the_whole_event_of_a_request() -> None:
    assert event_of(log_record()) == {
        "specversion": "1.0",
        "id": "f37e446f27097b739946db19e1f6e447:api_request",
        "source": "echo",
        "type": "kong.api_request",
        "subject": "acme",
        "time": STARTED_AT_RFC3339,
        "data": {
            "client_ip": "192.0.2.7",
            "request_host": "gateway.example",
            "request_method": "GET",
            "request_size_bytes": 135,
            "request_uri": "/anything",
            "request_user_agent": "curl/7.88.1",
            "response_http_status": 200,
            "response_size_bytes": 779,
            "route_id": "21f7817b-d909-5895-b81b-ac9ed0a6d09d",
            "route_name": "anything",
            "service_id": "adbd70b3-4224-5183-a52a-179d7b34ab5b",
            "service_name": "echo",
            "service_port": 9000,
            "service_protocol": "http",
            "subject_type": "header",
            "upstream_status": 200,
        },
    }


def test_the_fields_are_the_vendors() -> None:
    assert {name: set(catalogue(name)) for name in EVENT_FIELDS} == EVENT_FIELDS
    assert len(EVENT_FIELDS) == 2


def test_the_same_request_always_has_the_same_id() -> None:
    assert event_of(log_record())["id"] == event_of(log_record())["id"]


def test_another_request_has_another_id() -> None:
    assert event_of(log_record(request={"id": "1"}))["id"] != event_of(log_record(request={"id": "2"}))["id"]


def test_a_request_without_an_id_has_a_uuid() -> None:
    nothing: list[object] = [None, "", 5, {}]
    ids = [event_of(log_record(request={"id": value}))["id"] for value in nothing]
    assert len(set(ids)) == len(ids)
    for event_id in ids:
        assert event_id.endswith(":api_request")
        uuid.UUID(event_id.removesuffix(":api_request"))


@pytest.mark.parametrize(
    ("service", "expected"),
    [
        ({"id": "adbd70b3", "name": "echo"}, "echo"),
        ({"id": "adbd70b3"}, "adbd70b3"),
        ({"id": "adbd70b3", "name": ""}, "adbd70b3"),
        ({"id": "adbd70b3", "name": None}, "adbd70b3"),
        ({"id": 5, "name": []}, "kong-gateway"),
        ({}, "kong-gateway"),
        ([], "kong-gateway"),
        (None, "kong-gateway"),
        ({"name": "orders.v1_a-b~c"}, "orders.v1_a-b~c"),
        ({"name": "größe"}, "gr%C3%B6%C3%9Fe"),
        ({"name": "a b"}, "a%20b"),
        ({"name": "a:b"}, "a%3Ab"),
        ({"name": "50%"}, "50%25"),
        ({"name": "caf\udce9"}, "caf%EF%BF%BD"),
    ],
)
def test_the_source_is_the_service(service: object, expected: str) -> None:
    assert source_of(record_of({"service": service})) == expected


@given(st.text(alphabet=st.characters(codec=None, categories=None)))
def test_the_source_is_a_uri_reference_whatever_a_service_is_called(name: str) -> None:
    source = source_of(record_of({"service": {"name": name}}))
    assert source
    assert is_uri_reference(source)


@given(st.text(), st.text())
def test_two_services_are_two_sources(one: str, other: str) -> None:
    if one and other and one != other:
        assert source_of(record_of({"service": {"name": one}})) != source_of(record_of({"service": {"name": other}}))


@pytest.mark.parametrize(
    ("started_at", "expected"),
    [
        (STARTED_AT, STARTED_AT_RFC3339),
        (float(STARTED_AT), STARTED_AT_RFC3339),
        (str(STARTED_AT), STARTED_AT_RFC3339),
        (1_795_359_970_000, "2026-11-22T15:06:10.000Z"),
        (1_795_359_970_999, "2026-11-22T15:06:10.999Z"),
        (1_795_359_970_018.9998, STARTED_AT_RFC3339),
        (0, "1970-01-01T00:00:00.000Z"),
        (951_827_696_789, "2000-02-29T12:34:56.789Z"),
        (253_402_300_799_999, "9999-12-31T23:59:59.999Z"),
    ],
)
def test_the_time_is_the_start_to_the_millisecond(started_at: object, expected: str) -> None:
    assert event_of(log_record(started_at=started_at))["time"] == expected


@given(st.integers(0, 253_402_300_799_999))
def test_any_millisecond_is_kept(started_at: int) -> None:
    time = event_of(log_record(started_at=started_at))["time"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", time)
    assert int(time[-4:-1]) == started_at % 1000


@pytest.mark.parametrize(
    "started_at",
    [None, "", "yesterday", -1, -0.6, 253_402_300_800_000, 2**60, 1e300, float("nan"), float("inf"), True, [], {}],
)
def test_a_start_that_is_no_time_is_now(started_at: object) -> None:
    assert event_of(log_record(started_at=started_at))["time"] == "2027-01-15T08:00:00.000Z"


# -- the data ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "missing", ["client_ip", "request", "response", "route", "service", "upstream_status", "tries"]
)
def test_what_the_record_does_not_have_is_left_out(missing: str) -> None:
    data = data_of({name: value for name, value in log_record().items() if name != missing})
    if missing == "request":
        assert not any(name.startswith("request_") for name in data)
    elif missing == "tries":
        assert data == data_of(log_record())
    else:
        assert not any(name.startswith(missing) for name in data)


def test_a_request_that_kong_answered_has_no_upstream() -> None:
    data = data_of(answered_early(service=None, route=None))
    assert {"upstream_status", "route_id", "service_id"}.isdisjoint(data)
    assert data["response_http_status"] == 401


def test_null_is_absent() -> None:
    nothing = dict.fromkeys(["client_ip", "upstream_status", "started_at", "tries"])
    sections = {name: {"id": None, "name": None, "port": None} for name in ("route", "service", "response")}
    assert data_of({**log_record(), **nothing, **sections, "request": {"uri": None, "headers": None}}) == {
        "subject_type": "header"
    }


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("/anything?tenant=acme", "/anything"),
        ("/a?b?c", "/a"),
        ("/?", "/"),
        ("/", "/"),
        ("//a/../b/./c", "//a/../b/./c"),
        ("/a#fragment?b", "/a"),
        ("/%E9%00", "/%E9%00"),
        ("/caf\udce9", "/caf\ufffd"),
        ("*", "*"),
        ("?a=b", None),
        ("", None),
        (5, None),
        (["/a"], None),
    ],
)
def test_the_request_uri_is_the_path(uri: object, expected: str | None) -> None:
    assert data_of(log_record(request={"uri": uri})).get("request_uri") == expected


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://gateway.example:8000/anything", "gateway.example"),
        ("https://gateway.example/anything", "gateway.example"),
        ("http://gateway.example", "gateway.example"),
        ("http://gateway.example:8000?a=b:9", "gateway.example"),
        ("http://127.0.0.1:8000/", "127.0.0.1"),
        ("http://[::1]:8000/", "[::1]"),
        ("http://[2001:db8::7]/", "[2001:db8::7]"),
        ("http://absolute.example:8000/a?b=http://other.example/", "absolute.example"),
        ("http://:8000/", None),
        ("http://", None),
    ],
)
def test_the_host_is_nginxs_without_the_port(url: str, expected: str | None) -> None:
    assert host_of({"url": url, "headers": {"host": "forged.example"}}) == expected


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("gateway.example", "gateway.example"),
        ("gateway.example:8000", "gateway.example"),
        ("[::1]:8000", "[::1]"),
        ("[::1]", "[::1]"),
        ("gateway.example:", "gateway.example:"),
        (["gateway.example:8000", "other"], "gateway.example"),
        ("", None),
        ([], None),
        (5, None),
        (None, None),
    ],
)
@pytest.mark.parametrize("url", [None, "", 5, "/anything"])
def test_without_a_url_the_host_is_the_header(url: object, host: object, expected: str | None) -> None:
    assert host_of({"url": url, "headers": {"host": host}}) == expected


def test_without_anything_there_is_no_host() -> None:
    assert host_of({}) is None
    assert "request_host" not in data_of(log_record(request={"url": None, "headers": {}}))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("200", 200),
        (200, 200),
        (200.0, 200),
        ("502, 502, 200", 200),
        ("502, 502, 502", 502),
        ("502 : 200", 200),
        ("502, 504 : 502, 201", 201),
        ("", None),
        ("-", None),
        ("502, -", None),
        ("502, ", None),
        ("OK", None),
        (None, None),
        (True, None),
        (-1, None),
        ([200], None),
    ],
)
def test_the_upstream_status_is_that_of_the_last_try(value: object, expected: int | None) -> None:
    assert last_upstream_status(value) == expected
    assert data_of(log_record(upstream_status=value)).get("upstream_status") == expected


@pytest.mark.parametrize(
    ("size", "expected"),
    [(0, 0), (135.0, 135), ("135", 135), (2**53, 2**53), (2**53 + 1, None), (-1, None), (1.5, None), (1e300, None)],
)
def test_sizes_are_whole_numbers(size: object, expected: int | None) -> None:
    data = data_of(log_record(request={"size": size}, response={"status": 200, "size": size}))
    assert data.get("request_size_bytes") == expected
    assert data.get("response_size_bytes") == expected


@pytest.mark.parametrize(
    ("agent", "expected"), [("curl", "curl"), (["a", "b"], "a"), (["", "b"], "b"), ("", None), (5, None), ([], None)]
)
def test_the_user_agent_is_the_first_one(agent: object, expected: str | None) -> None:
    assert data_of(log_record(request={"headers": {"user-agent": agent}})).get("request_user_agent") == expected


def test_bytes_that_are_not_utf8_do_not_cost_the_event() -> None:
    junk = "caf\udce9"
    event = event_of(
        log_record(
            request={"id": junk, "uri": f"/{junk}?x", "method": junk, "headers": {"user-agent": junk}},
            route={"name": junk},
            client_ip=junk,
        ),
        {"x-tenant-id": junk, "x-department": junk},
        attributes=[DEPARTMENT],
    )
    assert event["subject"] == "café"
    assert event["data"]["request_user_agent"] == event["data"]["department"] == "caf\ufffd"


def test_a_subject_of_8_kilobytes_is_kept_whole() -> None:
    assert event_of(log_record(), {"x-tenant-id": "a" * 8192})["subject"] == "a" * 8192


# -- which requests ------------------------------------------------------------------------------------------------


def test_no_subject_is_no_event() -> None:
    assert meter().events(finished(log_record())) is Skipped.NO_SUBJECT
    assert meter().events(finished(log_record(), {"x-tenant-id": " "})) is Skipped.NO_SUBJECT


@pytest.mark.parametrize(
    ("ranges", "status", "metered"),
    [
        (["200-299"], 200, True),
        (["200-299"], 299, True),
        (["200-299"], 199, False),
        (["200-299"], 300, False),
        (["200-299", "404-404"], 404, True),
        (["200-299", "404-404"], 403, False),
        (["200-299"], "204", True),
        (["200-299"], 204.0, True),
        (["200-299"], None, False),
        (["200-299"], {}, False),
        ([], 500, True),
        (None, 500, True),
        ({}, None, True),
    ],
)
def test_only_allowed_status_codes_are_metered(ranges: object, status: object, metered: bool) -> None:  # noqa: FBT001
    request = finished(log_record(response={"status": status}), ACME)
    events = meter(allow_status_codes=ranges).events(request)
    assert isinstance(events, list) if metered else events is Skipped.STATUS_NOT_ALLOWED


def test_the_status_that_counts_is_the_one_that_the_client_got() -> None:
    request = finished(log_record(response={"status": 502}, upstream_status="200"), ACME)
    assert meter(allow_status_codes=["200-299"]).events(request) is Skipped.STATUS_NOT_ALLOWED


def test_api_requests_can_be_left_unmetered() -> None:
    assert meter(meter_api_requests=False).events(finished(log_record(), ACME)) == []
    assert meter(meter_api_requests=False, meter_ai_token_usage=True).events(finished(log_record(), ACME)) == []


# -- attributes ----------------------------------------------------------------------------------------------------


def test_a_header_attribute_is_the_captured_value() -> None:
    record = log_record(request={"headers": {"x-department": "changed"}})
    data = data_of(record, {**ACME, "x-department": "engineering"}, attributes=[DEPARTMENT])
    assert data["department"] == "engineering"


def test_a_header_attribute_of_an_early_answer_is_in_the_record() -> None:
    record = answered_early(request={"headers": {"x-tenant-id": "acme", "x-department": "engineering"}})
    assert data_of(record, {}, attributes=[DEPARTMENT])["department"] == "engineering"


def test_a_query_attribute_is_the_clients_own() -> None:
    record = log_record(request={"uri": "/a?plan=gold%20plus&plan=b"})
    assert data_of(record, attributes=[attribute("query", "plan", "pricing_plan")])["pricing_plan"] == "gold plus"


@pytest.mark.parametrize("value", [None, "", " \t"])
def test_an_attribute_that_is_absent_or_blank_is_left_out(value: str | None) -> None:
    captured = {**ACME, "x-department": value}
    attributes = [DEPARTMENT, attribute("query", "plan", "plan")]
    record = log_record(request={"uri": f"/a?plan={value or ''}"})
    assert {"department", "plan"}.isdisjoint(data_of(record, captured, attributes=attributes))


@pytest.mark.parametrize("name", sorted(EVENT_FIELDS[API_REQUEST]))
@pytest.mark.parametrize("record", [log_record(), {"tries": [{}]}], ids=["with", "without"])
def test_an_attribute_never_overwrites_a_field_of_ours(name: str, record: dict[str, Any]) -> None:
    captured = {**ACME, "x-forged": "forged"}
    attributes = [attribute("header", "x-forged", name)]
    assert data_of(record, captured, attributes=attributes) == data_of(record, captured)


@pytest.mark.parametrize("name", ["tokens", "provider", "model", "Route_ID", "größe", "a.b", "__proto__"])
def test_any_other_name_is_free(name: str) -> None:
    captured = {**ACME, "x-free": "value"}
    assert data_of(log_record(), captured, attributes=[attribute("header", "x-free", name)])[name] == "value"


@pytest.mark.parametrize(
    ("subject", "attributes", "names"),
    [
        (BY_HEADER, [], ("x-tenant-id",)),
        (BY_HEADER, [DEPARTMENT], ("x-tenant-id", "x-department")),
        (BY_HEADER, [attribute("header", "x-tenant-id", "tenant")], ("x-tenant-id",)),
        (BY_HEADER, [attribute("query", "plan", "plan")], ("x-tenant-id",)),
        ({}, [DEPARTMENT, DEPARTMENT], ("x-department",)),
        ({"look_up_value_in": "query", "field": "tenant"}, [], ()),
        ({"look_up_value_in": "consumer", "field": "username"}, [], ()),
        ({"look_up_value_in": "application"}, [], ()),
    ],
)
def test_the_access_phase_reads_these_headers(subject: object, attributes: object, names: tuple[str, ...]) -> None:
    assert meter(subject=subject, attributes=attributes).header_names == names


def test_nothing_is_read_when_nothing_is_metered() -> None:
    idle = meter(meter_api_requests=False, meter_ai_token_usage=False)
    assert not idle.meters_anything
    assert idle.header_names == ()


# -- records from whatever version of Kong, or from nowhere --------------------------------------------------------

any_text = st.text(alphabet=st.characters(codec=None, categories=None), max_size=10)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | any_text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(any_text, inner, max_size=3),
    max_leaves=8,
)
SECTIONS = sorted({*log_record(), "consumer", "application", "ai", "portal_id"})
FIELDS = [
    *(("request", name) for name in log_record()["request"]),
    *(("response", name) for name in ("status", "size", "headers")),
    *((part, name) for part in ("service", "route") for name in ("id", "name", "port", "protocol")),
    *(("consumer", name) for name in ("id", "username")),
    ("application", "id"),
]
meters = st.sampled_from(
    [
        meter(subject=subject, attributes=attributes, meter_ai_token_usage=True)
        for subject in (BY_HEADER, {"look_up_value_in": "query", "field": "t"}, {}, {"look_up_value_in": "application"})
        for attributes in ([], [DEPARTMENT, attribute("query", "t", "t")])
    ]
)


def assert_only_valid_events(found: list[bytes] | Skipped) -> None:
    if not isinstance(found, Skipped):
        for event in found:
            valid_event(event, attributes=frozenset({"department", "t"}))


@given(meters, st.dictionaries(any_text | st.sampled_from(SECTIONS), json_values), json_values)
def test_any_object_is_a_record(meter: Meter, record: dict[str, Any], captured: object) -> None:
    assert_only_valid_events(meter.events(finished(record, captured)))


@given(meters, st.dictionaries(st.sampled_from(SECTIONS), json_values, min_size=1), any_text)
def test_any_section_may_be_anything(meter: Meter, sections: dict[str, Any], subject: str) -> None:
    record = {**log_record(consumer={"id": "b32379d9"}, application={"id": "a"}), **sections}
    captured = {"x-tenant-id": f"a{subject}", "x-department": subject}
    assert_only_valid_events(meter.events(finished(record, captured)))


@given(meters, st.dictionaries(st.sampled_from(FIELDS), json_values, min_size=1))
def test_any_field_may_be_anything(meter: Meter, fields: dict[tuple[str, str], Any]) -> None:
    record = log_record(consumer={"id": "b32379d9"}, application={"id": "a"}, request={"uri": "/a?t=acme"})
    for (part, name), value in fields.items():
        record[part] = {**record[part], name: value}
    assert_only_valid_events(meter.events(finished(record, ACME)))


@pytest.mark.parametrize("value", [[], {}, 5, True, None, "", "caf\udce9"])
@pytest.mark.parametrize(
    ("part", "name"),
    [
        *(("meta", name) for name in ("plugin_id", "provider_name", "request_model", "response_model")),
        *(("usage", name) for name in ("prompt_tokens", "completion_tokens")),
        ("cache", "cache_status"),
    ],
)
def test_any_field_of_an_ai_plugin_may_be_anything(part: str, name: str, value: object) -> None:
    account: dict[str, dict[str, Any]] = {
        "meta": {"plugin_id": "e66b2aef", "provider_name": "openai", "request_model": "a", "response_model": "b"},
        "usage": {"prompt_tokens": 11, "completion_tokens": 7},
        "cache": {"cache_status": "Hit"},
    }
    account[part][name] = value
    events = meter(meter_ai_token_usage=True).events(finished(log_record(ai={"proxy": account}), ACME))
    assert not isinstance(events, Skipped)
    kinds = [valid_event(event)["data"].get("type", "api") for event in events]
    without = {"prompt_tokens": "request", "completion_tokens": "response"}.get(name) if value != 5 else None
    assert kinds == [kind for kind in ("api", "request", "response") if kind != without]


@given(st.binary(max_size=200))
def test_any_subject_that_is_not_blank_gives_a_valid_event(raw: bytes) -> None:
    subject = f"a{raw.decode('utf-8', 'surrogateescape')}"
    assert event_of(log_record(), {"x-tenant-id": subject})["subject"].startswith("a")


@given(st.dictionaries(st.sampled_from(SECTIONS), json_values))
def test_the_data_never_hold_nothing(record: dict[str, Any]) -> None:
    assert None not in api_request_data(record_of(record)).values()
    assert "" not in api_request_data(record_of(record)).values()


def test_an_event_that_waits_takes_hardly_more_memory_than_its_bytes() -> None:
    made, record = meter(), log_record()
    tracemalloc.start()
    try:
        waiting = [made.events(finished(record, ACME)) for _ in range(100)]
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    size = sum(len(event) for events in waiting if not isinstance(events, Skipped) for event in events)
    assert size > 100 * 300
    assert taken < 2 * size
