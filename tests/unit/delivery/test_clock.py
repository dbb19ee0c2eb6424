"""Events that are seconds old, and clocks that are wrong: nothing is dropped, and nothing in doubt, for that."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from kong_metering.spool.times import CLOCK, STEADY_SECONDS
from kong_metering.stats import Snapshot
from kong_metering.trial.outcome import Delivered
from tests.support.waiting import wait_until
from tests.unit.delivery.fakes import DOWN, FakeEndpoint, SteeredClock, down, numbered

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.loglines import LogLines
    from tests.unit.delivery.conftest import ProcessMaker
    from tests.unit.delivery.fakes import Process, SpooledQueue

DAY = 86_400
MONTH = 30 * DAY


def keeps_its_bounds(process: Process) -> None:
    """Have the bounds kept, those of logs whose queue is not open here too."""
    process.look_at_free_logs()
    process.wait_for_a_round()


@pytest.mark.parametrize("lasts", [0.0, 3600.0])
def test_a_start_with_the_clock_a_month_ahead_drops_nothing_and_doubts_nothing(
    process: ProcessMaker, steered: SteeredClock, lasts: float
) -> None:
    before = process(max_age=7 * DAY).open(down(DOWN), max_batch_size=5)
    before.put_on_disk(*numbered(20))
    before.endpoint.wait_for_request()
    before.process.wait_for_a_round()
    before.process.close()
    steered.set_wall_by(MONTH)
    looking = process(max_age=7 * DAY)
    steered.advance(lasts)
    keeps_its_bounds(looking)
    assert looking.close() == Snapshot()
    following = process(max_age=7 * DAY).open(max_batch_size=5)
    assert following.process.settle(adopted=20) == Snapshot(adopted=20, delivered=20)


def test_a_slow_clock_that_is_corrected_drops_nothing_in_this_process_or_the_next(
    process: ProcessMaker, steered: SteeredClock
) -> None:
    steered.set_wall_by(-2 * MONTH)
    it = process(max_age=7 * DAY).open(FakeEndpoint(lambda _: DOWN), max_batch_size=5)
    it.put_on_disk(*numbered(20))
    it.endpoint.wait_for_request()
    it.process.wait_for_a_round()
    steered.set_wall_by(2 * MONTH)
    it.process.spooler._bounds._bounds_at = 0.0
    it.process.wait_for_a_round()
    steered.advance(3600)
    keeps_its_bounds(it.process)
    assert it.process.account() == Snapshot(accepted=20)
    it.process.close()
    looking = process(max_age=7 * DAY)
    steered.advance(3600)
    keeps_its_bounds(looking)
    assert looking.close() == Snapshot()
    following = process(max_age=7 * DAY).open(max_batch_size=5)
    account = following.process.settle(adopted=20)
    assert account.dropped == {}
    assert account.delivered + account.dead_letters.get("ambiguous", 0) == 20


def test_what_is_really_old_goes_however_the_clock_was_set(process: ProcessMaker, steered: SteeredClock) -> None:
    before = process(max_age=DAY).open(down(), max_batch_size=5)
    before.put_on_disk(*numbered(20))
    before.process.wait_for_a_round()
    before.process.close()
    steered.set_wall_by(MONTH)
    looking = process(max_age=DAY)
    looking.wait_for_a_round()
    steered.advance(DAY + 3600)
    looking.look_at_free_logs()
    wait_until(lambda: looking.account().dropped == {"spool_age_exceeded": 20}, "they are dropped")


def test_a_start_with_the_clock_a_month_ahead_drops_nothing_where_no_clock_was_ever_noted(
    process: ProcessMaker, steered: SteeredClock, root: Path
) -> None:
    before = process(max_age=7 * DAY).open(down(), max_batch_size=5)
    before.put_on_disk(*numbered(20))
    before.process.wait_for_a_round()
    before.process.close()
    (root / CLOCK).unlink()
    steered.restart(60.0, MONTH)
    looking = process(max_age=7 * DAY)
    keeps_its_bounds(looking)
    steered.advance(STEADY_SECONDS - 120.0)
    keeps_its_bounds(looking)
    assert looking.account() == Snapshot()
    steered.set_wall_by(-MONTH)
    steered.advance(2 * STEADY_SECONDS)
    keeps_its_bounds(looking)
    assert looking.close() == Snapshot()
    following = process(max_age=7 * DAY).open(max_batch_size=5)
    assert following.process.settle(adopted=20) == Snapshot(adopted=20, delivered=20)


# -- what was sent without an answer -----------------------------------------------------------------------------------


def left_by_an_outage(process: ProcessMaker, **options: Any) -> None:
    """Leave twenty events of which some were sent without an answer."""
    before = process(**options).open(FakeEndpoint(lambda _: DOWN), max_batch_size=5)
    before.put_on_disk(*numbered(20))
    before.endpoint.wait_for_request()
    before.process.wait_for_a_round()
    before.process.close()


def let_clock_be_looked_at(it: SpooledQueue) -> None:
    """Let the clock be looked at, as it happens each few seconds."""
    it.let_pass(10.0)
    it.process.wait_for_a_round()


@pytest.mark.parametrize("wrong_by", [MONTH, -MONTH])
def test_a_process_that_starts_with_a_wrong_clock_doubts_nothing_once_that_is_set_right(
    process: ProcessMaker, steered: SteeredClock, wrong_by: float
) -> None:
    left_by_an_outage(process)
    steered.set_wall_by(wrong_by)
    following = process()
    following.wait_for_a_round()
    steered.set_wall_by(-wrong_by)
    it = following.open(max_batch_size=5)
    assert it.process.settle(adopted=20) == Snapshot(adopted=20, delivered=20)


@pytest.mark.parametrize("wrong_by", [MONTH, -MONTH])
@pytest.mark.parametrize(("passed", "is_too_old"), [(60.0, False), (DAY + 60.0, True)])
def test_what_is_sent_long_after_a_clock_was_set_right_is_as_old_as_it_is_for_the_next_process(
    process: ProcessMaker, steered: SteeredClock, *, wrong_by: float, passed: float, is_too_old: bool
) -> None:
    steered.set_wall_by(wrong_by)
    it = process().open(FakeEndpoint(lambda _: DOWN), max_batch_size=5)
    it.process.wait_for_a_round()
    steered.set_wall_by(-wrong_by)
    it.let_pass(2 * DAY)
    it.put_on_disk(*numbered(20))
    it.endpoint.wait_for_request()
    it.process.wait_for_a_round()
    it.process.close()
    steered.advance(passed)
    account = process().open(max_batch_size=5).process.settle(adopted=20)
    assert (account.dead_letters.get("ambiguous", 0) > 0) is is_too_old
    assert account.delivered + account.dead_letters.get("ambiguous", 0) == 20


@pytest.mark.parametrize("is_outage", [False, True])
@pytest.mark.parametrize("wrong_by", [MONTH, -MONTH])
def test_a_machine_that_starts_with_a_wrong_clock_which_is_set_right_minutes_later_doubts_nothing(
    process: ProcessMaker, steered: SteeredClock, *, wrong_by: float, is_outage: bool
) -> None:
    left_by_an_outage(process)
    steered.restart(600.0, wrong_by)
    it = process().open(FakeEndpoint(lambda _: DOWN) if is_outage else FakeEndpoint(), max_batch_size=5)
    wait_until(lambda: it.process.account().adopted == 20, "they are taken over")
    it.put_on_disk(b"new")
    it.endpoint.wait_for_request()
    it.let_pass(180.0)
    it.process.wait_for_a_round()
    steered.set_wall_by(-wrong_by)
    let_clock_be_looked_at(it)
    it.let_pass(STEADY_SECONDS + 60.0)
    it.process.wait_for_a_round()
    it.endpoint.decide = lambda _: Delivered()
    it.let_pass(60.0)
    assert it.process.settle(adopted=20) == Snapshot(accepted=1, adopted=20, delivered=21)
    assert sorted(it.endpoint.delivered) == sorted([*numbered(20), b"new"])


@pytest.mark.parametrize("wrong_by", [0.0, MONTH, -MONTH])
def test_what_went_out_before_a_machine_was_off_for_long_does_not_go_out_again(
    process: ProcessMaker, steered: SteeredClock, wrong_by: float
) -> None:
    left_by_an_outage(process)
    steered.restart(2 * DAY, wrong_by)
    it = process().open(max_batch_size=5)
    wait_until(lambda: it.process.account().adopted == 20, "they are taken over")
    it.let_pass(180.0)
    it.process.wait_for_a_round()
    steered.set_wall_by(-wrong_by)
    let_clock_be_looked_at(it)
    assert it.endpoint.requests == []
    it.let_pass(STEADY_SECONDS + 60.0)
    account = it.process.settle(adopted=20)
    assert account.dropped == {}
    assert 0 < account.dead_letters["ambiguous"] < 20
    assert account.delivered + account.dead_letters["ambiguous"] == 20


def test_what_waits_for_a_clock_is_said(process: ProcessMaker, steered: SteeredClock, log: LogLines) -> None:
    left_by_an_outage(process)
    steered.restart(600.0, MONTH)
    it = process().open(max_batch_size=5)
    wait_until(lambda: it.process.account().adopted == 20, "they are taken over")
    wait_until(lambda: log.with_text("until the machine's clock has run evenly for 10 min") != [], "it is said")
    it.process.close()
