"""A corrected URL takes over what waits, if the old one never accepted an event; over real HTTP and on real files."""

from __future__ import annotations

import errno
import functools
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kong_metering.clock import SystemClock
from kong_metering.config import Entity, PluginConfig, parse_entity
from kong_metering.delivery.couriers import Couriers
from kong_metering.delivery.registry import Delivery
from kong_metering.eventlog import files
from kong_metering.ingest.client import IngestClient
from kong_metering.ingest.connections import Connections
from kong_metering.spool.directory import survey
from kong_metering.spool.identity import QueueIdentity
from kong_metering.spool.options import SpoolOptions
from kong_metering.spool.requests import Answer, Asking, Kind, Request, new_id
from kong_metering.stats import Snapshot, Stats
from kong_metering.upkeep.spooler import Spooler
from tests.support.waiting import wait_until
from tests.unit.delivery.fakes import broken_disk, letters, on_disk
from tests.unit.ingest.ingest_server import Exchange, IngestServer, Reaction, answer, running

if TYPE_CHECKING:
    from kong_metering.delivery.queue import EventQueue
    from tests.support.loglines import LogLines

ONE = Entity("11111111-one", "one")
OTHER = Entity("22222222-other", "other")


class Served:
    """A process with its queues."""

    def __init__(self, root: Path | None) -> None:
        clock = SystemClock()
        self.stats = Stats()
        self.couriers = Couriers(clock, idle_seconds=0.1)
        connections = Connections(clock, functools.partial(IngestClient, clock=clock))
        spooler = None
        if root is not None:
            options = SpoolOptions(root, inbox_directory=None)
            spooler = Spooler(
                options, clock=clock, stats=self.stats, connections=connections, janitor_round_seconds=0.02
            )
            spooler.start()
        self.delivery = Delivery(
            clock=clock, stats=self.stats, couriers=self.couriers, connections=connections, spooler=spooler
        )

    def open(self, server: IngestServer, sequence: int = 0, entity: Entity = ONE) -> EventQueue:
        if sequence:
            entity = parse_entity({"__plugin_id": entity.id, "__seq__": sequence})
        settings = {"max_retry_delay": 0.02, "max_retry_time": 3600}
        config = {"ingest_endpoint": server.url, "api_token": "token-1", "queue": settings}
        return self.delivery.open(entity, PluginConfig.model_validate(config))

    def settle(self) -> Snapshot:
        wait_until(lambda: self.stats.snapshot().waiting == 0, "each event is delivered or dropped")
        wait_until(lambda: not any(self.delivery.waiting().values()), "no queue has one")
        return self.stats.snapshot()

    def close(self) -> Snapshot:
        self.delivery.close(0)
        return self.stats.snapshot()


Serve = Callable[[], Served]


@pytest.fixture
def right() -> Iterator[IngestServer]:
    with running(IngestServer()) as server:
        yield server


@pytest.fixture
def wrong(server: IngestServer) -> IngestServer:
    server.on_request = answer(404)
    return server


@contextmanager
def closing(made: list[Served]) -> Iterator[None]:
    yield
    for each in made:
        account = each.close()
        assert account.waiting == 0, account


@pytest.fixture
def serve(root: Path, log: LogLines) -> Iterator[Serve]:
    """Make processes with a spool that they share; at the end each adds up."""
    made: list[Served] = []

    def make() -> Served:
        made.append(Served(root))
        return made[-1]

    with closing(made):
        yield make
    assert log.with_text("delivery failed") == []
    assert [text for _, text in log.lines if text.startswith("the spool: ")] == []


@pytest.fixture(params=["on disk", "in memory"])
def served(request: pytest.FixtureRequest, serve: Serve, log: LogLines) -> Iterator[Served]:
    """Make a process, with a spool or without one."""
    if request.param == "on disk":
        yield serve()
        return
    made = [Served(None)]
    with closing(made):
        yield made[0]
    assert log.with_text("delivery failed") == []


def events(server: IngestServer) -> list[int]:
    """Give what a server was sent, as numbers, in order."""
    bodies = b",".join(request.body.strip(b"[]") for request in server.requests)
    return [int(number) for number in bodies.split(b",")] if bodies else []


def put(queue: EventQueue, first: int, end: int) -> None:
    for number in range(first, end):
        queue.put(b"%d" % number)


def held(server: IngestServer, status: int) -> threading.Event:
    """Make the server wait with its answers until the event that is given is set."""
    gate = threading.Event()

    def wait(exchange: Exchange) -> None:
        gate.wait(20)
        exchange.reply(status)

    server.on_request = wait
    return gate


