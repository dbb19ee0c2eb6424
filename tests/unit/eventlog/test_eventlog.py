"""One queue's log: what it keeps, what it gives back, what space it frees."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path
from zlib import crc32

import pytest

from kong_metering.errors import SpoolFormatError
from kong_metering.eventlog import appending
from kong_metering.eventlog.format import MAX_MARKS, Mark, segment_header
from kong_metering.eventlog.log import DamageKind, EventLog
from tests.unit.eventlog.helpers import (
    NOW,
    failing_writes,
    filled,
    kept,
    overwrite,
    payload,
    payloads,
    read_all,
    segments,
    sequences,
)


def test_events_come_back_in_order_with_their_numbers_and_times(tmp_path: Path) -> None:
    log = EventLog.open(tmp_path)
    assert log.append([b"one", b"two"], NOW) == range(1, 3)
    assert log.append([], NOW) == range(3, 3)
    assert log.append([b""], NOW + 1) == range(3, 4)
    assert log.read(0, 10, 1000) == [(1, NOW, b"one"), (2, NOW, b"two"), (3, NOW + 1, b"")]
    assert log.waiting == 3


@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_reading_goes_on_over_segments_and_after_reopening(tmp_path: Path, batch: int) -> None:
    log = filled(tmp_path, 200)
    assert len(segments(tmp_path)) > 10
    assert [event.payload for event in read_all(log, batch=batch)] == payloads(1, 200)
    log.close()
    again = EventLog.open(tmp_path)
    assert again.waiting == 200
    assert [event.payload for event in read_all(again, batch=batch)] == payloads(1, 200)
    assert again.take_damage() == []


def test_reading_follows_what_is_appended_meanwhile(tmp_path: Path) -> None:
    log = EventLog.open(tmp_path, segment_bytes=1500)
    for number in range(1, 100):
        log.append([payload(number)], NOW)
        assert log.read(number - 1, 10, 10_000) == [(number, NOW, payload(number))]
        assert log.read(number, 10, 10_000) == []


@pytest.mark.parametrize("after", [0, 1, 57, 119, 120, 500])
def test_reading_starts_anywhere(tmp_path: Path, after: int) -> None:
    log = filled(tmp_path, 120)
    read_all(log)
    assert [event.sequence for event in log.read(after, 5, 10_000)] == list(range(after + 1, 121))[:5]


def test_a_batch_has_as_many_bytes_as_it_may_and_at_least_one_event(tmp_path: Path) -> None:
    log = EventLog.open(tmp_path, segment_bytes=500)
    log.append([b"x" * 100] * 8, NOW)
    log.append([b"y" * 100] * 8, NOW)
    assert len(log.read(0, 100, 350)) == 3
    assert len(log.read(3, 100, 350)) == 3
    assert len(log.read(6, 100, 399)) == 3, "over the border of two segments"
    assert len(log.read(9, 100, 1)) == 1
    assert len(log.read(10, 3, 1 << 30)) == 3


def test_events_of_every_size_are_kept(tmp_path: Path) -> None:
    """Also those larger than a read, larger than a segment, and larger than both."""
    sizes = [0, 1, 511 * 1024, 512 * 1024, 513 * 1024, 3_000_000, 10]
    log = EventLog.open(tmp_path, segment_bytes=1_000_000)
    for size in sizes:
        log.append([b"z" * size], NOW)
    log.append([b"z" * size for size in sizes], NOW)
    assert [len(event.payload) for event in read_all(log)] == sizes * 2
    log.close()
    assert [len(event.payload) for event in read_all(EventLog.open(tmp_path))] == sizes * 2


def test_an_event_that_is_too_large_is_refused_with_its_whole_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(appending, "MAX_PAYLOAD_BYTES", 100)
    log = EventLog.open(tmp_path)
    with pytest.raises(ValueError, match="more than 100 bytes"):
        log.append([b"fine", b"x" * 101], NOW)
    assert log.append([b"fine"], NOW) == range(1, 2)


def test_what_is_done_is_not_read_again_and_its_segments_are_unlinked(tmp_path: Path) -> None:
    log = filled(tmp_path, 100)
    before = len(segments(tmp_path))
    log.done(60)
    assert log.waiting == 40
    assert sequences(log) == list(range(61, 101))
    assert len(segments(tmp_path)) < before / 2
    assert log.bytes_on_disk == sum(path.stat().st_size for path in segments(tmp_path))
    log.done(10)
    assert log.done_up_to == 60, "what is done stays done"


def test_the_space_of_a_segment_that_was_being_read_is_freed(tmp_path: Path) -> None:
    log = filled(tmp_path, 100)
    log.read(0, 1, 1)
    log.done(60)
    open_files = [os.path.realpath(path) for path in Path("/proc/self/fd").iterdir()]
    assert not [name for name in open_files if str(tmp_path) in name and "(deleted)" in name]


def test_what_was_not_appended_cannot_be_done(tmp_path: Path) -> None:
    log = filled(tmp_path, 5)
    with pytest.raises(ValueError, match="6 was not appended yet"):
        log.done(6)


def test_numbers_are_never_used_twice(tmp_path: Path) -> None:
    for number in range(1, 6):
        log = EventLog.open(tmp_path)
        assert log.append([b"event"], NOW) == range(number, number + 1)
        log.done(number)
        log.close()
        assert segments(tmp_path) == [], "all that is done is removed at the end"


def test_the_position_is_found_again(tmp_path: Path) -> None:
    log = filled(tmp_path, 100)
    log.done(33)
    log.save_position()
    again = EventLog.open(tmp_path)
    assert again.done_up_to == 33
    assert again.waiting == 67
    assert not again.was_position_lost


def test_a_log_that_is_opened_again_goes_on_in_its_newest_segment(tmp_path: Path) -> None:
    filled(tmp_path, 3, segment_bytes=100_000).close()
    log = filled(tmp_path, 3, segment_bytes=100_000)
    assert len(segments(tmp_path)) == 1
    assert [event.payload for event in read_all(log)] == payloads(1, 3) * 2


def test_the_oldest_event_is_told_without_disturbing_the_reading(tmp_path: Path) -> None:
    log = filled(tmp_path, 50)
    assert log.read(0, 20, 100_000)[-1].sequence == 20
    log.done(7)
    oldest = log.oldest()
    assert oldest
    assert (oldest.sequence, oldest.payload) == (8, payload(8))
    assert log.read(20, 1, 100_000)[0].sequence == 21
    log.done(50)
    assert log.oldest() is None


def test_the_oldest_segment_can_be_dropped_and_its_events_counted(tmp_path: Path) -> None:
    log = filled(tmp_path, 50)
    log.done(2)
    dropped = log.drop_oldest_segment()
    assert dropped > 0
    assert log.waiting == 48 - dropped
    assert sequences(log) == list(range(3 + dropped, 51))
    while count := log.drop_oldest_segment():
        dropped += count
    assert (dropped, log.waiting, log.bytes_on_disk, segments(tmp_path)) == (48, 0, 0, [])
    assert log.append([b"next"], NOW) == range(51, 52)
    assert sequences(log) == [51]


@pytest.mark.parametrize("room", [0, 1, 30, 400])
def test_an_append_that_fails_leaves_the_log_as_it_was(tmp_path: Path, room: int) -> None:
    log = filled(tmp_path, 3, segment_bytes=100_000)
    before = segments(tmp_path)[0].read_bytes()
    with failing_writes(room), pytest.raises(OSError, match="No space left"):
        log.append(payloads(4, 5), NOW)
    assert segments(tmp_path)[0].read_bytes() == before
    assert log.append(payloads(4, 2), NOW) == range(4, 6)
    assert [event.payload for event in read_all(log)] == payloads(1, 5)


@pytest.mark.parametrize("room", [0, 10, 400])
def test_a_new_segment_that_finds_no_room_leaves_no_file(tmp_path: Path, room: int) -> None:
    log = filled(tmp_path, 10, group=10, segment_bytes=10)
    with failing_writes(room), pytest.raises(OSError, match="No space left"):
        log.append(payloads(11, 5), NOW)
    assert len(segments(tmp_path)) == 1
    log.append(payloads(11, 5), NOW)
    assert [event.payload for event in read_all(log)] == payloads(1, 15)


def test_a_full_disk_does_not_keep_space_from_being_freed(tmp_path: Path) -> None:
    log = filled(tmp_path, 100)
    with failing_writes():
        assert len(read_all(log)) == 100
        log.done(90)
    assert log.bytes_on_disk < 5_000


def test_what_cannot_be_unlinked_now_is_unlinked_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = filled(tmp_path, 100)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", _read_only)
        log.done(50)
        assert log.waiting == 50
    log.done(51)
    assert len(segments(tmp_path)) * 2000 < 51 * 250
    assert sequences(log) == list(range(52, 101))


def _read_only(_path: Path, *, missing_ok: bool = False) -> None:
    raise OSError(30, f"Read-only file system {missing_ok}")


def test_syncing_covers_every_segment_that_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = filled(tmp_path, 100)
    synced: list[str] = []

    def fdatasync(descriptor: int) -> None:
        synced.append(os.path.realpath(f"/proc/self/fd/{descriptor}"))

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    log.sync()
    assert sorted(synced) == [*(str(path) for path in segments(tmp_path)), str(tmp_path / "position")]
    log.append([b"event"], NOW)
    log.save_position()
    del synced[:]
    log.sync()
    assert synced == [str(segments(tmp_path)[-1]), str(tmp_path / "position")]


def test_a_new_segment_has_its_directory_synced_not_by_append_but_by_sync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = filled(tmp_path, 10)
    log.sync()
    synced: list[str] = []

    def fsync(descriptor: int) -> None:
        synced.append(os.path.realpath(f"/proc/self/fd/{descriptor}"))

    monkeypatch.setattr(os, "fsync", fsync)
    log.append([b"x" * 5000], NOW)
    assert synced == []
    log.sync()
    assert synced == [str(tmp_path)]
    log.append([b"x"], NOW)
    log.sync()
    assert synced == [str(tmp_path)] * 2, "that one was larger than a segment, and another one came"
    log.append([b"x"], NOW)
    log.sync()
    assert synced == [str(tmp_path)] * 2


def test_where_nothing_was_written_there_is_nothing_to_sync(tmp_path: Path) -> None:
    log = filled(tmp_path, 10)
    first = log.unsynced()
    assert first
    assert not log.unsynced()
    log.append([b"event"], NOW)
    assert log.unsynced()
    log.save_position()
    assert log.unsynced()
    log.read(0, 5, 10_000)
    log.mark_ambiguous(1, 2, NOW)
    assert not log.unsynced()
    first.sync()
    assert not log.unsynced()


def test_what_could_not_be_synced_is_synced_the_next_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when newer things were synced in between; and one that fails does not keep the others from it."""
    log = filled(tmp_path, 30)
    log.sync()
    number = len(segments(tmp_path))
    log.append(payloads(31, 20), NOW)
    log.save_position()
    bad = segments(tmp_path)[number]
    synced: list[str] = []
    failing = True

    def fdatasync(descriptor: int) -> None:
        path = os.path.realpath(f"/proc/self/fd/{descriptor}")
        if failing and path == str(bad):
            raise OSError(5, "Input/output error")
        synced.append(Path(path).name)

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    early = log.unsynced()
    log.append([b"x" * 5000], NOW)
    log.sync()
    assert synced == [segments(tmp_path)[-1].name]
    with pytest.raises(OSError, match="Input/output error"):
        early.sync()
    assert synced[1:] == ["position"]
    with pytest.raises(OSError, match="Input/output error"):
        log.sync()
    failing = False
    log.sync()
    assert synced[2:] == [bad.name]
    assert not log.unsynced()


