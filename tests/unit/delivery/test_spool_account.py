"""The account of a process with a spool, whatever happens: everything at once, and random steps against a model."""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import os
import random
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from unittest import mock

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kong_metering.account import QueueAccount
from kong_metering.backlog.logsource import LogSource
from kong_metering.backlog.spooled import Shared, SpooledBacklog
from kong_metering.clock import EpochClock
from kong_metering.config import Entity, PluginConfig, Queue
from kong_metering.delivery.registry import Delivery
from kong_metering.eventlog.log import EventLog
from kong_metering.ingest.client import IngestClient
from kong_metering.ingest.connections import Connections
from kong_metering.reasons import Buried
from kong_metering.spool.directory import HeldLog, SpoolDirectory, survey
from kong_metering.spool.options import SpoolOptions, Sync
from kong_metering.spool.times import SpoolTimes
from kong_metering.stats import Stats
from kong_metering.trial.outcome import Delivered, Outcome, Rejected
from tests.support.waiting import wait_until
from tests.unit.delivery.fakes import (
    BUSY,
    DOWN,
    IDENTITY,
    REFUSED,
    UNREACHABLE,
    FakeEndpoint,
    letters,
    on_disk,
)
from tests.unit.ingest.ingest_server import Exchange, IngestServer, running

if TYPE_CHECKING:
    from kong_metering.backlog.burials import LetterBox
    from kong_metering.backlog.source import Entry
    from kong_metering.backlog.stock import Sending
    from kong_metering.eventlog.format import StoredEvent
    from kong_metering.spool.deadletters import DeadLetter
    from kong_metering.spool.identity import QueueIdentity
    from kong_metering.upkeep.holdings import Holdings
    from tests.unit.delivery.conftest import ProcessMaker
    from tests.unit.delivery.fakes import SpooledQueue

pytestmark = pytest.mark.slow
_WINDOW_MS = 1_000_000


# -- everything at once ------------------------------------------------------------------------------------------------


class Unreliable:
    """An endpoint and a disk that fail at random; keeps count of what the endpoint took."""

    def __init__(self, seed: int, *failures: Outcome) -> None:
        self.chance = random.Random(seed)  # noqa: S311
        self.taken: Counter[bytes] = Counter()
        self.disk_fails = False
        self._outcomes: list[Outcome] = [Delivered()] * len(failures) + [*failures]
        self._pwrite = os.pwrite

    def decide(self, events: list[bytes]) -> Outcome:
        outcome = self.chance.choice(self._outcomes)
        bad = tuple(index for index, event in enumerate(events) if event.endswith(b"77"))
        if bad and outcome == Delivered():
            return Rejected("https://ingest.test answered 400: no", self.chance.choice([bad, ()]))
        if outcome == Delivered():
            self.taken.update(events)
        return outcome

    def write(self, descriptor: int, data: bytes, offset: int) -> int:
        if self.disk_fails and self.chance.random() < 0.5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self._pwrite(descriptor, data, offset)


def settle_beside(it: SpooledQueue, is_over: Callable[[], bool]) -> None:
    """Put events that get through until all is over: only beside them is an event known to be to blame."""
    for number in range(1000):
        it.put(b"witness %d" % number)
        with contextlib.suppress(AssertionError):
            wait_until(is_over, "it is over", seconds=0.05)
            return
        it.let_pass(1)  # what fails is compared with others only after a while, where there are many of it
    raise AssertionError("it does not come to an end")


def without_witnesses(events: Iterable[bytes]) -> list[bytes]:
    return sorted(event for event in events if not event.startswith(b"witness"))


def put_slowly(it: SpooledQueue, events: list[bytes]) -> None:
    for start in range(0, len(events), 20):
        it.put(*events[start : start + 20])
        time.sleep(0.002)


@pytest.mark.parametrize("concurrency", [1, -1])
@pytest.mark.parametrize("seed", range(3))
def test_the_account_is_exact_whatever_fails_at_once(
    process: ProcessMaker, root: Path, seed: int, concurrency: int
) -> None:
    world = Unreliable(seed, REFUSED, DOWN, UNREACHABLE, BUSY)
    it = process().open(FakeEndpoint(world.decide), max_entries=1_000_000, concurrency_limit=concurrency)
    lots = [[b"%d-%d" % (lot, number) for number in range(300)] for lot in range(4)]
    threads = [threading.Thread(target=put_slowly, args=(it, lot)) for lot in lots]
    with mock.patch.object(os, "pwrite", world.write):
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            time.sleep(0.01)
            it.reconfigure(max_batch_size=world.chance.choice([1, 7, 100]))
            world.disk_fails = not world.disk_fails
        world.disk_fails = False
        settle_beside(it, lambda: it.process.account().waiting == 0)
        account = it.process.settle()
    buried = Counter(stored.letter.event for stored in letters(root))
    assert account.accepted == account.delivered + sum(account.dead_letters.values()) >= 1200
    # Of those that it failed for, an event may have seemed to be to blame; then it is a dead letter.
    assert without_witnesses([*world.taken.elements(), *buried.elements()]) == sorted(itertools.chain(*lots))
    assert {event for lot in lots for event in lot if event.endswith(b"77")} <= set(buried)
    assert on_disk(root) == []


