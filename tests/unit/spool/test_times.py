"""What a spool's times are worth when the clock is set, by processes one after the other and over restarts."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from kong_metering.spool.times import CLOCK, STEADY_SECONDS, Reading, Record, SpoolTimes
from tests.support.clock import FakeClock

DAY = 86_400
DAY_MS = DAY * 1000
MONTH_MS = 30 * DAY_MS
NOW_MS = 1_800_000_000_000


def at(since_boot: float, wall_ms: int, boot: str = "one") -> Reading:
    return Reading(boot, since_boot, wall_ms)


def seen(*readings: Reading) -> Record:
    record = Record.beginning(readings[0])
    for reading in readings[1:]:
        record = record.seen_at(reading)
    return record


def test_a_clock_that_runs_evenly_is_believed_after_a_while() -> None:
    record = seen(at(0, NOW_MS), at(300, NOW_MS + 300_000))
    assert not record.is_steady
    record = record.seen_at(at(STEADY_SECONDS, NOW_MS + 600_500))
    assert record.is_steady
    assert record.settings == ()
    assert record.older_than_ms(60) == NOW_MS + 540_500


@pytest.mark.parametrize("by_ms", [MONTH_MS, -MONTH_MS, 120_000])
def test_one_that_was_set_is_not_for_a_while(by_ms: int) -> None:
    record = seen(at(0, NOW_MS), at(1000, NOW_MS + 1_000_000))
    record = record.seen_at(at(1010, NOW_MS + 1_010_000 + by_ms))
    assert not record.is_steady
    assert record.seen_at(at(1610, NOW_MS + 1_610_000 + by_ms)).is_steady


def test_what_was_written_seconds_before_a_clock_goes_a_month_ahead_is_seconds_old() -> None:
    written_ms = NOW_MS + 999_000
    record = seen(at(0, NOW_MS), at(940, NOW_MS + 940_000), at(1000, NOW_MS + 1_000_000 + MONTH_MS))
    assert record.older_than_ms(DAY) < written_ms
    # A day and a bit later it is old.
    later = record.seen_at(at(1000 + DAY, NOW_MS + 1_000_000 + MONTH_MS + DAY_MS))
    assert written_ms < later.older_than_ms(DAY) <= NOW_MS + 1_000_001
    # What was written in between is told from it.
    assert later.seen_at(at(2000 + DAY, NOW_MS + 2_000_000 + MONTH_MS + DAY_MS)).older_than_ms(DAY) > NOW_MS + MONTH_MS


def test_a_slow_clock_that_is_corrected_makes_nothing_old() -> None:
    slow_ms = NOW_MS - 2 * MONTH_MS
    record = seen(at(50_000, NOW_MS - 60_000, "one"), at(5, slow_ms, "two"), at(65, slow_ms + 60_000, "two"))
    record = record.seen_at(at(70, NOW_MS, "two"))
    assert record.older_than_ms(DAY) < slow_ms


def test_a_clock_that_is_ahead_after_a_restart_makes_nothing_old() -> None:
    record = seen(at(50_000, NOW_MS, "one"), at(5, NOW_MS + MONTH_MS, "two"))
    for written_ms in (NOW_MS - 1000, NOW_MS + 59_000):
        assert record.seen_at(at(5 + 3600, NOW_MS + MONTH_MS + 3_600_000, "two")).older_than_ms(DAY) < written_ms


# -- when something was sent -------------------------------------------------------------------------------------------


def verdict(record: Record, sent_ms: int) -> str:
    """Tell what is known of something that was sent at this time of the spool's, with a window of a day."""
    _, over_ms, perhaps_over_ms = record.window(DAY)
    return "too old" if sent_ms < over_ms else "unknown" if sent_ms < perhaps_over_ms else "young"


@pytest.mark.parametrize("by_ms", [MONTH_MS, -MONTH_MS])
def test_the_spools_own_time_runs_on_when_the_clock_is_set(by_ms: int) -> None:
    record = seen(at(0, NOW_MS), at(100, NOW_MS + 100_000 + by_ms))
    assert record.time_ms == NOW_MS + 100_000
    assert verdict(record, NOW_MS + 99_000) == "young"
    a_day_later = record.seen_at(at(100 + DAY, NOW_MS + 100_000 + by_ms + DAY_MS))
    assert [verdict(a_day_later, NOW_MS + offset) for offset in (99_000, 101_000)] == ["too old", "young"]


# For how long the machine was off, what its clock shows wrong at first, and whether what was sent before is too old.
RESTARTS = [
    (600, 0, "young", "young"),
    (2 * DAY, 0, "unknown", "too old"),
    (600, 30 * DAY, "unknown", "young"),
    (600, -30 * DAY, "unknown", "young"),
    (2 * DAY, 30 * DAY, "unknown", "too old"),
    (2 * DAY, -30 * DAY, "unknown", "too old"),
]