@pytest.mark.parametrize("failure", [answer(404), answer(400), answer(503), lambda exchange: exchange.reset()])
def test_a_corrected_url_takes_over_what_waits(
    served: Served, wrong: IngestServer, right: IngestServer, log: LogLines, failure: Reaction
) -> None:
    wrong.on_request = failure
    put(served.open(wrong), 0, 300)
    wait_until(lambda: wrong.requests, "the wrong one is tried")
    put(served.open(right), 300, 400)
    account = served.settle()
    assert (account.accepted, account.delivered) == (400, 400)
    assert sorted(events(right)) == list(range(400))
    assert [event for event in events(right) if event < 300] == list(range(300))
    (line,) = log.with_text("never accepted an event")
    assert f"{wrong.url} never accepted an event; " in line[1]
    assert right.url in line[1]


def test_what_comes_late_for_the_wrong_url_goes_to_the_right_one(
    served: Served, wrong: IngestServer, right: IngestServer
) -> None:
    old = served.open(wrong)
    put(old, 0, 10)
    wait_until(lambda: wrong.requests, "the wrong one is tried")
    new = served.open(right)
    put(old, 10, 20)
    served.settle()
    put(old, 20, 30)
    served.delivery.release(new)
    served.delivery.sweep()
    put(old, 30, 40)
    served.settle()
    assert sorted(events(right)) == list(range(40))
    served.delivery.release(old)
    served.delivery.sweep()
    assert served.delivery.waiting() == {}


def test_events_that_come_all_the_time_all_go_to_the_right_one(
    served: Served, wrong: IngestServer, right: IngestServer
) -> None:
    old = served.open(wrong)
    putting = threading.Thread(target=put, args=(old, 0, 20_000))
    putting.start()
    wait_until(lambda: wrong.requests, "the wrong one is tried")
    served.open(right)
    putting.join()
    served.settle()
    delivered = served.stats.snapshot().delivered
    assert delivered == len(set(events(right))) == len(events(right))
    assert delivered + sum(served.stats.snapshot().dropped.values()) == 20_000


def test_what_waits_at_an_endpoint_that_has_accepted_an_event_stays_with_it(
    served: Served, wrong: IngestServer, right: IngestServer, log: LogLines
) -> None:
    wrong.on_request = answer(204)
    old = served.open(wrong)
    put(old, 0, 1)
    served.settle()
    gate = held(wrong, 503)
    put(old, 1, 50)
    wait_until(lambda: len(wrong.requests) > 1, "it is tried")
    put(served.open(right), 50, 60)
    wait_until(lambda: len(events(right)) == 10, "the new one gets its own")
    gate.set()
    wrong.on_request = answer(204)
    served.settle()
    assert events(right) == list(range(50, 60))
    assert set(events(wrong)) == set(range(50))
    assert log.with_text("never accepted an event") == []


def test_a_request_under_way_that_is_accepted_keeps_what_waits(
    served: Served, wrong: IngestServer, right: IngestServer, log: LogLines
) -> None:
    gate = held(wrong, 204)
    put(served.open(wrong), 0, 50)
    wait_until(lambda: wrong.requests, "the first event is on its way")
    put(served.open(right), 50, 60)
    wait_until(lambda: len(events(right)) == 10, "the new one gets its own")
    gate.set()
    served.settle()
    assert events(right) == list(range(50, 60))
    assert events(wrong) == list(range(50))
    assert log.with_text("never accepted an event") == []


def test_another_entity_takes_nothing_over(served: Served, wrong: IngestServer, right: IngestServer) -> None:
    put(served.open(wrong), 0, 5)
    put(served.open(right, entity=OTHER), 5, 10)
    wait_until(lambda: len(events(right)) == 5 and wrong.requests, "both are tried")
    wait_until(lambda: served.stats.snapshot().waiting == 5, "its events are settled")
    assert events(right) == list(range(5, 10))
    served.open(right)
    served.settle()


def test_the_next_correction_takes_over_from_the_one_before(
    served: Served, wrong: IngestServer, right: IngestServer
) -> None:
    with running(IngestServer()) as second:
        second.on_request = answer(404)
        old = served.open(wrong)
        put(old, 0, 10)
        wait_until(lambda: wrong.requests, "it is tried")
        middle = served.open(second)
        put(middle, 10, 20)
        wait_until(lambda: second.requests, "the second one is tried")
        served.open(right)
        put(old, 20, 30)
        put(middle, 30, 40)
        served.settle()
    assert sorted(events(right)) == list(range(40))