def test_what_was_unlinked_meanwhile_needs_no_sync(tmp_path: Path) -> None:
    log = filled(tmp_path, 100)
    noted = log.unsynced()
    log.done(90)
    noted.sync()
    log.append([b"event"], NOW)
    noted = log.unsynced()
    log.done(101)
    log.close()
    shutil.rmtree(tmp_path)
    noted.sync()
    log.sync()


def test_syncing_goes_on_in_a_thread_beside_everything_else(tmp_path: Path) -> None:
    log = EventLog.open(tmp_path, segment_bytes=20_000)
    lock, ended, errors = threading.Lock(), threading.Event(), list[OSError]()
    rounds = 0

    def sync_for_ever() -> None:
        nonlocal rounds
        while not ended.is_set():
            with lock:
                noted = log.unsynced()
            try:
                noted.sync()
            except OSError as error:
                errors.append(error)
            rounds += 1

    thread = threading.Thread(target=sync_for_ever)
    thread.start()
    while rounds < 20:
        with lock:
            log.append(payloads(log.next_sequence, 10), NOW)
        with lock:
            batch = log.read(log.done_up_to, 9, 1 << 30)
            assert [event.payload for event in batch] == payloads(batch[0].sequence, len(batch))
            log.save_position()
            log.done(batch[-1].sequence)
    ended.set()
    thread.join()
    assert errors == []
    assert log.waiting == (log.next_sequence - 1) / 10


