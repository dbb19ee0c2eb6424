"""What a real Kong sent over `ProtoBuf:1` is sent again, byte for byte, to a real process that has just started."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import pytest

from tests.support.pb_rpc import FrameConnection, PBKongClient, frame, write_as_kong
from tests.support.pb_transcripts import Entry, PBTranscript, fields, load, returned, scenarios
from tests.support.protobuf import FUNCTIONS, parsed
from tests.wire.conftest import NO_RECORD, NO_SUBJECT
from tests.wire.replay import assert_fits_catalogue, drain, expected_event, warm_up

if TYPE_CHECKING:
    from tests.support.ingest import IngestServer
    from tests.support.plugin_server import PluginServerProcess

SCENARIOS = scenarios()
# The subjects of a scenario's requests, None for one that has none; in those that are not here, they are acme's.
SUBJECTS: dict[str, list[str | None]] = {
    "bad_request_400": [None],
    "blank_header": [None, None],
    "configuration_changed": ["before", "after"],
    "consumer_subject": ["consumer:b32379d9-3d28-5683-a79c-72139be6e34f"],
    "instance_unknown": ["before", "after"],
    "latin1_header": ["café", "café"],
    # Behind 100 others a list cannot be told from two headers at once; the plugin asks step by step for a while then.
    "listed_header_beyond_100": ["acme", "acme, globex"],
    "long_header_7000": ["a" * 7000] * 2,
    "no_subject": [None, None],
    "three_requests_on_one_connection": ["acme-0", "acme-1", "acme-2"],
    "utf8_header": ["Zoë-株式会社"] * 2,
}
PLACES = {"consumer_subject": "consumer_id", "query_subject": "query"}
ATTRIBUTES: dict[str, list[str | None]] = {
    "attribute_header": ["engineering"] * 2,
    "configuration_changed": [None, "sales"],
}
# Here Kong's record was none, and the event is made of pieces.
PIECEWISE = "record_not_serialisable"
LEFT_OUT = "the attribute route_name is left out"
_ID = re.compile("[0-9a-f]{32}")


class Replay:
    """Plays Kong's part of a transcript, and checks the plugin server's."""

    def __init__(self, server: PluginServerProcess, ingest: IngestServer) -> None:
        self._server = server
        self._ingest = ingest
        self._client = PBKongClient(server.path)
        self._connections: dict[int, FrameConnection] = {}
        # Today's ids of instances, by the recorded ones.
        self._instances: dict[int, int] = {}

    def play(self, transcript: PBTranscript) -> None:
        asked: dict[int, str] = {}
        for at, entry in enumerate(transcript.entries):
            following = next((e for e in transcript.entries[at + 1 :] if e.connection == entry.connection), None)
            if entry.warm_up:
                self._warm_up(entry.warm_up)
            elif entry.sender == "kong":
                self._send(entry, following)
            elif entry.is_end:
                with self._connections.pop(entry.connection) as connection:
                    assert connection.is_ended()
            else:
                content = self._connections[entry.connection].receive_frame()
                self._check(entry, content, asked.get(entry.connection, ""))
                asked[entry.connection] = entry.said.get("method", "")
        for connection in self._connections.values():
            connection.close()

    def _send(self, entry: Entry, following: Entry | None) -> None:
        if entry.is_end:
            self._connections.pop(entry.connection).close()
            return
        if entry.connection not in self._connections:
            self._connections[entry.connection] = FrameConnection(self._server.path)
        if following is not None and following.is_end and following.sender == "plugin":
            self._forget(entry.call["handle_event"].get("instance_id"))
        write_as_kong(self._connections[entry.connection], self._of_today(entry))

    def _warm_up(self, requests: int) -> None:
        """Let the only instance learn from so many requests; their events are none of the transcript's."""
        (instance,) = self._instances.values()
        warm_up(self._client, instance, requests)
        self._ingest.clear()

    def _forget(self, recorded: int | None) -> None:
        """Close an instance that Kong does not know to be closed."""
        if recorded is not None:
            self._client.close_instance(self._instances[recorded])

    def _of_today(self, entry: Entry) -> bytes:
        call = entry.call
        if "start_instance" in call:
            config = json.loads(call["start_instance"]["config"]) | {"ingest_endpoint": self._ingest.url}
            return entry.with_config(json.dumps(config))
        recorded = (call.get("handle_event") or call.get("close_instance") or {}).get("instance_id")
        return entry.frame if recorded is None else entry.with_instance(self._instances[recorded])

    def _check(self, entry: Entry, content: bytes, asked: str) -> None:
        """Compare what comes with what came: all bytes, but of ids, times, and of what is said in the log."""
        recorded = returned(entry.frame) if "return" in entry.said else None
        if recorded is not None and recorded.WhichOneof("one") == "instance_status":
            today = returned(frame(content))
            self._instances[recorded.instance_status.instance_id] = today.instance_status.instance_id
            for status in (recorded.instance_status, today.instance_status):
                status.ClearField("instance_id")
                status.ClearField("started_at")
            assert today == recorded
        elif "argument" in entry.said and asked.startswith("kong.log."):
            kind = FUNCTIONS[asked][0]
            assert len(getattr(parsed(kind, content), "values", ())) == len(entry.said["argument"].get("values", ()))
        else:
            assert frame(content) == entry.frame


