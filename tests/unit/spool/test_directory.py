"""Whose logs they are: locks, adoption, and directories that cannot be used."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest

from kong_metering.errors import SpoolError
from kong_metering.eventlog import files
from kong_metering.eventlog.log import EventLog
from kong_metering.spool import locks
from kong_metering.spool.directory import Adoption, Found, HeldLog, SpoolDirectory, survey, unusable
from kong_metering.spool.identity import (
    FILES,
    QueueIdentity,
    decode_identity,
    encode_identity,
    load_identity,
    save_identity,
)
from tests.unit.eventlog.helpers import NOW, filled, mounted, payloads, read_all, segments

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
sys.stdin.read()
"""

ADOPTER = """
import json, sys
from pathlib import Path
from kong_metering.spool.directory import SpoolDirectory
spool = SpoolDirectory(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
adoption = spool.adopt()
print(json.dumps([str(held.directory.relative_to(spool.root)) for held in adoption.logs]), flush=True)
sys.stdin.read()
"""

# Adopts logs at random, claims each, finishes a few of its events and retires it, until nothing is left.
PASSER = """
import json, os, random, sys
from pathlib import Path
from kong_metering.spool.directory import SpoolDirectory, survey
spool, claims, chance = SpoolDirectory(Path(sys.argv[1])), Path(sys.argv[2]), random.Random(int(sys.argv[3]))
print("ready", flush=True)
sys.stdin.readline()
seen = 0
while survey(spool.root) or any(spool.root.glob("proc-*")):
    for held in spool.adopt(lambda identity: chance.random() < 0.3).logs:
        claim = claims / (held.directory.parent.name + held.directory.name)
        os.close(os.open(claim, os.O_CREAT | os.O_EXCL))
        batch = held.log.read(held.log.done_up_to, chance.randint(1, 9), 1 << 30)
        seen += len(batch)
        held.log.done(batch[-1].sequence)
        claim.unlink()
        spool.retire(held)
print(json.dumps(seen), flush=True)
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


def tell(process: subprocess.Popen[str], word: str) -> None:
    assert process.stdin
    process.stdin.write(f"{word}\n")
    process.stdin.flush()


def dead_part(root: Path, name: str, identity: QueueIdentity = QUEUE) -> Path:
    """Make what a process leaves that was killed."""
    log = root / name / identity.key
    log.mkdir(parents=True)
    for file in FILES:
        (log / file).write_bytes(encode_identity(identity))
    filled(log, 20)
    (root / name / "lock").touch()
    return log


def descriptors(root: Path) -> list[str]:
    """Tell which files in there this process has open."""
    links = [os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()]
    return sorted(path for path in links if path.startswith(str(root)))


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
        assert spool.adopt() == Adoption()
        assert [found.holder for found in survey(tmp_path)] == [process.pid]
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert [found.holder for found in survey(tmp_path)] == [None]
        [held] = spool.adopt().logs
    assert held.identity == QUEUE
    assert [event.payload for event in read_all(held.log)] == [b"one", b"two", b"three"]
    assert spool.adopt() == Adoption()


def test_each_log_is_adopted_by_one_of_those_that_want_it(tmp_path: Path) -> None:
    logs = {dead_part(tmp_path, f"proc-{n}-dead", identity) for n in range(15) for identity in (QUEUE, OTHER)}
    with (
        running(ADOPTER, tmp_path) as first,
        running(ADOPTER, tmp_path) as second,
        running(ADOPTER, tmp_path) as third,
    ):
        for process in (first, second, third):
            tell(process, "go")
        adopted = [name for process in (first, second, third) for name in json.loads(said(process))]
    assert sorted(adopted) == sorted(str(log.relative_to(tmp_path)) for log in logs)


def test_processes_that_pass_logs_to_each_other_never_hold_one_together(tmp_path: Path) -> None:
    """They adopt, do a little and let go, until all is done: logs and parts are removed while others reach for them."""
    root, claims = tmp_path / "spool", tmp_path / "claims"
    claims.mkdir()
    for part in range(12):
        for queue in range(4):
            dead_part(root, f"proc-{part}-dead", QueueIdentity(str(queue), "metering", QUEUE.endpoint))
    with (
        running(PASSER, root, claims, "1") as first,
        running(PASSER, root, claims, "2") as second,
        running(PASSER, root, claims, "3") as third,
    ):
        for process in (first, second, third):
            tell(process, "go")
        accounts = [json.loads(said(process) or "null") for process in (first, second, third)]
    assert sum(accounts) == 12 * 4 * 20, "each event was seen by one, once"
    assert [path.name for path in root.iterdir()] == ["lock"]


def test_what_an_adopter_held_when_it_died_is_adopted_in_turn(tmp_path: Path) -> None:
    dead_part(tmp_path, "proc-1-dead")
    with running(ADOPTER, tmp_path) as process:
        tell(process, "go")
        assert json.loads(said(process)) == [f"proc-1-dead/{QUEUE.key}"]
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
    output = select.poll()
    output.register(process.stdout, select.POLLIN)
    while not output.poll(10):
        locks = Path("/proc/locks").read_text(encoding="ascii").splitlines()
        if any("->" in line and f" {process.pid} " in line for line in locks):
            return


def test_a_log_that_becomes_another_queues_just_before_it_is_locked_is_not_taken_for_the_first_ones(
    tmp_path: Path,
) -> None:
    directory = dead_part(tmp_path, "proc-1-dead")
    adopter = SpoolDirectory(tmp_path)

    def redirected_meanwhile() -> tuple[Path, ...]:
        # Asked between finding and locking.
        save_identity(directory, OTHER)
        return ()

    assert adopter.adopt(lambda identity: identity == QUEUE, redirected_meanwhile).logs == ()
    (held,) = adopter.adopt(lambda identity: identity == OTHER).logs
    assert held.directory == directory


@pytest.mark.parametrize("kind", ["our own", "adopted"])
def test_a_log_that_is_set_free_can_be_had_by_others_at_once(tmp_path: Path, kind: str) -> None:
    one, other = SpoolDirectory(tmp_path), SpoolDirectory(tmp_path)
    if kind == "adopted":
        dead_part(tmp_path, "proc-1-dead")
        (held,) = one.adopt().logs
    else:
        held = one.log_for(QUEUE)
        held.log.append([b"0", b"1", b"2"], NOW)
    one.log_for(OTHER).log.append([b"other"], NOW)
    events = read_all(held.log)
    one.set_free(held)
    (taken,) = other.adopt().logs
    assert (taken.identity, read_all(taken.log)) == (QUEUE, events)
    other.close()
    one.close()
    assert {log.identity for log in SpoolDirectory(tmp_path).adopt().logs} == {QUEUE, OTHER}


def test_a_log_that_was_made_another_queues_twice_is_let_go_of_once(tmp_path: Path) -> None:
    """Another log of the first queue may be in its place by the end."""
    spool = SpoolDirectory(tmp_path)
    held = spool.log_for(QUEUE)
    held.log.append(payloads(1, 3), NOW)
    spool.reassign(held, OTHER)
    # Something else failed, and it is tried again.
    reassigned = spool.reassign(held, OTHER)
    reassigned.log.done(3)
    spool.retire(reassigned)
    later = spool.log_for(QUEUE)
    assert later.directory == held.directory
    later.log.append(payloads(1, 5), NOW)
    spool.close()
    (left,) = SpoolDirectory(tmp_path).adopt().logs
    assert left.identity == QUEUE
    assert not left.log.was_position_lost


def test_looking_does_not_keep_a_process_from_taking(tmp_path: Path) -> None:
    """Nor does it change anything."""
    directory = dead_part(tmp_path, "proc-1-dead")
    spool = SpoolDirectory(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert survey(tmp_path) == [Found(directory, QUEUE, None)]
    assert sorted(tmp_path.rglob("*")) == before
    assert len(spool.adopt().logs) == 1


def test_a_survey_tells_who_holds_what(tmp_path: Path) -> None:
    dead = dead_part(tmp_path, "proc-1-dead")
    with holder(tmp_path, OTHER) as owner, running(ADOPTER, tmp_path) as adopter:
        tell(adopter, "go")
        said(adopter)
        assert {found.directory: found.holder for found in survey(tmp_path)}[dead] == adopter.pid
        assert {found.identity: found.holder for found in survey(tmp_path)} == {QUEUE: adopter.pid, OTHER: owner.pid}
        (dead / "lock").write_bytes(b"no number")
        assert {found.identity: found.holder for found in survey(tmp_path)}[QUEUE] == 0
    assert {found.identity: found.holder for found in survey(tmp_path)} == {QUEUE: None, OTHER: None}


def test_a_log_that_was_let_go_of_names_no_holder(tmp_path: Path) -> None:
    dead_part(tmp_path, "proc-1-dead")
    spool = SpoolDirectory(tmp_path)
    [held] = spool.adopt().logs
    assert int((held.directory / "lock").read_text()) == os.getpid()
    spool.retire(held)
    assert (held.directory / "lock").read_text().strip() == ""


# ------------------------------------------------------------------------------------------------------- log by log


def only(identity: QueueIdentity) -> Callable[[QueueIdentity | None], bool]:
    return lambda found: found == identity


def test_a_log_that_is_not_wanted_stays_free_for_another(tmp_path: Path) -> None:
    for identity in (QUEUE, OTHER):
        dead_part(tmp_path, "proc-1-dead", identity)
    spool, other = SpoolDirectory(tmp_path), SpoolDirectory(tmp_path)
    assert [held.identity for held in spool.adopt(only(QUEUE)).logs] == [QUEUE]
    assert {found.identity: found.holder for found in survey(tmp_path)} == {QUEUE: os.getpid(), OTHER: None}
    assert spool.adopt(only(QUEUE)) == Adoption()
    assert [held.identity for held in other.adopt().logs] == [OTHER]
    assert spool.adopt() == other.adopt() == Adoption()


def test_a_queue_with_hundreds_of_logs_leaves_room_for_those_with_a_few(tmp_path: Path) -> None:
    spool = SpoolDirectory(tmp_path)
    for number in range(40):
        dead_part(tmp_path, f"proc-{number}-dead")
    assert len(spool.adopt(max_adopted=8).logs) == 40, "all of a queue's or none"
    queues = [QueueIdentity(f"id-{number}", "metering", QUEUE.endpoint) for number in range(6)]
    for number, queue in enumerate(queues[:5]):
        dead_part(tmp_path, f"proc-{number + 50}-dead", queue)
    for number in range(6):
        dead_part(tmp_path, f"proc-{number + 60}-dead", queues[5])
    adoption = spool.adopt(max_adopted=8)
    assert [held.identity for held in adoption.logs] == queues[:4], "half as many again"
    assert adoption.left == (queues[4], queues[5])
    spool.close()
    adoption = SpoolDirectory(tmp_path).adopt(max_adopted=8)
    assert [held.identity for held in adoption.logs] == [*queues[:5], *[queues[5]] * 6], "those with the fewest first"
    assert adoption.left == (QUEUE,)


def test_who_retires_the_last_log_of_a_part_removes_it(tmp_path: Path) -> None:
    for identity in (QUEUE, OTHER):
        dead_part(tmp_path, "proc-1-dead", identity)
    spool, other = SpoolDirectory(tmp_path), SpoolDirectory(tmp_path)
    [first], [second] = spool.adopt(only(QUEUE)).logs, other.adopt(only(OTHER)).logs
    finish(first)
    spool.retire(first)
    assert not first.directory.exists()
    assert len(read_all(second.log)) == 20
    assert spool.adopt() == Adoption(), "the other one still holds it"
    finish(second)
    other.retire(second)
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_a_log_that_another_takes_or_removes_at_that_moment_is_left_to_it(tmp_path: Path) -> None:
    first, second = dead_part(tmp_path, "proc-1-dead"), dead_part(tmp_path, "proc-2-dead", OTHER)
    spool, other = SpoolDirectory(tmp_path), SpoolDirectory(tmp_path)

    def meanwhile(identity: QueueIdentity | None) -> bool:
        if identity == QUEUE:
            assert [held.directory for held in other.adopt(only(QUEUE)).logs] == [first]
        else:
            shutil.rmtree(second)
        return True

    assert spool.adopt(meanwhile) == Adoption()


def test_a_lock_whose_file_was_removed_at_that_moment_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = dead_part(tmp_path, "proc-1-dead")
    spool = SpoolDirectory(tmp_path)
    flock = fcntl.flock

    def removing(lock: int, operation: int) -> None:
        if os.path.realpath(f"/proc/self/fd/{lock}") == str(directory / "lock"):
            (directory / "lock").unlink()
        flock(lock, operation)

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", removing)
        assert spool.adopt() == Adoption()
    assert len(spool.adopt().logs) == 1


def test_a_part_whose_process_lives_after_all_is_left_alone(tmp_path: Path) -> None:
    """It was just being made: the lock was not there yet at the first look."""
    made = [dead_part(tmp_path, "proc-1-made").parent, tmp_path / "proc-2-made"]
    made[1].mkdir()
    spool = SpoolDirectory(tmp_path)

    def meanwhile(_identity: QueueIdentity | None) -> bool:
        for part in made:
            fcntl.flock(files.open_file(part / "lock"), fcntl.LOCK_EX)
        return True

    assert spool.adopt(meanwhile) == Adoption()
    assert all(part.exists() for part in made)


def test_a_log_is_removed_while_nobody_else_can_reach_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dead_part(tmp_path, "proc-1-dead")
    spool = SpoolDirectory(tmp_path)
    [held] = spool.adopt().logs
    finish(held)
    removed: list[bool] = []
    rmdir = Path.rmdir

    def watched(path: Path) -> None:
        removed.append(locks.is_locked(tmp_path))
        rmdir(path)

    monkeypatch.setattr(Path, "rmdir", watched)
    spool.retire(held)
    assert removed == [True, True], "the log and its part, both under the root's lock"


def test_a_question_that_fails_leaves_all_logs_free(tmp_path: Path) -> None:
    for identity in (QUEUE, OTHER):
        dead_part(tmp_path, "proc-1-dead", identity)
    spool = SpoolDirectory(tmp_path)
    with pytest.raises(KeyError):
        spool.adopt(lambda identity: {QUEUE: True}[identity])  # type: ignore[index]
    assert {found.holder for found in survey(tmp_path)} == {None}


def test_looking_again_at_logs_that_nobody_wants_reads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = dead_part(tmp_path, "proc-1-dead")
    spool = SpoolDirectory(tmp_path)
    asked: list[QueueIdentity | None] = []

    def unwanted(identity: QueueIdentity | None) -> bool:
        asked.append(identity)
        return False

    assert spool.adopt(unwanted) == Adoption()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", None)
        assert spool.adopt(unwanted) == Adoption()
    assert asked == [QUEUE, QUEUE]
    assert not (directory / "lock").exists()
    assert len(spool.adopt().logs) == 1


def test_an_owner_that_changes_within_a_tick_of_the_clock_is_found_a_little_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel's file times go up by 4 ms: what is written just after the look leaves the time that was seen."""
    directory = dead_part(tmp_path, "proc-1-dead")
    spool = SpoolDirectory(tmp_path)
    assert spool.adopt(only(OTHER)) == Adoption()
    seen = directory.stat()
    save_identity(directory, OTHER)
    os.utime(directory, ns=(seen.st_atime_ns, seen.st_mtime_ns))
    later = time.monotonic() + 3
    monkeypatch.setattr(time, "monotonic", lambda: later)
    (held,) = spool.adopt(only(OTHER)).logs
    assert held.identity == OTHER


