"""Records that no Kong of today would log, and more subjects than anybody has, through the real process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.openmeter import valid_event
from tests.support.pb_rpc import PBKongClient
from tests.support.plugin_server import PluginServerProcess
from tests.support.records import log_record
from tests.support.rpc import KongRequest, PhaseRun, in_rounds
from tests.wire.replay import drain

if TYPE_CHECKING:
    from tests.support.ingest import IngestServer
    from tests.support.protocols import Client, Protocol

SUBJECTS = 100_000
AT_ONCE = 500
# What a step may leave behind in an allocator's pockets, seen up to 4 MB; 60,000 subjects of 100 bytes would be more.
MEMORY_SLACK = 6 * 1024 * 1024
# Said of the first request without a subject; the next ones are only counted.
BILLED_TO_NOBODY = "a request is billed to nobody, it has no query argument tenant"


@pytest.fixture
def hostile_server() -> Iterator[PluginServerProcess]:
    with PluginServerProcess() as server:
        yield server


@pytest.fixture
def client(protocol: Protocol, hostile_server: PluginServerProcess) -> Client:
    return protocol.client(hostile_server.path)


@pytest.fixture
def instance(client: Client, ingest: IngestServer) -> int:
    return start(client, ingest)


def start(client: Client, ingest: IngestServer, **queue: object) -> int:
    """Start an instance that meters by the query argument `tenant`: its access phase has nothing to do."""
    config = {
        "__plugin_id": "276df434-3e72-5032-b483-19156b86f1ca",
        "ingest_endpoint": ingest.url,
        "api_token": "om_token",
        "subject": {"look_up_value_in": "query", "field": "tenant"},
        "queue": {"max_batch_size": 1000, "max_coalescing_delay": 0.05, "max_entries": 100_000, **queue},
    }
    return client.start_instance(config)


def logged(record: object) -> KongRequest:
    text = record if isinstance(record, str) else json.dumps(record)
    return KongRequest({"kong.log.serialize": text})


def of_subject(subject: str, **changes: Any) -> dict[str, Any]:
    return log_record(request={"uri": f"/a?tenant={subject}", "id": f"request-{subject}"}, **changes)


# -- many ------------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(600)
def test_a_hundred_thousand_subjects_need_no_more_memory_than_forty_thousand(
    hostile_server: PluginServerProcess, protocol: Protocol, client: Any, instance: int, ingest: IngestServer
) -> None:
    text = json.dumps(of_subject("SUBJECT"))
    memory: list[int] = []
    seen: set[str] = set()
    with protocol.connection(hostile_server.path) as connection:
        for start_at in range(0, SUBJECTS, SUBJECTS // 5):
            names = [f"tenant-{number}" for number in range(start_at, start_at + SUBJECTS // 5)]
            runs = [PhaseRun(instance, "log", logged(text.replace("SUBJECT", name))) for name in names]
            for together in in_rounds(runs, AT_ONCE):
                client.run_together(together, connection)
            drain(client)
            seen.update(event["subject"] for event in ingest.events())
            ingest.clear()
            memory.append(hostile_server.resident_bytes())
    assert len(seen) == SUBJECTS
    figures = drain(client)
    assert (figures["accepted"], figures["delivered"], figures["dropped"]) == (SUBJECTS, SUBJECTS, {})
    assert memory[-1] - memory[1] < MEMORY_SLACK, memory
    assert hostile_server.complaints() == []


# -- large -------------------------------------------------------------------------------------------------------------


def test_a_record_of_a_megabyte_gives_an_event_of_the_usual_size(
    client: Client, instance: int, ingest: IngestServer
) -> None:
    """As with payload logging: what an AI plugin sent and got is in the record, and not in the event."""
    payload = {"proxy": {"payload": {"request": "x" * 500_000, "response": "caf\udce9" * 200_000}}}
    text = json.dumps(of_subject("acme", ai=payload), ensure_ascii=False)
    assert len(text) > 1_000_000
    client.run_phases(instance, logged(text), "log")
    drain(client)
    (event,) = ingest.events()
    assert event["subject"] == "acme"
    assert len(json.dumps(event)) < 2000


@pytest.mark.parametrize(
    "changes",
    [
        {"request": {"uri": "/" + "a" * 1_000_000 + "?tenant=acme"}},
        {"request": {"uri": "/a?tenant=" + "a" * 1_000_000}},
        {"request": {"uri": "/a?tenant=acme", "headers": {"user-agent": "a" * 1_000_000}}},
        {"request": {"uri": "/a?tenant=acme"}, "service": {"name": "ä" * 500_000}},
    ],
    ids=["path", "subject", "user agent", "service"],
)
def test_an_event_that_kafka_would_refuse_is_a_dead_letter(
    changes: dict[str, Any], hostile_server: PluginServerProcess, client: Client, instance: int
) -> None:
    client.run_phases(instance, logged(log_record(**changes)), "log")
    figures = drain(client)
    assert (figures["accepted"], figures["dead_letters"], figures["skipped"]) == (1, {"too_large": 1}, {})
    line = hostile_server.wait_for_log("is too large")
    assert hostile_server.complaints() == [line]
    assert len(line) < 300
    assert "aaaa" not in line


# -- of the wrong kind -------------------------------------------------------------------------------------------------

NUMBERS = [-1, 0, 0.5, -0.0, 1e300, 2**63, -(2**63)]
WRONG: list[Any] = [None, True, *NUMBERS, "", "x", "-1", "9" * 400, [], [[]], {}, {"id": {}}]
SECTIONS = ["response", "route", "service", "consumer", "application", "ai", "latencies", "tries", "started_at"]
FIELDS = [
    *(("request", name) for name in ("id", "method", "url", "size", "headers", "querystring")),
    *(("response", name) for name in ("status", "size", "headers")),
    *((section, name) for section in ("service", "route") for name in ("id", "name", "port", "protocol")),
]


def wrong_records() -> Iterator[dict[str, Any]]:
    """Give records in which one section or one field is something else than Kong makes of it."""
    number = 0
    for value in WRONG:
        for section in SECTIONS:
            number += 1
            yield {**of_subject(f"s{number}"), section: value}
        for section, name in FIELDS:
            number += 1
            record = of_subject(f"s{number}")
            yield {**record, section: {**record[section], name: value}}


def test_a_record_of_the_wrong_kinds_is_still_billed_with_what_is_right_in_it(
    hostile_server: PluginServerProcess, client: Client, instance: int, ingest: IngestServer
) -> None:
    records = list(wrong_records())
    for record in records:
        client.run_phases(instance, logged(record), "log")
    figures = drain(client)
    assert (figures["accepted"], figures["skipped"], figures["dropped"]) == (len(records), {}, {})
    events = [valid_event(json.dumps(event).encode()) for event in ingest.events()]
    assert [event["subject"] for event in events] == [f"s{number}" for number in range(1, len(records) + 1)]
    right = valid_event(json.dumps(events[0]).encode())["data"].keys() | {"response_http_status", "response_size_bytes"}
    assert all(event["data"].keys() <= right | {"application_id"} for event in events)
    assert hostile_server.complaints() == []


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"request": {}},
        {"request": None},
        {"request": []},
        {"request": {"uri": ["/a?tenant=acme"]}},
        {"request": {"uri": {"tenant": "acme"}}},
        {"tenant": "acme", "uri": "/a?tenant=acme"},
    ],
)
def test_a_record_without_a_subject_is_counted(
    record: object, hostile_server: PluginServerProcess, client: Client, instance: int
) -> None:
    client.run_phases(instance, logged(record), "log")
    figures = drain(client)
    assert (figures["accepted"], figures["skipped"]) == (0, {"no_subject": 1})
    line = hostile_server.wait_for_log(BILLED_TO_NOBODY)
    assert hostile_server.complaints() == [line]


@pytest.mark.parametrize("text", ["", "null", "[]", "5", "{", '{"a":' * 5000, "[" * 200_000, "\x00", '"{}"'])
def test_what_is_no_record_is_said_once_and_counted(
    text: str, hostile_server: PluginServerProcess, client: Client, instance: int
) -> None:
    for _ in range(50):
        client.run_phases(instance, logged(text), "log")
    line = hostile_server.wait_for_log("could not serialise the log record of a request")
    nobody = hostile_server.wait_for_log(BILLED_TO_NOBODY)
    if isinstance(client, PBKongClient):
        # Asked at once, Kong has gone on when the first one comes; the plugin asks step by step from then on.
        assert drain(client)["skipped"] == {"error": 1, "no_subject": 49}
        first = hostile_server.wait_for_log("could not serialise the log record")
        assert hostile_server.complaints() == [first, line, nobody]
    else:
        assert drain(client)["skipped"] == {"no_subject": 50}
        assert hostile_server.complaints() == [line, nobody]


def test_numbers_as_other_versions_of_kong_write_them_are_read(
    client: Client, instance: int, ingest: IngestServer
) -> None:
    record = of_subject("acme", started_at="1795359970019", upstream_status=200.0)
    record["request"]["size"] = "135"
    record["response"] = {"status": 200.0, "size": 7.79e2}
    record["service"]["port"] = "9000"
    client.run_phases(instance, logged(record), "log")
    drain(client)
    (event,) = ingest.events()
    assert event["time"] == "2026-11-22T15:06:10.019Z"
    found = {name: event["data"][name] for name in ("request_size_bytes", "response_size_bytes", "service_port")}
    assert found == {"request_size_bytes": 135, "response_size_bytes": 779, "service_port": 9000}
    assert event["data"]["upstream_status"] == event["data"]["response_http_status"] == 200