def test_a_log_that_was_closed_stays_as_another_left_it(tmp_path: Path) -> None:
    log = filled(tmp_path, 20, segment_bytes=100_000)
    log.close()
    other = EventLog.open(tmp_path)
    other.done(10)
    other.save_position()
    for _ in range(5):
        log.close()
    assert EventLog.open(tmp_path).done_up_to == 10


# -------------------------------------------------------------------------------------------------------------- ages


def aged(directory: Path, times: list[int], segment_bytes: int = 500) -> EventLog:
    """Make a log in which event n was appended at the n-th of these times."""
    log = EventLog.open(directory, segment_bytes=segment_bytes)
    for number, time_ms in enumerate(times, 1):
        log.append([payload(number)], time_ms)
    return log


def test_what_was_appended_before_a_time_is_told(tmp_path: Path) -> None:
    log = aged(tmp_path, [10 * number for number in range(1, 101)])
    assert log.last_older_than(0, 5) == 0
    assert log.last_older_than(0, 10) == 0, "not older, as old"
    assert log.last_older_than(0, 11) == 1
    assert log.last_older_than(0, 505) == 50
    assert log.last_older_than(30, 505) == 50
    assert log.last_older_than(60, 505) == 60
    assert log.last_older_than(0, 5000) == 100
    assert log.last_older_than(100, 5000) == 100
    log.append([b"younger"], 6000)
    assert log.last_older_than(100, 5000) == 100
    assert log.last_older_than(100, 6001) == 101
    assert EventLog.open(tmp_path).last_older_than(0, 505) == 50