def test_an_owner_that_the_disk_does_not_give_is_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = dead_part(tmp_path, "proc-1-dead")
    spool = SpoolDirectory(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", disk_error)
        assert spool.adopt(only(QUEUE)) == Adoption()
        later = time.monotonic() + 3
        patch.setattr(time, "monotonic", lambda: later)
        assert spool.adopt(only(QUEUE)) == Adoption()
    much_later = later + 60
    monkeypatch.setattr(time, "monotonic", lambda: much_later)
    (held,) = spool.adopt(only(QUEUE)).logs
    assert held.directory == directory


def disk_error(path: Path) -> bytes:
    raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))


def test_what_has_neither_owner_nor_events_is_cleared_away_by_anybody(tmp_path: Path) -> None:
    bare = tmp_path / "proc-1-dead" / QUEUE.key
    bare.mkdir(parents=True)
    (bare / f"{FILES[0]}.new").write_bytes(b"torn")
    kept = dead_part(tmp_path, "proc-2-dead")
    for name in FILES:
        (kept / name).unlink()
    assert SpoolDirectory(tmp_path).adopt(only(OTHER)) == Adoption()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lock", "proc-2-dead"]
    assert len(segments(kept)) > 1


def test_a_log_that_is_done_but_has_a_strange_file_in_it_is_not_opened_every_time(tmp_path: Path) -> None:
    directory = dead_part(tmp_path, "proc-1-dead")
    log = EventLog.open(directory)
    log.done(20)
    log.close()
    (directory / "notes.txt").write_text("mine", encoding="utf-8")
    spool = SpoolDirectory(tmp_path)
    assert spool.adopt() == Adoption()
    before = directory.stat().st_mtime_ns
    assert spool.adopt() == Adoption()
    assert directory.stat().st_mtime_ns == before
    assert [path.name for path in directory.iterdir()] == ["notes.txt"]