@pytest.mark.parametrize("seed", range(3))
def test_processes_that_end_at_any_moment_hand_each_event_on(process: ProcessMaker, root: Path, seed: int) -> None:
    world = Unreliable(seed, REFUSED, DOWN, BUSY)
    numbers = itertools.count()
    for _ in range(15):
        settings: dict[str, Any] = {
            "max_batch_size": world.chance.choice([1, 5, 50]),
            "concurrency_limit": world.chance.choice([1, -1]),
        }
        it = process().open(FakeEndpoint(world.decide), **settings)
        for _ in range(world.chance.randrange(10)):
            it.put(*(b"%d" % next(numbers) for _ in range(world.chance.randrange(20))))
            time.sleep(world.chance.random() * 0.01)
        # Requests that are under way are waited for, so that nothing is sent twice.
        it.process.close(20)
    it = process().open(FakeEndpoint(world.decide), max_batch_size=50)
    settle_beside(it, lambda: on_disk(root) == [] and it.process.account().waiting == 0)
    it.process.settle()
    buried = [stored.letter.event for stored in letters(root)]
    assert without_witnesses([*world.taken.elements(), *buried]) == sorted(b"%d" % n for n in range(next(numbers)))


def test_no_file_ever_holds_a_token_or_credentials(process: ProcessMaker, root: Path) -> None:
    def echo(exchange: Exchange) -> None:
        is_bad = b"bad" in server.requests[-1].body
        exchange.reply(400 if is_bad else 204, b"no event of " + exchange.headers["Authorization"].encode())

    with running(IngestServer()) as server:
        server.on_request = echo
        it = process()
        connections = Connections(it.clock, functools.partial(IngestClient, clock=it.clock))
        delivery = Delivery(
            clock=it.clock, stats=it.stats, couriers=it.couriers, connections=connections, spooler=it.spooler
        )
        for number, url in enumerate((server.url, server.url.replace("//", "//user:pa55word@"))):
            config = PluginConfig.model_validate(
                {"ingest_endpoint": url, "api_token": "s3cret-token", "queue": {"initial_retry_delay": 0.01}}
            )
            queue = delivery.open(Entity(str(number), "one"), config)
            queue.put(b'"bad"')
            for _ in range(1000):
                if it.account().dead_letters == {"rejected": number + 1}:
                    break
                # It is to blame only where others get through.
                queue.put(b"{}")
                time.sleep(0.02)
        it.settle()
        assert it.account().dead_letters == {"rejected": 2}
        server.on_request = Exchange.hang
        queue.put(b"{}")
        wait_until(lambda: len(on_disk(root)) == 1, "it is on disk")
        files = [path for path in root.rglob("*") if path.is_file()]
        assert len(files) > 5
        for path in files:
            data = path.read_bytes()
            assert b"s3cret" not in data, path
            assert b"pa55word" not in data, path
        delivery.close(0)
        it.is_closed = True


# -- a model -----------------------------------------------------------------------------------------------------------


class Hands:
    """What a backlog shares with others, and the way into it, driven by hand: no thread writes or looks after it."""

    def __init__(self, root: Path, now_ms: int) -> None:
        self.now = now_ms
        self.letters: list[DeadLetter] = []
        self.fails = False
        self.put: list[bytes] = []
        self.directory = SpoolDirectory(root)
        options = SpoolOptions(root, sync=Sync.OFF, dedupe_window=_WINDOW_MS / 1000)
        times = SpoolTimes(root, self)
        self.shared = Shared(cast("Holdings", self), cast("LetterBox", self), options, EpochClock(self), times)

    def wall(self) -> float:
        return self.now / 1000

    def since_boot(self) -> float:
        return self.now / 1000

    def boot_id(self) -> str:
        return "one"

    def monotonic(self) -> float:
        return self.now / 1000

    def own_log(self, identity: QueueIdentity) -> HeldLog:
        return self.directory.log_for(identity)

    def keep(self, letters: Sequence[DeadLetter]) -> None:
        if self.fails:
            raise OSError(28, "No space left on device")
        self.letters += letters

    def take(self, event: bytes) -> bool:
        self.put.append(event)
        return True

    def lost_with_process(self, events: int) -> int:
        return events

    def log_opened(self, directory: Path) -> None:
        assert directory.is_dir()

    def write(self, backlog: SpooledBacklog) -> None:
        """Do what the writer does."""
        backlog.writing.write(self.put)
        self.put = []


