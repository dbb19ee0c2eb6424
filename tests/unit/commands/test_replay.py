"""`kong-metering spool replay`."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Collection
from pathlib import Path

import pytest

from kong_metering.eventlog import files
from kong_metering.spool.deadletters import DEAD_LETTERS, DeadLetters
from kong_metering.spool.directory import SpoolDirectory, survey
from tests.unit.commands.helpers import (
    OTHER,
    PLUGIN,
    QUEUE,
    dead_letters,
    event,
    events_of,
    holder,
    letter,
    run,
    run_json,
    start,
    waiting,
)
from tests.unit.eventlog.helpers import failing_writes

ASKED = "Put 1 event (1 rejected) back into the queue? [y/N]: "


def test_a_letter_goes_back_into_its_queue_by_id(root: Path) -> None:
    kept = dead_letters(root, letter("rejected", event(1)), letter("rejected", event(2), OTHER))
    result = run(root, "replay", 2, "--yes")
    assert result.exit_code == 0
    assert result.stdout.startswith("1 event back in the queue.\nA running server")
    assert events_of(root, OTHER) == [event(2)]
    assert events_of(root) == []
    assert [stored.id for stored in kept.letters()] == [1]


def test_it_can_be_adopted_at_once(root: Path) -> None:
    dead_letters(root, *[letter("rejected", event(n)) for n in range(2500)])
    assert run_json(root, "replay", "--all", "--yes")["replayed"] == 2500
    assert all(found.holder is None for found in survey(root))
    (held,) = SpoolDirectory(root).adopt(lambda queue: queue == QUEUE).logs
    assert held.log.waiting == 2500


def test_two_letters_of_one_event_put_it_back_once(root: Path) -> None:
    """A process that was killed left the first one, the next process wrote the second one."""
    large = [event(n) + b" " * 300_000 for n in range(6)]
    letters = [letter("rejected", one) for one in (large[0], *large, event(7), event(7))]
    kept = dead_letters(root, *letters, letter("rejected", large[0], OTHER))
    told = run_json(root, "replay", "--all", "--yes")
    assert (told["replayed"], told["repeated"], told["left"]) == (8, 2, 0)
    assert events_of(root) == [*large, event(7)]
    assert events_of(root, OTHER) == [large[0]]
    assert list(kept.letters()) == []


def test_people_are_told_of_letters_of_one_event(root: Path) -> None:
    dead_letters(root, letter("rejected", event(1)), letter("rejected", event(1)))
    result = run(root, "replay", "--all", "--yes")
    assert result.stdout.startswith("1 event back in the queue.\n")
    assert "1 dead letter removed as well: the same event was in another one." in result.stderr


def test_all_leaves_ambiguous_and_unreadable_ones(root: Path) -> None:
    kept = dead_letters(root, letter("rejected", event(1)), letter("ambiguous", event(2)), letter("unreadable", b""))
    result = run(root, "replay", "--all", "--yes")
    assert events_of(root) == [event(1)]
    assert "1 dead letter left in place: ambiguous" in result.stderr
    assert "1 dead letter left in place: what could not be read" in result.stderr
    assert [stored.id for stored in kept.letters()] == [2, 3]


@pytest.mark.parametrize("arguments", [["--reason", "ambiguous"], ["1"]])
def test_ambiguous_ones_go_with_a_warning_when_asked_for(root: Path, arguments: list[str]) -> None:
    dead_letters(root, letter("ambiguous", event(1)))
    result = run(root, "replay", *arguments, stdin="y\n")
    assert "WARNING: 1 of them may have arrived" in result.stderr.replace("\n", " ")
    assert events_of(root) == [event(1)]


def test_an_unreadable_one_is_never_replayed(root: Path) -> None:
    kept = dead_letters(root, letter("unreadable", b""))
    result = run(root, "replay", 1, "--yes")
    assert "cannot be replayed" in result.stderr
    assert kept.get(1)
    assert survey(root) == []


@pytest.mark.parametrize(("answer", "said"), [("n\n", "Nothing was changed."), ("", "nobody answered")])
def test_it_asks_first(root: Path, answer: str, said: str) -> None:
    kept = dead_letters(root, letter("rejected", event(1)))
    result = run(root, "replay", "--all", stdin=answer)
    assert result.exit_code == 1
    assert ASKED in result.stderr
    assert said in result.stderr
    assert kept.get(1)
    assert run(root, "replay", "--all", stdin="y\n").exit_code == 0
    assert kept.get(1) is None


def test_an_id_that_is_not_there_is_told(root: Path) -> None:
    dead_letters(root, letter("rejected", event(1)))
    result = run(root, "replay", 1, 7, "--yes")
    assert result.exit_code == 1
    assert "Not found, or not matching: 7." in result.stderr
    assert events_of(root) == [event(1)]
    assert run(root, "replay", 7, "--yes").exit_code == 1


@pytest.mark.parametrize("arguments", [[], ["--all", "1"]])
def test_a_call_that_does_not_say_what(root: Path, arguments: list[str]) -> None:
    dead_letters(root, letter("rejected", event(1)))
    assert run(root, "replay", *arguments).exit_code == 2


def test_filters_choose(root: Path) -> None:
    dead_letters(root, letter("rejected", event(1)), letter("rejected", event(2), OTHER))
    assert run_json(root, "replay", "--plugin-id", PLUGIN, "-y")["replayed"] == 1
    assert events_of(root) == [event(1)]


def test_events_are_on_the_disk_with_their_owner_before_letters_go(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dead_letters(root, letter("rejected", event(1)))
    synced: list[Path] = []
    at_removal: list[list[Path]] = []
    remove = DeadLetters.remove

    def note_sync(descriptor: int) -> None:
        synced.append(Path(os.path.realpath(f"/proc/self/fd/{descriptor}")))

    def note_removal(letters: DeadLetters, ids: Collection[int]) -> int:
        at_removal.append(list(synced))
        return remove(letters, ids)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "fdatasync", note_sync)
    monkeypatch.setattr(DeadLetters, "remove", note_removal)
    assert run_json(root, "replay", "--all", "--yes")["replayed"] == 1
    (found,) = survey(root)
    log, part = found.directory, found.directory.parent
    needed = {log / "queue.json", log / "queue.json.copy", *log.glob("*.seg"), log, part, root}
    assert [needed - set(before) for before in at_removal] == [set()]


def test_a_disk_that_does_not_confirm_loses_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = dead_letters(root, letter("rejected", event(1)))

    def refuse(_descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", refuse)
    result = run(root, "replay", "--all", "--yes")
    assert result.exit_code == 1
    assert "Input/output error" in result.stderr
    assert len(list(kept.letters())) == 1


def test_a_full_disk_loses_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = dead_letters(root, *[letter("rejected", event(n)) for n in range(3)])
    made = files.make_directory

    def full(path: Path) -> None:
        if path.name.startswith("proc-"):
            raise OSError(28, "No space left on device")
        made(path)

    monkeypatch.setattr(files, "make_directory", full)
    result = run(root, "replay", "--all", "--yes")
    assert result.exit_code == 1
    assert "No space left on device" in result.stderr
    assert "3 dead letters left as they were" in result.stderr.replace("\n", " ")
    assert len(list(kept.letters())) == 3


def test_a_disk_that_fills_up_on_the_way_loses_nothing(root: Path) -> None:
    kept = dead_letters(root, *[letter("rejected", event(n)) for n in range(2500)])
    with failing_writes(after_bytes=300_000):
        result = run(root, "replay", "--all", "--yes")
    assert result.exit_code == 1
    left = {stored.letter.event for stored in kept.letters()}
    assert left
    assert left | set(events_of(root)) == {event(n) for n in range(2500)}


def test_two_replays_at_a_time_are_one_too_many(root: Path) -> None:
    dead_letters(root, letter("rejected", event(1)))
    lock = os.open(root / DEAD_LETTERS / "replay.lock", os.O_CREAT | os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    result = run(root, "replay", "--all", "--yes")
    os.close(lock)
    assert result.exit_code == 1
    assert "another replay or redirect is under way" in result.stderr
    assert events_of(root) == []


def test_as_a_program_beside_what_waits(root: Path) -> None:
    waiting(root, [event(1)])
    dead_letters(root, letter("rejected", event(2)))
    with start(root, "replay", "--all") as process:
        _, stderr = process.communicate()
    assert process.returncode == 1
    assert b"add --yes" in stderr
    with start(root, "replay", "--all", "--yes") as process:
        assert process.wait() == 0
    assert sorted(events_of(root)) == [event(1), event(2)]


def test_nothing_to_replay(root: Path) -> None:
    SpoolDirectory(root)
    result = run(root, "replay", "--all")
    assert result.exit_code == 0
    assert "There are no dead letters." in result.stderr


def test_events_that_wait_are_told_where_no_dead_letter_matches(root: Path) -> None:
    waiting(root, [event(n) for n in range(3)])
    with holder(root) as pid:
        told = run(root, "replay", "--all", "--plugin-id", PLUGIN, "--yes", width=400).stderr
    assert "There are no dead letters." in told
    assert "No dead letters, but 3 events held by nobody: `kong-metering spool deliver` delivers them." in told
    assert (
        f"held by process {pid}, which delivers them itself: `kong-metering spool deliver` has it try at once" in told
    )