def test_to_close_is_to_let_go_of_everything(tmp_path: Path) -> None:
    dead_part(tmp_path, "proc-1-dead", OTHER)
    spool, other = SpoolDirectory(tmp_path), SpoolDirectory(tmp_path)
    before = descriptors(tmp_path)
    own, [adopted] = spool.log_for(QUEUE), spool.adopt().logs
    own.log.append(payloads(1, 5), NOW)
    spool.close()
    assert descriptors(tmp_path) == before
    logs = {held.identity: held.log for held in other.adopt().logs}
    assert {identity: log.waiting for identity, log in logs.items()} == {QUEUE: 5, OTHER: 20}
    logs[OTHER].done(7)
    logs[OTHER].save_position()
    adopted.log.close()
    spool.close()
    other.close()
    assert EventLog.open(adopted.directory).done_up_to == 7, "to close it again has changed nothing"


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
    assert len(segments(directory)) > 1
    assert [found.holder for found in survey(tmp_path)] == [None, os.getpid()]


def test_a_log_that_was_refused_is_let_alone_until_something_in_it_changes(tmp_path: Path) -> None:
    directory = dead_part(tmp_path, "proc-1-dead")
    newest = segments(directory)[-1]
    data = newest.read_bytes()
    newest.write_bytes(newer_version(data))
    spool = SpoolDirectory(tmp_path)
    before = descriptors(tmp_path)
    assert len(spool.adopt().refused) == 1
    assert spool.adopt() == Adoption()
    assert descriptors(tmp_path) == before
    newest.unlink()
    newest.write_bytes(data)
    assert len(spool.adopt().logs) == 1


