"""`kong-metering spool purge`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kong_metering.spool.directory import SpoolDirectory, survey
from tests.unit.commands.helpers import (
    HOUR,
    NOW,
    OTHER,
    PLUGIN,
    dead_letters,
    event,
    events_of,
    holder,
    leave_damaged_file,
    letter,
    run,
    run_json,
    waiting,
)


def test_dead_letters_go_after_a_yes(root: Path) -> None:
    kept = dead_letters(root, letter("rejected", event(1)), letter("ambiguous", event(2)), letter("unreadable", b""))
    refused = run(root, "purge", "--dead-letters", stdin="n\n")
    assert "Remove 3 dead letters (1 ambiguous, 1 rejected, 1 unreadable) for good? [y/N]: " in refused.stderr
    assert (refused.exit_code, len(list(kept.letters()))) == (1, 3)
    assert run(root, "purge", "--dead-letters", "--reason", "rejected", "--yes").stdout == "1 dead letter removed.\n"
    assert run(root, "purge", "--dead-letters", stdin="y\n").stdout == "2 dead letters removed.\n"
    assert list(kept.letters()) == []
    assert run(root, "purge", "--dead-letters").stdout == "There is nothing to remove.\n"


def test_only_what_is_older(root: Path) -> None:
    kept = dead_letters(root, letter("rejected", event(1)), now=NOW - 31 * 24 * HOUR)
    dead_letters(root, letter("rejected", event(2)))
    waiting(root, [event(3)], accepted=NOW - 31 * 24 * HOUR)
    log = waiting(root, [event(4)], accepted=NOW)
    counts = run_json(root, "purge", "--dead-letters", "--waiting", "--plugin-id", PLUGIN, "--older-than", "30d", "-y")
    assert counts == {"dead_letters": 1, "waiting": 1, "damaged_files": 0, "waiting_held": 0}
    assert [stored.id for stored in kept.letters()] == [2]
    assert events_of(root) == [event(4)]
    assert log.directory.exists()


def test_waiting_events_of_one_plugin(root: Path) -> None:
    waiting(root, [event(n) for n in range(10)])
    waiting(root, [event(n) for n in range(5)])
    waiting(root, [event(9)], OTHER)
    assert run(root, "purge", "--waiting", "--plugin-id", PLUGIN, "-y").stdout == "15 waiting events removed.\n"
    assert events_of(root) == []
    assert events_of(root, OTHER) == [event(9)]
    assert len(survey(root)) == 1


def test_what_a_living_process_holds_stays(root: Path) -> None:
    waiting(root, [event(1)])
    with holder(root) as pid:
        result = run(root, "purge", "--waiting", "--plugin-id", PLUGIN, "-y")
        assert result.stdout == "1 waiting event removed.\n"
        assert f"left in place: held by process {pid}, which delivers them. To remove them" in result.stderr
        assert run(root, "purge", "--waiting", "--plugin-id", PLUGIN, "-y").stdout == "Nothing removed.\n"
    assert len(events_of(root)) >= 100


def test_what_came_free_after_the_question_stays(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting(root, [event(1)])

    def another_dies(*_: object, **__: object) -> None:
        waiting(root, [event(2)])

    monkeypatch.setattr("kong_metering.commands.purge.confirmed", another_dies)
    assert run(root, "purge", "--waiting", "--plugin-id", PLUGIN).stdout == "1 waiting event removed.\n"
    assert events_of(root) == [event(2)]


def test_what_a_server_took_over_after_the_question_is_told(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting(root, [event(1)])
    server = SpoolDirectory(root)
    monkeypatch.setattr("kong_metering.commands.purge.confirmed", lambda *_, **__: server.adopt(lambda _: True))
    result = run(root, "purge", "--waiting", "--plugin-id", PLUGIN)
    assert result.exit_code == 1
    assert "1 event not removed: a server took the log over meanwhile" in result.stderr
    server.close()
    assert events_of(root) == [event(1)]


def test_damaged_files_go_with_what_is_left_of_their_logs(root: Path) -> None:
    leave_damaged_file(root)
    assert run_json(root, "status")["damaged"]["files"] == 1
    (path,) = (root / "damaged").rglob("*.bytes")
    assert run(root, "purge", "--damaged", "--older-than", "1h", "-y").stdout == "There is nothing to remove.\n"
    os.utime(path, (0, 0))
    assert run(root, "purge", "--damaged", "--older-than", "1h", "-y").stdout == "1 damaged file removed.\n"
    assert list((root / "damaged").iterdir()) == []


@pytest.mark.parametrize(
    "arguments", [[], ["--waiting"], ["--damaged", "--reason", "rejected"], ["--older-than", "1d"]]
)
def test_a_call_that_does_not_say_what(root: Path, arguments: list[str]) -> None:
    SpoolDirectory(root)
    assert run(root, "purge", *arguments).exit_code == 2
