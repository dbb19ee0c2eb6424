"""Rings are where only their user can put and see them, each is its process's, and what cannot be is refused."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kong_metering.errors import InboxError
from kong_metering.inbox.place import Place
from kong_metering.inbox.ring import HEADER_BYTES
from tests.unit.eventlog.helpers import mounted
from tests.unit.inbox.helpers import unread

CAPACITY = 8192
REPOSITORY = Path(__file__).parents[3]


def place_in(tmp_path: Path, *, uid: int | None = None, shared: Path | None = None) -> Place:
    root = tmp_path / "spool"
    root.mkdir(exist_ok=True)
    return Place(shared or tmp_path, root, uid=uid)


def orphans(place: Place) -> list[str]:
    return [ring.name for ring in place.orphans()]


def test_files_are_for_their_user_alone_whatever_the_umask(tmp_path: Path) -> None:
    place = place_in(tmp_path)
    before = os.umask(0o277)
    try:
        file, _ = place.create(CAPACITY)
    finally:
        os.umask(before)
    assert place.path.stat().st_mode & 0o777 == 0o700
    assert file.path.stat().st_mode & 0o777 == 0o600
    root = (tmp_path / "spool").stat()
    assert place.path.name == f"kong-metering-{os.geteuid()}-{root.st_dev}-{root.st_ino}"
    assert file.name.startswith(f"{os.getpid()}-")


def test_two_spools_have_two_places(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    assert place_in(tmp_path).path != Place(tmp_path, tmp_path / "other").path


def test_a_living_process_s_ring_is_no_orphan_and_a_dead_one_s_is(tmp_path: Path) -> None:
    place = place_in(tmp_path)
    file, ring = place.create(CAPACITY)
    ring.append(1, b"x")
    assert orphans(place) == []
    ring.close()
    file.release()
    found = [(one.name, unread(one.read())) for one in place.orphans()]
    assert found == [(file.name, [(1, b"x")])]
    # Nobody has taken it out.
    assert orphans(place) == [file.name]


def test_an_orphan_is_taken_by_one_at_a_time(tmp_path: Path) -> None:
    place = place_in(tmp_path)
    file, ring = place.create(CAPACITY)
    ring.close()
    file.release()
    for _ in place.orphans():
        assert orphans(place) == []


def test_the_last_ring_that_is_removed_takes_the_directory_along(tmp_path: Path) -> None:
    place = place_in(tmp_path)
    files = [place.create(CAPACITY)[0] for _ in range(2)]
    files[0].remove()
    assert place.path.exists()
    files[1].remove()
    assert not place.path.exists()
    assert orphans(place) == []


def test_a_directory_that_goes_with_somebody_s_last_ring_just_then_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, make = place_in(tmp_path), os.mkdir
    file, _ = place.create(CAPACITY)

    def make_late(*arguments: Any, **options: Any) -> None:
        try:
            make(*arguments, **options)
        except FileExistsError:
            monkeypatch.undo()
            file.remove()
            raise

    monkeypatch.setattr(os, "mkdir", make_late)
    assert place.create(CAPACITY)[0].path.exists()


def test_where_there_is_no_room_for_a_ring_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    place = place_in(tmp_path, shared=shared)

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(InboxError, match="No space left on device"):
        place.create(CAPACITY)
    assert list(shared.iterdir()) == []


def test_what_a_process_left_that_died_while_it_made_a_ring_is_removed(tmp_path: Path) -> None:
    place = place_in(tmp_path)
    place.create(CAPACITY)
    draft = place.path / ".1-ab.new"
    draft.write_bytes(b"")
    under_way = place.path / ".2-ab.new"
    with under_way.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert orphans(place) == []
        assert not draft.exists()
        assert under_way.exists()


def test_a_directory_of_another_user_is_refused(tmp_path: Path) -> None:
    place_in(tmp_path).create(CAPACITY)
    somebody = os.geteuid() + 1
    ours = place_in(tmp_path).path
    ours.rename(place_in(tmp_path, uid=somebody).path)
    with pytest.raises(InboxError, match=rf"belongs to user {os.geteuid()}, not to {somebody}"):
        place_in(tmp_path, uid=somebody).create(CAPACITY)
    with pytest.raises(InboxError, match="belongs to user"):
        orphans(place_in(tmp_path, uid=somebody))


def test_a_directory_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    place = place_in(tmp_path)
    place.path.mkdir()
    place.path.chmod(0o777)
    with pytest.raises(InboxError, match="its mode is 0777, not 0700"):
        place.create(CAPACITY)


@pytest.mark.parametrize("is_dangling", [False, True])
def test_a_symbolic_link_in_its_place_is_refused(tmp_path: Path, *, is_dangling: bool) -> None:
    place = place_in(tmp_path)
    target = tmp_path / "target"
    if not is_dangling:
        target.mkdir(0o700)
    place.path.symlink_to(target)
    with pytest.raises(InboxError, match="cannot be used: Not a directory"):
        place.create(CAPACITY)
    assert not target.exists() or not list(target.iterdir())


def test_a_file_in_its_place_is_refused(tmp_path: Path) -> None:
    place = place_in(tmp_path)
    place.path.touch()
    with pytest.raises(InboxError, match="Not a directory"):
        place.create(CAPACITY)


def test_links_in_the_directory_are_no_rings(tmp_path: Path) -> None:
    place = place_in(tmp_path)
    place.create(CAPACITY)
    (place.path / "1-ab.ring").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InboxError, match="symbolic links"):
        orphans(place)


def test_no_directory_and_no_spool_are_told(tmp_path: Path) -> None:
    with pytest.raises(InboxError, match="No such file"):
        place_in(tmp_path, shared=tmp_path / "none").create(CAPACITY)
    with pytest.raises(InboxError, match="No such file"):
        Place(tmp_path, tmp_path / "none").create(CAPACITY)


def test_a_tmpfs_without_room_for_it_refuses_it_and_keeps_nothing(tmp_path: Path) -> None:
    with mounted(tmp_path / "small", "size=64k") as small:
        place = place_in(tmp_path, shared=small)
        file, ring = place.create(CAPACITY)
        with pytest.raises(InboxError, match="No space left"):
            place.create(256 * 1024)
        assert [path.name for path in place.path.iterdir()] == [file.name]
        # What has its space goes on when others have taken the rest.
        with pytest.raises(OSError, match="No space left"):
            (small / "fill").write_bytes(bytes(256 * 1024))
        while ring.append(1, b"x" * 1000):
            pass
        assert len(unread(file.path.read_bytes())) == ring.waiting > 5


def test_a_limit_of_file_sizes_refuses_it_and_keeps_nothing(tmp_path: Path) -> None:
    place = place_in(tmp_path)
    place.create(CAPACITY)
    program = (
        "import sys, pathlib; from kong_metering.errors import InboxError\n"
        "from kong_metering.inbox.place import Place\n"
        "try: Place(*map(pathlib.Path, sys.argv[1:])).create(1 << 20)\n"
        "except InboxError as error: print(error)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-B", "-c", program, str(tmp_path), str(tmp_path / "spool")],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536)),
    )
    assert "File too large" in ended.stdout
    assert len(list(place.path.iterdir())) == 1


def test_lists_are_given_of_living_and_dead_processes(tmp_path: Path) -> None:
    place = place_in(tmp_path)
    living, _ = place.create(CAPACITY)
    dead, ring = place.create(CAPACITY)
    living.add_line(b"living")
    dead.add_line(b"dead")
    ring.close()
    dead.release()
    (place.path / "1-ab.ring").write_bytes(bytes(HEADER_BYTES))
    assert dict(place.lists()) == {living.stem: b"living", dead.stem: b"dead", "1-ab": b""}