def test_in_an_empty_log_nothing_is_older(tmp_path: Path) -> None:
    log = EventLog.open(tmp_path)
    assert (log.last_older_than(0, NOW), log.last_older_than(7, NOW)) == (0, 7)


def test_what_is_done_is_passed(tmp_path: Path) -> None:
    log = aged(tmp_path, [10, 50, 20, 30, 40])
    assert log.last_older_than(0, 35) == 1
    log.done(2)
    assert log.last_older_than(0, 35) == 4
    log.done(5)
    assert log.last_older_than(0, 35) == 5


def test_a_clock_that_was_set_back_hides_what_comes_behind(tmp_path: Path) -> None:
    log = aged(tmp_path, [10, 20, 900, 30, 40, 5])
    assert log.last_older_than(0, 100) == 2
    assert log.last_older_than(2, 100) == 2
    assert log.last_older_than(3, 100) == 6
    assert log.last_older_than(0, 901) == 6


def test_ages_are_told_without_disturbing_the_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = aged(tmp_path, list(range(1, 201)), segment_bytes=10_000)
    reading = log.read(0, 50, 1 << 20)
    opened: list[str] = []
    real = os.open

    def open_file(path: str, flags: int, mode: int = 0o777) -> int:
        opened.append(str(path))
        return real(path, flags, mode)

    monkeypatch.setattr(os, "open", open_file)
    assert log.last_older_than(50, 51) == 50
    assert log.last_older_than(51, 52) == 51
    assert opened == [], "it starts from where the reading is"
    assert log.last_older_than(50, 52) == 51
    assert log.last_older_than(0, 180) == 179
    assert log.last_older_than(120, 180) == 179
    del opened[:]
    reading += log.read(50, 1, 1 << 20)
    assert opened == []
    monkeypatch.undo()
    reading += read_all(log, 51)
    assert [event.sequence for event in reading] == list(range(1, 201))


def test_damaged_events_count_as_older(tmp_path: Path) -> None:
    aged(tmp_path, [10, 20, 30, 40, 50, 60], segment_bytes=100_000).close()
    for number in (1, 4, 6):
        damage_payload(segments(tmp_path)[0], number)
    log = EventLog.open(tmp_path)
    assert log.last_older_than(0, 1) == 1
    assert log.last_older_than(0, 35) == 4
    assert log.last_older_than(3, 50) == 4
    assert log.last_older_than(0, 51) == log.next_sequence - 1
    assert log.waiting == 3


def test_only_so_many_are_looked_at_in_one_call(tmp_path: Path) -> None:
    log = EventLog.open(tmp_path)
    for _ in range(25):
        log.append([b"old"] * 100, NOW)
    log.append([b"new"], NOW + 1)
    told = [0]
    while (last := log.last_older_than(told[-1], NOW + 1)) != told[-1]:
        told.append(last)
    assert told == [0, 1_121, 2_242, 2_500]


def test_files_are_private_whatever_the_umask(tmp_path: Path) -> None:
    for umask in (0o000, 0o777):
        before = os.umask(umask)
        try:
            log = filled(tmp_path, 20)
            log.save_position()
        finally:
            os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}


# ------------------------------------------------------------------------------------------------------------- marks