@pytest.mark.parametrize("name", FILES)
def test_an_owner_in_a_newer_format_is_told_of_once(tmp_path: Path, name: str) -> None:
    directory = dead_part(tmp_path, "proc-1-dead")
    members = json.loads(encode_identity(QUEUE)) | {"format_version": 2}
    del members["checksum"]
    members["checksum"] = crc32(json.dumps(members, sort_keys=True).encode("ascii"))
    (directory / FILES[0]).write_bytes(b"damaged")
    (directory / name).write_text(json.dumps(members), encoding="ascii")
    spool = SpoolDirectory(tmp_path)
    if name == FILES[0]:
        (directory / FILES[1]).unlink()
    assert [refused.directory for refused in spool.adopt().refused] == [directory]
    assert spool.adopt() == Adoption()
    assert [found.identity for found in survey(tmp_path)] == [None]


def test_what_the_system_refuses_is_tried_again_after_a_minute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = dead_part(tmp_path, "proc-1-dead")
    spool = SpoolDirectory(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(EventLog, "open", no_descriptors)
        [refused] = spool.adopt().refused
    assert (refused.directory, "Too many open files" in refused.reason) == (directory, True)
    assert spool.adopt() == Adoption()
    later = time.monotonic() + 61
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert spool.adopt(lambda identity: identity == OTHER) == Adoption()
    [held] = spool.adopt(lambda identity: identity == QUEUE).logs
    assert held.identity == QUEUE


def no_descriptors(directory: Path, **_options: Any) -> EventLog:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(directory))


