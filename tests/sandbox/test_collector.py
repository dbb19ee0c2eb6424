"""The collector, over real HTTP against its real process."""

from __future__ import annotations

import gzip
import json
import re
import select
import socket
import subprocess
import sys
import time
from http.client import HTTPConnection
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest
import requests
from hypothesis import given, settings
from hypothesis import strategies as st
from openapi_schema_validator import OAS30Validator
from pydantic import ValidationError

from kong_metering_sandbox.collector.client import CollectorClient
from kong_metering_sandbox.collector.faults import FaultMatch, FaultRule
from kong_metering_sandbox.collector.formats import format_checker, is_date_time, is_uri, is_uri_reference
from kong_metering_sandbox.collector.process import CollectorError, CollectorProcess
from kong_metering_sandbox.collector.records import IngestRequest, Usage
from kong_metering_sandbox.collector.store import EventStore
from kong_metering_sandbox.collector.validation import EventValidator, is_plainly_valid
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

Event = dict[str, Any]

BATCH = "application/cloudevents-batch+json"
SINGLE = "application/cloudevents+json"
V1 = "/api/v1/events"
V3 = "/api/v3/openmeter/events"
KONNECT = "/v3/openmeter/events"
V1_SCHEMA = ("openmeter-ingest-v1.openapi.yaml", "Event")
V3_SCHEMA = ("openmeter-ingest-v3.openapi.yaml", "MeteringEvent")


@pytest.fixture(scope="module")
def process() -> Iterator[CollectorProcess]:
    with CollectorProcess() as running:
        yield running


@pytest.fixture
def collector(process: CollectorProcess) -> CollectorProcess:
    process.client.clear_faults()
    process.client.set_tokens([])
    process.client.reset()
    return process


def event(number: int = 0, **changes: object) -> Event:
    whole: Event = {
        "specversion": "1.0",
        "id": f"event-{number}",
        "source": "https://gateway.example/node-1",
        "type": "kong.api_request",
        "subject": "acme",
        "time": "2026-02-28T12:30:45.123Z",
        "datacontenttype": "application/json",
        "data": {"request_method": "GET", "response_http_status": 200},
    }
    return whole | changes


def without(whole: Event, *names: str) -> Event:
    return {name: value for name, value in whole.items() if name not in names}


def post(
    collector: CollectorProcess,
    body: object,
    *,
    path: str = V1,
    content_type: str = BATCH,
    headers: dict[str, str] | None = None,
) -> requests.Response:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    all_headers = {"Content-Type": content_type} | (headers or {})
    return requests.post(collector.url + path, data=raw, headers=all_headers, timeout=10)


def post_impatiently(collector: CollectorProcess, body: object) -> None:
    """Meet the only fault rule with a request, and go away once it is used up; until then nothing is answered."""
    parts = urlsplit(collector.url)
    connection = HTTPConnection(str(parts.hostname), parts.port)
    connection.request("POST", V3, json.dumps(body), {"Content-Type": "application/json"})
    wait_until(lambda: collector.client.faults_left() == [], "the collector has the request")
    assert select.select([connection.sock], [], [], 0.2)[0] == []
    connection.close()


def ids(collector: CollectorProcess) -> list[str]:
    return [stored.id for stored in collector.client.events()]


def statuses(collector: CollectorProcess) -> list[int | None]:
    return [request.status for request in collector.client.requests()]


# Accepting


@pytest.mark.parametrize(("path", "status"), [(V1, 204), (V3, 202), (KONNECT, 202)])
@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("application/json", event()),
        ("application/json", [event()]),
        (SINGLE, event()),
        (BATCH, [event()]),
    ],
)
def test_each_path_takes_each_content_type_with_its_own_status(
    collector: CollectorProcess, path: str, status: int, content_type: str, body: object
) -> None:
    answer = post(collector, body, path=path, content_type=content_type)
    assert (answer.status_code, answer.content) == (status, b"")
    assert ids(collector) == ["event-0"]


def test_an_event_is_stored_with_everything_that_was_sent(collector: CollectorProcess) -> None:
    before = time.time()
    post(collector, [event(data={"b": 1, "a": {"ä": [2**53 + 1, None]}}, traceparent="00-1")])
    (stored,) = collector.client.events()
    assert (stored.seq, stored.id, stored.source) == (1, "event-0", "https://gateway.example/node-1")
    assert (stored.type, stored.subject, stored.time) == ("kong.api_request", "acme", "2026-02-28T12:30:45.123Z")
    assert stored.data == {"b": 1, "a": {"ä": [2**53 + 1, None]}}
    assert stored.attributes == {
        "specversion": "1.0",
        "datacontenttype": "application/json",
        "traceparent": "00-1",
    }
    assert before <= stored.received_at <= time.time()
    assert (stored.token, stored.path) == (None, V1)


def test_an_empty_batch_is_accepted(collector: CollectorProcess) -> None:
    assert post(collector, []).status_code == 204
    assert collector.client.stats().events == 0


def test_optional_attributes_may_be_absent(collector: CollectorProcess) -> None:
    assert post(collector, [without(event(), "time", "datacontenttype", "data")]).status_code == 204
    (stored,) = collector.client.events()
    assert (stored.time, stored.data) == (None, None)


