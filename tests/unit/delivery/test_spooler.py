"""Several processes on one spool, one after the other and side by side; each is real, but for its endpoint."""

from __future__ import annotations

import errno
import itertools
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import pytest

from kong_metering.backlog.writing import Writing
from kong_metering.delivery.couriers import STALLED_SECONDS
from kong_metering.spool.accepted import Acceptances
from kong_metering.spool.directory import HeldLog, SpoolDirectory, survey
from kong_metering.spool.options import Sync
from kong_metering.stats import Snapshot
from kong_metering.trial.outcome import Delivered, Failed, Outcome, Rejected
from tests.support.waiting import wait_until
from tests.unit.delivery.fakes import (
    BUSY,
    DOWN,
    IDENTITY,
    REFUSED,
    UNAUTHORIZED,
    UNREACHABLE,
    FakeEndpoint,
    HangingDisk,
    Refusing,
    SpooledQueue,
    SteeredClock,
    crashed,
    down,
    letters,
    numbered,
    on_disk,
    stalled_adoption,
    take_all,
)

if TYPE_CHECKING:
    from kong_metering.spool.identity import QueueIdentity
    from tests.support.loglines import LogLines
    from tests.unit.delivery.conftest import ProcessMaker

DAY = 86_400


# -- the end, and the next process -------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 10, 1000])
@pytest.mark.parametrize("failure", [REFUSED, DOWN], ids=["refused", "503"])
def test_what_waits_at_the_end_is_left_for_the_next_process_which_delivers_it_first(
    process: ProcessMaker, root: Path, batch: int, failure: Failed
) -> None:
    it = process().open(down(failure), max_batch_size=batch)
    it.put(*numbered(100))
    it.endpoint.wait_for_request()
    assert it.process.close(20) == Snapshot(accepted=100, left=100)
    assert on_disk(root) == numbered(100)
    following = process().open(max_batch_size=batch)
    wait_until(lambda: following.process.account().adopted, "the events are taken over")
    following.put(*numbered(100, first=100))
    assert following.process.settle(adopted=100) == Snapshot(accepted=100, adopted=100, delivered=200)
    assert following.endpoint.delivered == numbered(200)


def test_events_that_wait_for_a_batch_to_fill_up_are_sent_at_the_end(process: ProcessMaker) -> None:
    it = process().open(max_batch_size=100, max_coalescing_delay=3600)
    it.put(*numbered(5))
    assert it.process.close(20) == Snapshot(accepted=5, delivered=5)


def test_an_event_that_is_put_right_before_the_end_is_on_disk(process: ProcessMaker, root: Path) -> None:
    it = process().open(down(DOWN))
    it.put(b"last")
    it.process.close(0)
    assert on_disk(root) == [b"last"]


@pytest.mark.parametrize("event", [b"late", b"x" * 1_000_000])
def test_an_event_that_comes_after_the_end_is_counted(process: ProcessMaker, event: bytes) -> None:
    it = process().open()
    it.close()
    it.put(event)
    assert it.process.close() == Snapshot(accepted=1, dropped={"process_ended": 1})


def test_nothing_goes_out_behind_a_batch_that_fails_at_the_end(process: ProcessMaker, root: Path) -> None:
    it = process().open(max_batch_size=10)
    it.endpoint.hold()
    it.put_on_disk(*numbered(50))
    it.endpoint.wait_for_request()
    it.endpoint.script.append(Delivered())
    it.endpoint.decide = lambda events: DOWN if b"10" in events else Delivered()
    it.endpoint.script.clear()
    it.queue.begin_close()
    it.endpoint.let_go()
    assert it.process.close(20) == Snapshot(accepted=50, delivered=10, left=40)
    assert on_disk(root) == numbered(40, first=10)


def test_an_answer_after_the_deadline_changes_nothing_and_the_next_process_sends_again(
    process: ProcessMaker,
) -> None:
    it = process().open(max_batch_size=5)
    it.endpoint.hold()
    it.put_on_disk(*numbered(20))
    it.endpoint.wait_for_request()
    assert it.process.close(0) == Snapshot(accepted=20, left=20)
    it.endpoint.let_go()
    following = process().open(max_batch_size=5)
    assert following.process.settle(adopted=20) == Snapshot(adopted=20, delivered=20)
    assert following.endpoint.delivered == numbered(20)