def test_what_may_have_arrived_is_remembered_with_the_time_of_the_first_send(tmp_path: Path) -> None:
    log = filled(tmp_path, 20)
    assert log.mark_ambiguous(1, 5, NOW) == [Mark(1, 5, NOW)]
    assert log.mark_ambiguous(3, 8, NOW + 1) == [Mark(6, 8, NOW + 1)]
    log.save_position()
    again = EventLog.open(tmp_path)
    assert [again.sent_at(number) for number in (1, 5, 6, 8, 9)] == [NOW, NOW, NOW + 1, NOW + 1, None]
    again.done(6)
    assert again.marks == (Mark(7, 8, NOW + 1),)


def test_a_clear_refusal_takes_back_only_the_mark_of_its_own_send(tmp_path: Path) -> None:
    log = filled(tmp_path, 20)
    log.mark_ambiguous(4, 5, NOW)
    log.unmark(log.mark_ambiguous(1, 10, NOW + 9))
    assert log.marks == (Mark(4, 5, NOW),)


def test_more_marks_than_there_is_room_for_err_towards_what_was_sent_earlier(tmp_path: Path) -> None:
    log = filled(tmp_path, 5 * MAX_MARKS, group=100, segment_bytes=100_000)
    for index in range(MAX_MARKS + 50):
        log.mark_ambiguous(3 * index + 1, 3 * index + 1, NOW + index)
    log.save_position()
    again = EventLog.open(tmp_path)
    assert len(again.marks) == MAX_MARKS
    for index in range(MAX_MARKS + 50):
        sent_at = again.sent_at(3 * index + 1)
        assert sent_at is not None
        assert sent_at <= NOW + index


# ---------------------------------------------------------------------------------------------------------- recovery


def test_a_torn_tail_is_cut_off_and_kept_aside(tmp_path: Path) -> None:
    """At every byte of the last group."""
    whole = filled(tmp_path / "whole", 10, segment_bytes=100_000)
    whole.append(payloads(11, 3), NOW)
    data = segments(whole.directory)[0].read_bytes()
    start = len(data) - sum(25 + len(event) for event in payloads(11, 3))
    for size in range(start, len(data)):
        directory = tmp_path / str(size)
        directory.mkdir()
        (directory / "00000000000000000001.seg").write_bytes(data[:size])
        log = EventLog.open(directory)
        count = log.waiting
        assert [event.payload for event in read_all(log)] == payloads(1, count)
        assert 10 <= count <= 12
        assert [damage.kind for damage in log.take_damage()] == [DamageKind.TORN] * bool(kept(directory))
        assert data[:size].endswith(kept(directory))
        log.append([payload(count + 1)], NOW)
        log.close()
        again = EventLog.open(directory)
        assert [event.payload for event in read_all(again)] == payloads(1, count + 1)
        again.close()


def test_a_tail_of_zeros_is_a_torn_one(tmp_path: Path) -> None:
    filled(tmp_path, 5, segment_bytes=100_000)
    with segments(tmp_path)[0].open("ab") as file:
        file.write(bytes(5000))
    log = EventLog.open(tmp_path)
    assert (log.waiting, log.append([b"six"], NOW)) == (5, range(6, 7))
    assert [(damage.kind, damage.events) for damage in log.take_damage()] == [(DamageKind.TORN, 0)]


def test_an_event_that_cannot_be_read_is_passed_over_told_once_and_kept_aside(tmp_path: Path) -> None:
    filled(tmp_path, 30, segment_bytes=100_000).close()
    damage_payload(segments(tmp_path)[0], 12)
    log = EventLog.open(tmp_path)
    assert log.waiting == 30, "nobody knows yet"
    assert sequences(log) == [*range(1, 12), *range(13, 31)]
    assert log.waiting == 29
    [damage] = log.take_damage()
    assert (damage.kind, damage.events, damage.length) == (DamageKind.UNREADABLE, 1, 25 + len(payload(12)))
    assert damage.kept_in
    assert payload(12)[:-1] in damage.kept_in.read_bytes()
    assert sequences(log) == [*range(1, 12), *range(13, 31)]
    assert log.take_damage() == []


def test_damage_right_behind_what_is_done_does_not_stop_the_rest(tmp_path: Path) -> None:
    filled(tmp_path, 30).close()
    damage_payload(segments(tmp_path)[0], 5)
    log = EventLog.open(tmp_path)
    assert [event.sequence for event in log.read(0, 4, 10_000)] == [1, 2, 3, 4]
    log.done(4)
    assert log.read(4, 1, 10_000)[0].sequence == 6
    assert log.waiting == 25
    log.done(5)
    assert (log.done_up_to, log.waiting) == (5, 25)
    log.done(29)
    assert (log.done_up_to, log.waiting) == (29, 1)
    log.done(30)
    assert (log.waiting, log.read(30, 1, 1)) == (0, [])


