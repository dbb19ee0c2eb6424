"""The pool of couriers: when it serves a queue, how many at a time, and how it shares itself out."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from kong_metering.clock import SystemClock
from kong_metering.delivery.couriers import STALLED_SECONDS, Couriers
from kong_metering.delivery.requestfigures import LastRequest
from kong_metering.delivery.shares import HANGING_SECONDS
from tests.support.waiting import wait_until
from tests.unit.delivery.fakes import SteeredClock


@dataclass(eq=False)
class Served:
    """A queue with so many things to do; a thing to do may hang."""

    couriers: Couriers
    origin: str = "https://one.test"
    width: int = 1
    todo: int = 0
    at_work: int = 0
    most_at_work: int = 0
    served: list[str] = field(default_factory=list)
    log: list[str] | None = None
    gate: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)
    again_in: float | None = None
    problem: str = ""
    last_request: LastRequest = field(default_factory=LastRequest)

    def __post_init__(self) -> None:
        self.gate.set()

    def step(self) -> float | None:
        with self.lock:
            if self.todo == 0:
                return None
            self.todo -= 1
            self.at_work += 1
            self.most_at_work = max(self.most_at_work, self.at_work)
            gate = self.gate
            if self.width > 1 and self.todo:
                self.couriers.wake(self, 0.0)
        began = self.couriers._clock.monotonic()
        gate.wait(20)
        seconds = self.couriers._clock.monotonic() - began
        with self.lock:
            self.last_request = LastRequest(self.last_request.number + 1, self.problem, seconds)
            self.at_work -= 1
            self.served.append(threading.current_thread().name)
            if self.log is not None:
                self.log.append(self.origin)
        if self.again_in is not None:
            return self.couriers._clock.monotonic() + self.again_in
        return 0.0 if self.todo else None


@pytest.fixture
def clock() -> SteeredClock:
    return SteeredClock()


@pytest.fixture
def couriers(clock: SteeredClock) -> Iterator[Couriers]:
    pool = Couriers(clock, limit=8, idle_seconds=0.2)
    yield pool
    pool.close(5)
    assert pool.threads == 0


def test_a_queue_is_served_by_one_courier_at_a_time_until_it_has_nothing_to_do(couriers: Couriers) -> None:
    queue = Served(couriers, todo=100)
    for _ in range(20):
        couriers.wake(queue, 0.0)
    wait_until(lambda: len(queue.served) == 100, "all is done")
    assert queue.most_at_work == 1


def test_a_queue_without_anything_to_do_has_no_thread(couriers: Couriers) -> None:
    queue = Served(couriers, todo=3)
    couriers.wake(queue, 0.0)
    wait_until(lambda: len(queue.served) == 3, "all is done")
    wait_until(lambda: couriers.threads == 0, "the courier is gone")
    queue.todo = 1
    couriers.wake(queue, 0.0)
    wait_until(lambda: len(queue.served) == 4, "a new courier comes")


def test_a_wide_queue_is_served_by_several_and_no_more_than_that(couriers: Couriers) -> None:
    queue = Served(couriers, width=3, todo=10)
    queue.gate.clear()
    couriers.wake(queue, 0.0)
    wait_until(lambda: queue.at_work == 3, "three are at work")
    queue.gate.set()
    wait_until(lambda: len(queue.served) == 10, "all is done")
    assert queue.most_at_work == 3


def test_a_queue_is_served_when_it_is_due_and_not_before(couriers: Couriers, clock: SteeredClock) -> None:
    queue = Served(couriers, todo=1)
    couriers.wake(queue, clock.monotonic() + 3600)
    other = Served(couriers, todo=1, origin="https://two.test")
    couriers.wake(other, clock.monotonic())
    wait_until(lambda: len(other.served) == 1, "the other is done")
    assert queue.served == []
    clock.advance(3600)
    couriers.look()
    wait_until(lambda: len(queue.served) == 1, "it is done")


def test_who_is_woken_earlier_is_served_earlier(couriers: Couriers, clock: SteeredClock) -> None:
    queue = Served(couriers, todo=1)
    couriers.wake(queue, clock.monotonic() + 3600)
    couriers.wake(queue, clock.monotonic() + 7200)
    couriers.wake(queue, clock.monotonic())
    wait_until(lambda: len(queue.served) == 1, "it is done")


def test_a_queue_that_says_when_to_come_again_is_served_then(couriers: Couriers, clock: SteeredClock) -> None:
    queue = Served(couriers, todo=2, again_in=3600)
    couriers.wake(queue, 0.0)
    wait_until(lambda: len(queue.served) == 1, "it is served once")
    clock.advance(3600)
    couriers.look()
    wait_until(lambda: len(queue.served) == 2, "it is served again")


def test_a_time_that_comes_while_all_are_busy_is_kept_by_a_new_courier(couriers: Couriers, clock: SteeredClock) -> None:
    busy = Served(couriers, todo=1)
    busy.gate.clear()
    couriers.wake(busy, 0.0)
    wait_until(lambda: busy.at_work == 1, "a courier is busy")
    later = Served(couriers, todo=1, origin="https://two.test")
    couriers.wake(later, clock.monotonic() + 0.05)
    wait_until(lambda: len(later.served) == 1, "the other is served meanwhile")
    busy.gate.set()


def test_being_woken_while_it_is_served_is_not_lost(couriers: Couriers) -> None:
    queue = Served(couriers, todo=1)
    queue.gate.clear()
    couriers.wake(queue, 0.0)
    wait_until(lambda: queue.at_work == 1, "it is served")
    couriers.wake(queue, 0.0)
    queue.todo = 0
    queue.gate.set()
    wait_until(lambda: len(queue.served) == 1, "the first step is over")
    queue.todo = 1
    couriers.wake(queue, 0.0)
    wait_until(lambda: len(queue.served) == 2, "and the second")


def test_a_courier_that_is_called_in_the_moment_in_which_it_would_leave_stays(couriers: Couriers) -> None:
    is_over = threading.Event()

    class Slow(Served):
        """Woken for so long that meanwhile the time of an idle courier is over."""

        @property
        def width(self) -> int:
            is_over.wait(2 * couriers._idle_seconds)
            is_over.set()
            return 1

        @width.setter
        def width(self, width: int) -> None:
            assert width == 1

    first, second, busy = (Served(couriers, f"https://{name}.test", todo=1) for name in ("one", "two", "busy"))
    for queue in (first, second, busy):
        queue.gate.clear()
    for queue in (first, second):
        couriers.wake(queue, 0.0)
    wait_until(lambda: first.at_work + second.at_work == 2, "there are two couriers")
    for queue in (first, second):
        queue.gate.set()
    wait_until(lambda: first.served and second.served, "both have nothing to do")
    couriers.wake(busy, 0.0)
    wait_until(lambda: busy.at_work == 1, "one of them is busy, the other one is idle")
    called = Slow(couriers, "https://called.test", todo=1)
    couriers.wake(called, 0.0)
    wait_until(lambda: called.served, "it is served all the same")
    busy.gate.set()


def test_a_queue_that_becomes_wider_is_served_by_more_at_once(couriers: Couriers) -> None:
    queue = Served(couriers, todo=3)
    queue.gate.clear()
    couriers.wake(queue, 0.0)
    wait_until(lambda: queue.at_work == 1, "it is served by one")
    couriers.wake(queue, 0.0)
    queue.width = 3
    couriers.wake(queue, 0.0)
    wait_until(lambda: queue.at_work == 3, "it is served by three")
    queue.gate.set()


def test_an_endpoint_that_hangs_takes_no_more_than_its_share(couriers: Couriers) -> None:
    hanging = [Served(couriers, todo=1) for _ in range(20)]
    for queue in hanging:
        queue.gate.clear()
        couriers.wake(queue, 0.0)
    wait_until(lambda: sum(queue.at_work for queue in hanging) == 4, "half of the couriers hang")
    good = Served(couriers, todo=50, origin="https://two.test")
    couriers.wake(good, 0.0)
    wait_until(lambda: len(good.served) == 50, "others are served")
    assert sum(queue.at_work for queue in hanging) == 4
    for queue in hanging:
        queue.gate.set()
    wait_until(lambda: all(queue.served for queue in hanging), "those that were held back are served afterwards")


def hanging(couriers: Couriers, count: int, problem: str = "timed out") -> list[Served]:
    """Have so many endpoints that do not answer before their gate is opened, with two things to do each."""
    queues = [Served(couriers, f"https://{number}.test", todo=2, problem=problem) for number in range(count)]
    for queue in queues:
        queue.gate.clear()
        couriers.wake(queue, 0.0)
    return queues


def at_work(queues: list[Served]) -> int:
    return sum(queue.at_work for queue in queues)


def let_pass(seconds: float, couriers: Couriers, clock: SteeredClock) -> None:
    clock.advance(seconds)
    couriers.look()


def test_where_all_endpoints_begin_to_hang_at_once_others_are_served_after_a_second(
    couriers: Couriers, clock: SteeredClock
) -> None:
    queues = hanging(couriers, 10)
    wait_until(lambda: at_work(queues) >= 8, "all couriers are taken")
    good = Served(couriers, todo=50, origin="https://good.test")
    couriers.wake(good, clock.monotonic())
    let_pass(HANGING_SECONDS, couriers, clock)
    wait_until(lambda: len(good.served) == 50, "others are served")
    wait_until(lambda: at_work(queues) == 10, "so are those that nobody knew to hang")
    assert not any(queue.served for queue in queues)
    for queue in queues:
        queue.gate.set()


def test_endpoints_that_hang_take_half_of_the_couriers_together(couriers: Couriers, clock: SteeredClock) -> None:
    queues = hanging(couriers, 10)
    wait_until(lambda: at_work(queues) >= 8, "all couriers are taken")
    let_pass(HANGING_SECONDS, couriers, clock)
    wait_until(lambda: at_work(queues) == 10, "those that are left have their turn")
    let_pass(HANGING_SECONDS, couriers, clock)
    for queue in queues:
        gate, queue.gate = queue.gate, threading.Event()
        gate.set()
    wait_until(lambda: all(queue.served for queue in queues), "their first requests end in a timeout")
    wait_until(lambda: at_work(queues) == 6, "half of the couriers hang again")
    good = Served(couriers, todo=50, origin="https://good.test")
    couriers.wake(good, clock.monotonic())
    wait_until(lambda: len(good.served) == 50, "others are served at once")
    assert at_work(queues) == 6
    for queue in queues:
        queue.gate.set()
    wait_until(lambda: all(len(queue.served) == 2 for queue in queues), "those that were held back have their turn")


def test_what_is_let_go_while_all_are_busy_has_its_turn_in_time(couriers: Couriers, clock: SteeredClock) -> None:
    first, second = (Served(couriers, "https://shared.test", todo=1) for _ in range(2))
    first.gate.clear()
    couriers.wake(first, 0.0)
    others = hanging(couriers, 6)
    wait_until(lambda: at_work([first, *others]) == 7, "there is one courier for the endpoint of both")
    couriers.wake(second, 0.0)
    wait_until(lambda: second in [turn.queue for turn in couriers._held_back.get(second.origin, ())], "one waits")
    let_pass(HANGING_SECONDS, couriers, clock)
    for queue in others:
        queue.todo = 0
        queue.gate.set()
    wait_until(lambda: at_work(others) == 0, "others are done")
    later = Served(couriers, "https://later.test", todo=1)
    couriers.wake(later, clock.monotonic() + 3600)
    busy = [Served(couriers, f"https://busy-{number}.test", todo=1) for number in range(8)]
    for queue in busy:
        queue.gate.clear()
        couriers.wake(queue, clock.monotonic())
    wait_until(lambda: at_work(busy) == 8, "all are busy")
    first.gate.set()
    wait_until(lambda: second.served, "the other one is served as soon as those that are busy hang")
    assert not any(queue.served for queue in busy)
    for queue in busy:
        queue.gate.set()


def test_couriers_that_hang_for_long_while_others_wait_are_stalled(couriers: Couriers, clock: SteeredClock) -> None:
    queues = hanging(couriers, 13)
    wait_until(lambda: at_work(queues) >= 8, "as many hang as may begin in a second")
    let_pass(HANGING_SECONDS, couriers, clock)
    wait_until(lambda: at_work(queues) == 12, "all couriers hang")
    waiting = Served(couriers, "https://waiting.test", todo=1)
    couriers.wake(waiting, 0.0)
    assert not couriers.is_stalled()
    clock.advance(STALLED_SECONDS + 1)
    assert couriers.is_stalled()
    for queue in queues:
        queue.gate.set()
    wait_until(lambda: waiting.served, "who waited is served")
    assert not couriers.is_stalled()


def test_couriers_without_work_are_not_stalled(couriers: Couriers, clock: SteeredClock) -> None:
    queue = Served(couriers, todo=1)
    couriers.wake(queue, 0.0)
    wait_until(lambda: queue.served, "it is served")
    clock.advance(10 * STALLED_SECONDS)
    assert not couriers.is_stalled()


def test_queues_take_turns() -> None:
    log: list[str] = []
    pool = Couriers(SystemClock(), limit=1)
    first, second = (Served(pool, todo=20, origin=f"https://{name}.test", log=log) for name in ("a", "b"))
    first.gate.clear()
    pool.wake(first, 0.0)
    wait_until(lambda: first.at_work == 1, "it is served")
    pool.wake(second, 0.0)
    first.gate.set()
    wait_until(lambda: len(log) == 40, "all is done")
    pool.close(5)
    assert log[1:21].count("https://b.test") >= 9


def test_a_bug_in_a_step_does_not_end_the_service(couriers: Couriers, clock: SteeredClock) -> None:
    class Buggy(Served):
        def step(self) -> float | None:
            if self.todo == 2:
                self.todo -= 1
                raise RuntimeError("a bug")
            return super().step()

    queue = Buggy(couriers, todo=2)
    couriers.wake(queue, 0.0)
    wait_until(lambda: queue.todo == 1, "the bug")
    clock.advance(2)
    couriers.look()
    wait_until(lambda: len(queue.served) == 1, "it goes on")


def test_many_queues_and_threads_lose_no_call(couriers: Couriers) -> None:
    queues = [Served(couriers, todo=0, width=1 + number % 3, origin=f"o{number % 5}") for number in range(100)]

    def feed() -> None:
        for _ in range(20):
            for queue in queues:
                with queue.lock:
                    queue.todo += 1
                couriers.wake(queue, 0.0)

    feeders = [threading.Thread(target=feed) for _ in range(4)]
    for feeder in feeders:
        feeder.start()
    for feeder in feeders:
        feeder.join()
    wait_until(lambda: all(len(queue.served) == 80 for queue in queues), "all is done")
    assert all(queue.most_at_work <= queue.width for queue in queues)


def test_a_queue_that_is_forgotten_is_not_served(couriers: Couriers, clock: SteeredClock) -> None:
    queue = Served(couriers, todo=1)
    couriers.wake(queue, clock.monotonic() + 1)
    couriers.forget(queue)
    clock.advance(2)
    couriers.look()
    other = Served(couriers, todo=1)
    couriers.wake(other, clock.monotonic())
    wait_until(lambda: len(other.served) == 1, "another one is served")
    assert queue.served == []
