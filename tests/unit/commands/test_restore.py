"""`kong-metering spool restore`: segments that were set aside come back, what was delivered of them does not."""

from __future__ import annotations

import errno
import subprocess
from pathlib import Path

import pytest

from kong_metering.commands.logs import damaged_files
from kong_metering.eventlog.log import EventLog
from kong_metering.spool.directory import SpoolDirectory, survey
from tests.unit.commands.helpers import (
    NOW,
    OTHER,
    PROGRAM,
    QUEUE,
    REPOSITORY,
    damage,
    event,
    events_of,
    run,
    run_json,
    waiting,
)
from tests.unit.eventlog.helpers import segments
from tests.unit.eventlog.test_disk_errors import bad_sector


def set_aside(root: Path, *, delivered: int = 0, marked: int = 0, when_opened: bool = False) -> Path:
    """Leave a log of ten events whose segment the file system calls damaged; give its file."""
    log = EventLog.open(waiting(root, [event(n) for n in range(10)]).directory)
    log.done(delivered)
    if marked:
        log.mark_ambiguous(delivered + 1, delivered + marked, NOW - 1000)
    log.close()
    (segment,) = segments(log.directory)
    if when_opened:
        with bad_sector(segment, error=errno.EUCLEAN):
            log = EventLog.open(log.directory)
    else:
        log = EventLog.open(log.directory)
        with bad_sector(segment, error=errno.EUCLEAN):
            assert log.read(0, 100, 1 << 20) == []
    log.done(log.next_sequence - 1)
    log.close()
    (damaged,) = damaged_files(root)
    return damaged


@pytest.mark.parametrize("when_opened", [True, False])
@pytest.mark.parametrize("is_retired", [True, False])
def test_what_was_not_delivered_comes_back_once(root: Path, *, when_opened: bool, is_retired: bool) -> None:
    set_aside(root, delivered=4, when_opened=when_opened)
    if is_retired:
        # The first process to look moves what is left of the log away.
        spool = SpoolDirectory(root)
        assert spool.adopt().logs == ()
        spool.close()
    assert events_of(root) == []
    assert run_json(root, "restore", "--yes") == {"restored": 6, "files": 1, "files_left": 0}
    assert events_of(root) == [event(n) for n in range(4, 10)]
    assert damaged_files(root) == []
    assert run_json(root, "restore", "--yes") == {"restored": 0, "files": 0, "files_left": 0}


def test_what_was_sent_without_an_answer_is_still_known_as_such(root: Path) -> None:
    set_aside(root, delivered=4, marked=3)
    run(root, "restore", "--yes")
    (found,) = [each for each in survey(root) if each.identity == QUEUE and EventLog.view(each.directory).waiting]
    log = EventLog.view(found.directory)
    assert [log.sent_at(number) for number in range(1, 7)] == [NOW - 1000] * 3 + [None] * 3


def test_it_asks_first(root: Path) -> None:
    set_aside(root)
    result = run(root, "restore", stdin="n\n")
    assert "Put 10 events of 1 damaged file back into the queue?" in result.output
    assert result.exit_code != 0
    assert events_of(root) == []
    assert "10 events back in the queue." in run(root, "restore", stdin="y\n").output


def test_what_somebody_else_takes_back_in_while_one_is_asked_does_not_come_twice(root: Path) -> None:
    set_aside(root)
    with subprocess.Popen(
        [*PROGRAM, "spool", "restore", "--spool-dir", str(root)],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as asked:
        assert asked.stdout
        said = ""
        while "back into the queue?" not in said:
            said += asked.stdout.read(1)
        assert run_json(root, "restore", "--yes")["restored"] == 10
        said += asked.communicate("y\n")[0]
    assert "1 damaged file left out: somebody has taken its events back in meanwhile" in said
    assert "0 events back in the queue." in said
    assert (asked.returncode, events_of(root)) == (0, [event(n) for n in range(10)])


@pytest.mark.parametrize("is_retired", [True, False])
@pytest.mark.parametrize("command", [["restore"], ["purge", "--damaged"]])
def test_nothing_is_left_behind_of_a_log_when_its_damaged_file_is_gone(
    root: Path, command: list[str], *, is_retired: bool
) -> None:
    set_aside(root, delivered=4)
    spool = SpoolDirectory(root)
    if is_retired:
        assert spool.adopt().logs == ()
    run(root, *command, "--yes")
    for held in spool.adopt().logs:
        held.log.done(held.log.next_sequence - 1)
    spool.close()
    assert list(root.glob("damaged/*")) == list(root.glob("proc-*")) == []


def test_a_file_that_the_disk_still_does_not_give_stays(root: Path) -> None:
    path = set_aside(root)
    with bad_sector(path):
        result = run(root, "restore", "--yes")
    assert "Input/output error" in result.output
    assert "There is nothing to take back in." in result.output
    assert damaged_files(root) == [path]


def test_of_a_file_that_is_damaged_in_part_the_rest_comes_back_once_and_it_stays(root: Path) -> None:
    path = set_aside(root)
    path.write_bytes(path.read_bytes().replace(b"%08d:api" % 5, b"%08d:apx" % 5))
    assert run_json(root, "restore", "--yes")["restored"] == 9
    assert events_of(root) == [event(n) for n in range(10) if n != 5]
    assert damaged_files(root) == [path]
    assert run_json(root, "restore", "--yes") == {"restored": 0, "files": 0, "files_left": 1}


def test_what_is_not_known_of_is_taken_when_asked_for(root: Path) -> None:
    path = set_aside(root)
    path.with_name(path.name + ".json").unlink()
    assert "--all takes it all" in " ".join(run(root, "restore", "--yes").output.split())
    assert run_json(root, "restore", "--yes", "--all")["restored"] == 10


def test_another_plugins_stay(root: Path) -> None:
    set_aside(root)
    assert run_json(root, "restore", "--yes", "--plugin-id", OTHER.entity_id)["restored"] == 0
    assert run_json(root, "restore", "--yes", "--plugin-id", QUEUE.entity_id)["restored"] == 10


def test_stretches_of_damage_are_left_alone(root: Path) -> None:
    damage(waiting(root, [event(n) for n in range(3)]), 1)
    log = EventLog.open(survey(root)[0].directory)
    assert len(log.read(0, 10, 1 << 20)) == 2
    log.close()
    assert len(damaged_files(root)) == 1
    assert run_json(root, "restore", "--yes") == {"restored": 0, "files": 0, "files_left": 0}


def test_purge_removes_what_is_known_of_a_file_with_it(root: Path) -> None:
    path = set_aside(root)
    run(root, "purge", "--damaged", "--yes")
    assert list(path.parent.iterdir()) == []
