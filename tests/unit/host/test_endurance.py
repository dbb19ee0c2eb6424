"""Ten thousand of what goes wrong: every RPC is answered, and memory stays where it was."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kong_metering.record import legible
from tests.support import raising_host
from tests.support.pb_rpc import FrameConnection, PBKongClient, call_frame
from tests.support.plugin_server import PluginServerProcess, ServerProcess, script_command
from tests.support.protocols import PROTOCOLS, Protocol
from tests.support.rpc import Connection, KongClient, KongRequest, PhaseRun
from tests.support.waiting import wait_until
from tests.unit.host.conftest import header_config, record

if TYPE_CHECKING:
    from tests.support.ingest import IngestServer

pytestmark = pytest.mark.slow
MANY = 10_000
WARM_UP = 1_500
AT_ONCE = 250
AT_A_TIME = 2_500
# What an allocator may keep; ten thousand requests that leave a kilobyte each behind show, and an event has four.
SANE_BYTES = 8 * 1024 * 1024

HOSTILE = [
    "caf\udce9-{}",
    "\udcff\udcfe\udc80{}",
    "{}\udcc3",
    "株式\udce4\udcbc{}",
    "tab\there {} \udc93",
]


@pytest.fixture(params=PROTOCOLS)
def protocol(request: pytest.FixtureRequest) -> Protocol:
    chosen: Protocol = PROTOCOLS[request.param]
    return chosen


def in_groups(runs: Sequence[PhaseRun]) -> Iterable[Sequence[PhaseRun]]:
    return (runs[start : start + AT_ONCE] for start in range(0, len(runs), AT_ONCE))


def growth(server: ServerProcess, work: Callable[[int], None]) -> int:
    """Tell by how many bytes the process grows while it does the work many times, after it has warmed up."""
    work(WARM_UP)
    before = server.resident_bytes()
    work(MANY)
    return server.resident_bytes() - before


def test_ten_thousand_requests_whose_phases_raise_are_answered(protocol: Protocol, prefix: Path) -> None:
    """Each is answered that it is over: the request goes on. The log tells of it a few times, not of each."""
    command = script_command(Path(raising_host.__file__), prefix)
    with ServerProcess(command, prefix / "raising.sock") as server, protocol.connection(server.path) as connection:
        client: Any = protocol.client(server.path)
        instance = client.start_instance({}, raising_host.NAME)

        def work(requests: int) -> None:
            request = KongRequest({"kong.log.serialize": "x" * 1000})
            for group in in_groups(
                [PhaseRun(instance, phase, request) for phase in ("access", "log") * (requests // 2)]
            ):
                client.run_together(group, connection)

        assert growth(server, work) < SANE_BYTES
        assert client.status(raising_host.NAME)["Events"] == 0
    said = server.complaints()
    assert len(said) < 10
    assert "ValueError: at once" in said[0]
    repeats = [int(count) for line in said for count in re.findall(r"and (\d+) more like this", line)]
    # The first of each phase is said by itself; what is raised a minute after is, too, in the line that sums up.
    assert 2 <= WARM_UP + MANY - sum(repeats) <= len(said)


def test_ten_thousand_abandoned_events_are_forgotten() -> None:
    """Kong never goes on with them: their clients went away."""
    with PluginServerProcess("--phase-timeout 0.05") as server, Connection(server.path) as connection:
        client = KongClient(server.path)
        instance = client.start_instance(header_config("http://127.0.0.1:1"))

        def abandon(events: int) -> None:
            for group in in_groups([PhaseRun(instance, "access", KongRequest()) for _ in range(events)]):
                connection.send(b"".join(run.next_frame(number) for number, run in enumerate(group, 1)))
                for run in group:
                    run.take(connection.receive())
            wait_until(lambda: client.status()["Events"] == 0, "the events to be forgotten")

        def work(events: int) -> None:
            for _ in range(0, events, AT_A_TIME):
                abandon(AT_A_TIME)

        assert growth(server, work) < SANE_BYTES
        whole = PhaseRun(instance, "access", KongRequest())
        assert client.run(whole).is_over
    assert 1 <= len(server.complaints()) < 10


def test_ten_thousand_events_whose_answers_do_not_come_are_given_up() -> None:
    """Kong's connections end between its call and its answers."""
    with PluginServerProcess() as server:
        client = PBKongClient(server.path)
        instance = client.start_instance(header_config("http://127.0.0.1:1"))

        def give_up(phase: bytes) -> None:
            with ExitStack() as stack:
                connections = [stack.enter_context(FrameConnection(server.path)) for _ in range(AT_ONCE)]
                for connection in connections:
                    connection.send(call_frame(1, handle_event={"instance_id": instance, "event_name": phase}))
                for connection in connections:
                    assert connection.receive_frame().startswith(b"kong.")

        def work(events: int) -> None:
            for number in range(events // AT_ONCE):
                give_up((b"access", b"log")[number % 2])

        assert growth(server, work) < SANE_BYTES
        given_up = (WARM_UP + MANY) // AT_ONCE // 2 * AT_ONCE
        wait_until(lambda: client.status()["Status"]["skipped"] == {"error": given_up}, "the account")
        client.close_instance(instance)
    assert "a request was not metered, its log phase failed" in server.complaints()[0]
    assert 1 <= len(server.complaints()) < 10


def test_ten_thousand_requests_with_hostile_bytes_are_all_billed(protocol: Protocol, ingest: IngestServer) -> None:
    queue = {"max_batch_size": 1000, "max_coalescing_delay": 0.01, "max_entries": 100_000}
    with PluginServerProcess() as server, protocol.connection(server.path) as connection:
        client: Any = protocol.client(server.path)
        instance = client.start_instance(header_config(ingest.url, queue=queue))
        sent: Counter[str] = Counter()

        def work(requests: int) -> None:
            subjects = [HOSTILE[number % len(HOSTILE)].format(number % 7) for number in range(requests)]
            made = [hostile_request(sum(sent.values()) + number, subject) for number, subject in enumerate(subjects)]
            sent.update(subjects)
            for phase in ("access", "log"):
                for group in in_groups([PhaseRun(instance, phase, request) for request in made]):
                    client.run_together(group, connection)
            wait_until(lambda: client.status()["Status"]["delivered"] == sum(sent.values()), "delivery of all events")

        grown = growth(server, work)
        status = client.status()["Status"]
        assert (status["waiting"], [*status["queues"].values()], status["waiting_for_instances"]) == (0, [0], {})
    billed = Counter(event["subject"] for event in ingest.events())
    assert billed == Counter({legible(as_latin_1(subject)): count for subject, count in sent.items()})
    assert len({event["id"] for event in ingest.events()}) == WARM_UP + MANY
    assert grown < SANE_BYTES
    assert server.complaints() == []


def hostile_request(number: int, subject: str) -> KongRequest:
    whole = json.loads(record(number, uri="/caf\udce9/\udcff?tenant=%ff\udcfe&%zz=\udc80"))
    whole["request"]["headers"] = {"user-agent": "\udcff\udcfe", "x-tenant-id": subject, "\udce9": ["\udc80", "ok"]}
    # As lua-cjson writes it: the bytes themselves, no escapes.
    text = json.dumps(whole, ensure_ascii=False)
    return KongRequest({"kong.request.get_header": subject, "kong.log.serialize": text})


def as_latin_1(subject: str) -> str:
    return subject.encode("utf-8", "surrogateescape").decode("latin-1")
