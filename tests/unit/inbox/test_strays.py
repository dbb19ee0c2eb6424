"""Shared memory of a spool whose directory was replaced: what is empty goes, what holds events is told of."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from kong_metering.inbox.place import Place
from kong_metering.inbox.queues import ListedQueue, encode_poured, encode_queue
from kong_metering.inbox.strays import Stray, look, tidy
from tests.unit.inbox.helpers import QUEUE

if TYPE_CHECKING:
    from kong_metering.inbox.place import RingFile
    from kong_metering.inbox.ring import Ring

CAPACITY = 8192


def spool(tmp_path: Path, name: str = "spool") -> Place:
    (tmp_path / name).mkdir()
    (tmp_path / "shm").mkdir(exist_ok=True)
    return Place(tmp_path / "shm", tmp_path / name)


def replaced(tmp_path: Path) -> Place:
    """Put another directory in the place of the spool's, whose inode is not used again."""
    (tmp_path / "spool").rename(tmp_path / "before")
    return spool(tmp_path)


def die(file: RingFile, ring: Ring) -> None:
    ring.close()
    file.release()


def test_an_empty_ring_of_a_spool_that_was_replaced_goes_once_its_process_is_dead(tmp_path: Path) -> None:
    place = spool(tmp_path)
    before = place.path
    file, ring = place.create(CAPACITY)
    now = replaced(tmp_path)
    assert tidy(now) == []
    assert [path.name for path in before.iterdir()] == [file.name]
    die(file, ring)
    assert look(now) == []
    assert before.exists()
    assert tidy(now) == []
    assert not before.exists()


def test_one_with_events_stays_and_is_told_of(tmp_path: Path) -> None:
    place = spool(tmp_path)
    before = place.path
    file, ring = place.create(CAPACITY)
    for number in range(3):
        ring.append(1, b"%d" % number)
    file.add_line(encode_queue(1, ListedQueue(QUEUE, None)))
    now = replaced(tmp_path)
    assert tidy(now) == look(now) == [], "a living process's"
    die(file, ring)
    assert tidy(now) == look(now) == [Stray(before, 3)]
    # Its own servers take it in.
    with (before / file.name).open("ab") as data:
        data.write(encode_poured({1: 3}))
    assert tidy(now) == []
    assert not before.exists()


def test_the_rings_of_this_spool_and_what_is_no_ring_are_left_alone(tmp_path: Path) -> None:
    place = spool(tmp_path)
    die(*place.create(CAPACITY))
    other = place.path.with_name(f"kong-metering-{place.uid}-1-2")
    other.mkdir(mode=0o700)
    (other / "notes").write_text("mine")
    open_to_all = place.path.with_name(f"kong-metering-{place.uid}-1-3")
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    (open_to_all / "1-ab.ring").write_bytes(b"")
    assert tidy(place) == []
    assert (other / "notes").exists()
    assert (open_to_all / "1-ab.ring").exists()
    assert len(list(place.path.iterdir())) == 1


def test_a_ring_whose_header_is_damaged_stays(tmp_path: Path) -> None:
    place = spool(tmp_path)
    file, ring = place.create(CAPACITY)
    before = place.path
    now = replaced(tmp_path)
    die(file, ring)
    (before / file.name).write_bytes(b"?" * 1000)
    assert tidy(now) == []
    assert (before / file.name).exists()


def test_without_shared_memory_there_is_nothing_to_do(tmp_path: Path) -> None:
    place = spool(tmp_path)
    shutil.rmtree(tmp_path / "shm")
    assert tidy(place) == look(place) == []
    shutil.rmtree(tmp_path / "spool")
    assert tidy(place) == look(place) == []