# Refusing


@pytest.mark.parametrize(
    ("path", "content_type", "status"),
    [
        (V1, "application/cloudevents-batch+json; charset=utf-8", 400),
        (V1, "application/json; charset=utf-8", 400),
        (V1, "Application/JSON", 400),
        (V3, "application/cloudevents-batch+json; charset=utf-8", 202),
        (V1, "text/plain", 400),
        (V3, "text/plain", 400),
    ],
)
def test_only_v3_ignores_parameters_of_the_content_type(
    collector: CollectorProcess, path: str, content_type: str, status: int
) -> None:
    answer = post(collector, [event()], path=path, content_type=content_type)
    assert answer.status_code == status
    assert len(ids(collector)) == (status == 202)
    if status == 400:
        assert content_type in answer.json()["detail"]


@pytest.mark.parametrize(("content_type", "body"), [(SINGLE, [event()]), (BATCH, event())])
def test_a_cloudevents_content_type_fixes_the_bodys_shape(
    collector: CollectorProcess, content_type: str, body: object
) -> None:
    assert post(collector, body, content_type=content_type).status_code == 400
    assert ids(collector) == []


@pytest.mark.parametrize("path", [V1, V3])
@pytest.mark.parametrize("body", [b"", b"[", b"\xff", b'[{"data": NaN}]', b"null", b"[null]", b'"text"', b"\x0b{}"])
def test_what_is_not_a_json_object_is_refused(collector: CollectorProcess, path: str, body: bytes) -> None:
    answer = post(collector, body, path=path, content_type="application/json")
    assert answer.status_code == 400
    assert answer.headers["Content-Type"] == "application/problem+json"


@pytest.mark.parametrize("path", [V1, V3])
@pytest.mark.parametrize(
    ("changes", "stored"),
    [
        ({"source": " "}, {"source": " "}),
        ({"source": "Zürich"}, {"source": "Zürich"}),
        ({"specversion": "0.3"}, {"specversion": "0.3"}),
        ({"subject": "a\ud800b"}, {"subject": "a\ufffdb"}),
    ],
    ids=["a blank source", "a source that is not ASCII", "an old version", "a lone surrogate"],
)
def test_what_openmeter_takes_is_taken(collector: CollectorProcess, path: str, changes: Event, stored: Event) -> None:
    assert post(collector, [event(**changes)], path=path).ok
    (found,) = collector.client.events()
    whole = {"source": found.source, "subject": found.subject, **found.attributes}
    assert {name: whole[name] for name in stored} == stored


@pytest.mark.parametrize("path", [V1, V3])
def test_bytes_that_are_not_utf_8_are_replaced(collector: CollectorProcess, path: str) -> None:
    body = json.dumps([event(subject="X")]).encode().replace(b"X", b"a\xffb")
    assert post(collector, body, path=path).ok
    assert [found.subject for found in collector.client.events()] == ["a\ufffdb"]


@pytest.mark.parametrize("path", [V1, V3])
def test_of_json_lines_only_the_first_event_is_stored(collector: CollectorProcess, path: str) -> None:
    body = b"".join(json.dumps(event(number)).encode() + b"\n" for number in range(3))
    assert post(collector, body, path=path, content_type=SINGLE).ok
    assert ids(collector) == ["event-0"]


@pytest.mark.parametrize("path", [V1, V3])
def test_an_event_that_kafka_refuses_gets_500(collector: CollectorProcess, path: str) -> None:
    assert post(collector, [event(data={"x": "y" * 999_000})], path=path).ok
    # The quotes take two bytes each, once OpenMeter has made a string of the data.
    assert post(collector, [event(data={"x": '"' * 340_000})], path=path).status_code == 500
    assert len(ids(collector)) == 1


@pytest.mark.parametrize("path", [V1, V3])
def test_an_event_of_1970_is_taken_and_never_seen(collector: CollectorProcess, path: str) -> None:
    assert post(collector, [event(time="1970-01-01T00:00:00Z"), event(1)], path=path).ok
    assert ids(collector) == ["event-1"]


@pytest.mark.parametrize("path", [V1, V3])
def test_another_path_and_a_trailing_slash_get_404(collector: CollectorProcess, path: str) -> None:
    assert post(collector, [event()], path=f"{path}/").status_code == 404
    assert post(collector, [event()], path=f"{path}s").status_code == 404


@pytest.mark.parametrize("path", [V1, V3])
def test_a_compressed_body_is_not_decompressed(collector: CollectorProcess, path: str) -> None:
    body = gzip.compress(json.dumps([event()]).encode())
    assert post(collector, body, path=path, headers={"Content-Encoding": "gzip"}).status_code == 400
    assert ids(collector) == []


@pytest.mark.parametrize("path", [V1, V3])
def test_one_invalid_event_refuses_its_batch(collector: CollectorProcess, path: str) -> None:
    batch = [event(0), event(1), event(2), without(event(3), "subject"), event(4)]
    assert post(collector, batch, path=path).status_code == 400
    stats = collector.client.stats()
    assert (stats.events, stats.requests) == (0, {"400": 1})


