"""Connections that are kept, lent and closed, over real sockets."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kong_metering.ingest.client import Endpoint, IngestClient
from kong_metering.ingest.connections import Connections
from kong_metering.trial.outcome import Delivered, Failed
from tests.support.waiting import wait_until
from tests.unit.ingest.ingest_server import Exchange, IngestServer, answer, running

if TYPE_CHECKING:
    from tests.support.clock import FakeClock
    from tests.support.loglines import LogLines

ConnectionsMaker = Callable[..., Connections]


@pytest.fixture
def make(clock: FakeClock) -> Iterator[ConnectionsMaker]:
    """Make connections; at the end of the test those that are still borrowed are closed too."""
    clients: list[IngestClient] = []

    def connect(endpoint: Endpoint) -> IngestClient:
        clients.append(IngestClient(endpoint, clock))
        return clients[-1]

    yield lambda **options: Connections(clock, connect, **options)
    for client in clients:
        client.close()


@pytest.fixture
def endpoint(server: IngestServer) -> Endpoint:
    return at(server)


def at(server: IngestServer, *, keepalive: float = 60) -> Endpoint:
    return Endpoint(url=server.url, token="t", timeout=10, keepalive=keepalive, verify=False)


def post(connections: Connections, endpoint: Endpoint) -> None:
    client = connections.borrow(endpoint)
    assert client.send([b"{}"]) == Delivered()
    connections.give_back(client)


def held(server: IngestServer) -> int:
    """Count this process's descriptors of connections to a server, CLOSE_WAIT included."""
    port = f":{server.server_address[1]:04X}"
    lines = [line.split() for line in Path("/proc/self/net/tcp").read_text().splitlines()[1:]]
    inodes = {columns[9] for columns in lines if columns[2].endswith(port)}
    return sum(link.removeprefix("socket:[").rstrip("]") in inodes for link in links())


def sweep_until_gone(connections: Connections, server: IngestServer, clock: FakeClock) -> None:
    """Sweep, without any time passing, until no connection is held."""

    def is_gone() -> bool:
        connections.sweep(clock.monotonic())
        return held(server) == 0

    wait_until(is_gone, "no descriptor is left")


def links() -> Iterator[str]:
    for descriptor in Path("/proc/self/fd").iterdir():
        # The one that lists the directory is gone by now.
        with suppress(FileNotFoundError):
            yield str(descriptor.readlink())


def test_a_connection_is_used_again(server: IngestServer, make: ConnectionsMaker, endpoint: Endpoint) -> None:
    connections = make()
    for _ in range(3):
        post(connections, endpoint)
    assert server.connections == 1
    assert held(server) == 1


def test_two_borrowers_have_two_connections(server: IngestServer, make: ConnectionsMaker, endpoint: Endpoint) -> None:
    connections = make()
    borrowed = [connections.borrow(endpoint) for _ in range(2)]
    assert [client.send([b"{}"]) for client in borrowed] == [Delivered()] * 2
    for client in borrowed:
        connections.give_back(client)
    assert server.connections == 2
    assert {connections.borrow(endpoint) for _ in range(2)} == set(borrowed)


def test_the_connection_that_was_used_last_is_lent_first(make: ConnectionsMaker, endpoint: Endpoint) -> None:
    connections = make()
    first, last = (connections.borrow(endpoint) for _ in range(2))
    for client in (first, last):
        client.send([b"{}"])
        connections.give_back(client)
    assert connections.borrow(endpoint) is last


@pytest.mark.parametrize(
    "changes",
    [
        {"token": "another"},
        {"timeout": 9.0},
        {"keepalive": 59.0},
        {"verify": True},
        {"url": "http://127.0.0.1:1/events"},
    ],
)
def test_other_endpoints_get_other_connections(
    make: ConnectionsMaker, endpoint: Endpoint, changes: dict[str, object]
) -> None:
    connections = make()
    client = connections.borrow(endpoint)
    client.send([b"{}"])
    connections.give_back(client)
    assert connections.borrow(replace(endpoint, **changes)) is not client  # type: ignore[arg-type]
    assert connections.borrow(endpoint) is client


