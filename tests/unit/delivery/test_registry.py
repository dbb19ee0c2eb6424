"""Which queue the events of a configuration go into, over real HTTP: no event leaves for the wrong endpoint."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kong_metering.clock import SystemClock
from kong_metering.config import Entity, PluginConfig, parse_entity
from kong_metering.delivery.couriers import Couriers
from kong_metering.delivery.registry import Delivery
from kong_metering.ingest.client import IngestClient
from kong_metering.ingest.connections import Connections
from kong_metering.spool.options import SpoolOptions
from kong_metering.stats import Snapshot, Stats
from kong_metering.upkeep.spooler import Spooler
from tests.support.waiting import wait_until
from tests.unit.ingest.ingest_server import Exchange, IngestServer, Reaction, answer, running

if TYPE_CHECKING:
    from kong_metering.delivery.queue import EventQueue
    from tests.support.loglines import LogLines

ONE = Entity("11111111-one", "one")
OTHER = Entity("22222222-other", "other")


@pytest.fixture
def other_server() -> Iterator[IngestServer]:
    with running(IngestServer()) as server:
        yield server


@pytest.fixture
def stats() -> Stats:
    return Stats()


@pytest.fixture
def couriers() -> Couriers:
    return Couriers(SystemClock(), idle_seconds=0.1)


@pytest.fixture
def delivery(stats: Stats, log: LogLines, couriers: Couriers) -> Iterator[Delivery]:
    clock = SystemClock()
    connections = Connections(clock, functools.partial(IngestClient, clock=clock))
    delivery = Delivery(clock=clock, stats=stats, couriers=couriers, connections=connections, adaptive_batch=1)
    yield delivery
    delivery.close(0)
    assert stats.snapshot().waiting == 0
    assert delivery.waiting() == {}
    assert delivery.waiting_for_instances() == {}
    assert log.with_text("delivery failed") == []
    assert log.with_text("token-") == []


def config(server: IngestServer, token: str = "token-1", **queue: float) -> PluginConfig:  # noqa: S107
    return PluginConfig.model_validate({"ingest_endpoint": server.url, "api_token": token, "queue": queue})


def test_endpoints_that_differ_in_their_query_only_are_two_whatever_is_in_it(delivery: Delivery) -> None:
    """Once what looked like a name and a password there was taken out of the URL as well."""
    urls = [f"http://127.0.0.1:1/events?to=//{name}@example.com" for name in ("one", "two")]
    wanted = [PluginConfig.model_validate({"ingest_endpoint": url, "api_token": "token-1"}) for url in urls]
    queues = [delivery.open(ONE, config) for config in wanted]
    assert queues[0] is not queues[1]


def numbered(sequence: object) -> Entity:
    """Give the entity as Kong passes it with a configuration that has this number."""
    return parse_entity({"__plugin_id": ONE.id, "__seq__": sequence})


def test_a_courier_that_cannot_be_started_is_started_though_no_event_comes(
    delivery: Delivery, server: IngestServer, stats: Stats, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = delivery.open(ONE, config(server))

    def no_thread(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", no_thread)
        queue.put(b"{}")
    delivery.sweep()
    settle(stats)


def ruling(delivery: Delivery, server: IngestServer, stats: Stats, *opened: tuple[str, object]) -> str:
    """Open configurations, by their tokens and numbers, and give the token with which an event leaves then."""
    queues = [delivery.open(numbered(sequence), config(server, token)) for token, sequence in opened]
    queues[-1].put(b"{}")
    settle(stats)
    return posted(server)[-1][0]


def posted(server: IngestServer) -> list[tuple[str, bytes]]:
    """Give what the server took, with the token that came with it."""
    return [(request.headers["Authorization"].removeprefix("Bearer "), request.body) for request in server.requests]


def settle(stats: Stats) -> Snapshot:
    wait_until(lambda: stats.snapshot().waiting == 0, "each event is delivered or dropped")
    return stats.snapshot()


def held(server: IngestServer) -> threading.Event:
    """Make the server wait with its answers until the event that is given is set."""
    gate = threading.Event()

    def wait(exchange: Exchange) -> None:
        gate.wait(20)
        exchange.reply(204)

    server.on_request = wait
    return gate


@pytest.mark.parametrize("has_spool", [True, False])
def test_kongs_default_batch_size_keeps_up_with_an_endpoint_that_takes_its_time(
    server: IngestServer, stats: Stats, couriers: Couriers, tmp_path: Path, *, has_spool: bool
) -> None:
    """Each event alone, 50 ms away, once made 20 a second at most: 352 of 2,000 in 20 s."""

    def after_50_ms(exchange: Exchange) -> None:
        time.sleep(0.05)
        exchange.reply(204)

    server.on_request = after_50_ms
    clock = SystemClock()
    connections = Connections(clock, functools.partial(IngestClient, clock=clock))
    spooler = None
    if has_spool:
        options = SpoolOptions(tmp_path / "spool", inbox_directory=None)
        spooler = Spooler(options, clock=clock, stats=stats, connections=connections)
        spooler.start()
    delivery = Delivery(clock=clock, stats=stats, couriers=couriers, connections=connections, spooler=spooler)
    queue = delivery.open(ONE, config(server))
    for burst in range(20):
        for number in range(10):
            queue.put(b"%d" % (10 * burst + number))
        time.sleep(0.1)  # the load: 100 events a second
    settle(stats)
    delivery.close(0)
    assert stats.snapshot().delivered == 200
    sent = b",".join(request.body.strip(b"[]") for request in server.requests)
    assert sent == b",".join(b"%d" % number for number in range(200))
    # Each alone, they would have been 200.
    assert len(server.requests) <= 60


# -- one queue per entity and endpoint ---------------------------------------------------------------------------------


def test_all_instances_of_an_entity_share_a_queue(
    delivery: Delivery, server: IngestServer, stats: Stats, couriers: Couriers
) -> None:
    queues = [delivery.open(ONE, config(server)) for _ in range(4)]
    assert len(set(queues)) == 1
    for queue in queues:
        queue.put(b"{}")
    assert settle(stats).delivered == 4
    assert server.connections == 1
    assert couriers.threads <= 2


@pytest.mark.parametrize(
    "different",
    [
        lambda delivery, server, _: delivery.open(OTHER, config(server)),
        lambda delivery, _, other_server: delivery.open(ONE, config(other_server)),
    ],
    ids=["entity", "endpoint"],
)
def test_another_entity_or_another_endpoint_is_another_queue(
    delivery: Delivery,
    server: IngestServer,
    other_server: IngestServer,
    different: Callable[[Delivery, IngestServer, IngestServer], EventQueue],
) -> None:
    assert different(delivery, server, other_server) is not delivery.open(ONE, config(server))


def test_entities_with_the_same_endpoint_keep_to_their_own_tokens(
    delivery: Delivery, server: IngestServer, stats: Stats
) -> None:
    queues = [delivery.open(ONE, config(server, "token-1")), delivery.open(OTHER, config(server, "token-2"))]
    for number in range(20):
        queues[number % 2].put(b"%d" % number)
    settle(stats)
    assert sorted(posted(server), key=lambda request: int(request[1])) == [
        (f"token-{number % 2 + 1}", b"%d" % number) for number in range(20)
    ]


# -- a newer configuration ---------------------------------------------------------------------------------------------


def test_a_newer_token_takes_over_what_waits(delivery: Delivery, server: IngestServer, stats: Stats) -> None:
    gate = held(server)
    queue = delivery.open(ONE, config(server, "token-old"))
    queue.put(b"first")
    wait_until(lambda: server.requests, "the first event is on its way")
    queue.put(b"second")
    assert delivery.open(ONE, config(server, "token-new")) is queue
    gate.set()
    settle(stats)
    queue.put(b"third")
    settle(stats)
    assert posted(server) == [("token-old", b"first"), ("token-new", b"second"), ("token-new", b"third")]


def test_a_newer_token_ends_the_backoff_of_a_refused_one(
    delivery: Delivery, server: IngestServer, stats: Stats
) -> None:
    def check(exchange: Exchange) -> None:
        exchange.reply(204 if exchange.headers["Authorization"] == "Bearer token-right" else 401)

    server.on_request = check
    queue = delivery.open(ONE, config(server, "token-wrong", initial_retry_delay=1000, max_retry_delay=1000))
    queue.put(b"event")
    wait_until(lambda: server.requests, "the wrong token is refused")
    delivery.open(ONE, config(server, "token-right", initial_retry_delay=1000, max_retry_delay=1000))
    assert settle(stats) == Snapshot(accepted=1, delivered=1)


def test_newer_queue_parameters_take_over(delivery: Delivery, server: IngestServer, stats: Stats) -> None:
    queue = delivery.open(ONE, config(server, max_batch_size=100, max_coalescing_delay=3600))
    queue.put(b"1")
    queue.put(b"2")
    delivery.open(ONE, config(server, max_batch_size=2, max_coalescing_delay=3600))
    assert settle(stats).delivered == 2
    assert [request.body for request in server.requests] == [b"[1,2]"]


def test_a_newer_configuration_is_said_and_the_same_one_is_not(
    delivery: Delivery, server: IngestServer, log: LogLines
) -> None:
    for token in ("a", "a", "b", "b"):
        delivery.open(ONE, config(server, token))
    assert log.lines == [("INFO", "queue one: a newer configuration took over")]


def test_a_changed_endpoint_leaves_what_waits_for_the_old_one_with_the_old_token(
    delivery: Delivery, server: IngestServer, other_server: IngestServer, stats: Stats
) -> None:
    old = delivery.open(ONE, config(server, "token-old"))
    old.put(b"0")
    settle(stats)
    gate = held(server)
    old.put(b"1")
    old.put(b"2")
    new = delivery.open(ONE, config(other_server, "token-new"))
    delivery.release(old)
    new.put(b"3")
    wait_until(lambda: other_server.requests, "the new endpoint gets its event")
    gate.set()
    settle(stats)
    assert posted(server) == [("token-old", b"0"), ("token-old", b"1"), ("token-old", b"2")]
    assert posted(other_server) == [("token-new", b"3")]


def test_going_back_to_the_old_endpoint_finds_the_old_queue(
    delivery: Delivery, server: IngestServer, other_server: IngestServer, stats: Stats
) -> None:
    gate = held(server)
    old = delivery.open(ONE, config(server, "token-old"))
    old.put(b"1")
    wait_until(lambda: server.requests, "it is on its way")
    old.put(b"2")
    new = delivery.open(ONE, config(other_server, "token-new"))
    delivery.release(old)
    assert delivery.open(ONE, config(server, "token-newest")) is old
    delivery.release(new)
    gate.set()
    settle(stats)
    assert posted(server) == [("token-old", b"1"), ("token-newest", b"2")]
    assert other_server.requests == []


@pytest.mark.parametrize("status", [307, 503])
def test_events_never_leave_for_another_endpoint_however_the_right_one_fails(
    delivery: Delivery, server: IngestServer, other_server: IngestServer, stats: Stats, status: int
) -> None:
    first = delivery.open(ONE, config(server, "token-old", max_retry_time=-1))
    first.put(b"before")
    settle(stats)
    server.on_request = answer(status, b"", {"Location": other_server.url})
    second = delivery.open(ONE, config(other_server, "token-new"))
    for number in range(10):
        (first if number % 2 else second).put(b"%d" % number)
    account = settle(stats)
    assert account.dropped == {"retry_time_exceeded": 5}
    assert [body for _, body in posted(other_server)] == [b"0", b"2", b"4", b"6", b"8"]
    assert {token for token, _ in posted(other_server)} == {"token-new"}


# -- an old configuration that comes late ------------------------------------------------------------------------------

LATE = "queue 11111111-one: an older configuration came late, the newer one goes on"
TAKEN_OVER = "queue 11111111-one: a newer configuration took over"


def test_a_late_request_does_not_bring_the_old_token_back(
    delivery: Delivery, server: IngestServer, stats: Stats
) -> None:
    old, new = (numbered(1), config(server, "token-old")), (numbered(2), config(server, "token-new"))
    queue = delivery.open(*old)
    for configuration in (new, old, new, old):
        assert delivery.open(*configuration) is queue
        delivery.release(queue)  # a worker closes the instance before only when the next one is started
        queue.put(b"{}")
        settle(stats)
    assert [token for token, _ in posted(server)] == ["token-new"] * 4


def test_an_old_configuration_that_comes_late_uses_the_queue(delivery: Delivery, server: IngestServer) -> None:
    queue = delivery.open(numbered(1), config(server, "old"))
    delivery.open(numbered(2), config(server, "new"))
    delivery.release(queue)
    delivery.open(numbered(1), config(server, "old"))
    delivery.release(queue)
    assert delivery.waiting() == {"11111111-one": 0}
    delivery.release(queue)
    assert delivery.waiting() == {}


def test_late_queue_parameters_do_not_come_back(delivery: Delivery, server: IngestServer, stats: Stats) -> None:
    old = config(server, max_batch_size=1)
    queue = delivery.open(numbered(1), old)
    delivery.open(numbered(2), config(server, max_batch_size=2, max_coalescing_delay=3600))
    delivery.open(numbered(1), old)
    queue.put(b"1")
    queue.put(b"2")
    settle(stats)
    assert [request.body for request in server.requests] == [b"[1,2]"]


def test_a_late_configuration_does_not_end_a_backoff(delivery: Delivery, server: IngestServer, stats: Stats) -> None:
    server.on_request = answer(503)
    pauses = {"initial_retry_delay": 1000, "max_retry_delay": 1000}
    queue = delivery.open(numbered(1), config(server, "old", **pauses))
    delivery.open(numbered(2), config(server, "new", **pauses))
    queue.put(b"{}")
    wait_until(lambda: server.requests, "it is tried")
    delivery.open(numbered(1), config(server, "old", **pauses))
    time.sleep(0.1)
    assert len(server.requests) == 1
    assert stats.snapshot().waiting == 1


@pytest.mark.parametrize(
    "opened",
    [
        [("old", 1), ("old", 2), ("new", 3), ("new", 4), ("old", 2), ("old", 1)],
        [("old", 2), ("old", 1), ("new", 4), ("new", 3), ("old", 2)],
        [("old", 1), ("new", 3), ("old", 2)],
        [("oldest", 1), ("old", 2), ("new", 3), ("oldest", 1), ("old", 2)],
        [("old", 1), ("old", 5), ("new", 7), ("old", 5), ("new", 9), ("old", 5)],
    ],
    ids=["each worker", "in any order", "a worker's first", "two changes", "other plugins change too"],
)
def test_an_old_configuration_comes_late_from_any_worker(
    delivery: Delivery, server: IngestServer, stats: Stats, opened: list[tuple[str, object]]
) -> None:
    assert ruling(delivery, server, stats, *opened) == "new"


def test_going_back_to_an_earlier_configuration_takes_over(
    delivery: Delivery, server: IngestServer, stats: Stats
) -> None:
    assert ruling(delivery, server, stats, ("a", 1), ("b", 2), ("a", 3)) == "a"
    assert ruling(delivery, server, stats, ("b", 2), ("a", 1), ("b", 2)) == "a", "what it went back from is late now"
    assert ruling(delivery, server, stats, ("b", 4), ("a", 3), ("a", 1)) == "b"


def test_a_slow_worker_that_still_reads_the_old_configuration_is_followed_by_the_new_one(
    delivery: Delivery, server: IngestServer, stats: Stats
) -> None:
    assert ruling(delivery, server, stats, ("old", 1), ("new", 2), ("old", 3), ("new", 4), ("old", 3)) == "new"


@pytest.mark.parametrize("after", [1, 8, 9], ids=["lower", "earlier", "the same"])
def test_a_changed_configuration_of_a_restarted_kong_takes_over_and_may_be_taken_back(
    delivery: Delivery, server: IngestServer, stats: Stats, after: int
) -> None:
    assert ruling(delivery, server, stats, ("a", 8), ("b", 9), ("c", after)) == "c"
    for token in ("a", "b", "c"):
        after += 1
        assert ruling(delivery, server, stats, (token, after)) == token
    assert ruling(delivery, server, stats, ("b", after - 1)) == "c", "what is late is known by the new numbers"


def test_after_a_restart_of_kong_with_the_same_configuration_an_earlier_one_may_come_back(
    delivery: Delivery, server: IngestServer, stats: Stats
) -> None:
    assert ruling(delivery, server, stats, ("a", 8), ("b", 9), ("b", 1), ("a", 2)) == "a"
    assert ruling(delivery, server, stats, ("b", 1)) == "a", "what is late is known by the new numbers"


def test_configurations_that_kong_restarts_with_by_turns_take_over(
    delivery: Delivery, server: IngestServer, stats: Stats
) -> None:
    for token in ("a", "b", "a", "b"):
        assert ruling(delivery, server, stats, (token, 5)) == token
    assert ruling(delivery, server, stats, ("b", 9), ("a", 7), ("b", 3)) == "b", "no worker's number is forgotten"


def test_an_earlier_configuration_after_an_unseen_restart_of_kong_takes_over_with_its_next_number_that_is_higher(
    delivery: Delivery, server: IngestServer, stats: Stats
) -> None:
    assert ruling(delivery, server, stats, ("a", 1), ("b", 3), ("a", 1), ("a", 2)) == "b"
    assert ruling(delivery, server, stats, ("a", 3)) == "a"


@pytest.mark.parametrize("sequence", [None, 0, -1, "1", 1.5, True, [], float("nan")])
def test_without_a_number_the_last_one_rules(
    delivery: Delivery, server: IngestServer, stats: Stats, sequence: object
) -> None:
    for token in ("a", "b", "a", "b"):
        assert ruling(delivery, server, stats, (token, sequence)) == token
    assert ruling(delivery, server, stats, ("a", 5), ("b", 6), ("a", sequence)) == "a"


def test_of_many_superseded_configurations_the_last_sixteen_are_known(
    delivery: Delivery, server: IngestServer, stats: Stats
) -> None:
    newest = 20
    opened = [(str(number), number) for number in range(1, newest + 1)]
    assert ruling(delivery, server, stats, *opened) == "20"
    assert ruling(delivery, server, stats, *[(str(number), number) for number in range(4, newest)]) == "20"
    assert ruling(delivery, server, stats, ("3", 3)) == "3"


def test_taking_over_is_said_only_when_it_happens(delivery: Delivery, server: IngestServer, log: LogLines) -> None:
    opened = [("old", 1), ("old", 2), ("new", 3), ("new", 4), ("old", 2), ("new", 4), ("new", 3)]
    for token, sequence in opened:
        delivery.open(numbered(sequence), config(server, token))
    assert log.lines == [("INFO", TAKEN_OVER), ("INFO", LATE)]


def test_another_entity_or_endpoint_knows_nothing_of_it(
    delivery: Delivery, server: IngestServer, other_server: IngestServer, stats: Stats
) -> None:
    assert ruling(delivery, server, stats, ("old", 1), ("new", 2)) == "new"
    assert ruling(delivery, other_server, stats, ("old", 1)) == "old"
    delivery.open(Entity(OTHER.id, OTHER.name, 1), config(server, "old")).put(b"{}")
    settle(stats)
    assert posted(server)[-1][0] == "old"


# -- letting go --------------------------------------------------------------------------------------------------------


def test_a_queue_that_nobody_uses_ends_when_it_is_empty(
    delivery: Delivery, server: IngestServer, stats: Stats, couriers: Couriers
) -> None:
    queue = delivery.open(ONE, config(server))
    delivery.open(ONE, config(server))
    queue.put(b"event")
    settle(stats)
    delivery.release(queue)
    assert delivery.waiting() == {"one": 0}
    delivery.release(queue)
    assert delivery.waiting() == {}
    wait_until(lambda: couriers.threads == 0, "nobody serves it any more")


def test_a_queue_with_events_goes_on_without_users_until_it_is_empty(
    delivery: Delivery, server: IngestServer, stats: Stats
) -> None:
    gate = held(server)
    queue = delivery.open(ONE, config(server))
    queue.put(b"1")
    queue.put(b"2")
    delivery.release(queue)
    delivery.sweep()
    assert delivery.waiting() == {"one": 2}
    gate.set()
    assert settle(stats) == Snapshot(accepted=2, delivered=2)
    delivery.sweep()
    assert delivery.waiting() == {}


def test_a_queue_in_use_is_not_swept(delivery: Delivery, server: IngestServer) -> None:
    queue = delivery.open(ONE, config(server))
    delivery.sweep()
    assert delivery.open(ONE, config(server)) is queue


def test_after_the_end_of_a_queue_the_same_configuration_opens_another(
    delivery: Delivery, server: IngestServer, stats: Stats
) -> None:
    queue = delivery.open(ONE, config(server))
    delivery.release(queue)
    another = delivery.open(ONE, config(server))
    assert another is not queue
    another.put(b"event")
    assert settle(stats).delivered == 1


# -- the end -----------------------------------------------------------------------------------------------------------


def test_closing_sends_what_waits_in_all_queues(
    delivery: Delivery, server: IngestServer, other_server: IngestServer, stats: Stats
) -> None:
    # Of entities of their own: of one entity, the later endpoint would get what waits for an earlier one.
    for number, endpoint in enumerate((server, other_server, server, other_server)):
        entity = Entity(f"{number}3333333-entity", f"entity-{number}")
        queue = delivery.open(entity, config(endpoint, max_batch_size=100, max_coalescing_delay=3600))
        for event in range(5):
            queue.put(b"%d" % event)
    delivery.close(20)
    assert stats.snapshot() == Snapshot(accepted=20, delivered=20)
    assert len(server.requests) == len(other_server.requests) == 2


@pytest.mark.parametrize("reaction", [Exchange.hang, Exchange.drip, answer(503)])
def test_closing_keeps_its_deadline_whatever_the_endpoints_do(
    delivery: Delivery, server: IngestServer, stats: Stats, reaction: Reaction
) -> None:
    server.on_request = reaction
    for number in range(5):
        queue = delivery.open(Entity(str(number), str(number)), config(server, initial_retry_delay=1000))
        queue.put(b"1")
        queue.put(b"2")
    started = time.monotonic()
    delivery.close(0.3)
    # Without a deadline the endpoints would take ten seconds for each event.
    assert time.monotonic() - started < 10
    assert stats.snapshot() == Snapshot(accepted=10, dropped={"process_ended": 10})


def test_beginning_to_close_sends_at_once_without_waiting_for_it(
    delivery: Delivery, server: IngestServer, stats: Stats
) -> None:
    queue = delivery.open(ONE, config(server, max_batch_size=100, max_coalescing_delay=3600))
    queue.put(b"1")
    delivery.begin_close()
    settle(stats)
    queue.put(b"2")
    assert settle(stats) == Snapshot(accepted=2, delivered=2)


def test_closing_without_queues_is_nothing(delivery: Delivery, stats: Stats) -> None:
    delivery.close(5)
    delivery.close(5)
    assert stats.snapshot() == Snapshot()


# -- telling -----------------------------------------------------------------------------------------------------------


def test_what_waits_is_told_by_name_and_added_up_where_names_are_the_same(
    delivery: Delivery, server: IngestServer, other_server: IngestServer, stats: Stats
) -> None:
    gates = [held(server), held(other_server)]
    for entity, endpoint, count in ((ONE, server, 1), (ONE, other_server, 2), (OTHER, server, 4)):
        queue = delivery.open(entity, config(endpoint))
        for _ in range(count):
            queue.put(b"event")
    assert delivery.waiting() == {"one": 3, "other": 4}
    for gate in gates:
        gate.set()
    settle(stats)