INVALID = {
    "id absent": (without(event(), "id"), "id", "required"),
    "subject empty": (event(subject=""), "subject", "min_length"),
    "subject null": (event(subject=None), "subject", "is_string"),
    "type a number": (event(type=5), "type", "is_string"),
    "source not a reference": (event(source="http://[::1"), "source", "invalid"),
    "specversion unknown": (event(specversion="2.0"), "specversion", "enum"),
    "time not RFC 3339": (event(time="2026-02-28 12:30:45"), "time", "is_date_time"),
    "time with a line feed": (event(time="2026-02-28T12:30:45Z\n"), "time", "is_date_time"),
    "time on no day": (event(time="2026-02-30T12:30:45Z"), "time", "is_date_time"),
    "data a list": (event(data=[1]), "data", "is_object"),
    "datacontenttype other": (event(datacontenttype="text/plain"), "datacontenttype", "enum"),
    "dataschema relative": (event(dataschema="schema.json"), "dataschema", "invalid"),
}


@pytest.mark.parametrize(("wrong", "field", "rule"), INVALID.values(), ids=INVALID)
def test_v1_points_at_the_first_invalid_event(collector: CollectorProcess, wrong: Event, field: str, rule: str) -> None:
    del rule
    batch = [event(0), event(1), event(2), wrong, without(event(4), "id")]
    problem = post(collector, batch).json()
    assert f'Error at "/3/{field}": ' in problem["detail"]
    assert "/4/" not in problem["detail"]
    assert (problem["type"], problem["title"], problem["status"]) == ("about:blank", "Bad Request", 400)
    assert problem["instance"].startswith("urn:")


@pytest.mark.parametrize(("wrong", "field", "rule"), INVALID.values(), ids=INVALID)
def test_v3_lists_what_is_wrong(collector: CollectorProcess, wrong: Event, field: str, rule: str) -> None:
    batch = [event(0), event(1), event(2), wrong, without(event(4), "id")]
    problem = post(collector, batch, path=V3).json()
    assert [(found["field"], found["rule"], found["source"]) for found in problem["invalid_parameters"]] == [
        (f"3.{field}", rule, "body"),
        ("4.id", "required", "body"),
    ]
    assert_follows_schema(problem, "BadRequestError")


def assert_follows_schema(document: object, schema: str) -> None:
    components = EventValidator(*V3_SCHEMA)._validator.schema["components"]
    OAS30Validator({"$ref": f"#/components/schemas/{schema}", "components": components}).validate(document)


@pytest.mark.parametrize("content_type", ["application/json", SINGLE])
def test_a_single_event_has_no_index(collector: CollectorProcess, content_type: str) -> None:
    wrong = without(event(), "subject")
    problem = post(collector, wrong, content_type=content_type).json()
    assert 'Error at "/subject": property "subject" is missing' in problem["detail"]
    problem = post(collector, wrong, path=V3, content_type=content_type).json()
    assert [found["field"] for found in problem["invalid_parameters"]] == ["subject"]


def test_only_v1_takes_extension_attributes(collector: CollectorProcess) -> None:
    extended = [event(0), event(1, traceparent="00-1")]
    assert post(collector, extended).status_code == 204
    answer = post(collector, extended, path=V3)
    assert answer.status_code == 400
    (found,) = answer.json()["invalid_parameters"]
    assert (found["field"], found["rule"]) == ("1.traceparent", "unknown_property")


@pytest.mark.parametrize("path", [V1, V3])
def test_every_refusal_of_a_body_follows_the_published_schema(collector: CollectorProcess, path: str) -> None:
    schema = "BadRequestError" if path == V3 else "BaseError"
    for body in (b"", b"[1]", b"{}"):
        assert_follows_schema(post(collector, body, path=path, content_type="application/json").json(), schema)


# The quick check and the schema


TEXTS = st.sampled_from(["", "1.0", "a", "a b", "%zz", "urn:x:y", "https://[::1]:80/a?b#c", "a:b", "1:b", "ü"])
TIMES = st.sampled_from(
    [
        "2026-02-28T12:30:45Z",
        "2026-02-29T12:30:45Z",
        "2024-02-29T23:59:59.9+14:00",
        "2026-02-28t12:30:45z",
        "2026-02-28T24:00:00Z",
        "0000-01-01T00:00:00Z",
        "2026-02-28T12:30:45Z\n",
        "\u0662\u066026-02-28T12:30:45Z",
    ]
)
VALUES = st.one_of(TEXTS, TIMES, st.none(), st.booleans(), st.integers(), st.text(), st.just({}), st.just([]))
NAMES = [*event(), "dataschema", "traceparent"]


@st.composite
def perhaps_valid_events(draw: st.DrawFn) -> Event:
    changes = draw(st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=3))
    return without(event() | changes, *draw(st.sets(st.sampled_from(NAMES), max_size=1)))


