"""The inbox of a process stays where the next one finds it, whatever is removed, and goes where it should be."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest

from kong_metering.app import rings_in
from kong_metering.host.keeping import Keeping
from kong_metering.inbox.place import Place
from tests.support.waiting import wait_until
from tests.unit.delivery.fakes import down, numbered, on_disk
from tests.unit.inbox.helpers import unread

if TYPE_CHECKING:
    from kong_metering.inbox.lent import LentRings
    from tests.support.loglines import LogLines
    from tests.unit.delivery.conftest import ProcessMaker

KEPT = "its last events are in its supervisor's memory alone"


@pytest.fixture
def keeping() -> Iterator[Keeping]:
    keeping = Keeping()
    yield keeping
    keeping.close()


def lend(keeping: Keeping) -> LentRings:
    lent = keeping.lend()
    keeping.lent_to(1, lent)
    return rings_in(lent)


def rings(inbox: Path) -> list[Path]:
    return sorted(inbox.glob("*/*.ring"))


def remove_all(inbox: Path) -> None:
    for place in inbox.iterdir():
        shutil.rmtree(place)


def kept(keeping: Keeping) -> bool:
    """Whether a server that died now would leave something with the supervisor."""
    keeping.reclaim(1)
    lent = keeping.lend()
    keeping.lent_to(1, lent)
    return bool(lent.left)


def test_a_ring_that_is_removed_is_made_anew_and_that_is_said_once(
    process: ProcessMaker, root: Path, inbox: Path, log: LogLines
) -> None:
    it = process().open(down())
    it.put_on_disk(*numbered(10))
    (before,) = rings(inbox)
    remove_all(inbox)
    wait_until(lambda: log.with_text("RemoveIPC=no"), "it is said")
    (after,) = rings(inbox)
    assert before != after
    it.put_on_disk(*numbered(10, first=10))
    wait_until(lambda: unread(after.read_bytes()) == [], "it is taken out of the new one")
    after.unlink()
    wait_until(lambda: len(log.with_text("RemoveIPC=no")) == 2, "it is noticed again")
    it.put_on_disk(*numbered(10, first=20))
    ((_, said), _) = log.with_text("was removed while it was in use")
    assert str(before) in said
    assert f"{after} now, and none of it is lost" in said
    assert on_disk(root) == numbered(30)
    it.process.close()
    assert list(inbox.iterdir()) == []


def test_where_no_ring_can_be_made_the_supervisor_keeps_it_until_one_can(
    process: ProcessMaker, inbox: Path, log: LogLines, keeping: Keeping
) -> None:
    it = process(lent=lend(keeping)).open(down())
    shutil.rmtree(inbox)
    wait_until(lambda: log.with_text("RemoveIPC=no"), "it is said")
    ((_, said),) = log.with_text("was removed while it was in use")
    assert KEPT in said
    assert "No such file or directory" in said
    it.put_on_disk(*numbered(10))
    assert kept(keeping)
    inbox.mkdir()
    it.process.clock.advance(61)
    wait_until(lambda: log.with_text("shared memory can be had now"), "it moves back")
    (ring,) = rings(inbox)
    assert log.with_text(str(ring))
    wait_until(lambda: not kept(keeping), "the memory is given back")
    it.put_on_disk(*numbered(10, first=10))
    assert len(log.with_text(KEPT)) == 1
    it.process.close()


def test_where_nothing_outlives_the_process_that_is_said_and_tried_again(
    process: ProcessMaker, inbox: Path, log: LogLines
) -> None:
    it = process().open(down())
    shutil.rmtree(inbox)
    wait_until(lambda: log.with_text("its last 10 ms of events or so are lost"), "it is said")
    assert len(log.with_text("RemoveIPC=no")) == 1
    it.put_on_disk(*numbered(10))
    inbox.mkdir()
    it.process.clock.advance(61)
    wait_until(lambda: rings(inbox), "it is there again")
    it.put_on_disk(*numbered(10, first=10))


def test_a_process_that_began_without_shared_memory_moves_there_when_it_can(
    process: ProcessMaker, inbox: Path, log: LogLines, keeping: Keeping
) -> None:
    inbox.rmdir()
    it = process(lent=lend(keeping)).open(down())
    ((_, said),) = log.with_text(KEPT)
    assert "choose another place with --inbox-dir" in said
    it.put_on_disk(*numbered(10))
    inbox.mkdir()
    assert rings(inbox) == []
    it.process.clock.advance(61)
    wait_until(lambda: log.with_text("shared memory can be had now"), "it moves")
    assert len(rings(inbox)) == 1
    wait_until(lambda: not kept(keeping), "the memory is given back")
    it.put_on_disk(*numbered(10, first=10))
    it.process.close()


def test_a_ring_follows_the_spool_that_is_made_anew(
    process: ProcessMaker, root: Path, inbox: Path, log: LogLines
) -> None:
    it = process().open(down())
    it.put_on_disk(*numbered(10))
    (before,) = rings(inbox)
    root.rename(root.with_name("moved"))
    wait_until(lambda: log.with_text("the spool is another directory now"), "the ring follows")
    (after,) = rings(inbox)
    found = root.stat()
    assert after.parent.name.endswith(f"-{found.st_dev}-{found.st_ino}")
    assert not before.parent.exists()
    it.put_on_disk(*numbered(10, first=10))
    it.process.from_strangers = -10


def test_a_look_that_comes_late_to_the_end_moves_nothing(
    process: ProcessMaker, inbox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The spool's directory is on a disk that hangs."""
    path_of = cast("property", Place.path).fget
    looks, goes_on, is_over = threading.Event(), threading.Event(), threading.Event()

    def hang(place: Place) -> Path:
        if threading.current_thread().name == "metering lodging" and not looks.is_set():
            looks.set()
            goes_on.wait(20)
            is_over.set()
        assert path_of is not None
        return cast("Path", path_of(place))

    it = process().open(down())
    it.put_on_disk(*numbered(3))
    monkeypatch.setattr(Place, "path", property(hang))
    assert looks.wait(20)
    it.process.close()
    assert list(inbox.iterdir()) == []
    (thread,) = [each for each in threading.enumerate() if each.name == "metering lodging"]
    goes_on.set()
    thread.join(20)
    assert is_over.is_set()
    assert list(inbox.iterdir()) == []
