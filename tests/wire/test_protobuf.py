"""What can happen between Kong's call and its answers over `ProtoBuf:1`, with the real process and real requests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.pb_rpc import FrameConnection, PBKongClient, call_frame, frame
from tests.support.protobuf import as_bytes, message
from tests.support.transcripts import RecordedRequest, load
from tests.support.waiting import wait_until
from tests.wire.replay import drain, expected_event, recorded_start, start_instance, warm_up

if TYPE_CHECKING:
    from tests.support.ingest import IngestServer
    from tests.support.plugin_server import PluginServerProcess

NEW_CALL = call_frame(9, get_plugin_names={})


@pytest.fixture
def client(fresh_server: PluginServerProcess) -> PBKongClient:
    return PBKongClient(fresh_server.path)


@pytest.fixture
def instance(client: PBKongClient, ingest: IngestServer) -> int:
    """Start an instance, and let it see so many requests that its phases ask at once."""
    number = start_instance(client, ingest, recorded_start(), meter_ai_token_usage=False)
    warm_up(client, number)
    ingest.clear()
    return number


def request(copy: int = 0) -> RecordedRequest:
    (made,) = load("get_header_subject").fresh_requests(copy)
    return made


def begin(connection: FrameConnection, instance: int, phase: str) -> list[bytes]:
    """Send an event's call and read all that comes back at once, which PDK functions are asked for."""
    connection.send(call_frame(7, handle_event={"instance_id": instance, "event_name": phase.encode()}))
    asked = []
    while (name := connection.receive_frame()) != b"":
        asked.append(name)
        connection.receive_frame()
    assert connection.receive_frame() == b"\x08\x07"
    return asked


def string(text: str) -> bytes:
    return frame(message("String", v=as_bytes(text)).SerializeToString())


def record_of(made: RecordedRequest) -> bytes:
    return frame(message("String", v=made.phases["log"].value("kong.log.serialize")).SerializeToString())


def test_kong_reads_the_end_of_both_phases_before_it_has_answered_anything(
    fresh_server: PluginServerProcess, instance: int, client: PBKongClient, ingest: IngestServer
) -> None:
    with FrameConnection(fresh_server.path) as connection:
        assert begin(connection, instance, "access") == [b"kong.nginx.get_var", b"kong.nginx.get_var"]
        record = request().record
        # A header that was changed on its way to the log phase: what access was told counts.
        answers = string("by access") + string(record["request"]["id"])
        connection.send(answers)
        assert begin(connection, instance, "log") == [b"kong.log.serialize"]
        connection.send(record_of(request()) + NEW_CALL)
        connection.receive_frame()
    drain(client)
    assert ingest.events() == [expected_event(request(), "by access")]
    assert fresh_server.complaints() == []


@pytest.mark.parametrize("answered", [0, 1])
def test_a_connection_that_ends_in_the_access_phase_costs_what_it_would_have_read(
    answered: int, fresh_server: PluginServerProcess, instance: int, client: PBKongClient, ingest: IngestServer
) -> None:
    """Nothing is kept of it; the request is billed by the headers of the record."""
    with FrameConnection(fresh_server.path) as connection:
        begin(connection, instance, "access")
        connection.send(string("by access") * answered)
    client.run_phases(instance, request(), "log")
    drain(client)
    assert ingest.events() == [expected_event(request(), "acme")]
    assert fresh_server.complaints() == []


def test_connections_that_end_in_the_log_phase_are_counted_and_said_once(
    fresh_server: PluginServerProcess, instance: int, client: PBKongClient, ingest: IngestServer
) -> None:
    """Half of what would have been an answer is none; after the first of them, the phase asks in steps to tell Kong."""
    with FrameConnection(fresh_server.path) as connection:
        begin(connection, instance, "log")
        connection.send(record_of(request())[:-1])
    fresh_server.wait_for_log("a request was not metered")
    for _ in range(20):
        with FrameConnection(fresh_server.path) as connection:
            connection.send(call_frame(7, handle_event={"instance_id": instance, "event_name": b"log"}))
            assert connection.receive_frame() == b"kong.log.serialize"
    wait_until(lambda: drain(client)["skipped"] == {"error": 21}, "the account")
    (line,) = fresh_server.complaints()
    assert "a request was not metered, its log phase failed: ConnectionError" in line
    told = request()
    client.run_phases(instance, told)
    drain(client)
    assert ingest.events() == [expected_event(told, "acme")]
    assert told.said == [line.removeprefix("error: ")]


def test_an_event_at_once_is_delivered_though_its_instance_was_closed_before_the_answers(
    fresh_server: PluginServerProcess, instance: int, client: PBKongClient, ingest: IngestServer
) -> None:
    """Even if it is the last one of its queue."""
    client.run_phases(instance, request(), "access")
    with FrameConnection(fresh_server.path) as connection:
        begin(connection, instance, "log")
        client.close_instance(instance)
        assert client.status()["Instances"] == []
        connection.send(record_of(request()) + NEW_CALL)
        connection.receive_frame()
    assert ingest.wait_for_events(1) == [expected_event(request(), "acme")]
    assert fresh_server.complaints() == []


def test_an_event_without_an_instance_ends_the_connection_and_nothing_else(
    fresh_server: PluginServerProcess, instance: int, client: PBKongClient
) -> None:
    with FrameConnection(fresh_server.path) as other:
        begin(other, instance, "access")
        for handled in ({"event_name": b"access"}, {"event_name": b"log", "instance_id": instance + 1}):
            with FrameConnection(fresh_server.path) as connection:
                connection.send(call_frame(7, handle_event=handled))
                with pytest.raises(ConnectionError, match="closed"):
                    connection.receive_frame()
        other.send(string("acme") * 2 + NEW_CALL)
        assert other.receive_frame()
    assert [one["Id"] for one in client.status()["Instances"]] == [instance]
    assert fresh_server.complaints() == []