@pytest.mark.parametrize("schema", [V1_SCHEMA, V3_SCHEMA])
def test_the_quick_check_changes_nothing_about_what_is_valid(schema: tuple[str, str]) -> None:
    validator = EventValidator(*schema)

    @settings(max_examples=300, deadline=None, database=None)
    @given(perhaps_valid_events())
    def check(candidate: Event) -> None:
        allowed = validator._validator.is_valid(candidate) and candidate["specversion"] == "1.0"
        assert (validator.problems(candidate) == ()) == allowed
        assert allowed or not is_plainly_valid(candidate)

    check()


def test_the_quick_check_passes_ordinary_events() -> None:
    assert is_plainly_valid(event())
    assert is_plainly_valid(without(event(), "time", "data", "datacontenttype"))
    assert not is_plainly_valid([event()])


@pytest.mark.parametrize(
    "text", ["2026-12-31T23:59:59Z", "2026-12-31T23:59:59.123456789Z", "2024-02-29T00:00:00-11:30"]
)
def test_times_of_rfc_3339(text: str) -> None:
    assert is_date_time(text)


@pytest.mark.parametrize("text", ["", "2026-12-31", "2026-12-31T23:59:59", "2026-13-01T00:00:00Z", "now"])
def test_other_times_are_none(text: str) -> None:
    assert not is_date_time(text)


@pytest.mark.parametrize(
    "text",
    [
        "https://github.com/cloudevents",
        "mailto:cncf-wg-serverless@lists.cncf.io",
        "urn:uuid:6e8bc430-9c3a-11d9-9669-0800200c9a66",
        "http://user:pw@[2001:db8::1]:8080/a//b;c=d?e=f/?g#h",
        "file:///etc/hosts",
        "x:",
    ],
)
def test_uris(text: str) -> None:
    assert is_uri(text)
    assert is_uri_reference(text)


@pytest.mark.parametrize(
    "text", ["", "/a/b", "a/b:c", "1-555-123-4567", "//host/path", "?q", "#f", ".", " ", "a b", "café"]
)
def test_relative_references_are_no_uris(text: str) -> None:
    assert is_uri_reference(text)
    assert not is_uri(text)


@pytest.mark.parametrize("text", ["http://a b/", "http://é/", "%", "%4", "1:b", "http://[::1", "<x>", "a\n", "#a#b"])
def test_what_is_no_reference(text: str) -> None:
    assert not is_uri_reference(text)


def test_formats_say_nothing_about_what_is_not_text() -> None:
    checker = format_checker()
    assert all(checker.conforms(5, name) for name in ("date-time", "uri", "uri-reference"))


@pytest.mark.parametrize("path", [V1, V3])
def test_a_thousand_events_are_answered_in_well_under_200_ms(collector: CollectorProcess, path: str) -> None:
    def seconds(attempt: int) -> float:
        answer = post(collector, [event(number, source=f"node-{attempt}") for number in range(1_000)], path=path)
        return answer.elapsed.total_seconds()

    assert min(seconds(attempt) for attempt in range(3)) < 0.2
    assert collector.client.stats().unique == 3_000


# Tokens


@pytest.mark.parametrize("path", [V1, V3])
@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer wrong", "Basic secret", "secret", "Bearer secret2"])
def test_a_wrong_token_gets_401(collector: CollectorProcess, path: str, header: str | None) -> None:
    collector.client.set_tokens(["secret", "other"])
    answer = post(collector, [event()], path=path, headers={} if header is None else {"Authorization": header})
    assert answer.status_code == 401
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert_follows_schema(answer.json(), "UnauthorizedError")
    assert ids(collector) == []


def test_tokens_change_at_run_time(collector: CollectorProcess) -> None:
    collector.client.set_tokens(["first"])
    assert post(collector, [event()], headers={"Authorization": "Bearer first"}).status_code == 204
    collector.client.set_tokens(["second"])
    assert post(collector, [event()], headers={"Authorization": "Bearer first"}).status_code == 401
    assert post(collector, [event()], headers={"Authorization": "bearer second"}).status_code == 204
    collector.client.set_tokens([])
    assert post(collector, [event()]).status_code == 204


def test_a_database_file_outlives_the_process_and_holds_no_token(tmp_path: Path) -> None:
    database = tmp_path / "events.sqlite"
    token = "kpat_very-secret"
    with CollectorProcess(tokens=[token], database=database) as collector:
        assert post(collector, [event()], headers={"Authorization": f"Bearer {token}"}).status_code == 204
    assert all(token.encode() not in file.read_bytes() for file in tmp_path.iterdir())
    store = EventStore(str(database))
    (stored,) = store.events()
    store.close()
    assert stored.id == "event-0"
    assert re.fullmatch("[0-9a-f]{12}", str(stored.token))


def test_a_stored_event_tells_which_token_it_came_with(collector: CollectorProcess) -> None:
    for number, token in enumerate(["first", "second", "first"]):
        post(collector, [event(number)], headers={"Authorization": f"Bearer {token}"})
    first, second, third = (stored.token for stored in collector.client.events())
    assert first == third != second


def test_tokens_are_checked_before_the_body(collector: CollectorProcess) -> None:
    collector.client.set_tokens(["secret"])
    assert post(collector, b"nonsense", content_type="text/plain").status_code == 401


def test_malformed_tokens_are_refused(collector: CollectorProcess) -> None:
    answer = requests.put(f"{collector.url}/tokens", json={"a": 1}, timeout=10)
    assert answer.status_code == 400
    assert "valid array" in answer.text