def test_all_recorded_scenarios_are_here() -> None:
    assert len(SCENARIOS) == 29


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_replacing_an_id_changes_nothing_else_in_a_frame(scenario: str) -> None:
    for entry in load(scenario).entries:
        for kind in ("handle_event", "close_instance"):
            if "instance_id" in entry.call.get(kind, ()):
                assert entry.with_instance(entry.call[kind]["instance_id"]) == entry.frame
        if "start_instance" in entry.call:
            assert entry.with_config(entry.call["start_instance"]["config"]) == entry.frame


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_what_kong_sent_is_answered_as_it_was_and_billed(
    scenario: str, fresh_server: PluginServerProcess, ingest: IngestServer
) -> None:
    transcript = load(scenario)
    Replay(fresh_server, ingest).play(transcript)
    drain(PBKongClient(fresh_server.path))
    if scenario == PIECEWISE:
        return
    subjects = SUBJECTS.get(scenario, ["acme"] * len(transcript.records))
    departments = ATTRIBUTES.get(scenario, [None] * len(subjects))
    expected = []
    for record, subject, department in zip(transcript.records, subjects, departments, strict=True):
        if subject is not None:
            event = expected_event(record, subject, PLACES.get(scenario, "header"))
            event["data"] |= {"department": department} if department else {}
            expected.append(event)
    assert ingest.events() == expected
    for event in expected:
        assert_fits_catalogue(event, "department")
    if None in subjects:
        nobody = fresh_server.wait_for_log(NO_SUBJECT)
        # Once, however many such requests there are.
        assert fresh_server.complaints() == [nobody]
    else:
        assert [line for line in fresh_server.complaints() if LEFT_OUT not in line] == []


def test_a_record_that_kong_could_not_serialise_is_billed_by_its_pieces(
    fresh_server: PluginServerProcess, ingest: IngestServer
) -> None:
    """But for the first one: asked at once, Kong had gone on."""
    transcript = load(PIECEWISE)
    assert transcript.answers("kong.log.serialize") == [None, None]
    Replay(fresh_server, ingest).play(transcript)
    account = drain(PBKongClient(fresh_server.path))
    assert account["skipped"] == {"error": 1}
    (event,) = ingest.events()
    (route,), (service,) = transcript.answers("kong.router.get_route"), transcript.answers("kong.router.get_service")
    (request_id,) = transcript.answers("kong.response.get_header")
    assert request_id == transcript.answers("kong.nginx.get_var")[-1]
    assert (event["id"], event["subject"], event["source"]) == (f"{request_id}:api_request", "acme", "echo")
    found = {name: event["data"][name] for name in ("route_id", "route_name", "service_id", "service_port")}
    assert found == {
        "route_id": route["id"],
        "route_name": "anything",
        "service_id": service["id"],
        "service_port": service["port"],
    }
    (uri,) = transcript.answers("kong.nginx.get_ctx")
    assert uri == {"string_value": "/anything/x?tenant=acme&flag"}
    assert event["data"]["request_uri"] == "/anything/x"
    assert event["data"]["response_http_status"] == 200
    assert all(NO_RECORD in line for line in fresh_server.complaints())


@pytest.mark.parametrize("scenario", ["header_subject", "client_chooses_request_id", "single_header_beyond_100"])
def test_the_id_that_access_is_told_is_the_log_records(scenario: str) -> None:
    """Whatever a client sends in its place; by this id it is found again what access captured."""
    transcript = load(scenario)
    told = [answer for answer in transcript.answers("kong.nginx.get_var") if _ID.fullmatch(answer or "")]
    assert len(told) == 2
    assert told == [record["request"]["id"] for record in transcript.records]


def test_kong_sends_the_sequence_number_first_or_last() -> None:
    """Both were recorded; so was an event without its instance, which Kong sends when two configurations meet."""
    firsts = {
        fields(entry.frame[4:])[0][0] == 1 for scenario in SCENARIOS for entry in load(scenario).entries if entry.call
    }
    assert firsts == {True, False}
    bare = [event for event in load("event_without_instance").calls("handle_event") if "instance_id" not in event]
    assert bare
