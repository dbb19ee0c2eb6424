"""What a disk answers that is failing, or that cannot do everything: passing errors cost nothing, others one file."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import pytest

from kong_metering.eventlog import files
from kong_metering.eventlog.damage import PATIENCE_SECONDS, Patience
from kong_metering.eventlog.format import POSITION_BYTES
from kong_metering.eventlog.log import DamageKind, EventLog
from kong_metering.spool.directory import SpoolDirectory
from kong_metering.spool.identity import QueueIdentity
from tests.unit.eventlog.helpers import NOW, filled, payloads, read_all, segments, sequences

FINAL = [errno.EUCLEAN, errno.EBADMSG]
UNKNOWN = [errno.EINVAL, errno.EOPNOTSUPP]


class Clock:
    """Stands until it is set forward."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@contextmanager
def bad_sector(path: Path, at: int = 0, error: int = errno.EIO) -> Iterator[None]:
    """Let this file give nothing from a place on; what lies before it is read short, as the kernel does."""
    pread, real_read = os.pread, Path.read_bytes

    def failing_pread(descriptor: int, size: int, offset: int) -> bytes:
        if Path(f"/proc/self/fd/{descriptor}").readlink() != path or offset + size <= at:
            return pread(descriptor, size, offset)
        if offset >= at:
            raise OSError(error, os.strerror(error))
        return pread(descriptor, at - offset, offset)

    def failing_read(self: Path) -> bytes:
        if self == path:
            raise OSError(error, os.strerror(error))
        return real_read(self)

    with mock.patch.object(os, "pread", failing_pread), mock.patch.object(Path, "read_bytes", failing_read):
        yield


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def log(tmp_path: Path, clock: Clock) -> EventLog:
    filled(tmp_path, 60).close()
    return EventLog.open(tmp_path, patience=Patience(clock=clock))


def test_an_error_that_passes_costs_nothing(tmp_path: Path, log: EventLog) -> None:
    second, third = (int(path.stem) for path in segments(tmp_path)[1:3])
    with bad_sector(segments(tmp_path)[1], at=700):
        batch = log.read(0, 1000, 1 << 30)
        assert second <= batch[-1].sequence < third, "all that comes before the bad place is given"
        with pytest.raises(OSError, match="Input/output error"):
            log.read(batch[-1].sequence, 1000, 1 << 30)
    assert batch + log.read(batch[-1].sequence, 1000, 1 << 30) == read_all(log)
    assert sequences(log) == list(range(1, 61))
    assert log.take_damage() == []


def test_a_segment_is_set_aside_when_the_error_lasted(tmp_path: Path, log: EventLog, clock: Clock) -> None:
    bad = segments(tmp_path)[1]
    with bad_sector(bad, at=700):
        last = log.read(0, 1000, 1 << 30)[-1].sequence
        for seconds in (0, PATIENCE_SECONDS / 2, PATIENCE_SECONDS / 2 - 1):
            clock.now += seconds
            with pytest.raises(OSError, match="Input/output error"):
                log.read(last, 1000, 1 << 30)
            assert log.read(int(bad.stem) - 1, 1, 1 << 30), "what lies before it can be read, which says nothing"
        clock.now += 1
        following = int(segments(tmp_path)[2].stem)
        assert sequences_after(log, last) == list(range(following, 61))
    (damage,) = log.take_damage()
    assert (damage.kind, damage.events) == (DamageKind.UNREADABLE, following - last - 1)
    assert damage.kept_in == tmp_path / "damaged" / bad.name
    log.done(60)
    assert log.waiting == 0


def sequences_after(log: EventLog, after: int) -> list[int]:
    return [event.sequence for event in read_all(log, after)]


def test_errors_with_good_reads_between_them_are_passing_ones(tmp_path: Path, log: EventLog, clock: Clock) -> None:
    for _ in range(5):
        with bad_sector(segments(tmp_path)[0]), pytest.raises(OSError, match="Input/output error"):
            log.read(0, 1000, 1 << 30)
        assert len(log.read(0, 1000, 1 << 30)) == 60
        clock.now += PATIENCE_SECONDS
    assert log.take_damage() == []