def test_a_refusal_of_tokens_does_not_repeat_them(collector: CollectorProcess) -> None:
    answer = requests.put(f"{collector.url}/tokens", json=["secret", ["secret"]], timeout=10)
    assert answer.status_code == 400
    assert answer.text == "1: Input should be a valid string"


# Deduplication


def test_a_repeated_event_is_stored_once_and_counted(collector: CollectorProcess) -> None:
    post(collector, [event(0), event(1), event(1)])
    post(collector, [event(0), event(2)], path=V3)
    stats = collector.client.stats()
    assert (stats.events, stats.unique, stats.duplicates, stats.conflicts) == (5, 3, 2, 0)
    assert stats.requests == {"202": 1, "204": 1}
    assert stats.by_type == {"kong.api_request": 3}
    assert ids(collector) == ["event-0", "event-1", "event-2"]


@pytest.mark.parametrize(
    "change",
    [
        {"subject": "globex"},
        {"type": "kong.llm_request"},
        {"time": "2026-02-28T12:30:46Z"},
        {"time": None},
        {"data": {"request_method": "POST"}},
        {"data": None},
        {"traceparent": "00-1"},
    ],
)
def test_the_same_id_with_other_content_is_a_conflict(collector: CollectorProcess, change: Event) -> None:
    post(collector, [event()])
    assert post(collector, [event(**change)]).status_code == 204
    stats = collector.client.stats()
    assert (stats.unique, stats.duplicates, stats.conflicts) == (1, 0, 1)
    assert collector.client.events()[0].subject == "acme"


def test_the_order_of_members_and_null_for_absent_are_no_conflict(collector: CollectorProcess) -> None:
    post(collector, [event(data={"a": 1, "b": 2}, time=None)])
    post(collector, [without(dict(reversed(event(data={"b": 2, "a": 1}).items())), "time")])
    stats = collector.client.stats()
    assert (stats.duplicates, stats.conflicts) == (1, 0)


def test_one_id_from_two_sources_is_two_events(collector: CollectorProcess) -> None:
    post(collector, [event(source="node-1"), event(source="node-2")])
    assert collector.client.stats().unique == 2


# Questions


def test_usage_counts_events_and_sums_tokens(collector: CollectorProcess) -> None:
    def llm(number: int, subject: str, tokens: object) -> Event:
        return event(number, subject=subject, type="kong.llm_request", data={"tokens": tokens})

    post(collector, [event(0), event(1), event(2, subject="globex"), llm(3, "acme", 100), llm(4, "acme", 20)])
    post(collector, [llm(5, "globex", "many"), llm(5, "globex", 7), llm(6, "acme", 2**62), llm(7, "acme", 2**62)])
    assert collector.client.usage("kong.api_request") == [
        Usage("acme", "kong.api_request", 2, 0),
        Usage("globex", "kong.api_request", 1, 0),
    ]
    assert [(row.subject, row.count) for row in collector.client.usage("kong.llm_request")] == [
        ("acme", 4),
        ("globex", 1),
    ]
    assert len(collector.client.usage()) == 4
    collector.client.reset()
    post(collector, [llm(number, "acme", 100 + number) for number in range(3)])
    assert collector.client.usage() == [Usage("acme", "kong.llm_request", 3, 303)]


def test_events_are_listed_in_order_of_arrival_and_filtered(collector: CollectorProcess) -> None:
    post(collector, [event(3), event(1, subject="globex"), event(2, type="other"), event(0, source="node-2")])
    assert ids(collector) == ["event-3", "event-1", "event-2", "event-0"]
    assert [stored.id for stored in collector.client.events(subject="globex")] == ["event-1"]
    assert [stored.id for stored in collector.client.events(event_type="other")] == ["event-2"]
    assert [stored.id for stored in collector.client.events(source="node-2")] == ["event-0"]


def test_events_come_in_pages(collector: CollectorProcess) -> None:
    post(collector, [event(number) for number in range(2_500)])
    page = requests.get(f"{collector.url}/events?limit=2&after=7", timeout=10).json()["events"]
    assert [row["seq"] for row in page] == [8, 9]
    assert ids(collector) == [f"event-{number}" for number in range(2_500)]


@pytest.mark.parametrize("query", ["limit=-1", "limit=x", "after=", "after=٣"])
def test_a_malformed_query_is_refused(collector: CollectorProcess, query: str) -> None:
    answer = requests.get(f"{collector.url}/events?{query}", timeout=10)
    assert answer.status_code == 400
    assert "give a number" in answer.text


def test_the_request_log_tells_connections_apart(collector: CollectorProcess) -> None:
    with requests.Session() as kept_open:
        for body in (b"[]", b"nonsense"):
            kept_open.post(collector.ingest_v3, data=body, headers={"Content-Type": BATCH}, timeout=10)
    post(collector, [event(0), event(1)])
    first, second, third = collector.client.requests()
    assert (first.path, first.content_type, first.events, first.status) == (V3, BATCH, 0, 202)
    assert (second.events, second.status) == (None, 400)
    assert (third.path, third.events, third.status) == (V1, 2, 204)
    assert first.connection == second.connection != third.connection
    assert first.received_at <= second.received_at <= third.received_at
    assert collector.client.requests(limit=1) == [third]