def test_damage_among_what_is_done_is_nobodys_loss(tmp_path: Path) -> None:
    log = filled(tmp_path, 30, segment_bytes=100_000)
    log.done(20)
    log.close()
    damage_payload(segments(tmp_path)[0], 5)
    again = EventLog.open(tmp_path)
    assert sequences(again) == list(range(21, 31))
    assert again.take_damage() == []


def test_what_cannot_be_read_right_behind_what_is_done_is_done_too(tmp_path: Path) -> None:
    """Or its segment would never be removed."""
    filled(tmp_path, 30).close()
    following = int(segments(tmp_path)[1].stem)
    damage_payload(segments(tmp_path)[0], following - 1)
    log = EventLog.open(tmp_path)
    read_all(log)
    log.done(following - 2)
    assert log.done_up_to == following - 1
    assert int(segments(tmp_path)[0].stem) == following


def test_the_last_event_of_a_finished_segment_can_be_damaged(tmp_path: Path) -> None:
    filled(tmp_path, 60).close()
    first, second = segments(tmp_path)[:2]
    last = int(second.stem) - 1
    damage_payload(first, last)
    log = EventLog.open(tmp_path)
    assert sequences(log) == [*range(1, last), *range(last + 1, 61)]
    log.done(60)
    assert log.waiting == 0


def test_a_finished_segment_that_was_cut_short_costs_what_was_cut(tmp_path: Path) -> None:
    filled(tmp_path, 60).close()
    path, following = segments(tmp_path)[2:4]
    os.truncate(path, path.stat().st_size - 10)
    lost = int(following.stem) - 1
    log = EventLog.open(tmp_path)
    assert sequences(log) == [*range(1, lost), *range(lost + 1, 61)]
    assert [damage.events for damage in log.take_damage()] == [1]


@pytest.mark.parametrize("index", [0, 2, -1])
@pytest.mark.parametrize("size", [0, 10, 32])
def test_a_file_that_lost_all_its_events_does_not_stop_the_others(tmp_path: Path, index: int, size: int) -> None:
    filled(tmp_path, 60).close()
    paths = segments(tmp_path)
    lost = range(int(paths[index].stem), int(paths[index + 1].stem) if index >= 0 else 61)
    os.truncate(paths[index], size)
    log = EventLog.open(tmp_path)
    assert sequences(log) == [number for number in range(1, 61) if number not in lost]
    first = log.append([b"next"], NOW).start
    assert first >= (61 if index >= 0 else lost.start)
    assert read_all(log)[-1] == (first, NOW, b"next")


@pytest.mark.parametrize("index", [0, 2, -1])
def test_a_zeroed_header_costs_nothing(tmp_path: Path, index: int) -> None:
    filled(tmp_path, 60).close()
    overwrite(segments(tmp_path)[index], 0, bytes(32))
    log = EventLog.open(tmp_path)
    assert sequences(log) == list(range(1, 61))
    assert [(damage.offset, damage.length, damage.events) for damage in log.take_damage()] == [(0, 32, 0)]
    log.append([b"next"], NOW)
    assert len(sequences(log)) == 61


@pytest.mark.parametrize("index", [0, 2, -1])
def test_a_zeroed_page_costs_the_events_in_it(tmp_path: Path, index: int) -> None:
    filled(tmp_path, 600, segment_bytes=20_000).close()
    path = segments(tmp_path)[index]
    overwrite(path, 4096, bytes(4096))
    log = EventLog.open(tmp_path)
    found = sequences(log)
    assert found == sorted(set(found))
    assert 600 - len(found) <= 4096 // 45 + 2
    assert bytes(4096) in kept(tmp_path)
    assert sum(damage.events for damage in log.take_damage()) == 600 - len(found)


@pytest.mark.parametrize("index", [0, 2, -1])
def test_garbage_at_the_head_of_a_file_costs_nothing(tmp_path: Path, index: int) -> None:
    filled(tmp_path, 60).close()
    path = segments(tmp_path)[index]
    path.write_bytes(b"garbage, and not a little of it, 60 bytes at the very least..." + path.read_bytes()[32:])
    log = EventLog.open(tmp_path)
    assert sequences(log) == list(range(1, 61))
    assert b"garbage" in kept(tmp_path)


