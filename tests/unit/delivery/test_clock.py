"""Events that are seconds old, and clocks that are wrong: nothing is dropped, and nothing in doubt, for that."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kong_metering.stats import Snapshot
from tests.support.waiting import wait_until
from tests.unit.delivery.fakes import DOWN, FakeEndpoint, SteeredClock, down, numbered

if TYPE_CHECKING:
    from tests.unit.delivery.conftest import ProcessMaker
    from tests.unit.delivery.fakes import Process

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
    it.process.spooler._janitor._bounds_at = 0.0
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