def test_the_request_log_is_bounded(tmp_path: Path) -> None:
    store = EventStore(str(tmp_path / "events.sqlite"), log_size=3)
    request = IngestRequest(time.time(), V1, BATCH, 0, 204, "1-1")
    for _ in range(10):
        store.record(request, (), None)
    assert len(store.requests(100)) == 3
    assert store.stats().requests == {"204": 10}
    store.close()


def test_reset_forgets_what_arrived_and_keeps_tokens_and_faults(collector: CollectorProcess) -> None:
    collector.client.set_tokens(["secret"])
    collector.client.faults(FaultRule(status=503))
    post(collector, [event()])
    collector.client.reset()
    stats = collector.client.stats()
    assert (stats.requests, stats.events, stats.by_type) == ({}, 0, {})
    assert collector.client.requests() == []
    assert post(collector, [event()]).status_code == 503
    collector.client.clear_faults()
    assert post(collector, [event()]).status_code == 401


def test_waiting_for_events_ends_when_they_are_there(collector: CollectorProcess) -> None:
    post(collector, [event(0), event(1)])
    assert collector.client.wait_for_events(2).unique == 2
    with pytest.raises(TimeoutError, match="2 of 3 events"):
        collector.client.wait_for_events(3, timeout=0.05)


# Faults


def test_a_status_with_headers_so_many_times(collector: CollectorProcess) -> None:
    collector.client.faults(FaultRule(status=503, headers={"Retry-After": "2"}, body="busy", times=2))
    for left in (1, 0):
        answer = post(collector, [event()])
        assert (answer.status_code, answer.headers["Retry-After"], answer.text) == (503, "2", "busy")
        assert [rule.times for rule in collector.client.faults_left()] == [left] * left
    assert ids(collector) == []
    assert post(collector, [event()]).status_code == 204


def test_a_fault_without_times_stays_until_it_is_removed(collector: CollectorProcess) -> None:
    collector.client.faults(FaultRule(status=429))
    assert {post(collector, [event()]).status_code for _ in range(5)} == {429}
    collector.client.clear_faults()
    assert post(collector, [event()]).status_code == 204
    assert statuses(collector) == [429] * 5 + [204]


def test_an_error_answer_without_body_is_a_problem_document(collector: CollectorProcess) -> None:
    collector.client.faults(FaultRule(status=503))
    for path in (V1, V3):
        answer = post(collector, [event()], path=path)
        assert answer.headers["Content-Type"] == "application/problem+json"
        assert (answer.json()["status"], answer.json()["title"]) == (503, "Service Unavailable")


def test_a_body_says_its_content_type(collector: CollectorProcess) -> None:
    collector.client.faults(FaultRule(status=502, body="<h1>", headers={"content-type": "text/html"}))
    assert post(collector, [event()]).headers["Content-Type"] == "text/html"
    collector.client.faults(FaultRule(status=502, body="no"))
    assert post(collector, [event()]).headers["Content-Type"] == "text/plain"


def test_another_success_status_stores_the_events(collector: CollectorProcess) -> None:
    collector.client.faults(FaultRule(status=200))
    assert post(collector, [event()]).status_code == 200
    assert ids(collector) == ["event-0"]


@pytest.mark.parametrize("store", [False, True])
def test_an_error_may_be_ambiguous(collector: CollectorProcess, store: bool) -> None:  # noqa: FBT001
    collector.client.faults(FaultRule(status=500, store=store))
    assert post(collector, [event()]).status_code == 500
    assert ids(collector) == ["event-0"] * store


def test_no_fault_stores_what_the_endpoint_refuses(collector: CollectorProcess) -> None:
    collector.client.faults(FaultRule(status=500, store=True))
    assert post(collector, [event(0), without(event(1), "id")]).status_code == 500
    assert ids(collector) == []


def test_the_first_rule_that_applies_wins(collector: CollectorProcess) -> None:
    collector.client.faults(
        FaultRule(status=429, match=FaultMatch(subject="globex")),
        FaultRule(status=503, times=1),
        FaultRule(status=500, times=1),
    )
    assert post(collector, [event(0), event(1, subject="globex")]).status_code == 429
    assert [post(collector, [event()]).status_code for _ in range(3)] == [503, 500, 204]


@pytest.mark.parametrize(
    ("match", "attribute"),
    [
        (FaultMatch(id="event-1"), "id"),
        (FaultMatch(subject="globex"), "subject"),
        (FaultMatch(contains='"poison":true'), "data"),
        (FaultMatch(subject="globex", id="event-1", contains="poison"), "subject"),
    ],
)
def test_a_matched_event_is_refused_with_its_index(
    collector: CollectorProcess, match: FaultMatch, attribute: str
) -> None:
    collector.client.faults(FaultRule(status=400, match=match))
    poison = event(1, subject="globex", data={"poison": True})
    assert post(collector, [event(0)]).status_code == 204
    assert f'Error at "/2/{attribute}"' in post(collector, [event(2), event(3), poison]).json()["detail"]
    problem = post(collector, [event(2), poison, poison], path=V3).json()
    assert [found["field"] for found in problem["invalid_parameters"]] == [f"1.{attribute}", f"2.{attribute}"]
    assert f'Error at "/{attribute}"' in post(collector, poison, content_type=SINGLE).json()["detail"]
    assert ids(collector) == ["event-0"]