def in_order(root: Path) -> list[bytes]:
    """Give the events on disk in the order in which they are adopted: log by log, the one with the oldest first."""
    logs: list[list[StoredEvent]] = []
    for found in survey(root):
        log = EventLog.view(found.directory)
        logs.append(log.read(log.done_up_to, log.waiting, 1 << 40))
        log.close()
    in_order = sorted((log for log in logs if log), key=lambda log: log[0].time_ms)
    return [event.payload for log in in_order for event in log]


def test_one_who_looks_while_a_write_is_tried_is_woken_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hands = Hands(tmp_path / "spool", 1)
    backlog = SpooledBacklog(IDENTITY, Queue(), hands.shared, QueueAccount("model", Stats()), hands)
    backlog.begin()
    woken: list[int] = []
    backlog.on_ready(lambda: woken.append(backlog.unread))
    disk_works = iter([False, False, True])

    def own_log(identity: QueueIdentity) -> HeldLog:
        assert backlog.unread == 0
        if next(disk_works):
            return hands.directory.log_for(identity)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(hands, "own_log", own_log)
    backlog.put(b"1")
    hands.write(backlog)
    assert woken == [1]
    for turn in (2, 3):
        backlog.writing.spill()
        assert woken == [1] * turn
    assert [entry.event for entry in backlog.read(5)] == [b"1"]
    hands.directory.close()