@pytest.mark.parametrize(("off", "wrong_by", "at_first", "in_the_end"), RESTARTS)
def test_over_a_restart_an_age_is_known_once_the_clock_has_run_evenly(
    off: int, wrong_by: int, at_first: str, in_the_end: str
) -> None:
    sent_ms, start_ms = NOW_MS - 1000, NOW_MS + off * 1000
    record = seen(at(50_000, NOW_MS), at(5, start_ms + 5000 + wrong_by * 1000, "two"))
    assert verdict(record, sent_ms) == at_first
    sent_before_it_is_set_ms = record.time_ms
    record = record.seen_at(at(180, start_ms + 180_000, "two"))
    assert verdict(record, sent_ms) in (at_first, in_the_end)
    sent_then_ms = record.time_ms
    record = record.seen_at(at(800, start_ms + 800_000, "two"))
    assert verdict(record, sent_ms) == in_the_end
    for later_ms in (sent_before_it_is_set_ms, sent_then_ms):
        assert verdict(record, later_ms) == "young"
        a_day_later = record.seen_at(at(800 + DAY, start_ms + 800_000 + DAY_MS, "two"))
        assert verdict(a_day_later, later_ms) == "too old"


def test_what_went_out_before_several_restarts_is_as_old_as_they_took_together() -> None:
    record = seen(at(50_000, NOW_MS))
    for number in range(1, 5):
        record = record.seen_at(at(10, NOW_MS + number * 6 * 3_600_000, f"{number}"))
        record = record.seen_at(at(700, NOW_MS + number * 6 * 3_600_000 + 690_000, f"{number}"))
    assert verdict(record, NOW_MS) == "too old"
    assert verdict(record, NOW_MS + 6 * 3_600_000) == "young"


def test_a_time_since_the_start_that_goes_back_is_a_restart_where_starts_have_no_names() -> None:
    record = seen(at(50_000, NOW_MS, ""), at(5, NOW_MS + 2 * DAY_MS, ""), at(700, NOW_MS + 2 * DAY_MS + 695_000, ""))
    assert verdict(record, NOW_MS) == "too old"


# -- written down ------------------------------------------------------------------------------------------------------


def test_the_next_process_knows_it(tmp_path: Path) -> None:
    clock = FakeClock()
    before = SpoolTimes(tmp_path, clock)
    before.look()
    clock.advance(5000)
    assert SpoolTimes(tmp_path, clock).look().is_steady
    clock.set_wall(clock.wall() + 30 * DAY)
    following = SpoolTimes(tmp_path, clock)
    assert not following.now().is_steady
    (setting,) = following.look().settings
    # Those that run beside it see it as one.
    assert before.look().settings == SpoolTimes(tmp_path, clock).look().settings == (setting,)


def test_one_beside_a_process_that_was_faster_notes_it_once(tmp_path: Path) -> None:
    clock = FakeClock()
    both = [SpoolTimes(tmp_path, clock) for _ in range(2)]
    for step in range(50):
        clock.advance(7)
        if step == 25:
            clock.set_wall(clock.wall() - 30 * DAY)
        records = [each.look() for each in both]
        assert [len(record.settings) for record in records] == [int(step >= 25)] * 2


class PausedBetween(FakeClock):
    """Clocks of a process that is stopped for an hour, once, between reading one of them and the other."""

    pause = 0.0

    def wall(self) -> float:
        self.advance(self.pause)
        self.pause = 0.0
        return super().wall()


def test_a_process_that_is_stopped_while_it_reads_the_clocks_does_not_think_that_one_was_set(tmp_path: Path) -> None:
    clock = PausedBetween()
    times = SpoolTimes(tmp_path, clock)
    times.look()
    clock.advance(STEADY_SECONDS)
    clock.pause = 3600.0
    record = times.look()
    assert (record.settings, record.is_steady) == ((), True)


def test_the_spools_own_time_is_the_same_for_all_its_processes_from_the_first_question_on(tmp_path: Path) -> None:
    clock = FakeClock()
    one = SpoolTimes(tmp_path, clock)
    began_ms = one.now().time_ms
    clock.set_wall(clock.wall() - 30 * DAY)
    clock.advance(10)
    one.look()
    assert one.now().time_ms == SpoolTimes(tmp_path, clock).now().time_ms == began_ms + 10_000


@pytest.mark.parametrize("garbage", [b"", b"{", b"[]", b'{"at": 1}', b"\xff"])
def test_damage_to_the_file_costs_what_stood_there(tmp_path: Path, garbage: bytes) -> None:
    clock = FakeClock()
    (tmp_path / CLOCK).write_bytes(garbage)
    times = SpoolTimes(tmp_path, clock)
    assert not times.look().is_steady
    clock.advance(STEADY_SECONDS)
    assert times.look().is_steady


def test_a_disk_that_does_not_take_it_is_no_hindrance(tmp_path: Path) -> None:
    clock, root = FakeClock(), tmp_path / "spool"
    root.mkdir()
    times = SpoolTimes(root, clock)
    times.look()
    shutil.rmtree(root)
    clock.set_wall(clock.wall() + 30 * DAY)
    assert len(times.look().settings) == 1
    clock.advance(STEADY_SECONDS)
    assert len(times.look().settings) == 1
    assert times.look().is_steady
    assert not root.exists()


def test_settings_do_not_grow_for_ever() -> None:
    record = seen(at(0, NOW_MS))
    for number in range(1, 200):
        record = record.seen_at(replace(record.at, since_boot=number, wall_ms=NOW_MS + number * DAY_MS))
    assert len(record.settings) == 32