@pytest.mark.parametrize("error", FINAL)
@pytest.mark.parametrize("index", [0, 2, -1])
def test_a_file_that_the_file_system_calls_damaged_costs_its_own_events(
    tmp_path: Path, log: EventLog, error: int, index: int
) -> None:
    bad = segments(tmp_path)[index]
    following = int(segments(tmp_path)[index + 1].stem) if index >= 0 else 61
    with bad_sector(bad, error=error):
        found = sequences(log)
        assert found == [number for number in range(1, 61) if not int(bad.stem) <= number < following]
        first = log.append([b"next"], NOW).start
        assert read_all(log, 60)[-1] == (first, NOW, b"next")
    (damage,) = log.take_damage()
    assert (damage.events, damage.kept_in) == (60 - len(found), tmp_path / "damaged" / bad.name)


@pytest.mark.parametrize("error", [errno.EMFILE, errno.ENOMEM, errno.EACCES])
def test_what_says_nothing_about_the_file_never_costs_it(
    tmp_path: Path, log: EventLog, clock: Clock, error: int
) -> None:
    for _ in range(3):
        clock.now += 2 * PATIENCE_SECONDS
        with bad_sector(segments(tmp_path)[0], error=error), pytest.raises(OSError, match=os.strerror(error)):
            log.read(0, 10, 1 << 30)
    assert sequences(log) == list(range(1, 61))


@pytest.mark.parametrize("error", FINAL)
def test_a_log_whose_newest_segment_is_damaged_is_opened(tmp_path: Path, error: int) -> None:
    filled(tmp_path, 60).close()
    newest = segments(tmp_path)[-1]
    with bad_sector(newest, error=error):
        assert sequences(EventLog.view(tmp_path)) == list(range(1, int(newest.stem)))
        assert newest.exists()
        log = EventLog.open(tmp_path)
    assert sequences(log) == list(range(1, int(newest.stem)))
    (damage,) = log.take_damage()
    assert (damage.kind, damage.events) == (DamageKind.UNREADABLE, 1)
    assert damage.kept_in == tmp_path / "damaged" / newest.name
    log.append([b"next"], NOW)
    assert read_all(log)[-1].payload == b"next"


@pytest.mark.parametrize("error", [None, *FINAL])
def test_a_newest_segment_that_can_neither_be_read_nor_moved_does_not_stop_the_log(
    tmp_path: Path, error: int | None
) -> None:
    filled(tmp_path, 60).close()
    newest = segments(tmp_path)[-1]
    newest.write_bytes(b"garbage" * 20)
    (tmp_path / "damaged").write_bytes(b"in its place")
    with bad_sector(newest, error=error) if error else nullcontext():
        log = EventLog.open(tmp_path)
    assert log.append([b"next"], NOW).start == int(newest.stem) + 1
    assert read_all(log)[-1].payload == b"next"
    assert log.waiting == int(newest.stem)
    assert [damage.events for damage in log.take_damage()] == [1]
    assert newest.exists()


def test_a_file_that_could_be_made_and_neither_be_written_nor_removed_is_in_nobodys_way(tmp_path: Path) -> None:
    log = EventLog.open(tmp_path)
    read_only = OSError(errno.EROFS, os.strerror(errno.EROFS))
    with (
        mock.patch.object(os, "pwrite", side_effect=read_only),
        mock.patch.object(Path, "unlink", side_effect=read_only),
    ):
        for _ in range(2):
            with pytest.raises(OSError, match="Read-only file system"):
                log.append([b"event"], NOW)
    log.append([b"event"], NOW)
    assert [event.payload for event in read_all(log)] == [b"event"]


def test_a_log_that_cannot_be_opened_for_an_error_that_lasts_is_adopted_without_the_segment(
    tmp_path: Path, clock: Clock
) -> None:
    before = SpoolDirectory(tmp_path / "spool")
    log = before.log_for(QueueIdentity("7b5c", "metering", "https://ingest.example/events")).log
    log._appender._segment_bytes = 2000
    for number in range(1, 61):
        log.append(payloads(number, 1), NOW)
    before.close()
    directory, newest = log.directory, segments(log.directory)[-1]
    spool = SpoolDirectory(tmp_path / "spool", Patience(clock=clock))
    with bad_sector(newest):
        for seconds in (0, PATIENCE_SECONDS - 1):
            clock.now += seconds
            # Who looks again sees that something changed.
            (directory / "changed").touch()
            (directory / "changed").unlink()
            (refused,) = spool.adopt().refused
            assert "Input/output error" in refused.reason
        clock.now += 1
        (directory / "changed").touch()
        (held,) = spool.adopt().logs
    assert sequences(held.log) == list(range(1, int(newest.stem)))
    spool.close()