@pytest.mark.parametrize("index", [0, 2, -1])
def test_a_file_full_of_garbage_is_kept_aside(tmp_path: Path, index: int) -> None:
    filled(tmp_path, 60).close()
    path = segments(tmp_path)[index]
    garbage = os.urandom(3000)
    path.write_bytes(garbage)
    log = EventLog.open(tmp_path)
    assert len(sequences(log)) < 60
    assert kept(tmp_path).replace(garbage[:32] + garbage[32:], b"") == b""
    assert garbage[32:] in kept(tmp_path)
    log.append([b"next"], NOW)
    assert read_all(log)[-1].payload == b"next"


def test_a_missing_middle_segment_is_told_and_passed_over(tmp_path: Path) -> None:
    filled(tmp_path, 60).close()
    path, following = segments(tmp_path)[2:4]
    path.unlink()
    lost = range(int(path.stem), int(following.stem))
    log = EventLog.open(tmp_path)
    assert sequences(log) == [number for number in range(1, 61) if number not in lost]
    assert [(damage.kind, damage.events) for damage in log.take_damage()] == [(DamageKind.MISSING, len(lost))]
    log.done(60)
    assert log.waiting == 0


def test_a_segment_that_goes_missing_while_it_is_waited_for_is_passed_over(tmp_path: Path) -> None:
    log = filled(tmp_path, 60)
    for path in segments(tmp_path)[1:3]:
        path.unlink()
    found = sequences(log)
    assert found[0] == 1
    assert found[-1] == 60
    assert sum(damage.events for damage in log.take_damage()) == 60 - len(found) == 60 - log.waiting


def test_a_missing_first_segment_is_told(tmp_path: Path) -> None:
    log = filled(tmp_path, 60)
    log.done(2)
    log.close()
    first, second = segments(tmp_path)[:2]
    first.unlink()
    again = EventLog.open(tmp_path)
    lost = int(second.stem) - 3
    assert [(damage.kind, damage.events) for damage in again.take_damage()] == [(DamageKind.MISSING, lost)]
    assert again.waiting == 58 - lost


def test_without_a_position_file_all_that_is_there_waits(tmp_path: Path) -> None:
    log = filled(tmp_path, 60)
    log.done(30)
    log.close()
    (tmp_path / "position").unlink()
    again = EventLog.open(tmp_path)
    assert again.was_position_lost
    found = sequences(again)
    assert found == list(range(found[0], 61))
    assert found[0] <= 31
    assert again.take_damage() == []


def test_what_may_have_been_sent_before_the_position_was_lost_is_in_doubt_for_all_who_open_the_log_later(
    tmp_path: Path,
) -> None:
    """The first to open it may only move it, or put events behind, and leave it to those who deliver."""
    filled(tmp_path, 20).close()
    (tmp_path / "position").unlink()
    first = EventLog.open(tmp_path)
    first.append([b"never sent"], NOW)
    first.close()
    again = EventLog.open(tmp_path)
    oldest = again.oldest()
    assert oldest
    assert {again.sent_at(number) for number in range(1, 21)} == {oldest.time_ms}
    assert again.sent_at(21) is None


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 5000, 8191])
def test_a_position_file_that_was_cut_short_loses_no_event(tmp_path: Path, size: int) -> None:
    log = filled(tmp_path, 60)
    log.save_position()
    log.done(30)
    log.close()
    os.truncate(tmp_path / "position", size)
    again = EventLog.open(tmp_path)
    assert set(sequences(again)) >= set(range(31, 61))
    again.done(45)
    again.save_position()
    assert EventLog.open(tmp_path).done_up_to == 45


def test_a_torn_write_of_the_position_leaves_the_one_before(tmp_path: Path) -> None:
    log = filled(tmp_path, 60, segment_bytes=100_000)
    before = b""
    for done in range(10, 14):
        log.done(done)
        log.save_position()
        data = (tmp_path / "position").read_bytes()
        changed = [offset for offset in (0, 4096) if data[offset : offset + 4096] != before[offset : offset + 4096]]
        assert len(changed) == 1 or not before
        before = data
    overwrite(tmp_path / "position", changed[0] + 20, b"torn")
    assert EventLog.open(tmp_path).done_up_to == 12


@pytest.mark.parametrize("offset", [20, 4096 + 20])
def test_damage_to_one_position_does_not_make_removed_segments_look_missing(tmp_path: Path, offset: int) -> None:
    log = filled(tmp_path, 60)
    log.save_position()
    log.done(40)
    overwrite(tmp_path / "position", offset, b"torn")
    again = EventLog.open(tmp_path)
    assert (again.done_up_to, again.take_damage()) == (40, [])


