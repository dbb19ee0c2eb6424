"""However the bytes of the transcripts arrive, and in whatever company, the events are the same."""

from __future__ import annotations

import fcntl
import itertools
import random
import struct
import termios
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.pb_rpc import FrameConnection, PBKongClient, call_frame
from tests.support.protocols import PROTOCOLS
from tests.support.rpc import Connection, KongClient, PhaseRun, Write, request_frame
from tests.support.transcripts import RecordedRequest, load, scenarios
from tests.support.waiting import wait_until
from tests.wire.replay import HEADER_SUBJECTS, drain, expected_event, recorded_start, start_instance, warm_up

if TYPE_CHECKING:
    from tests.support.ingest import IngestServer
    from tests.support.plugin_server import PluginServerProcess
    from tests.support.protocols import Client, Protocol

WITH_EVENTS = [scenario for scenario in scenarios() if load(scenario).requests]
COPIES = 5
CONNECTIONS = 12


@pytest.fixture(scope="module")
def instances() -> dict[type[Client], int]:
    """Hold the instance of each protocol: one that has learned to ask at once is worth keeping."""
    return {}


@pytest.fixture
def instance(client: Client, ingest: IngestServer, instances: dict[type[Client], int]) -> int:
    """Give an instance; with `ProtoBuf:1` one whose phases ask at once."""
    number = instances.get(type(client))
    if number is None or not asks_at_once(client, number):
        number = instances[type(client)] = start_instance(client, ingest, recorded_start(), meter_ai_token_usage=False)
        if isinstance(client, PBKongClient):
            warm_up(client, number)
    assert asks_at_once(client, number)
    ingest.clear()
    return number


def asks_at_once(client: Client, instance: int) -> bool:
    """Tell whether it does, as far as it can: after a header that may be several, phases ask in steps for long."""
    if not isinstance(client, PBKongClient):
        return True
    (access,) = warm_up(client, instance, 1)
    return "kong.request.get_header" not in access.calls


@pytest.fixture
def connections(protocol: Protocol, server: PluginServerProcess) -> Iterator[list[Connection]]:
    with ExitStack() as stack:
        yield [stack.enter_context(protocol.connection(server.path)) for _ in range(CONNECTIONS)]


def write_in_pieces(connection: Connection, pieces: Sequence[bytes]) -> None:
    """Write each piece once the server has read the one before, so that it gets each by itself."""
    for piece in pieces:
        connection.send(piece)
        wait_until(lambda: _unread(connection) == 0, "the server reads", pause=0)


def _unread(connection: Connection) -> int:
    """Tell how many bytes that were written the other side has not read."""
    answer = fcntl.ioctl(connection.socket, termios.TIOCOUTQ, struct.pack("i", 0))
    return int(struct.unpack("i", answer)[0])


def write_byte_by_byte(connection: Connection, frame: bytes) -> None:
    write_in_pieces(connection, [frame[index : index + 1] for index in range(len(frame))])


def write_cut_by_chance(connection: Connection, frame: bytes) -> None:
    chance = random.Random(frame)  # noqa: S311 - the same cuts each time
    cuts = [0, *sorted(chance.sample(range(1, len(frame)), min(6, len(frame) - 1))), len(frame)]
    write_in_pieces(connection, [frame[start:end] for start, end in itertools.pairwise(cuts)])


def requests_of(*played: str, copy: int = 0) -> list[RecordedRequest]:
    return [request for scenario in played for request in load(scenario).fresh_requests(copy)]


def expected(*played: str, copies: int = 1) -> list[dict[str, Any]]:
    subjects = {scenario: HEADER_SUBJECTS.get(scenario, "acme") for scenario in played}
    return in_order(
        expected_event(request, subject)
        for scenario, subject in subjects.items()
        if subject
        for copy in range(copies)
        for request in load(scenario).fresh_requests(copy)
    )