def test_an_owner_that_cannot_be_read_just_now_is_not_taken_for_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead_part(tmp_path, "proc-1-dead")
    spool = SpoolDirectory(tmp_path)
    monkeypatch.setattr(Path, "read_bytes", no_descriptors)
    adoption = spool.adopt()
    assert (adoption.logs, len(adoption.refused)) == ((), 1)


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
        spool.close()
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
        log._appender._segment_bytes = 50_000
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
        log._appender._segment_bytes = 50_000
        accepted = fill(log)
        filler = disk / "filler"
        with filler.open("wb", buffering=0) as file:
            while write_byte(file.fileno()):
                pass
        spool.close()
        starting = SpoolDirectory(disk)
        with pytest.raises(SpoolError, match=r"No space left on device \(free space there"):
            starting.log_for(OTHER)
        [held] = starting.adopt().logs
        assert len(read_all(held.log)) == held.log.waiting == accepted
        finish(held)
        starting.retire(held)
        starting.log_for(OTHER).log.append([b"event"], NOW)


@pytest.mark.parametrize("free", [0, 1, 2])
def test_tries_to_make_a_log_without_free_descriptors_leave_nothing(tmp_path: Path, free: int) -> None:
    spool = SpoolDirectory(tmp_path)
    directory = spool.log_for(QUEUE).directory
    before = sorted(directory.parent.iterdir())
    with descriptors_left(free):
        for _ in range(3):
            with contextlib.suppress(SpoolError):
                spool.retire(spool.log_for(QUEUE))
    assert sorted(directory.parent.iterdir()) == before
    assert spool.log_for(QUEUE).directory.name == f"{QUEUE.key}-2"