def test_a_connection_that_is_idle_for_keepalive_is_closed(
    server: IngestServer, make: ConnectionsMaker, endpoint: Endpoint, clock: FakeClock
) -> None:
    connections = make()
    post(connections, endpoint)
    clock.advance(59)
    connections.sweep(clock.monotonic())
    assert held(server) == 1
    post(connections, endpoint)
    clock.advance(59)
    connections.sweep(clock.monotonic())
    assert held(server) == 1
    clock.advance(1)
    connections.sweep(clock.monotonic())
    assert held(server) == 0
    post(connections, endpoint)
    assert server.connections == 2


def test_looking_at_connections_does_not_make_them_younger(
    server: IngestServer, make: ConnectionsMaker, endpoint: Endpoint, clock: FakeClock
) -> None:
    connections = make()
    post(connections, endpoint)
    for _ in range(60):
        clock.advance(1)
        connections.sweep(clock.monotonic())
    assert held(server) == 0


def test_without_keepalive_a_connection_stays_until_the_endpoint_ends_it(
    server: IngestServer, make: ConnectionsMaker, clock: FakeClock
) -> None:
    connections = make()
    post(connections, at(server, keepalive=0))
    clock.advance(1_000_000)
    connections.sweep(clock.monotonic())
    assert held(server) == 1
    server.end_connections()
    sweep_until_gone(connections, server, clock)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_connection_that_the_endpoint_has_ended_is_closed(
    make: ConnectionsMaker, clock: FakeClock, tls_context: ssl.SSLContext, scheme: str
) -> None:
    connections = make()
    with running(IngestServer(tls_context if scheme == "https" else None)) as server:
        post(connections, at(server))
        connections.sweep(clock.monotonic())
        post(connections, at(server))
        assert (server.connections, held(server)) == (1, 1)
        server.end_connections()
        sweep_until_gone(connections, server, clock)
        post(connections, at(server))
        assert server.connections == 2


def test_a_connection_on_which_the_endpoint_says_what_nobody_asked_for_is_closed(
    server: IngestServer, make: ConnectionsMaker, endpoint: Endpoint, clock: FakeClock
) -> None:
    server.on_request = lambda exchange: exchange.raw(b"HTTP/1.1 204 X\r\n\r\nHTTP/1.1 408 X\r\n\r\n")
    connections = make()
    post(connections, endpoint)
    sweep_until_gone(connections, server, clock)


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("is_swept", [False, True])
def test_an_endpoint_that_gives_more_answers_than_were_asked_for_gets_a_new_connection_for_each_request(  # noqa: PLR0913 - fixtures
    make: ConnectionsMaker, clock: FakeClock, tls_context: ssl.SSLContext, log: LogLines, scheme: str, *, is_swept: bool
) -> None:
    """What comes together with the next request can be told from its answer by nobody: but once, it is not kept."""
    refuses = threading.Event()

    def answers_twice(exchange: Exchange) -> None:
        if refuses.is_set():
            exchange.reply(503)
            return
        exchange.raw(b"HTTP/1.1 204 X\r\n\r\nHTTP/1.1 204 X\r\n\r\n")

    def says_more_once_the_next_request_comes(exchange: Exchange) -> None:
        exchange.raw(b"HTTP/1.1 204 X\r\n\r\n")
        if exchange.connection.recv(1):
            exchange.raw(b"HTTP/1.1 204 X\r\n\r\n")

    connections = make()
    with running(IngestServer(tls_context if scheme == "https" else None)) as server:
        server.on_request = answers_twice
        post(connections, at(server))
        if is_swept:
            sweep_until_gone(connections, server, clock)
        post(connections, at(server))
        server.on_request = says_more_once_the_next_request_comes
        post(connections, at(server))
        refuses.set()
        server.on_request = answers_twice
        client = connections.borrow(at(server))
        assert isinstance(client.send([b"{}"]), Failed)
        connections.give_back(client)
        assert held(server) == 0
        (line,) = log.with_text("gives more answers than were asked for")
        assert server.url in line[1]