def test_a_rule_means_only_events_that_have_all_it_names(collector: CollectorProcess) -> None:
    collector.client.faults(FaultRule(status=400, match=FaultMatch(subject="globex", id="event-1")))
    assert post(collector, [event(0, subject="globex"), event(1)]).status_code == 204


@pytest.mark.parametrize("path", [V1, V3])
def test_a_refusal_without_index(collector: CollectorProcess, path: str) -> None:
    collector.client.faults(FaultRule(no_index=True))
    assert post(collector, [event(0)], path=path).ok
    for batch in ([event(1), without(event(2), "id")], [without(event(2), "id")]):
        answer = post(collector, batch, path=path)
        assert answer.status_code == 400
        assert re.search(r"[/\"]\d+[./]", re.sub(r'"instance":"[^"]*"', "", answer.text)) is None
    collector.client.faults(FaultRule(no_index=True, match=FaultMatch(id="event-4")))
    answer = post(collector, [event(3), event(4)], path=path)
    assert answer.status_code == 400
    assert "Error at" not in answer.text
    assert ids(collector) == ["event-0"]


def test_a_batch_over_a_limit_gets_413(collector: CollectorProcess) -> None:
    collector.client.faults(FaultRule(max_events=2))
    assert post(collector, [event(0), event(1)]).status_code == 204
    assert post(collector, [event(2), event(3), event(4)]).status_code == 413
    collector.client.faults(FaultRule(max_bytes=len(json.dumps([event(2)]))))
    assert post(collector, [event(2)]).status_code == 204
    assert post(collector, [event(3, data={"more": "bytes" * 100})]).status_code == 413
    assert ids(collector) == ["event-0", "event-1", "event-2"]


def test_a_delayed_answer_comes_late_and_counts(collector: CollectorProcess) -> None:
    collector.client.faults(FaultRule(delay=0.2, times=1))
    answer = post(collector, [event()])
    assert (answer.status_code, answer.elapsed.total_seconds() >= 0.2) == (204, True)
    assert ids(collector) == ["event-0"]


def test_a_delay_beyond_the_clients_patience_has_stored_the_events(collector: CollectorProcess) -> None:
    collector.client.faults(FaultRule(delay=60, times=1))
    post_impatiently(collector, [event()])
    assert post(collector, [event()]).status_code == 204
    assert collector.client.stats().duplicates == 1


def raw_answers(collector: CollectorProcess, path: str) -> bytes:
    """Post an event on a connection that ends with its answer, and give all that came."""
    address = urlsplit(collector.url)
    body = json.dumps(event()).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {SINGLE}\r\nContent-Length: {len(body)}\r\n"
    with socket.create_connection((address.hostname or "", address.port or 0), timeout=10) as connection:
        connection.sendall(head.encode() + b"Connection: close\r\n\r\n" + body)
        return b"".join(iter(lambda: connection.recv(4096), b""))


def test_interim_answers_come_before_the_answer(collector: CollectorProcess) -> None:
    collector.client.faults(FaultRule(interim=[102, 103, 103], interim_pause=0.01))
    lines = re.findall(rb"HTTP/1.1 (\d+)", raw_answers(collector, V1))
    assert lines == [b"102", b"103", b"103", b"204"]
    assert collector.client.stats().unique == 1


def test_a_rule_with_a_chance_means_some_requests(collector: CollectorProcess) -> None:
    collector.client.faults(FaultRule(status=503, chance=0.5))
    assert {post(collector, [event(number)]).status_code for number in range(60)} == {204, 503}


def test_a_hanging_request_gets_no_answer_and_does_not_block_others(collector: CollectorProcess) -> None:
    collector.client.faults(FaultRule(hang=60, times=1))
    post_impatiently(collector, [event(0)])
    assert post(collector, [event(1)]).status_code == 204
    assert ids(collector) == ["event-1"]
    assert statuses(collector) == [None, 204]


def test_a_hang_ends_with_the_connection(collector: CollectorProcess) -> None:
    collector.client.faults(FaultRule(hang=0.1, store=True))
    with pytest.raises(requests.ConnectionError):
        post(collector, [event()])
    assert ids(collector) == ["event-0"]


@pytest.mark.parametrize(("reset", "stored"), [("before", 0), ("in_body", 0), ("after_store", 1)])
def test_a_reset_gives_no_answer(collector: CollectorProcess, reset: Any, stored: int) -> None:
    collector.client.faults(FaultRule(reset=reset, times=1))
    with pytest.raises(ConnectionResetError):
        exchange(collector, [event()])
    assert ids(collector) == ["event-0"] * stored
    assert statuses(collector) == [None]
    assert collector.client.stats().requests == {"none": 1}
    assert post(collector, [event()]).status_code == 204