def test_a_limit_of_open_files_is_told_with_what_raises_it(tmp_path: Path) -> None:
    spool = SpoolDirectory(tmp_path)
    with (
        descriptors_left(0),
        pytest.raises(SpoolError, match=r"Too many open files \(raise .*LimitNOFILE=65536.*ulimit -n 65536") as told,
    ):
        spool.log_for(QUEUE)
    assert "another place" not in str(told.value)
    of_the_system = OSError(errno.ENFILE, os.strerror(errno.ENFILE))
    assert "Too many open files in system (raise fs.file-max" in str(unusable(tmp_path, of_the_system))


@contextmanager
def descriptors_left(free: int) -> Iterator[None]:
    """Let this process open so many files more, and none after them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 256), hard))
    taken: list[int] = []
    try:
        with pytest.raises(OSError, match="Too many open files"):
            take_all_descriptors(taken)
        for _ in range(free):
            os.close(taken.pop())
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in taken:
            os.close(descriptor)


def take_all_descriptors(taken: list[int]) -> None:
    while True:
        taken.append(os.open(os.devnull, os.O_RDONLY))


def write_byte(descriptor: int) -> bool:
    try:
        return os.write(descriptor, b"x" * 1024) > 0
    except OSError:
        return False


def finish(held: HeldLog) -> None:
    numbers = [event.sequence for event in read_all(held.log)]
    held.log.done(numbers[-1] if numbers else held.log.done_up_to)