def test_going_back_takes_over_again(served: Served, wrong: IngestServer, right: IngestServer) -> None:
    put(served.open(wrong), 0, 10)
    wait_until(lambda: wrong.requests, "it is tried")
    right.on_request = answer(404)
    put(served.open(right), 10, 20)
    wait_until(lambda: right.requests, "the other one is tried")
    wrong.requests.clear()
    wrong.on_request = answer(204)
    put(served.open(wrong), 20, 30)
    served.settle()
    assert sorted(set(events(wrong))) == list(range(30))


def test_an_old_configuration_that_comes_late_takes_nothing_over(
    served: Served, wrong: IngestServer, right: IngestServer
) -> None:
    put(served.open(wrong, 1), 0, 10)
    wait_until(lambda: wrong.requests, "it is tried")
    gate = held(right, 503)
    put(served.open(right, 3), 10, 20)
    wait_until(lambda: right.requests, "what waits has come to the right one")
    put(served.open(wrong, 2), 20, 30)
    right.requests.clear()
    right.on_request = answer(204)
    gate.set()
    served.settle()
    assert sorted(events(right)) == list(range(30))


def test_a_late_request_whose_queue_has_gone_is_billed_at_the_right_url(
    served: Served, wrong: IngestServer, right: IngestServer
) -> None:
    """Its worker starts an instance of the old configuration once more, after the last one was closed."""
    old = served.open(wrong, 1)
    put(old, 0, 10)
    wait_until(lambda: wrong.requests, "it is tried")
    served.open(right, 2)
    served.settle()
    served.delivery.release(old)
    served.delivery.sweep()
    put(served.open(wrong, 1), 10, 11)
    served.settle()
    assert sorted(events(right)) == list(range(11))


# -- with a spool ------------------------------------------------------------------------------------------------------


def test_what_a_process_left_for_a_url_that_never_accepted_is_taken_over_by_the_next_one(
    serve: Serve, wrong: IngestServer, right: IngestServer, root: Path, log: LogLines
) -> None:
    first = serve()
    put(first.open(wrong), 0, 100)
    wait_until(lambda: wrong.requests, "it is tried")
    assert first.close().left == 100
    following = serve()
    following.open(right)
    wait_until(lambda: following.stats.snapshot().delivered == 100, "all are delivered")
    assert sorted(events(right)) == list(range(100))
    assert on_disk(root) == []
    assert len(log.with_text("which never accepted an event")) >= 1


def test_what_a_process_left_for_a_url_that_accepted_once_stays_with_it(
    serve: Serve, wrong: IngestServer, right: IngestServer, root: Path
) -> None:
    first = serve()
    wrong.on_request = answer(204)
    queue = first.open(wrong)
    put(queue, 0, 1)
    first.settle()
    wrong.on_request = answer(503)
    put(queue, 1, 11)
    wait_until(lambda: len(wrong.requests) > 1, "it is tried")
    assert first.close().left == 10
    following = serve()
    put(following.open(right), 11, 12)
    following.settle()
    following.delivery._spooler._janitor.look_for_others(5)  # type: ignore[union-attr]
    assert events(right) == [11]
    assert len(on_disk(root)) == 10


def test_a_spool_of_a_version_that_noted_no_acceptance_is_asked_what_its_logs_tell(
    serve: Serve, wrong: IngestServer, right: IngestServer, root: Path
) -> None:
    first, gate = serve(), threading.Event()

    def accept_one(exchange: Exchange) -> None:
        gate.wait(20)
        exchange.reply(204 if len(wrong.requests) == 1 else 503)

    wrong.on_request = accept_one
    queue = first.open(wrong)
    put(queue, 0, 1)
    wait_until(lambda: wrong.requests, "it is sent")
    put(queue, 1, 11)
    wait_until(lambda: len(on_disk(root)) == 11, "the others are in the same log")
    gate.set()
    wait_until(lambda: len(wrong.requests) > 1, "the others are tried")
    assert first.close().left == 10
    shutil.rmtree(root / "accepted")
    following = serve()
    put(following.open(right), 11, 12)
    following.settle()
    following.delivery._spooler._janitor.look_for_others(5)  # type: ignore[union-attr]
    assert events(right) == [11]
    assert len(on_disk(root)) == 10