def in_order(events: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(events, key=lambda event: str(event["id"]))


def arrived(client: Client, ingest: IngestServer) -> list[dict[str, Any]]:
    drain(client)
    return in_order(iter(ingest.events()))


@pytest.mark.parametrize(
    ("write", "scenario"),
    [
        *((write_cut_by_chance, scenario) for scenario in WITH_EVENTS),
        (write_byte_by_byte, "latin1_subject_header_invalid_utf8"),
        (write_byte_by_byte, "consumer_key_auth_hidden_credentials"),
        (write_byte_by_byte, "no_route_404"),
    ],
)
def test_frames_that_are_cut_give_the_same_events(  # noqa: PLR0913, PLR0917 - the matrix
    write: Write, scenario: str, protocol: Protocol, server: PluginServerProcess, instance: int, ingest: IngestServer
) -> None:
    client = protocol.client(server.path, write=write)
    for request in requests_of(scenario):
        client.run_phases(instance, request, *request.phases)
    assert arrived(client, ingest) == expected(scenario)


def write_whole(connection: Connection, frames: bytes) -> None:
    connection.send(frames)


def write_in_halves(connection: Connection, frames: bytes) -> None:
    middle = len(frames) // 2
    write_in_pieces(connection, [frames[:middle], frames[middle:]])


@pytest.mark.parametrize("write", [write_whole, write_in_halves])
def test_many_frames_in_one_write_are_all_answered_in_order(  # noqa: PLR0913, PLR0917 - the matrix
    write: Write,
    protocol: Protocol,
    server: PluginServerProcess,
    instance: int,
    connections: list[Any],
    ingest: IngestServer,
) -> None:
    """The steps of many events; or, in the other protocol, the answers of one and the call of the next."""
    client = protocol.client(server.path, write=write)
    requests = requests_of(*WITH_EVENTS)
    for phase in ("access", "log"):
        runs = [PhaseRun(instance, phase, request) for request in requests if phase in request.phases]
        client.run_together(runs, connections[0])
        assert all(run.is_over and run.rpcs <= 4 for run in runs)
    assert arrived(client, ingest) == expected(*WITH_EVENTS)


@pytest.mark.parametrize("scenario", WITH_EVENTS)
def test_a_request_arrives_over_different_connections(  # noqa: PLR0913, PLR0917 - the matrix
    scenario: str,
    protocol: Protocol,
    server: PluginServerProcess,
    instance: int,
    connections: list[Connection],
    ingest: IngestServer,
) -> None:
    """Each step of its events does; or, in the other protocol, each event."""
    client = protocol.client(server.path, connections)
    for request in requests_of(scenario):
        client.run_phases(instance, request, *request.phases)
    assert arrived(client, ingest) == expected(scenario)


def test_many_events_interleave_over_many_connections(
    client: Client, instance: int, connections: list[Any], ingest: IngestServer
) -> None:
    """Each step goes out at a time by chance, while other requests are in their access or log phase."""
    chance = random.Random(20)  # noqa: S311 - the same order each time
    requests = [request for copy in range(COPIES) for request in requests_of(*WITH_EVENTS, copy=copy)]
    chance.shuffle(requests)
    in_log: list[RecordedRequest] = []
    for start in range(0, len(requests) + 30, 30):
        in_access = requests[start : start + 30]
        runs = [PhaseRun(instance, "access", request) for request in in_access if "access" in request.phases]
        runs += [PhaseRun(instance, "log", request) for request in in_log]
        client.run_shuffled(runs, connections, chance)
        in_log = in_access
    assert arrived(client, ingest) == expected(*WITH_EVENTS, copies=COPIES)


def test_a_connection_that_ends_in_the_middle_of_a_frame_takes_nothing_with_it(
    server: PluginServerProcess, messagepack: KongClient, ingest: IngestServer
) -> None:
    """The event of the frame that was cut off goes on when its step is sent again, over another connection."""
    (request,) = requests_of("get_header_subject")
    instance = start_instance(messagepack, ingest, recorded_start(), meter_ai_token_usage=False)
    run = PhaseRun(instance, "access", request)
    run.take(messagepack.answer_to(run.next_frame(1)))
    frame = run.next_frame(2)
    with Connection(server.path) as connection:
        write_in_pieces(connection, [frame[:-1]])
    run.take(messagepack.answer_to(frame))
    messagepack.run(run)
    messagepack.run_phases(instance, request, "log")
    assert arrived(messagepack, ingest) == expected("get_header_subject")
    messagepack.close_instance(instance)


def test_a_request_that_is_half_there_does_not_hold_up_others(
    server: PluginServerProcess, messagepack: KongClient
) -> None:
    frame = request_frame(7, "GetStatus").data
    call = call_frame(7, get_plugin_names={})
    with Connection(server.path) as half, FrameConnection(server.path) as other_half:
        write_in_pieces(half, [frame[:5]])
        write_in_pieces(other_half, [call[:5]])
        assert messagepack.status()
        assert PBKongClient(server.path).call(get_plugin_names={}).plugin_names.names == [b"metering-and-billing"]
        half.send(frame[5:])
        other_half.send(call[5:])
        assert half.receive().id == 7
        assert other_half.receive_frame()[:2] == b"\x08\x07"


def test_both_protocols_are_served_side_by_side(server: PluginServerProcess, ingest: IngestServer) -> None:
    """An instance belongs to none of them, and neither do the headers that an access phase kept."""
    clients: list[Client] = [protocol.client(server.path) for protocol in PROTOCOLS.values()]
    instances = [start_instance(client, ingest, recorded_start(), meter_ai_token_usage=False) for client in clients]
    requests = [requests_of(*WITH_EVENTS, copy=copy) for copy in range(4)]
    for turn, copies in enumerate(requests):
        for request in copies:
            for phase in request.phases:
                # In turn: both phases in one protocol, and each phase in one of its own.
                client = clients[(turn + (turn > 1 and phase == "log")) % 2]
                client.run_phases(instances[turn % 2], request, phase)
    assert arrived(clients[0], ingest) == expected(*WITH_EVENTS, copies=4)
    for client, instance in zip(clients, instances, strict=True):
        client.close_instance(instance)