def test_an_endpoint_that_refuses_what_nobody_asked_keeps_its_connections(
    server: IngestServer, make: ConnectionsMaker, endpoint: Endpoint, clock: FakeClock
) -> None:
    """Some say 408 to who is idle; and a false refusal costs a request, no event."""
    server.on_request = lambda exchange: exchange.raw(b"HTTP/1.1 204 X\r\n\r\nHTTP/1.1 408 X\r\n\r\n")
    connections = make()
    post(connections, endpoint)
    sweep_until_gone(connections, server, clock)
    server.on_request = answer(204)
    for _ in range(3):
        post(connections, endpoint)
    assert (server.connections, held(server)) == (2, 1)


def test_a_client_without_a_connection_is_not_kept(
    server: IngestServer, make: ConnectionsMaker, endpoint: Endpoint
) -> None:
    server.on_request = answer(204, b"", {"Connection": "close"})
    connections = make()
    client = connections.borrow(endpoint)
    client.send([b"{}"])
    assert held(server) == 0
    connections.give_back(client)
    assert connections.borrow(endpoint) is not client


def test_so_many_are_idle_at_most_and_the_longest_idle_go(make: ConnectionsMaker, clock: FakeClock) -> None:
    connections = make(max_idle=2)
    with ExitStack() as stack:
        servers = [stack.enter_context(running(IngestServer())) for _ in range(3)]
        for number in (0, 1, 2, 1, 0, 2):
            clock.advance(1)
            post(connections, at(servers[number]))
        assert [held(server) for server in servers] == [1, 0, 1]
        assert [server.connections for server in servers] == [2, 1, 2]


def test_connections_to_a_forgotten_endpoint_are_closed_and_those_in_use_when_they_come_back(
    server: IngestServer, make: ConnectionsMaker, endpoint: Endpoint
) -> None:
    connections = make()
    with running(IngestServer()) as other:
        in_use = connections.borrow(endpoint)
        assert in_use.send([b"{}"]) == Delivered()
        post(connections, endpoint)
        post(connections, at(other))
        assert held(server) == 2
        connections.forget(endpoint)
        assert (held(server), held(other)) == (1, 1)
        assert in_use.send([b"{}"]) == Delivered()
        connections.give_back(in_use)
        assert (held(server), held(other)) == (0, 1)
        post(connections, endpoint)
        assert held(server) == 1


def test_what_is_closed_keeps_no_connection(server: IngestServer, make: ConnectionsMaker, endpoint: Endpoint) -> None:
    connections = make()
    in_use = connections.borrow(endpoint)
    in_use.send([b"{}"])
    post(connections, endpoint)
    connections.close()
    assert held(server) == 1
    connections.give_back(in_use)
    assert held(server) == 0
    post(connections, endpoint)
    assert held(server) == 0


def test_borrowers_never_share_a_connection_while_others_are_swept(
    server: IngestServer, make: ConnectionsMaker, endpoint: Endpoint, clock: FakeClock
) -> None:
    connections = make(max_idle=3)
    in_use: set[IngestClient] = set()
    shared: list[IngestClient] = []
    stop = threading.Event()

    def borrow_and_post() -> None:
        for _ in range(50):
            client = connections.borrow(endpoint)
            if client in in_use:
                shared.append(client)
            in_use.add(client)
            if client.send([b"{}"]) != Delivered():
                shared.append(client)
            in_use.discard(client)
            connections.give_back(client)

    def sweep() -> None:
        while not stop.is_set():
            connections.sweep(clock.monotonic())

    sweeper = threading.Thread(target=sweep)
    borrowers = [threading.Thread(target=borrow_and_post) for _ in range(8)]
    for thread in (sweeper, *borrowers):
        thread.start()
    for thread in borrowers:
        thread.join()
    stop.set()
    sweeper.join()
    assert shared == []
    assert len(server.requests) == 400
    assert held(server) <= 3
    connections.close()
    assert held(server) == 0