def test_a_spool_of_such_a_version_in_which_nothing_was_settled_is_taken_over(
    serve: Serve, wrong: IngestServer, right: IngestServer, root: Path
) -> None:
    first = serve()
    put(first.open(wrong), 0, 10)
    wait_until(lambda: wrong.requests, "it is tried")
    assert first.close().left == 10
    shutil.rmtree(root / "accepted", ignore_errors=True)
    following = serve()
    following.open(right)
    wait_until(lambda: following.stats.snapshot().delivered == 10, "all are delivered")
    assert sorted(events(right)) == list(range(10))


def test_what_was_sent_to_the_wrong_url_is_not_in_doubt_at_the_right_one(
    serve: Serve, wrong: IngestServer, right: IngestServer, root: Path
) -> None:
    wrong.on_request = lambda exchange: exchange.reset()
    served = serve()
    put(served.open(wrong), 0, 5)
    wait_until(lambda: len(wrong.requests) > 3, "they are sent without an answer")
    gate = held(right, 503)
    served.open(right)
    wait_until(lambda: right.requests, "they have come to the right one")
    gate.set()
    right.on_request = answer(204)
    served.settle()
    assert letters(root) == []
    assert set(events(right)) == set(range(5))


def test_a_disk_that_is_read_only_delays_it(
    serve: Serve, wrong: IngestServer, right: IngestServer, log: LogLines
) -> None:
    served = serve()
    put(served.open(wrong), 0, 50)
    wait_until(lambda: wrong.requests, "it is tried")
    with broken_disk(errno.EROFS):
        served.open(right)
        wait_until(lambda: log.with_text("cannot be given to another endpoint"), "it is said")
    served.settle()
    assert sorted(set(events(right))) == list(range(50))


def test_a_disk_that_does_not_tell_for_a_while_whether_an_event_was_accepted_delays_it(
    serve: Serve, wrong: IngestServer, right: IngestServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve()
    queue = served.open(wrong)
    put(queue, 0, 50)
    wait_until(lambda: wrong.requests, "it is tried")
    stat, asked = Path.stat, threading.Event()

    def fails(path: Path, *, follow_symlinks: bool = True) -> os.stat_result:
        if path.parent.name == "accepted":
            asked.set()
            raise OSError(errno.EIO, "Input/output error", str(path))
        return stat(path, follow_symlinks=follow_symlinks)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "stat", fails)
        served.open(right)
        assert asked.wait(60)
        wait_until(lambda: not queue.is_leaving, "it goes on")
        wrong.requests.clear()
        served.delivery.sweep()
        wait_until(lambda: wrong.requests, "it is tried there meanwhile")
        assert not queue.has_moved
    served.delivery.sweep()
    wait_until(lambda: queue.has_moved, "it is asked again, and hands over")
    served.settle()
    assert sorted(set(events(right))) == list(range(50))


def test_what_is_still_on_its_way_to_a_url_that_is_corrected_again_goes_on_to_the_next(
    serve: Serve, wrong: IngestServer, right: IngestServer, log: LogLines
) -> None:
    served = serve()
    put(served.open(wrong), 0, 10)
    wait_until(lambda: wrong.requests, "it is tried")
    with running(IngestServer()) as second:
        with broken_disk(errno.EROFS):
            middle = served.open(second)
            wait_until(lambda: log.with_text("cannot be given to another endpoint, for now"), "it is to be given away")
            served.open(right)
            wait_until(lambda: middle.has_moved, "the second one has handed over, too")
        served.settle()
        assert second.requests == []
    assert sorted(events(right)) == list(range(10))


def test_what_was_to_be_taken_over_when_the_process_ends_is_left_for_the_next_one(
    serve: Serve, wrong: IngestServer, right: IngestServer
) -> None:
    served = serve()
    gate = held(wrong, 404)
    put(served.open(wrong), 0, 50)
    wait_until(lambda: wrong.requests, "one is on its way")
    served.open(right)
    closing = threading.Thread(target=served.close)
    closing.start()
    gate.set()
    closing.join()
    assert served.stats.snapshot().waiting == 0
    following = serve()
    following.open(right)
    wait_until(lambda: sorted(set(events(right))) == list(range(50)), "all are delivered")


# -- redirected by somebody --------------------------------------------------------------------------------------------