def test_a_stale_position_file_only_repeats(tmp_path: Path) -> None:
    log = filled(tmp_path, 60, segment_bytes=100_000)
    log.save_position()
    stale = (tmp_path / "position").read_bytes()
    log.done(30)
    log.close()
    (tmp_path / "position").write_bytes(stale)
    assert sequences(EventLog.open(tmp_path)) == list(range(1, 61))


def test_a_position_ahead_of_what_reached_the_disk_is_believed(tmp_path: Path) -> None:
    """After a power cut the position can be on the disk, and the events that it is about not."""
    log = filled(tmp_path, 60, segment_bytes=100_000)
    log.done(50)
    log.mark_ambiguous(51, 55, NOW)
    log.save_position()
    size = 32 + sum(25 + len(event) for event in payloads(1, 40))
    os.truncate(segments(tmp_path)[0], size)
    again = EventLog.open(tmp_path)
    assert [(damage.kind, damage.events) for damage in again.take_damage()] == [(DamageKind.MISSING, 5)]
    assert (again.waiting, again.read(0, 10, 10_000)) == (0, [])
    assert again.append([b"new"], NOW) == range(56, 57), "no number that was sent is used again"
    assert again.sent_at(56) is None
    assert sequences(again) == [56]


def test_a_newer_format_is_refused_and_nothing_is_touched(tmp_path: Path) -> None:
    filled(tmp_path, 60).close()
    newest = segments(tmp_path)[-1]
    overwrite(newest, 0, newer_version(newest.read_bytes()))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(SpoolFormatError, match="format version 2"):
        EventLog.open(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_newer_format_in_the_middle_is_refused_when_it_is_come_to(tmp_path: Path) -> None:
    filled(tmp_path, 60).close()
    path = segments(tmp_path)[2]
    overwrite(path, 0, newer_version(path.read_bytes()))
    log = EventLog.open(tmp_path)
    with pytest.raises(SpoolFormatError, match="format version 2"):
        read_all(log)
    assert path.exists()


def newer_version(data: bytes) -> bytes:
    start = data[:8] + (2).to_bytes(4, "little")
    return start + crc32(start).to_bytes(4, "little")


def test_bytes_that_are_set_aside_on_a_full_disk_stay_with_their_segment(tmp_path: Path) -> None:
    filled(tmp_path, 60).close()
    path = segments(tmp_path)[1]
    number = int(path.stem) + 1
    damage_payload(path, number)
    data = path.read_bytes()
    log = EventLog.open(tmp_path)
    with failing_writes():
        assert len(read_all(log)) == 59
        log.done(60)
    assert not path.exists()
    assert kept(tmp_path) == data


def test_an_append_that_could_not_be_cut_off_again_does_not_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = filled(tmp_path, 3, segment_bytes=100_000)

    def failing(_descriptor: int, _size: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "ftruncate", failing)
        with failing_writes(700), pytest.raises(OSError, match="No space left"):
            log.append([b"never"] * 100, NOW)
    log.append(payloads(4, 1), NOW)
    assert [event.payload for event in read_all(log)] == payloads(1, 4)


# -------------------------------------------------------------------------------------------------------------- views


def test_a_view_changes_nothing_and_shows_what_waits(tmp_path: Path) -> None:
    log = filled(tmp_path, 60)
    log.done(7)
    log.save_position()
    damage_payload(segments(tmp_path)[0], 8)
    with segments(tmp_path)[-1].open("ab") as file:
        file.write(b"torn")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    view = EventLog.view(tmp_path)
    assert sequences(view) == list(range(9, 61))
    assert view.waiting == 52
    view.close()
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_view_stands_its_owner_going_on(tmp_path: Path) -> None:
    log = filled(tmp_path, 60)
    view = EventLog.view(tmp_path)
    log.done(40)
    log.append(payloads(61, 5), NOW)
    found = sequences(view)
    assert set(found) <= set(range(1, 61))
    assert set(found) >= set(range(41, 61))


def test_a_view_of_an_empty_directory_is_empty(tmp_path: Path) -> None:
    assert sequences(EventLog.view(tmp_path)) == []
    (tmp_path / "00000000000000000001.seg").write_bytes(segment_header(1)[:10])
    assert sequences(EventLog.view(tmp_path)) == []
    assert len(segments(tmp_path)) == 1


def damage_payload(path: Path, number: int) -> None:
    """Change the last byte of event `number`, which has to be in this segment."""
    offset = path.read_bytes().index(payload(number)) + len(payload(number)) - 1
    overwrite(path, offset, bytes([path.read_bytes()[offset] ^ 1]))