# ---------------------------------------------------------------------------------------------------------- position


@pytest.mark.parametrize("error", FINAL)
def test_a_position_file_that_the_file_system_calls_damaged_is_made_anew(tmp_path: Path, error: int) -> None:
    log = filled(tmp_path, 60, segment_bytes=100_000)
    log.done(30)
    log.close()
    old = (tmp_path / "position").stat().st_ino
    keep = (tmp_path / "position").open("rb")
    with keep, bad_sector(tmp_path / "position", error=error):
        again = EventLog.open(tmp_path)
    assert again.was_position_lost
    assert (tmp_path / "position").stat().st_ino != old
    assert sequences(again) == list(range(1, 61))
    again.done(45)
    again.save_position()
    assert EventLog.open(tmp_path).done_up_to == 45


@pytest.mark.parametrize("error", [errno.EIO, errno.EPERM, errno.EMFILE])
def test_a_position_file_that_takes_no_write_is_made_anew(tmp_path: Path, error: int) -> None:
    log = filled(tmp_path, 20)
    log.done(5)
    log.save_position()
    pwrite = os.pwrite
    position = tmp_path / "position"

    def failing(descriptor: int, data: bytes, offset: int) -> int:
        if position.exists() and os.path.samestat(os.fstat(descriptor), first):
            raise OSError(error, os.strerror(error))
        return pwrite(descriptor, data, offset)

    first = position.stat()
    with mock.patch.object(os, "pwrite", failing):
        for done in (10, 12, 15):
            log.done(done)
            log.save_position()
            assert EventLog.view(tmp_path).done_up_to == done
    assert position.stat().st_mode & 0o777 == 0o600
    log.close()
    assert EventLog.open(tmp_path).done_up_to == 15


def test_a_position_file_that_cannot_be_read_now_is_read_later(tmp_path: Path, clock: Clock) -> None:
    filled(tmp_path, 60).close()
    patience = Patience(clock=clock)
    with bad_sector(tmp_path / "position"):
        with pytest.raises(OSError, match="Input/output error"):
            EventLog.open(tmp_path, patience=patience)
        clock.now += PATIENCE_SECONDS
        assert EventLog.open(tmp_path, patience=patience).was_position_lost


# -------------------------------------------------------------------------------------- what a disk does not know


@pytest.mark.parametrize("error", UNKNOWN)
def test_a_file_system_that_cannot_sync_directories_is_good_enough(tmp_path: Path, error: int) -> None:
    synced: list[int] = []
    log = filled(tmp_path, 10)
    with (
        mock.patch.object(os, "fsync", side_effect=OSError(error, os.strerror(error))) as fsync,
        mock.patch.object(os, "fdatasync", synced.append),
    ):
        log.sync()
    assert fsync.call_count == 1
    assert len(synced) == len(segments(tmp_path)) + 1
    assert not log.unsynced()


@pytest.mark.parametrize("error", UNKNOWN)
def test_a_file_that_cannot_be_synced_is_an_error_all_the_same(tmp_path: Path, error: int) -> None:
    log = filled(tmp_path, 10)
    with (
        mock.patch.object(os, "fdatasync", side_effect=OSError(error, os.strerror(error))),
        pytest.raises(OSError, match=os.strerror(error)),
    ):
        log.sync()


@pytest.mark.parametrize("error", UNKNOWN)
@pytest.mark.parametrize("have", [0, 4096, POSITION_BYTES])
def test_space_is_taken_by_writing_where_it_cannot_be_reserved(tmp_path: Path, error: int, have: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * have)
    descriptor = files.open_file(path)
    with mock.patch.object(os, "posix_fallocate", side_effect=OSError(error, os.strerror(error))):
        files.take_space(descriptor, POSITION_BYTES)
    os.close(descriptor)
    assert path.read_bytes() == b"x" * have + bytes(POSITION_BYTES - have)


def test_a_full_disk_takes_no_space(tmp_path: Path) -> None:
    descriptor = files.create_file(tmp_path / "file")
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with mock.patch.object(os, "posix_fallocate", side_effect=full), pytest.raises(OSError, match="No space left"):
        files.take_space(descriptor, POSITION_BYTES)
    os.close(descriptor)