def redirect(root: Path, source: IngestServer, target: IngestServer, entity: Entity = ONE) -> Answer:
    """Ask as `kong-metering spool redirect` does; give the server's last word."""
    queue, to = (QueueIdentity(entity.id, entity.name, server.url) for server in (source, target))
    logs = tuple(str(log.directory.relative_to(root)) for log in survey(root) if log.identity == queue)
    request = Request(new_id(), Kind.REDIRECT, queue, logs, time.time_ns() // 1_000_000 + 60_000, to)
    with Asking(root, request) as asking:
        return wait_until(lambda: next((each for each in asking.answers() if each.is_done), None), "an answer")


def stuck(served: Served, wrong: IngestServer) -> EventQueue:
    """Open a queue whose endpoint has accepted event 0 and takes no other, and put events 1 to 49."""
    wrong.on_request = answer(204)
    queue = served.open(wrong)
    put(queue, 0, 1)
    served.settle()
    wrong.on_request = answer(401)
    put(queue, 1, 50)
    wait_until(lambda: len(wrong.requests) > 1, "one is tried")
    return queue


def test_what_is_redirected_is_delivered_by_the_queue_that_is_open_here(
    serve: Serve, wrong: IngestServer, right: IngestServer, root: Path
) -> None:
    served = serve()
    stuck(served, wrong)
    put(served.open(right), 50, 60)
    answered = redirect(root, wrong, right)
    assert (answered.events, answered.left, answered.problem) == (49, 0, "")
    served.settle()
    assert sorted(events(right)) == list(range(1, 60))
    assert (served.stats.snapshot().adopted, served.stats.snapshot().left) == (0, 0)


def test_a_queue_that_was_redirected_goes_on_with_what_comes_later(
    serve: Serve, wrong: IngestServer, right: IngestServer, root: Path
) -> None:
    """Its instances go on putting events into it, and its token is still refused; so it is as often as it may be."""
    served = serve()
    queue = stuck(served, wrong)
    for first in range(50, 100, 10):
        assert redirect(root, wrong, right).events > 0
        put(queue, first, first + 10)
        wrong.requests.clear()
        wait_until(lambda: wrong.requests, "what came later is tried")
        wait_until(lambda: served.delivery.is_refused(queue), "its token is known to be refused")
    wrong.requests.clear()
    wrong.on_request = answer(204)
    following = serve()
    following.open(right)
    wait_until(lambda: len(events(right)) == 89, "what was redirected is delivered by another process")
    following.settle()
    served.settle()
    assert events(wrong) == list(range(90, 100))
    assert sorted(events(right)) == list(range(1, 90))
    served.delivery.release(queue)
    for _ in range(6):  # those that went on for it end one after the other
        served.delivery.sweep()
    assert served.delivery.waiting() == {}


def test_events_that_come_all_the_time_are_at_one_of_the_two_while_they_are_redirected(
    serve: Serve, wrong: IngestServer, right: IngestServer, root: Path
) -> None:
    served = serve()
    queue = stuck(served, wrong)
    served.open(right)
    putting = threading.Thread(target=put, args=(queue, 50, 20_000))
    putting.start()
    while putting.is_alive():
        redirect(root, wrong, right)
    before = len(events(wrong))
    wrong.on_request = answer(204)
    account = served.settle()
    # In between one may have been refused once more; that each was taken once is what the account says.
    assert {*events(right), *events(wrong)[before:]} == set(range(1, 20_000))
    assert account.delivered == 20_000


def test_what_the_disk_does_not_allow_stays_and_is_said(
    serve: Serve, wrong: IngestServer, right: IngestServer, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve()
    stuck(served, wrong)
    write = files.write_file

    def refuses(path: Path, data: bytes, *, is_lasting: bool = False) -> None:
        if path.name.startswith("queue.json"):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        write(path, data, is_lasting=is_lasting)

    def unreadable(*_: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(files, "write_file", refuses)
        patched.setattr(os, "pread", unreadable)
        answered = redirect(root, wrong, right)
    assert (answered.events, answered.left) == (0, 49)
    assert "Read-only file system" in answered.problem
    before = len(events(wrong))
    wrong.on_request = answer(204)
    served.settle()
    assert right.requests == []
    assert set(events(wrong)[before:]) == set(range(1, 50))


def test_a_log_that_the_disk_does_not_set_free_at_once_is_free_as_soon_as_it_does(
    serve: Serve, wrong: IngestServer, right: IngestServer, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve()
    stuck(served, wrong)
    replace = Path.replace

    def refuses(path: Path, target: Path) -> Path:
        if path.is_dir():
            raise OSError(errno.EIO, "Input/output error", str(path))
        return replace(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", refuses)
        answered = redirect(root, wrong, right)
    assert (answered.events, answered.left) == (0, 49)
    assert "Input/output error" in answered.problem
    following = serve()
    following.open(right)
    wait_until(lambda: set(events(right)) == set(range(1, 50)), "another process delivers them while this one lives")
    following.settle()
    assert sorted(events(right)) == list(range(1, 50))
