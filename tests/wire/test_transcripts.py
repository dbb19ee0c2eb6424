"""What a real Kong sent is sent again, to the real process; what it delivers is compared with the recorded record."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import msgpack
import pytest

from tests.support.ingest import IngestServer
from tests.support.pb_rpc import PBKongClient
from tests.support.records import log_record
from tests.support.rpc import Answer, KongClient, KongRequest, PhaseRun, Result
from tests.support.transcripts import RecordedFrame, load, scenarios
from tests.support.waiting import wait_until
from tests.wire.conftest import NO_RECORD, NO_SUBJECT
from tests.wire.replay import (
    CONSUMER_SUBJECTS,
    HEADER_SUBJECTS,
    LIFECYCLE,
    QUERY_SUBJECTS,
    VAULT,
    assert_fits_catalogue,
    drain,
    expected_event,
    recorded_start,
    start_frame,
    start_instance,
)

if TYPE_CHECKING:
    from tests.support.plugin_server import PluginServerProcess
    from tests.support.protocols import Client

SCENARIOS = scenarios()
WITH_EVENTS = [scenario for scenario in SCENARIOS if load(scenario).requests]
API_REQUESTS_ONLY = {"meter_ai_token_usage": False}
# Where the tests look for a subject that some request does not have, besides the recorded configuration's header.
PLACES: list[tuple[str, str | None]] = [
    ("consumer", None),
    ("consumer", "phone"),
    ("consumer", "tags"),
    ("query", "tenant"),
]


@pytest.fixture(scope="module")
def server(server: PluginServerProcess, endpoint: IngestServer) -> PluginServerProcess:
    """Give a server that has said what it says once, so that no phase of a test is the one that says it.

    Of the first request that has no subject in a place, a plugin entity warns, through Kong too; they are all one's.
    """
    client = KongClient(server.path)
    for changes in ({}, *({"subject": _subject(*place)} for place in PLACES)):
        instance = start_instance(client, endpoint, recorded_start(), **changes)
        first, second = (KongRequest({"kong.log.serialize": json.dumps(log_record())}) for _ in range(2))
        client.run_phases(instance, first)
        client.run_phases(instance, second)
        (said,) = first.said
        assert NO_SUBJECT in said
        assert second.said == []
        client.close_instance(instance)
    return server


def _subject(place: str, field: str | None) -> dict[str, str]:
    return {"look_up_value_in": place} | ({"field": field} if field else {})


def test_all_recorded_scenarios_are_here() -> None:
    assert len(SCENARIOS) == 29


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_replacing_an_id_changes_nothing_else_in_a_frame(scenario: str) -> None:
    """Decoding and encoding a recorded frame gives the recorded bytes: only the ids of a replay are ours."""
    for frame in load(scenario).frames:
        assert msgpack.packb(frame.message, use_bin_type=False) == frame.raw


@pytest.mark.parametrize("scenario", WITH_EVENTS)
def test_a_subject_in_a_header_is_metered_with_few_rpcs(scenario: str, client: Client, ingest: IngestServer) -> None:
    transcript = load(scenario)
    subject = HEADER_SUBJECTS.get(scenario, "acme")
    instance = start_instance(client, ingest, recorded_start(), **API_REQUESTS_ONLY)
    for request in transcript.fresh_requests():
        for run in client.run_phases(instance, request, *request.phases):
            # One more says that none of the headers is there; in the other protocol Kong waits for one in any case.
            assert run.rpcs <= (1 if isinstance(client, PBKongClient) else 3 if subject else 4)
            assert run.phase == "access" or run.calls == ["kong.log.serialize"]
        assert request.said == []
    drain(client)
    expected = [expected_event(request, subject) for request in transcript.requests] if subject else []
    assert ingest.events() == expected
    for event in ingest.events():
        assert_fits_catalogue(event)
    client.close_instance(instance)


@pytest.mark.parametrize(
    ("place", "field", "subjects", "subject_type"),
    [
        ("consumer", None, CONSUMER_SUBJECTS, "consumer_id"),
        ("query", "tenant", QUERY_SUBJECTS, "query"),
    ],
)
@pytest.mark.parametrize("scenario", WITH_EVENTS)
def test_a_consumer_or_query_subject_costs_one_rpc_in_access_and_a_record_in_log(  # noqa: PLR0913, PLR0917 - the matrix
    scenario: str,
    place: str,
    field: str | None,
    subjects: dict[str, str],
    subject_type: str,
    client: Client,
    ingest: IngestServer,
) -> None:
    transcript = load(scenario)
    subject = _subject(place, field)
    instance = start_instance(client, ingest, recorded_start(), subject=subject, **API_REQUESTS_ONLY)
    for request in transcript.fresh_requests():
        runs = client.run_phases(instance, request, *request.phases)
        assert {run.phase: run.calls for run in runs} == {
            run.phase: {"access": [], "log": ["kong.log.serialize"]}[run.phase] for run in runs
        }
        assert [run.rpcs for run in runs] == [
            1 + len(run.calls) * (not isinstance(client, PBKongClient)) for run in runs
        ]
    drain(client)
    found = subjects.get(scenario)
    expected = [expected_event(request, found, subject_type) for request in transcript.requests] if found else []
    assert ingest.events() == expected
    client.close_instance(instance)


@pytest.mark.parametrize(
    ("field", "subject"), [("username", "alice"), ("custom_id", "alice-custom"), ("phone", None), ("tags", None)]
)
def test_a_field_of_the_consumer_is_the_subject(
    field: str, subject: str | None, client: Client, ingest: IngestServer
) -> None:
    (request,) = load("consumer_key_auth_hidden_credentials").fresh_requests()
    instance = start_instance(client, ingest, recorded_start(), subject=_subject("consumer", field))
    client.run_phases(instance, request)
    drain(client)
    assert ingest.events() == ([expected_event(request, subject, f"consumer_{field}")] if subject else [])
    client.close_instance(instance)


def test_an_attribute_of_the_recorded_configuration_is_in_the_event(client: Client, ingest: IngestServer) -> None:
    """The recorded instance reads x-department too; the request that has it carries it, others have no such field."""
    instance = start_instance(client, ingest, recorded_start(VAULT))
    (with_department,) = load("get_header_subject").fresh_requests()
    (without,) = load("post_json_body").fresh_requests()
    client.run_phases(instance, with_department)
    client.run_phases(instance, without)
    drain(client)
    first, second = ingest.events()
    expected = expected_event(with_department, "acme")
    assert first == expected | {"data": expected["data"] | {"department": "engineering"}}
    assert second == expected_event(without, "acme")
    client.close_instance(instance)


def test_a_record_that_kong_cannot_serialise_is_pieced_together(client: Client, ingest: IngestServer) -> None:
    """Kong's `kong.log.serialize` is nil then (lua-cjson refuses NaN): what else it tells is metered.

    Asked at once, Kong has gone on when that turns out: the first such request is not billed, and it is said.
    """
    instance = start_instance(client, ingest, recorded_start())
    if isinstance(client, PBKongClient):
        nothing = KongRequest()
        client.run_phases(instance, nothing)
        assert wait_until(lambda: client.status()["Status"]["skipped"].get("error"), "the account") == 1
    (request,) = load("get_header_subject").fresh_requests()
    record = request.record
    pieces = {
        "log": {
            "kong.log.serialize": Result(),
            "kong.response.get_header": Result(record["request"]["id"]),
            "kong.request.get_headers": Result(
                {name: [value] for name, value in record["request"]["headers"].items()}, "StepMultiMap"
            ),
        }
    }
    recorded_answer = request.answer
    request.answer = (  # type: ignore[method-assign]
        lambda phase, method, arguments: pieces.get(phase, {}).get(method) or recorded_answer(phase, method, arguments)
    )
    client.run_phases(instance, request)
    drain(client)
    (event,) = ingest.events()
    expected = expected_event(request, "acme")
    assert (event["id"], event["subject"], event["source"]) == (expected["id"], "acme", "echo")
    assert event["data"].items() <= expected["data"].items()
    assert {"request_uri", "response_http_status", "route_id", "service_id"} <= event["data"].keys()
    assert request.said
    assert all(NO_RECORD in said for said in request.said)
    client.close_instance(instance)


def test_delivery_is_exactly_as_the_ingest_api_wants_it(client: Client, ingest: IngestServer) -> None:
    instance = start_instance(client, ingest, recorded_start())
    (request,) = load("get_header_subject").fresh_requests()
    client.run_phases(instance, request)
    ingest.wait_for_events(1)
    (post,) = ingest.requests()
    assert post.headers["Authorization"] == "Bearer spat_x"
    assert post.headers["Content-Type"] == "application/cloudevents+json"
    assert "Content-Encoding" not in post.headers
    client.close_instance(instance)


def test_a_vault_reference_arrives_resolved_and_is_used(client: Client, ingest: IngestServer) -> None:
    instance = start_instance(client, ingest, recorded_start(VAULT))
    (request,) = load("get_header_subject").fresh_requests()
    client.run_phases(instance, request)
    ingest.wait_for_events(1)
    assert ingest.requests()[0].headers["Authorization"] == "Bearer om_secret_from_vault"
    client.close_instance(instance)


def test_the_recorded_life_of_a_plugin_entity_runs_again(messagepack: KongClient, ingest: IngestServer) -> None:
    """Created, used, changed (a new instance starts, then the old one is closed), used, deleted (Kong says nothing)."""
    transcript = load(LIFECYCLE)
    requests = iter(transcript.fresh_requests())
    instances: list[int] = []
    for frame in transcript.frames:
        if frame.method == "StartInstance":
            answer = messagepack.answer_to(start_frame(frame, ingest).data)
            instances.append(answer.result["Id"])
        elif frame.method == "CloseInstance":
            answer = messagepack.answer_to(frame.with_argument(instances[-2]).data)
            assert answer.result["Id"] == instances[-2]
        elif frame.method == "HandleEvent" and frame.argument[b"EventName"] == b"access":
            messagepack.run_phases(instances[-1], next(requests))
    drain(messagepack)
    assert len(set(instances)) == 2
    assert ingest.events() == [expected_event(request, "acme") for request in transcript.requests]
    assert [instance["Id"] for instance in messagepack.status()["Instances"]] == instances[-1:]
    messagepack.close_instance(instances[-1])


def test_an_event_that_was_under_way_when_its_instance_was_closed_is_delivered(
    messagepack: KongClient, ingest: IngestServer
) -> None:
    """A log phase may still run when Kong closes the instance; even if the new one has another endpoint."""
    (request,) = load("get_header_subject").fresh_requests()
    old = start_instance(messagepack, ingest, recorded_start())
    messagepack.run(PhaseRun(old, "access", request))
    log = PhaseRun(old, "log", request)
    log.take(messagepack.answer_to(log.next_frame(1)))
    with IngestServer() as another:
        new = start_instance(messagepack, another, recorded_start())
        messagepack.close_instance(old)
        messagepack.run(log)
        drain(messagepack)
        assert ingest.events() == [expected_event(request, "acme")]
        assert another.events() == []
        messagepack.close_instance(new)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_recorded_frame_in_its_recorded_order_is_answered(
    scenario: str, messagepack: KongClient, ingest: IngestServer
) -> None:
    """The recorder asked for other calls than our plugin: results that do not fit bill nothing without a subject."""
    instances = [start_instance(messagepack, ingest, recorded_start())]
    last = Answer(0, None, {"Data": "ret"})
    event_id = 0
    for frame in load(scenario).frames:
        if frame.method == "HandleEvent":
            _finish(messagepack, event_id, last)
            last = messagepack.answer_to(frame.with_member(b"InstanceId", instances[-1]).data)
            event_id = last.result.get("EventId", 0)
        elif frame.method.startswith("Step"):
            last = messagepack.answer_to(frame.with_member(b"EventId", event_id).data)
            assert last.error in (None, f"event id {event_id} not found")
        else:
            # An event may be under way meanwhile.
            assert _answer_about_instance(messagepack, ingest, frame, instances).id == frame.number
            continue
        assert last.id == frame.number
    _finish(messagepack, event_id, last)
    drain(messagepack)
    assert all(event["subject"] for event in ingest.events())
    for instance in instances:
        messagepack.close_instance(instance)


def _answer_about_instance(
    messagepack: KongClient, ingest: IngestServer, frame: RecordedFrame, instances: list[int]
) -> Answer:
    if frame.method == "CloseInstance":
        return messagepack.answer_to(frame.with_argument(instances.pop(-2)).data)
    answer = messagepack.answer_to(start_frame(frame, ingest).data)
    instances.append(answer.result["Id"])
    return answer


def _finish(messagepack: KongClient, event_id: int, last: Answer) -> None:
    """Answer nil until the event is over, if it is not."""
    while last.error is None and last.result.get("Data", "ret") != "ret":
        last = messagepack.answer_to(Result().frame(1, event_id).data)
