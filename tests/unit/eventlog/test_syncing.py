"""Who waits for the disk, for what, and in which order: making a log and writing to it does not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest

from kong_metering.eventlog.log import EventLog
from kong_metering.spool.deadletters import DeadLetter, DeadLetters
from kong_metering.spool.directory import HeldLog, SpoolDirectory
from kong_metering.spool.identity import QueueIdentity
from tests.unit.eventlog.helpers import NOW, filled, mounted, payloads, read_all, segments

QUEUE = QueueIdentity("7b5c", "metering", "https://ingest.example/events")
OTHER = QueueIdentity("7b5c", "metering", "https://elsewhere.example/events")
LETTER = DeadLetter("rejected", "400", QUEUE, NOW, b"event")


class Disk:
    """Takes note of what is synced, in order, and refuses what is bad."""

    def __init__(self) -> None:
        self.synced: list[Path] = []
        self.bad: set[Path] = set()

    def sync(self, descriptor: int) -> None:
        path = Path(os.path.realpath(f"/proc/self/fd/{descriptor}"))
        if path in self.bad:
            raise OSError(5, "Input/output error")
        self.synced.append(path)

    def take(self) -> list[Path]:
        taken, self.synced = self.synced, []
        return taken


@contextmanager
def watching() -> Iterator[Disk]:
    disk = Disk()
    with mock.patch.object(os, "fsync", disk.sync), mock.patch.object(os, "fdatasync", disk.sync):
        yield disk


@pytest.fixture
def disk() -> Iterator[Disk]:
    with watching() as disk:
        yield disk


def spool_with_event(root: Path) -> tuple[SpoolDirectory, HeldLog]:
    spool = SpoolDirectory(root)
    held = spool.log_for(QUEUE)
    held.log.append([b"event"], NOW)
    return spool, held


def depended_on(directory: Path) -> list[Path]:
    """Give all without which the events of a log are not found again, or have no owner, after a power cut."""
    part = directory.parent
    return [directory / "queue.json", directory / "queue.json.copy", directory, part, part.parent, part.parent.parent]


def test_a_log_is_made_and_written_to_without_waiting_for_the_disk(tmp_path: Path, disk: Disk) -> None:
    spool, held = spool_with_event(tmp_path / "spool")
    held.log.append(payloads(1, 100), NOW)
    held.log.save_position()
    spool.log_for(OTHER).log.append([b"event"], NOW)
    spool.close()
    assert len(SpoolDirectory(spool.root).adopt().logs) == 2
    assert disk.synced == []


def test_the_first_sync_covers_all_that_the_events_depend_on_and_does_so_before_them(
    tmp_path: Path, disk: Disk
) -> None:
    _, held = spool_with_event(tmp_path / "spool")
    held.log.unsynced().sync()
    assert disk.synced[:6] == depended_on(held.directory)
    assert disk.synced[6:] == [held.directory / "position", *segments(held.directory)]
    assert not held.log.unsynced()
    disk.take()
    held.log.append([b"event"], NOW)
    held.log.sync()
    assert disk.synced == segments(held.directory)


def test_each_log_has_its_part_synced(tmp_path: Path, disk: Disk) -> None:
    spool, held = spool_with_event(tmp_path / "spool")
    held.log.sync()
    disk.take()
    other = spool.log_for(OTHER)
    other.log.append([b"event"], NOW)
    other.log.sync()
    assert disk.synced[:6] == depended_on(other.directory)


def test_what_is_adopted_is_synced_as_well(tmp_path: Path, disk: Disk) -> None:
    """Its process may have died before it was."""
    spool, _ = spool_with_event(tmp_path / "spool")
    spool.close()
    (held,) = SpoolDirectory(spool.root).adopt().logs
    held.log.sync()
    assert disk.synced[:6] == depended_on(held.directory)
    assert disk.synced[6:] == [*segments(held.directory), held.directory / "position"]


def test_an_adopted_log_without_an_owner_can_be_synced(tmp_path: Path, disk: Disk) -> None:
    spool, held = spool_with_event(tmp_path / "spool")
    spool.close()
    for path in depended_on(held.directory)[:2]:
        path.unlink()
    (adopted,) = SpoolDirectory(spool.root).adopt().logs
    adopted.log.sync()
    assert disk.synced[:4] == depended_on(held.directory)[2:]


@pytest.mark.parametrize("index", range(6))
def test_what_could_not_be_synced_is_tried_again_before_what_was_written_since(
    tmp_path: Path, disk: Disk, index: int
) -> None:
    _, held = spool_with_event(tmp_path / "spool")
    bad = depended_on(held.directory)[index]
    disk.bad = {bad}
    for _ in range(2):
        with pytest.raises(OSError, match="Input/output error"):
            held.log.sync()
        held.log.append([b"event"], NOW)
    assert bad not in disk.take()
    disk.bad.clear()
    held.log.sync()
    assert disk.synced == [bad, *segments(held.directory)]
    assert not held.log.unsynced()


def test_a_mounted_spool_does_not_depend_on_the_directory_above_it(tmp_path: Path) -> None:
    with mounted(tmp_path / "spool", "size=4m") as root, watching() as disk:
        _, held = spool_with_event(root)
        held.log.sync()
        assert disk.synced[:5] == depended_on(held.directory)[:5]
        assert tmp_path not in disk.synced


def test_a_directory_above_it_that_may_not_be_listed_is_let_alone(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, _mode: path != tmp_path)
    _, held = spool_with_event(tmp_path / "spool")
    held.log.sync()
    assert disk.synced[:5] == depended_on(held.directory)[:5]
    assert tmp_path not in disk.synced


def test_a_spool_that_was_removed_needs_no_sync(tmp_path: Path, disk: Disk) -> None:
    spool, held = spool_with_event(tmp_path / "spool")
    spool.root.rename(tmp_path / "gone")
    held.log.sync()
    assert disk.synced == [tmp_path]


def test_letters_are_kept_without_waiting_for_the_disk_and_synced_with_their_directory(
    tmp_path: Path, disk: Disk
) -> None:
    directory = tmp_path / "dead"
    letters = DeadLetters(directory)
    assert not letters.unsynced()
    letters.add([LETTER], NOW)
    assert disk.synced == []
    disk.bad = {tmp_path}
    with pytest.raises(OSError, match="Input/output error"):
        letters.unsynced().sync()
    assert disk.take() == [directory, *segments(directory)]
    letters.add([LETTER], NOW)
    disk.bad.clear()
    letters.unsynced().sync()
    assert disk.take() == [tmp_path, *segments(directory)]
    assert not letters.unsynced()


def test_the_directory_of_letters_is_synced_by_whoever_adds_first_and_when_it_is_made_again(
    tmp_path: Path, disk: Disk
) -> None:
    directory = tmp_path / "dead"
    DeadLetters(directory).add([LETTER], NOW)
    letters = DeadLetters(directory)
    letters.add([LETTER], NOW)
    letters.unsynced().sync()
    assert disk.take() == [tmp_path, directory, *segments(directory)]
    directory.rename(tmp_path / "gone")
    letters.add([LETTER], NOW)
    letters.unsynced().sync()
    assert disk.take() == [tmp_path, directory, *segments(directory)]


def test_what_is_cut_off_is_on_the_disk_elsewhere_before(tmp_path: Path, disk: Disk) -> None:
    filled(tmp_path, 3, group=3).close()
    (segment,) = segments(tmp_path)
    whole = segment.read_bytes()
    segment.write_bytes(whole + b"torn")
    cut: list[list[Path]] = []
    truncate = os.ftruncate

    def ftruncate(descriptor: int, length: int) -> None:
        cut.append(list(disk.synced))
        truncate(descriptor, length)

    with mock.patch.object(os, "ftruncate", ftruncate):
        log = EventLog.open(tmp_path)
    (kept_in,) = (damage.kept_in for damage in log.take_damage())
    assert kept_in
    assert cut == [[kept_in.with_name(f"{kept_in.name}.new"), kept_in.parent, tmp_path]]
    assert segment.read_bytes() == whole
    assert [event.payload for event in read_all(log)] == payloads(1, 3)