def test_a_courier_that_outlives_the_deadline_takes_no_more_events(process: ProcessMaker) -> None:
    it = process().open()
    it.endpoint.hold()
    it.put_on_disk(*numbered(20))
    it.endpoint.wait_for_request()
    it.close(0)
    it.endpoint.let_go()
    it.process.wait_for_rest()
    assert len(it.endpoint.requests) == 1
    assert it.queue.waiting == 0


@pytest.mark.parametrize("concurrency", [1, -1])
def test_what_was_delivered_behind_an_event_that_is_left_does_not_come_again(
    process: ProcessMaker, root: Path, concurrency: int
) -> None:
    gate = threading.Event()

    def all_but_one(events: list[bytes]) -> Outcome:
        if events != [b"3"]:
            return Delivered()
        if concurrency == 1:
            return Rejected("https://ingest.test answered 400: no subject", (0,))
        gate.wait(20)
        return Delivered()

    it = process().open(FakeEndpoint(all_but_one), concurrency_limit=concurrency)
    wait_until(root.is_dir, "the spool is made")
    (root / "dead-letters").write_text("no letters today")
    it.put_on_disk(*numbered(20))
    wait_until(lambda: it.process.account().delivered == 19, "all but one are delivered")
    assert it.process.close(0) == Snapshot(accepted=20, delivered=19, left=1)
    gate.set()
    assert on_disk(root) == [b"3"]
    (root / "dead-letters").unlink()
    following = process().open()
    assert following.process.settle(adopted=1) == Snapshot(adopted=1, delivered=1)


def test_a_copy_behind_the_others_is_still_known_as_sent(
    process: ProcessMaker, root: Path, steered: SteeredClock
) -> None:
    gate = threading.Event()

    def all_but_one(events: list[bytes]) -> Outcome:
        return UNREACHABLE if events == [b"3"] and gate.wait(20) else Delivered()

    it = process().open(FakeEndpoint(all_but_one))
    it.settings = it.settings.model_copy(update={"concurrency_limit": -1})
    it.reconfigure()
    it.put_on_disk(*numbered(20))
    wait_until(lambda: it.process.account().delivered == 19, "all but one are delivered")
    it.process.close(0)
    gate.set()
    steered.advance(DAY + 60)
    following = process().open()
    assert following.process.settle(adopted=1) == Snapshot(adopted=1, dead_letters={"ambiguous": 1})
    assert [stored.letter.event for stored in letters(root)] == [b"3"]


def test_the_end_during_a_burial_makes_one_dead_letter_or_leaves_the_event(process: ProcessMaker, root: Path) -> None:
    for turn in range(20):
        it = process().open(FakeEndpoint(Refusing(b"bad")))
        it.put(b"bad", b"good")
        it.endpoint.wait_for_request()
        account = it.process.close(0)
        assert account.accepted + account.adopted == (
            account.delivered + account.left + account.dead_letters.get("rejected", 0)
        ), turn
    it = process().open(FakeEndpoint(Refusing(b"bad")))
    # An event is to blame only where others get through.
    while on_disk(root):
        it.put_on_disk(b"good")
    it.process.settle()
    assert len(letters(root)) == 20


