"""Whose logs they are: locks, adoption, and directories that cannot be used."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest

from kong_metering.errors import SpoolError
from kong_metering.spool import files
from kong_metering.spool.directory import Adoption, HeldLog, SpoolDirectory, survey
from kong_metering.spool.identity import FILES, QueueIdentity, decode_identity, encode_identity, load_identity
from kong_metering.spool.log import EventLog
from tests.unit.spool.helpers import NOW, filled, mounted, payloads, read_all, segments

QUEUE = QueueIdentity("7b5c", "metering", "https://ingest.example/events")
OTHER = QueueIdentity("7b5c", "metering", "https://elsewhere.example/events")
REPOSITORY = Path(__file__).parents[3]

HOLDER = """
import sys
from pathlib import Path
from kong_metering.spool.directory import SpoolDirectory
from kong_metering.spool.identity import QueueIdentity
spool = SpoolDirectory(Path(sys.argv[1]))
log = spool.log_for(QueueIdentity(*sys.argv[2:5])).log
log.append([b"one", b"two", b"three"], 1)
print("ready", flush=True)
if "fork" in globals():
    print(fork(), flush=True)
sys.stdin.read()
"""

# Has the holder fork when it is ready, and tell the child's pid once the child let go.
FORKING = """
import os, time

def fork():
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        spool.abandon()
        os.write(writer, b"!")
        os.close(1)
        time.sleep(600)
        os._exit(0)
    os.read(reader, 1)
    return child