class BacklogAgainstModel(RuleBasedStateMachine):
    """Nothing that was written is missing, nothing that was settled and saved comes again, and order is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.home = Path(tempfile.mkdtemp(prefix="spool-model-"))
        self.roots = itertools.count()
        self.numbers = itertools.count()
        self.now = 1_700_000_000_000
        self.unwritten: list[bytes] = []
        # On disk, in order, and not settled.
        self.waiting: list[bytes] = []
        self.gone: set[bytes] = set()
        # Those that may be on disk still, because something before them waits: a crash brings them back.
        self.sent: dict[bytes, int] = {}
        self.taken: list[list[Entry]] = []
        self.to_bury: set[bytes] = set()
        self.root = self.home / "0"
        self.start()

    def start(self) -> None:
        self.hands = Hands(self.root, self.now)
        self.stats = Stats()
        self.account = QueueAccount("model", self.stats)
        self.backlog = SpooledBacklog(IDENTITY, Queue(max_batch_size=5), self.hands.shared, self.account, self.hands)
        self.backlog.begin()

    @rule(count=st.integers(min_value=1, max_value=8))
    def put(self, count: int) -> None:
        for _ in range(count):
            event = b"%06d" % next(self.numbers)
            self.hands.now = self.now = self.now + 1
            self.account.accept()
            self.backlog.put(event)
            self.unwritten.append(event)

    @rule()
    def work(self) -> None:
        self.hands.write(self.backlog)
        self.backlog.try_again()
        self.waiting += self.unwritten
        self.unwritten = []
        self.check_letters()

    def check_letters(self) -> None:
        """Letters are written at once, or when it is tried again."""
        if not self.hands.fails:
            assert sorted(letter.event for letter in self.hands.letters) == sorted(self.to_bury)
            self.hands.letters.clear()
            self.gone |= self.to_bury
            self.to_bury = set()

    @precondition(lambda self: not self.taken or len(self.taken) < 4)
    @rule(limit=st.integers(min_value=1, max_value=6))
    def take(self, limit: int) -> None:
        entries = self.backlog.read(limit)
        out = {entry.event for batch in self.taken for entry in batch} | self.gone | self.to_bury
        expected = [event for event in self.waiting if event not in out][:limit]
        # It may be fewer: a batch comes out of one log.
        assert [entry.event for entry in entries] == expected[: len(entries)]
        assert bool(entries) == bool(expected)
        if entries:
            self.taken.append(entries)

    def send(self, index: int) -> tuple[Sending, list[Entry]]:
        entries = self.taken[index % len(self.taken)]
        sending = self.backlog.begin_send(entries)
        given = {entry.event for entry in sending.fresh}
        assert given.isdisjoint(entry.event for entry in sending.stale)
        for entry in entries:
            too_old = self.now - _WINDOW_MS
            assert (entry.event in given) == (self.sent.get(entry.event, too_old) >= too_old)
        self.to_bury |= {entry.event for entry in entries} - given
        self.taken[index % len(self.taken)] = sending.fresh
        if sending.stale:
            self.backlog.reject(sending.stale, Buried.AMBIGUOUS, sending.why_stale)
            self.check_letters()
        return sending, sending.fresh

    @precondition(lambda self: self.taken)
    @rule(index=st.integers(min_value=0, max_value=9), arrives=st.booleans())
    def fail(self, index: int, arrives: bool) -> None:  # noqa: FBT001 - hypothesis's
        sending, entries = self.send(index)
        if not arrives:
            self.backlog.did_not_arrive(sending)
        else:
            for entry in entries:
                self.sent.setdefault(entry.event, self.now)
        self.taken = [batch for batch in self.taken if batch]

    @precondition(lambda self: self.taken)
    @rule(index=st.integers(min_value=0, max_value=9))
    def deliver(self, index: int) -> None:
        _, entries = self.send(index)
        if entries:
            assert self.backlog.settle(entries)
            self.account.deliver(len(entries))
        for entry in entries:
            self.sent.setdefault(entry.event, self.now)
            assert entry.event not in self.gone
            self.gone.add(entry.event)
        self.taken.remove(entries)
        self.taken = [batch for batch in self.taken if batch]

    @precondition(lambda self: self.taken)
    @rule(index=st.integers(min_value=0, max_value=9))
    def reject(self, index: int) -> None:
        sending, entries = self.send(index)
        self.backlog.did_not_arrive(sending)
        if entries:
            self.backlog.reject(entries, Buried.REJECTED, "no")
        self.to_bury |= {entry.event for entry in entries}
        self.taken.remove(entries)
        self.taken = [batch for batch in self.taken if batch]
        self.check_letters()

    @rule(seconds=st.sampled_from([1, 900, 1100]))
    def time_passes(self, seconds: int) -> None:
        self.now += seconds * 1000
        self.hands.now = self.now

    @rule(fails=st.booleans())
    def letters_fail_or_not(self, fails: bool) -> None:  # noqa: FBT001 - hypothesis's
        self.hands.fails = fails
        if fails:
            return
        self.work()

    @rule()
    def end(self) -> None:
        """End well: the next process gets what is not settled, and nothing else."""
        self.hands.fails = False
        self.work()
        before = self.stats.snapshot()
        self.backlog.end(is_written=True)
        left = self.stats.snapshot().left
        assert self.stats.snapshot().waiting == 0
        assert left == before.waiting
        for held in self.backlog.chores.take_all():
            self.hands.directory.retire(held)
        self.hands.directory.close()
        self.waiting = [event for event in self.waiting if event not in self.gone]
        assert sorted(self.waiting) == sorted(on_disk(self.root))
        # What others had overtaken stands behind them now.
        self.waiting = in_order(self.root)
        self.adopt()
        assert self.stats.snapshot().adopted == left

    @rule()
    def crash(self) -> None:
        """Die: what was written is there, and of what was settled at most that which stood behind something else."""
        dead = self.root
        self.root = self.home / str(next(self.roots) + 1)
        shutil.copytree(dead, self.root)
        found = in_order(self.root)
        there = [event for event in self.waiting if event not in self.gone]
        assert [event for event in found if event not in self.gone] == there
        again = [event for event in found if event in self.gone]
        if again:
            assert there
            assert min(map(found.index, again)) > found.index(there[0])
        self.gone -= set(again)
        self.waiting = found
        self.unwritten = []
        self.forget()
        for held in self.backlog.chores.take_all():
            self.hands.directory.retire(held)
        self.adopt()

    def forget(self) -> None:
        self.taken = []
        self.to_bury = set()

    def adopt(self) -> None:
        self.forget()
        self.start()
        logs = [LogSource(held) for held in self.hands.directory.adopt().logs]
        for log in sorted(logs, key=lambda log: log.oldest_ms() or 0):
            assert self.backlog.chores.adopt(log)

    @invariant()
    def it_adds_up(self) -> None:
        assert self.account.waiting == self.stats.snapshot().waiting

    @invariant()
    def memory_is_bounded_and_the_disk_has_the_rest(self) -> None:
        wanted = [event for event in self.waiting if event not in self.gone]
        assert self.account.waiting == len(wanted) + len(self.unwritten)

    def teardown(self) -> None:
        shutil.rmtree(self.home)


TestBacklogAgainstModel = BacklogAgainstModel.TestCase
TestBacklogAgainstModel.settings = hypothesis_settings(max_examples=100, stateful_step_count=25, deadline=None)