def test_what_is_answered_while_the_end_writes_in_another_log_is_delivered_or_left(
    process: ProcessMaker, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = process().open(down(REFUSED))
    before.put_on_disk(b"1", b"2")
    before.process.close()
    gates = {event: threading.Event() for event in (b"1", b"2", b"3")}

    def answer_later(events: list[bytes]) -> Outcome:
        if events[0] in gates:
            gates[events[0]].wait(20)
        return Delivered()

    it = process().open(FakeEndpoint(answer_later), concurrency_limit=-1)
    wait_until(lambda: it.process.account().adopted == 2, "what was left is taken over")
    it.put_on_disk(b"3", b"4")
    wait_until(lambda: it.process.account().delivered == 1, "one is delivered")
    disk = HangingDisk("the end")
    monkeypatch.setattr(os, "pwrite", disk.pwrite)
    disk.hang()
    end = threading.Thread(target=it.process.close, name="the end")
    end.start()
    disk.wait_for_write()
    gates[b"2"].set()
    it.process.wait_for_rest(at_work=2)
    disk.go_on()
    end.join()
    assert it.process.account().left == len(on_disk(root))
    for gate in gates.values():
        gate.set()


def test_two_threads_that_write_at_once_make_each_dead_letter_once(process: ProcessMaker, root: Path) -> None:
    bad = numbered(200)[::2]
    it = process().open(FakeEndpoint(Refusing(*bad, names_it=True)), max_batch_size=50)
    it.put(*numbered(200))
    while it.process.account().waiting:
        it.backlog.try_again()
    assert it.process.settle() == Snapshot(accepted=200, delivered=100, dead_letters={"rejected": 100})
    assert sorted(stored.letter.event for stored in letters(root)) == sorted(bad)


def test_what_several_processes_left_is_delivered_in_the_order_in_which_it_came(
    process: ProcessMaker, root: Path
) -> None:
    for turn in range(8):
        it = process().open(down(REFUSED))
        it.put_on_disk(*numbered(5, first=5 * turn))
        it.process.clock.advance(1)
        (part,) = root.glob("proc-*")
        it.process.close()
        # So that the next one does not take it over.
        part.rename(root.with_name(f"{turn}-{part.name}"))
    for part in root.parent.glob("*-proc-*"):
        part.rename(root / part.name[2:])
    following = process().open(max_batch_size=3)
    following.process.settle(adopted=40)
    assert following.endpoint.delivered == numbered(40)


# -- whose events they are ---------------------------------------------------------------------------------------------


def test_a_queue_whose_logs_there_is_no_room_for_sends_what_is_new_after_a_while(
    process: ProcessMaker, monkeypatch: pytest.MonkeyPatch, log: LogLines
) -> None:
    """Three quarters of the logs are for endpoints that take nothing, and fill the room for as long as that lasts."""
    identities = sorted((replace(IDENTITY, entity_id=f"{number}") for number in range(8)), key=lambda each: each.key)
    before = process()
    for identity in identities:
        before.open(down(), identity).put_on_disk(b"old")
    before.close()
    monkeypatch.setattr(resource, "getrlimit", lambda _: (16, 16))
    following = process()
    endpoints = [*(down() for _ in range(6)), FakeEndpoint(), FakeEndpoint()]
    opened = [following.open(endpoint, each) for endpoint, each in zip(endpoints, identities, strict=True)]
    opened[-1].put_on_disk(b"new")
    for _ in range(3):
        following.wait_for_a_round()
    assert endpoints[-1].requests == []
    following.let_pass(60)
    wait_until(lambda: endpoints[-1].delivered == [b"new"], "what is new is sent")
    assert log.with_text("what dead processes left for 2 queues is not sent yet")
    for endpoint in endpoints[:6]:
        endpoint.decide = take_all
    following.let_pass(60)
    following.settle(adopted=8)
    assert [sorted(endpoint.delivered) for endpoint in endpoints] == [[b"old"]] * 7 + [[b"new", b"old"]]


@pytest.mark.parametrize(
    "other",
    [replace(IDENTITY, entity_id="22222222-other"), replace(IDENTITY, endpoint="https://elsewhere.test/events")],
    ids=["entity", "endpoint"],
)
def test_events_are_not_taken_over_for_another_entity_or_endpoint(
    process: ProcessMaker, root: Path, other: QueueIdentity
) -> None:
    it = process().open(down(DOWN))
    it.put(*numbered(5))
    it.process.close()
    Acceptances(root).note(IDENTITY.key)
    following = process()
    stranger = following.open(identity=other)
    stranger.put(b"other")
    following.settle()
    assert stranger.endpoint.delivered == [b"other"]
    assert on_disk(root) == numbered(5)
    right = following.open(identity=replace(IDENTITY, name="renamed meanwhile"))
    following.settle(adopted=5)
    assert right.endpoint.delivered == numbered(5)
    assert following.account() == Snapshot(accepted=1, adopted=5, delivered=6)


def test_two_living_processes_never_deliver_the_same_event(process: ProcessMaker) -> None:
    old = process().open(down(REFUSED))
    old.put_on_disk(*numbered(50))
    new = process().open()
    new.put(*numbered(50, first=50))
    new.process.settle()
    assert new.process.account() == Snapshot(accepted=50, delivered=50)
    old.process.close()
    wait_until(lambda: new.process.account().adopted == 50, "the old one's events are taken over")
    new.process.settle()
    assert new.endpoint.delivered == [*numbered(50, first=50), *numbered(50)]


def test_many_processes_that_come_and_go_deliver_each_event_once(process: ProcessMaker) -> None:
    numbers = itertools.count()
    queues: list[SpooledQueue] = []
    for turn in range(12):
        it = process().open(down(REFUSED) if turn % 3 else None, max_batch_size=7)
        it.put(*(b"%d" % next(numbers) for _ in range(20)))
        queues.append(it)
        if len(queues) > 2:
            queues[-3].process.close(0)
    last = process().open()
    for it in queues:
        it.process.close(0)
    wait_until(lambda: last.process.account().waiting == 0 and on_disk(last.process.root) == [], "all are delivered")
    delivered = [event for it in (*queues, last) for event in it.endpoint.delivered]
    # A request that was under way when its process ended was sent again by the next one.
    assert set(delivered) == set(numbered(240))


def test_a_queue_that_ended_and_opens_again_in_the_same_process_goes_on(process: ProcessMaker, root: Path) -> None:
    it = process()
    for turn in range(30):
        queue = it.open()
        queue.put(b"%d" % turn)
        it.settle()
        queue.close()
        assert queue.endpoint.delivered == [b"%d" % turn]
    it.close()
    assert list(root.rglob("*.seg")) == []


def test_a_queue_may_open_again_before_the_one_before_it_is_gone(process: ProcessMaker, root: Path) -> None:
    it = process()
    old = it.open()
    old.put_on_disk(b"old")
    it.settle()
    new = it.open()
    new.endpoint.hold()
    new.put_on_disk(b"new")
    old.close()
    wait_until(lambda: len(survey(root)) == 1, "the old one's log is gone")
    (found,) = survey(root)
    assert found.identity == IDENTITY
    assert on_disk(root) == [b"new"]
    new.endpoint.let_go()
    it.settle()


# -- crashes, and what nobody knows ------------------------------------------------------------------------------------


WRITER = """
import os, signal, sys
from pathlib import Path
from tests.unit.delivery.fakes import *
it = Process(Path(sys.argv[1]), SteeredClock(), Path(sys.argv[2])).open(max_batch_size=10)
it.endpoint.hold()
it.put_on_disk(*(b"%d" % number for number in range(100)))
it.endpoint.wait_for_request()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_held_is_delivered_by_one_that_lives_already(
    process: ProcessMaker, root: Path, inbox: Path
) -> None:
    living = process().open(max_batch_size=10)
    living.put(b"own")
    living.process.settle()
    living.process.from_strangers = 100
    repository = Path(__file__).parents[3]
    command = [sys.executable, "-c", WRITER, str(root), str(inbox)]
    killed = subprocess.run(command, cwd=repository, check=False)
    assert killed.returncode == -signal.SIGKILL
    wait_until(lambda: living.process.account().adopted == 100, "its events are taken over")
    assert living.process.settle() == Snapshot(accepted=1, adopted=100, delivered=101)
    assert living.endpoint.delivered == [b"own", *numbered(100)]


@pytest.mark.parametrize("passed", [0, DAY - 60, DAY + 60])
def test_a_send_without_an_answer_is_repeated_only_within_the_deduplication_window(
    process: ProcessMaker, root: Path, passed: float, steered: SteeredClock
) -> None:
    it = process().open(max_batch_size=3)
    it.put_on_disk(b"before")
    it.process.settle()
    it.endpoint.hold()
    it.put_on_disk(*numbered(10))
    it.endpoint.wait_for_request(2)
    copy = crashed(root)
    steered.advance(passed)
    following = process(copy).open(max_batch_size=3)
    account = following.process.settle(adopted=10)
    if passed < DAY:
        assert account == Snapshot(adopted=10, delivered=10)
        assert following.endpoint.requests[0] == it.endpoint.requests[1][:1]
        assert following.endpoint.delivered == numbered(10)
    else:
        assert account == Snapshot(adopted=10, delivered=7, dead_letters={"ambiguous": 3})
        assert following.endpoint.delivered == numbered(7, first=3)
        assert [(stored.letter.event, stored.letter.reason) for stored in letters(copy)] == [
            (event, "ambiguous") for event in numbered(3)
        ]
        assert "24 hours" in letters(copy)[0].letter.answer


@pytest.mark.parametrize(
    ("outcome", "is_ambiguous"),
    [(REFUSED, False), (BUSY, False), (UNAUTHORIZED, True), (DOWN, True), (UNREACHABLE, True)],
    ids=["refused", "429", "an unclear 401", "503", "timeout"],
)
def test_only_what_may_have_arrived_is_ambiguous(
    process: ProcessMaker, steered: SteeredClock, outcome: Failed, *, is_ambiguous: bool
) -> None:
    it = process().open(max_batch_size=3, initial_retry_delay=1000, max_retry_delay=1000)
    it.put_on_disk(b"before")
    it.process.settle()
    it.endpoint.decide = lambda _: outcome
    it.put_on_disk(*numbered(3))
    it.endpoint.wait_for_request(2)
    it.process.wait_for_rest()
    it.process.close(0)
    steered.advance(30 * DAY - 60)
    following = process().open(max_batch_size=3)
    account = following.process.settle(adopted=3)
    assert account.dead_letters == ({"ambiguous": 3} if is_ambiguous else {})
    assert account.delivered == (0 if is_ambiguous else 3)


def test_a_batch_that_fails_for_longer_than_the_window_is_not_sent_blindly_by_the_same_process_either(
    process: ProcessMaker,
) -> None:
    it = process().open(max_batch_size=3, initial_retry_delay=3600, max_retry_delay=3600)
    it.put_on_disk(b"before")
    it.process.settle()
    it.endpoint.decide = lambda _: DOWN
    it.put_on_disk(*numbered(6))
    for turn in range(1, 31):
        wait_until(lambda turn=turn: len(it.endpoint.requests) > min(turn, 24), "it is tried")  # type: ignore[misc]
        if it.process.account().dead_letters:
            break
        it.process.wait_for_rest()
        it.let_pass(3601)
    wait_until(lambda: it.process.account().dead_letters, "it is set aside")
    it.endpoint.decide = lambda _: Delivered()
    it.let_pass(3601)
    account = it.process.settle()
    assert account.delivered + account.dead_letters["ambiguous"] == 7


@pytest.mark.parametrize("failure", [DOWN, UNREACHABLE], ids=["5xx", "no answer"])
@pytest.mark.parametrize("has_worked", [True, False])
def test_an_outage_longer_than_the_window_leaves_the_probing_event_in_doubt(
    process: ProcessMaker, failure: Failed, *, has_worked: bool
) -> None:
    it = process().open(max_batch_size=1000, initial_retry_delay=1800, max_retry_delay=1800)
    it.put_on_disk(b"before")
    it.process.settle()
    if not has_worked:
        it.reconfigure()  # what was accepted under another configuration says nothing about this one
    it.endpoint.decide = lambda _: failure
    it.put_on_disk(*numbered(5000))
    it.endpoint.wait_for_request(2)
    in_doubt = len(it.endpoint.requests[1])
    # On a busy machine the first request may go before more than one event is there.
    assert has_worked or in_doubt == 1
    for _ in range(49):  # 24.5 hours
        let_the_next_try_come(it)
    wait_until(lambda: it.process.account().dead_letters.get("ambiguous"), "the oldest is set aside")
    it.endpoint.decide = lambda _: Delivered()
    let_the_next_try_come(it)
    account = it.process.settle()
    # Besides, one more joins after a minute and one after an hour: the oldest may be what is to blame.
    ambiguous = account.dead_letters["ambiguous"]
    assert in_doubt <= ambiguous <= in_doubt + 2
    assert account.delivered == 5001 - ambiguous


def let_the_next_try_come(it: SpooledQueue) -> None:
    """Let half an hour pass, and wait until something was sent, or set aside, or nothing waits."""

    def done() -> tuple[int, int]:
        return len(it.endpoint.requests), it.process.account().dead_letters.get("ambiguous", 0)

    # Between a try and its pause another event may be read, to join.
    wait_until(lambda: it.queue.told()["next_try_in_seconds"] or not it.queue.waiting, "a pause")
    before = done()
    it.let_pass(1801)
    wait_until(lambda: done() != before or not it.queue.waiting, "the next try")


@pytest.mark.parametrize("jump", [DAY + 3600, -DAY - 3600, 3 * DAY])
@pytest.mark.parametrize("options", [{}, {"max_age": 3600.0}])
def test_a_clock_that_is_set_makes_nothing_ambiguous_or_old(
    process: ProcessMaker, steered: SteeredClock, jump: float, options: dict[str, float]
) -> None:
    it = process(**options).open(down(DOWN), max_batch_size=3)
    it.put_on_disk(*numbered(6))
    it.endpoint.wait_for_request()
    steered.set_wall_by(jump)
    it.put_on_disk(*numbered(6, first=6))
    it.endpoint.wait_for_request(10)
    for _ in range(3):
        it.process.wait_for_a_round()
    it.endpoint.decide = lambda _: Delivered()
    assert it.process.settle() == Snapshot(accepted=12, delivered=12)
    # The one that probes besides the oldest may be the first that gets through.
    assert sorted(it.endpoint.delivered, key=int) == numbered(12)


def test_a_lost_position_makes_old_events_ambiguous_and_not_young_ones(
    process: ProcessMaker, root: Path, steered: SteeredClock
) -> None:
    for passed, expected in ((0, {}), (DAY + 60, {"ambiguous": 5})):
        it = process().open(down(REFUSED))
        it.put_on_disk(*numbered(5))
        it.process.close()
        for path in root.rglob("position"):
            path.unlink()
        steered.advance(passed)
        # Another process looks at it first, for the bounds, whose queue it is not.
        looking = process()
        looking.look_at_free_logs()
        looking.close()
        following = process().open()
        assert following.process.settle(adopted=5).dead_letters == expected
        following.process.close()


def test_a_queue_takes_its_place_on_disk_with_its_first_event(process: ProcessMaker, root: Path) -> None:
    it = process().open(down())
    it.process.wait_for_a_round()
    assert survey(root) == []
    it.put_on_disk(b"1")
    assert [found.identity for found in survey(root)] == [IDENTITY]


def test_a_disk_that_hangs_does_not_keep_a_queue_from_being_opened(
    process: ProcessMaker, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_on = threading.Event()
    log_for = SpoolDirectory.log_for

    def hanging(directory: SpoolDirectory, identity: QueueIdentity) -> HeldLog:
        goes_on.wait(30)
        return log_for(directory, identity)

    monkeypatch.setattr(SpoolDirectory, "log_for", hanging)
    it = process().open(down())
    it.put(b"1")
    assert on_disk(root) == []
    goes_on.set()
    wait_until(lambda: on_disk(root) == [b"1"], "it is on disk")


def test_threads_that_are_at_one_thing_for_long_are_stalled_and_the_others_are_not(
    process: ProcessMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = process().open(down())
    dead.put_on_disk(b"old")
    dead.process.close()
    goes_on = stalled_adoption(monkeypatch)
    it = process().open()
    it.put_on_disk(b"new")
    spooler = it.process.spooler
    assert spooler.stalled() == {"writer": 0, "janitor": 0}
    it.process.let_pass(STALLED_SECONDS + 1)
    assert spooler.stalled() == {"writer": 0, "janitor": 1}
    goes_on.set()
    it.process.settle(adopted=1)
    wait_until(lambda: spooler.stalled() == {"writer": 0, "janitor": 0}, "it goes on")


def test_a_disk_that_hangs_for_long_stalls_the_writer(process: ProcessMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    it = process().open(down())
    it.put_on_disk(b"1")
    hangs, goes_on = threading.Event(), threading.Event()
    write = Writing.write

    def hanging(backlog: Writing, events: Sequence[bytes]) -> None:
        hangs.set()
        goes_on.wait(30)
        write(backlog, events)

    monkeypatch.setattr(Writing, "write", hanging)
    it.put(b"2")
    wait_until(hangs.is_set, "it hangs")
    assert it.process.spooler.stalled()["writer"] == 0
    it.process.let_pass(STALLED_SECONDS + 1)
    assert it.process.spooler.stalled()["writer"] == 1
    goes_on.set()
    wait_until(lambda: it.process.spooler.stalled()["writer"] == 0, "it goes on")


def test_events_are_written_while_it_takes_long_to_take_over_what_a_dead_process_left(
    process: ProcessMaker, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = process().open(down())
    dead.put_on_disk(b"old")
    dead.process.close()
    goes_on = stalled_adoption(monkeypatch)
    it = process().open()
    it.put_on_disk(b"new")
    # It is not sent before that, but behind the old one.
    assert sorted(on_disk(root)) == [b"new", b"old"]
    goes_on.set()
    it.process.settle(adopted=1)
    assert it.endpoint.delivered == [b"old", b"new"]


def test_what_a_dead_process_left_goes_first_also_in_one_that_ends_at_once(process: ProcessMaker) -> None:
    dead = process().open(down())
    dead.put_on_disk(*numbered(3))
    dead.process.close()
    it = process(round_seconds=3600)
    wait_until(lambda: it.spooler._janitor.rounds, "the next look would be in an hour")
    queue = it.open()
    queue.put(*numbered(3, first=3))
    # Far longer than a test may take: what was left is looked for at once, and once is enough.
    assert it.close(3600) == Snapshot(accepted=3, adopted=3, delivered=6)
    assert queue.endpoint.delivered == numbered(6)


def test_an_empty_queue_ends_without_waiting_for_a_slow_look_at_what_others_left(
    process: ProcessMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a queue ends on the thread that serves Kong."""
    goes_on = stalled_adoption(monkeypatch)
    it = process().open()
    ending = threading.Thread(target=it.close)
    ending.start()
    ending.join(5)
    is_over = not ending.is_alive()
    goes_on.set()
    ending.join()
    assert is_over


def test_an_unreadable_log_does_not_keep_others_from_being_taken_over(
    process: ProcessMaker, log: LogLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    for turn in range(3):
        it = process().open(down(REFUSED))
        it.put_on_disk(b"%d" % turn)
        it.process.close()
    fails = iter([True])

    def fail_once(_: object) -> int:
        if next(fails, False):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return 0

    monkeypatch.setattr("kong_metering.backlog.logsource.LogSource.oldest_ms", fail_once)
    following = process().open()
    assert following.process.settle(adopted=3) == Snapshot(adopted=3, delivered=3)
    assert len(log.with_text("cannot be read, for now")) == 1


# -- the bare directory ------------------------------------------------------------------------------------------------


def test_no_byte_in_the_spool_is_for_everybody(process: ProcessMaker, root: Path) -> None:
    it = process().open(FakeEndpoint(Refusing(b"0")))
    it.put(*numbered(5))
    it.process.settle()
    it.endpoint.hold()
    it.put_on_disk(b"held")
    for path in (root, *root.rglob("*")):
        assert path.stat().st_mode & 0o077 == 0, path


@pytest.mark.parametrize("is_synced", ["commit", "second", "off"])
def test_each_way_to_sync_delivers(process: ProcessMaker, is_synced: str) -> None:
    it = process(sync=Sync(is_synced)).open(FakeEndpoint(Refusing(b"3")), max_batch_size=5)
    it.put(*numbered(50))
    assert it.process.settle() == Snapshot(accepted=50, delivered=49, dead_letters={"rejected": 1})


def test_what_is_written_and_not_synced_for_now_is_sent_and_kept_once(process: ProcessMaker, log: LogLines) -> None:
    it = process(sync=Sync.COMMIT).open(FakeEndpoint(Refusing(b"3")), max_batch_size=5)
    it.put(b"before")
    it.process.settle()
    broken = OSError(errno.EIO, os.strerror(errno.EIO))
    with mock.patch("kong_metering.eventlog.files.sync", side_effect=broken):
        it.put_on_disk(*numbered(20))
        it.process.wait_for_a_round()
    assert it.process.settle() == Snapshot(accepted=21, delivered=20, dead_letters={"rejected": 1})
    assert it.endpoint.delivered == [b"before", *(event for event in numbered(20) if event != b"3")]
    assert len(letters(it.process.root)) == 1
    assert len(log.with_text("the disk does not confirm what was written")) == 1