"""

ADOPTER = """
import json, sys
from pathlib import Path
from kong_metering.spool.directory import SpoolDirectory
spool = SpoolDirectory(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
adoption = spool.adopt()
print(json.dumps([held.directory.parent.name for held in adoption.logs]), flush=True)
sys.stdin.read()
"""


@contextmanager
def running(program: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert said(process) == "ready"
        yield process
    finally:
        process.kill()
        process.communicate()


def holder(root: Path, identity: QueueIdentity = QUEUE) -> Any:
    return running(HOLDER, root, identity.entity_id, identity.name, identity.endpoint)


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline().strip()


def dead_part(root: Path, name: str, identity: QueueIdentity = QUEUE) -> Path:
    """Make what a process leaves that was killed."""
    log = root / name / identity.key
    log.mkdir(parents=True)
    for file in FILES:
        (log / file).write_bytes(encode_identity(identity))
    filled(log, 20)
    (root / name / "lock").touch()
    return log


def test_everything_is_private_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        spool = SpoolDirectory(tmp_path / "spool")
        held = spool.log_for(QUEUE)
        held.log.append([b"event"], NOW)
        held.log.save_position()
    finally:
        os.umask(before)
    modes = {path.is_dir(): path.stat().st_mode & 0o777 for path in [spool.root, *spool.root.rglob("*")]}
    assert modes == {True: 0o700, False: 0o600}


def test_a_directory_that_others_could_read_is_closed_to_them(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    SpoolDirectory(tmp_path)
    assert tmp_path.stat().st_mode & 0o777 == 0o700


def test_each_entity_and_endpoint_has_a_log_of_its_own(tmp_path: Path) -> None:
    spool = SpoolDirectory(tmp_path)
    logs = [spool.log_for(identity) for identity in (QUEUE, OTHER, QueueIdentity("8", "metering", QUEUE.endpoint))]
    assert len({held.directory for held in logs}) == 3
    assert [load_identity(held.directory) for held in logs] == [held.identity for held in logs]
    assert QueueIdentity("a", "", "b").key != QueueIdentity("ab", "", "").key
    assert QueueIdentity("a", "old name", "b").key == QueueIdentity("a", "new name", "b").key


def test_what_a_living_process_holds_is_not_adopted_and_what_a_killed_one_held_is(tmp_path: Path) -> None:
    spool = SpoolDirectory(tmp_path)
    with holder(tmp_path) as process:
        assert spool.adoptable() == 0
        assert spool.adopt().logs == ()
        assert [found.is_held for found in survey(tmp_path)] == [True]
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert spool.adoptable() == 1
        [held] = spool.adopt().logs
    assert held.identity == QUEUE
    assert [event.payload for event in read_all(held.log)] == [b"one", b"two", b"three"]
    assert spool.adoptable() == 0
    assert spool.adopt().logs == ()


def test_a_part_is_adopted_by_one_of_those_that_want_it(tmp_path: Path) -> None:
    names = {f"proc-{number}-dead" for number in range(30)}
    for name in names:
        dead_part(tmp_path, name)
    with (
        running(ADOPTER, tmp_path) as first,
        running(ADOPTER, tmp_path) as second,
        running(ADOPTER, tmp_path) as third,
    ):
        for process in (first, second, third):
            assert process.stdin
            process.stdin.write("go\n")
            process.stdin.flush()
        adopted = [name for process in (first, second, third) for name in json.loads(said(process))]
    assert sorted(adopted) == sorted(names)


def test_what_an_adopter_held_when_it_died_is_adopted_in_turn(tmp_path: Path) -> None:
    dead_part(tmp_path, "proc-1-dead")
    with running(ADOPTER, tmp_path) as process:
        assert process.stdin
        process.stdin.write("go\n")
        process.stdin.flush()
        assert json.loads(said(process)) == ["proc-1-dead"]
        assert SpoolDirectory(tmp_path).adopt().logs == ()
    [held] = SpoolDirectory(tmp_path).adopt().logs
    assert held.log.waiting == 20


def test_a_part_that_is_being_made_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process adopts between the making of the directory and its lock."""
    spool = SpoolDirectory(tmp_path)
    create = files.create_file
    adopters: list[subprocess.Popen[str]] = []

    def slowly(path: Path) -> int:
        if path.name == "lock":
            process = subprocess.Popen(
                [sys.executable, "-c", ADOPTER, str(tmp_path)],
                cwd=REPOSITORY,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            adopters.append(process)
            assert process.stdin
            process.stdin.write("go\n")
            process.stdin.flush()
            wait_until_blocked(process)
        return create(path)

    monkeypatch.setattr(files, "create_file", slowly)
    held = spool.log_for(QUEUE)
    [process] = adopters
    assert (said(process), said(process)) == ("ready", "[]")
    process.kill()
    process.communicate()
    held.log.append([b"event"], NOW)
    assert held.directory.exists()


def wait_until_blocked(process: subprocess.Popen[str]) -> None:
    """Wait until the process waits for a lock, or says something."""
    assert process.stdout
    while not select.select([process.stdout], [], [], 0.01)[0]:
        locks = Path("/proc/locks").read_text(encoding="ascii").splitlines()
        if any("->" in line and f" {process.pid} " in line for line in locks):
            return


def test_looking_does_not_keep_a_process_from_taking(tmp_path: Path) -> None:
    """Nor does it change anything."""
    dead_part(tmp_path, "proc-1-dead")
    spool = SpoolDirectory(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    [found] = survey(tmp_path)
    assert (found.identity, found.is_held) == (QUEUE, False)
    assert sorted(tmp_path.rglob("*")) == before
    assert len(spool.adopt().logs) == 1


def test_empty_parts_are_removed(tmp_path: Path) -> None:
    for name in ("proc-1-nothing", "proc-2-lock", "proc-3-log"):
        (tmp_path / name).mkdir()
    (tmp_path / "proc-2-lock" / "lock").touch()
    (tmp_path / "proc-3-log" / QUEUE.key).mkdir()
    assert SpoolDirectory(tmp_path).adopt() == Adoption()
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_a_log_that_is_done_is_removed_with_its_part(tmp_path: Path) -> None:
    dead_part(tmp_path, "proc-1-dead")
    dead_part(tmp_path, "proc-1-dead", OTHER)
    spool = SpoolDirectory(tmp_path)
    first, second = spool.adopt().logs
    finish(first)
    spool.retire(first)
    assert not first.directory.exists()
    finish(second)
    spool.retire(second)
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_a_log_that_is_not_done_is_left_for_the_next(tmp_path: Path) -> None:
    dead_part(tmp_path, "proc-1-dead")
    spool = SpoolDirectory(tmp_path)
    [held] = spool.adopt().logs
    held.log.done(5)
    spool.retire(held)
    [again] = SpoolDirectory(tmp_path).adopt().logs
    assert again.log.waiting == 15


def test_bytes_that_nobody_could_read_outlive_their_log(tmp_path: Path) -> None:
    path = segments(dead_part(tmp_path, "proc-1-dead"))[0]
    data = bytearray(path.read_bytes())
    data[60] ^= 1
    path.write_bytes(data)
    spool = SpoolDirectory(tmp_path)
    [held] = spool.adopt().logs
    finish(held)
    spool.retire(held)
    [left] = (tmp_path / "damaged").iterdir()
    assert load_identity(left) == QUEUE
    assert [bytes(data).find(file.read_bytes()) for file in (left / "damaged").iterdir()] == [32]
    assert not (tmp_path / "proc-1-dead").exists()


def test_damage_in_a_log_in_which_nothing_waits_is_told(tmp_path: Path) -> None:
    directory = dead_part(tmp_path, "proc-1-dead")
    log = EventLog.open(directory)
    log.done(20)
    log.save_position()
    with segments(directory)[-1].open("ab") as file:
        file.write(b"torn")
    [damage] = SpoolDirectory(tmp_path).adopt().damage
    assert damage.length == 4
    assert not (tmp_path / "proc-1-dead").exists()


def test_an_owner_that_ends_leaves_the_rest_to_others_at_once(tmp_path: Path) -> None:
    spool, other = SpoolDirectory(tmp_path), SpoolDirectory(tmp_path)
    held = spool.log_for(QUEUE)
    held.log.append(payloads(1, 5), NOW)
    spool.retire(held)
    assert other.adopt().logs == ()
    spool.close()
    [adopted] = other.adopt().logs
    assert adopted.log.waiting == 5


def test_an_owner_that_ends_with_nothing_left_leaves_nothing(tmp_path: Path) -> None:
    spool = SpoolDirectory(tmp_path)
    held = spool.log_for(QUEUE)
    held.log.append([b"event"], NOW)
    finish(held)
    spool.retire(held)
    spool.close()
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_a_forked_child_that_abandons_does_not_outlive_its_parents_locks(tmp_path: Path) -> None:
    spool = SpoolDirectory(tmp_path)
    with running(FORKING + HOLDER, tmp_path, QUEUE.entity_id, QUEUE.name, QUEUE.endpoint) as process:
        child = int(said(process))
        try:
            assert spool.adopt().logs == (), "the parent still holds it"
            process.kill()
            process.wait()
            assert len(spool.adopt().logs) == 1
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_log_of_a_newer_format_is_left_to_one_who_knows_it(tmp_path: Path) -> None:
    directory = dead_part(tmp_path, "proc-1-dead")
    newest = segments(directory)[-1]
    newest.write_bytes(newer_version(newest.read_bytes()))
    dead_part(tmp_path, "proc-2-dead")
    spool = SpoolDirectory(tmp_path)
    adoption = spool.adopt()
    assert [held.directory.parent.name for held in adoption.logs] == ["proc-2-dead"]
    assert [(refused.directory, "format version 2" in refused.reason) for refused in adoption.refused] == [
        (directory, True)
    ]
    assert len(list(directory.iterdir())) > 3
    assert SpoolDirectory(tmp_path).adoptable() == 1, "nobody holds it"


def newer_version(data: bytes) -> bytes:
    start = data[:8] + (2).to_bytes(4, "little")
    return start + crc32(start).to_bytes(4, "little") + data[16:]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b'{"checksum": 1}', b"\xff\xfe"])
def test_one_damaged_identity_file_leaves_the_other(tmp_path: Path, name: str, data: bytes) -> None:
    directory = dead_part(tmp_path, "proc-1-dead")
    (directory / name).write_bytes(data)
    [held] = SpoolDirectory(tmp_path).adopt().logs
    assert held.identity == QUEUE


def test_a_flipped_bit_never_makes_another_queue_of_it() -> None:
    data = encode_identity(QUEUE)
    for bit in range(len(data) * 8):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        assert decode_identity(bytes(changed)) in (None, QUEUE)


def test_events_whose_owner_is_not_known_any_more_are_kept(tmp_path: Path) -> None:
    directory = dead_part(tmp_path, "proc-1-dead")
    for name in FILES:
        (directory / name).unlink()
    [held] = SpoolDirectory(tmp_path).adopt().logs
    assert (held.identity, held.log.waiting) == (None, 20)


# -------------------------------------------------------------------------------------- directories that cannot be used


def test_a_file_in_its_place_is_told(tmp_path: Path) -> None:
    path = tmp_path / "spool"
    path.touch()
    with pytest.raises(SpoolError, match=r"Not a directory \(move the file"):
        SpoolDirectory(path)
    with pytest.raises(SpoolError, match="Not a directory"):
        SpoolDirectory(path / "below")
    with pytest.raises(SpoolError, match="Not a directory"):
        survey(path)


def test_a_missing_directory_above_it_is_told(tmp_path: Path) -> None:
    with pytest.raises(SpoolError, match=r"No such file or directory \(make the directory above it"):
        SpoolDirectory(tmp_path / "missing" / "spool")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_may_not_be_written_is_told(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(SpoolError, match=r"Permission denied \(let the user that Kong runs as write there"):
        SpoolDirectory(tmp_path / "spool")


def test_a_read_only_file_system_is_told_and_recovers(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=1m") as disk:
        spool = SpoolDirectory(disk)
        log = spool.log_for(QUEUE).log
        log.append(payloads(1, 20), NOW)
        log.close()
        spool.abandon()
        remount(disk, "ro")
        with pytest.raises(SpoolError, match=r"Read-only file system \(mount it writable"):
            SpoolDirectory(disk)
        view = EventLog.view(log.directory)
        assert len(read_all(view)) == 20
        view.close()
        assert len(survey(disk)) == 1
        remount(disk, "rw")
        SpoolDirectory(disk).log_for(OTHER)


def remount(disk: Path, mode: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{mode}", str(disk)], check=True)  # noqa: S607


def test_a_disk_that_fills_up_keeps_what_it_has_and_drains(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=512k") as disk:
        log = SpoolDirectory(disk).log_for(QUEUE).log
        log._segment_bytes = 50_000
        accepted = fill(log)
        assert accepted > 1000
        assert log.waiting == accepted
        while batch := log.read(log.done_up_to, 100, 1 << 30):
            assert [event.payload for event in batch] == payloads(batch[0].sequence, len(batch))
            log.done(batch[-1].sequence)
            log.save_position()
        assert log.done_up_to == accepted
        assert fill(log) > 1000, "there is room again"


def fill(log: EventLog) -> int:
    first = log.next_sequence
    with pytest.raises(OSError, match="No space left on device"):
        append_for_ever(log)
    return log.next_sequence - first


def append_for_ever(log: EventLog) -> None:
    while True:
        log.append(payloads(log.next_sequence, 10), NOW)


def test_a_start_with_a_full_disk_adopts_and_drains(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=512k") as disk:
        spool = SpoolDirectory(disk)
        log = spool.log_for(QUEUE).log
        log._segment_bytes = 50_000
        accepted = fill(log)
        filler = disk / "filler"
        with filler.open("wb", buffering=0) as file:
            while write_byte(file.fileno()):
                pass
        log.close()
        spool.abandon()
        starting = SpoolDirectory(disk)
        with pytest.raises(SpoolError, match=r"No space left on device \(free space there"):
            starting.log_for(OTHER)
        [held] = starting.adopt().logs
        assert len(read_all(held.log)) == held.log.waiting == accepted
        finish(held)
        starting.retire(held)
        starting.log_for(OTHER).log.append([b"event"], NOW)


def write_byte(descriptor: int) -> bool:
    try:
        return os.write(descriptor, b"x" * 1024) > 0
    except OSError:
        return False


def finish(held: HeldLog) -> None:
    numbers = [event.sequence for event in read_all(held.log)]
    held.log.done(numbers[-1] if numbers else held.log.done_up_to)