def exchange(collector: CollectorProcess, body: object, path: str = V1) -> tuple[int, bytes]:
    """Send one request with nothing between us and the socket's own errors."""
    parts = urlsplit(collector.url)
    connection = HTTPConnection(str(parts.hostname), parts.port, timeout=10)
    try:
        connection.request("POST", path, json.dumps(body), {"Content-Type": BATCH})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def test_a_reset_before_the_body_does_not_wait_for_it(collector: CollectorProcess) -> None:
    collector.client.faults(FaultRule(reset="before", times=1))
    parts = urlsplit(collector.url)
    with socket.create_connection((parts.hostname, parts.port), timeout=10) as connection:
        head = f"POST {V1} HTTP/1.1\r\nHost: x\r\nContent-Type: {BATCH}\r\nContent-Length: 1000\r\n\r\n"
        connection.sendall(head.encode())
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
    assert [request.events for request in collector.client.requests()] == [None]


def test_a_reset_before_the_body_can_have_conditions(collector: CollectorProcess) -> None:
    collector.client.faults(FaultRule(reset="before", match=FaultMatch(id="event-1")))
    assert post(collector, [event(0)]).status_code == 204
    with pytest.raises(ConnectionResetError):
        exchange(collector, [event(1)])


def test_a_reset_after_the_headers_loses_the_answers_body(collector: CollectorProcess) -> None:
    collector.client.faults(FaultRule(reset="after_headers"))
    with pytest.raises(ConnectionResetError):
        exchange(collector, [event(0)], V3)
    assert exchange(collector, [event(1)], V1) == (204, b"")
    assert ids(collector) == ["event-0", "event-1"]
    assert statuses(collector) == [202, 204]
    collector.client.faults(FaultRule(reset="after_headers", status=503))
    with pytest.raises(ConnectionResetError):
        exchange(collector, [event(2)])
    assert ids(collector) == ["event-0", "event-1"]


@pytest.mark.parametrize(
    "rule",
    [
        {"stauts": 503},
        {"status": 99},
        {"reset": "sometime"},
        {"times": 0},
        {"delay": -1},
        {"hang": 1, "reset": "before"},
        {"hang": 1, "status": 503},
        {"reset": "in_body", "body": "x"},
        {"reset": "before", "store": True},
        {"match": {"type": "x"}},
    ],
)
def test_a_malformed_rule_is_refused_and_changes_nothing(collector: CollectorProcess, rule: Event) -> None:
    collector.client.faults(FaultRule(status=503))
    answer = requests.post(f"{collector.url}/faults", json=[rule], timeout=10)
    assert answer.status_code == 400
    assert next(iter(rule)) in answer.text
    assert collector.client.faults_left() == [FaultRule(status=503)]
    with pytest.raises(ValidationError):
        FaultRule(**rule)


# Processes


def test_a_pause_refuses_connections_and_loses_nothing() -> None:
    with CollectorProcess(tokens=["first"]) as collector:
        secret = {"Authorization": "Bearer second"}
        collector.client.set_tokens(["second"])
        post(collector, [event(0)], headers=secret)
        collector.client.faults(FaultRule(status=429, times=2))
        assert post(collector, [event(1)], headers=secret).status_code == 429
        before = collector.client.stats()
        collector.pause()
        with pytest.raises(requests.ConnectionError, match="refused"):
            post(collector, [event(1)], headers=secret)
        collector.resume()
        assert collector.client.stats() == before
        assert post(collector, [event(1)], headers=secret).status_code == 429
        assert post(collector, [event(1)], headers=secret).status_code == 204
        assert post(collector, [event(2)], headers={"Authorization": "Bearer first"}).status_code == 401
        assert ids(collector) == ["event-0", "event-1"]
        connections = [request.connection for request in collector.client.requests()]
        assert len(set(connections)) == len(connections)


def test_the_end_does_not_wait_for_held_requests_or_open_connections(tmp_path: Path) -> None:
    ready_file = tmp_path / "ready.json"
    command = [sys.executable, "-m", "kong_metering_sandbox.collector", "--ready-file", str(ready_file)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        wait_until(ready_file.exists, "the collector serves")
        address = urlsplit(json.loads(ready_file.read_bytes())["url"])
        with CollectorClient(address.geturl()) as client:
            client.faults(FaultRule(hang=600, times=1))
            held = HTTPConnection(str(address.hostname), address.port)
            held.request("POST", V1, json.dumps([event()]), {"Content-Type": BATCH})
            wait_until(lambda: client.faults_left() == [], "the collector has the request")
            process.terminate()
            assert process.wait(60) == 0
            held.close()


def test_a_collector_that_cannot_start_says_why(tmp_path: Path) -> None:
    database = tmp_path / "no-such-directory" / "events.sqlite"
    with pytest.raises(CollectorError, match="unable to open database file"), CollectorProcess(database=database):
        pass


def test_a_port_in_use_is_named(process: CollectorProcess) -> None:
    port = str(urlsplit(process.url).port)
    command = [sys.executable, "-m", "kong_metering_sandbox.collector", "--port", port]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert ended.returncode == 1
    assert f"cannot serve on 127.0.0.1 port {port}" in ended.stderr
