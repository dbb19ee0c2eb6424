"""Dead letters: kept with their reason, found by number, removed one by one, bounded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kong_metering.spool.deadletters import DeadLetter, DeadLetters
from kong_metering.spool.identity import QueueIdentity
from tests.unit.eventlog.helpers import NOW, failing_writes, segments
from tests.unit.eventlog.test_disk_errors import bad_sector

QUEUE = QueueIdentity("7b5c", "metering", "https://ingest.example/events")
REPOSITORY = Path(__file__).parents[3]


def letter(number: int, reason: str = "rejected", size: int = 20) -> DeadLetter:
    event = b'{"id":"%d"}\n' % number + b"\xff" * size
    return DeadLetter(reason, f'400: {{"detail": "ünknown {number}\n"}}', QUEUE, NOW - number, event)


def ids(letters: DeadLetters) -> list[int]:
    return [stored.id for stored in letters.letters()]


def test_letters_are_kept_with_all_that_is_known_of_them(tmp_path: Path) -> None:
    letters = DeadLetters(tmp_path / "dead")
    assert list(letters.letters()) == []
    assert letters.add([], NOW) == range(0)
    assert letters.add([letter(1), letter(2, "ambiguous")], NOW) == range(1, 3)
    assert letters.add([letter(3)], NOW + 1) == range(3, 4)
    again = DeadLetters(tmp_path / "dead")
    assert [stored.letter for stored in again.letters()] == [letter(1), letter(2, "ambiguous"), letter(3)]
    assert [(stored.id, stored.time_ms) for stored in again.letters()] == [(1, NOW), (2, NOW), (3, NOW + 1)]
    assert again.counts() == {(QUEUE, "rejected"): 2, (QUEUE, "ambiguous"): 1}
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "dead").iterdir()} == {0o600}


def test_one_letter_is_found_by_its_number(tmp_path: Path) -> None:
    letters = filled(tmp_path, 20)
    found = letters.get(13)
    assert found
    assert found.letter == letter(13)
    assert letters.get(21) is None
    assert [stored.id for stored in letters.letters(after=17)] == [18, 19, 20]


def test_removed_letters_are_gone_and_their_segments_too(tmp_path: Path) -> None:
    letters = filled(tmp_path, 20)
    before = len(segments(tmp_path))
    assert letters.remove([3, 4, 17, 99]) == 3
    assert letters.remove([3]) == 0
    assert ids(letters) == [number for number in range(1, 21) if number not in (3, 4, 17)]
    assert letters.get(3) is None
    assert letters.remove(range(1, 11)) == 8
    assert len(segments(tmp_path)) < before
    assert ids(DeadLetters(tmp_path)) == [number for number in range(11, 21) if number != 17]


def test_a_number_is_never_given_twice(tmp_path: Path) -> None:
    letters = filled(tmp_path, 20)
    assert letters.remove(range(1, 21)) == 20
    assert ids(letters) == []
    assert letters.bytes_on_disk < 100
    assert DeadLetters(tmp_path).remove(range(100)) == 0
    assert DeadLetters(tmp_path).add([letter(21)], NOW) == range(21, 22)
    assert ids(letters) == [21]


def test_removing_needs_no_space(tmp_path: Path) -> None:
    letters = filled(tmp_path, 20)
    header_writes = 25 * 10
    with failing_writes(header_writes), pytest.raises(OSError, match="No space left"):
        letters.add([letter(21, size=1000)], NOW)
    with failing_writes(header_writes):
        assert letters.remove(range(1, 11)) == 10
    assert ids(letters) == list(range(11, 21))


def test_above_the_bound_the_oldest_go_and_are_counted(tmp_path: Path) -> None:
    letters = DeadLetters(tmp_path, max_bytes=5000, segment_bytes=1000)
    for number in range(1, 101):
        letters.add([letter(number)], NOW)
    assert letters.bytes_on_disk <= 5000
    assert ids(letters) == list(range(letters.dropped + 1, 101))
    assert letters.dropped > 50
    # All processes see it, those that come later too.
    assert DeadLetters(tmp_path).dropped_ever == letters.dropped
    others = DeadLetters(tmp_path, max_bytes=1, segment_bytes=1000)
    others.add([letter(101)], NOW)
    assert DeadLetters(tmp_path).dropped_ever == letters.dropped + others.dropped


def test_what_was_removed_is_not_counted_as_dropped(tmp_path: Path) -> None:
    letters = DeadLetters(tmp_path, max_bytes=5000, segment_bytes=1000)
    letters.add([letter(1), letter(2)], NOW)
    letters.remove([1])
    for number in range(3, 101):
        letters.add([letter(number)], NOW)
    assert letters.dropped == 99 - len(ids(letters))


def test_several_processes_add_and_remove_at_the_same_time(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom pathlib import Path\n"
        "from kong_metering.spool.deadletters import DeadLetters\n"
        "from tests.unit.spool.test_deadletters import letter\n"
        "letters = DeadLetters(Path(sys.argv[1]), segment_bytes=3000)\n"
        "mine = [letters.add([letter(int(sys.argv[2]))], 1)[0] for _ in range(100)]\n"
        "assert letters.remove(mine[::2]) == 50\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    processes = [subprocess.Popen([*command, str(number)], cwd=REPOSITORY) for number in (1, 2, 3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    left = list(DeadLetters(tmp_path).letters())
    assert len(left) == 150
    assert {len([s for s in left if s.letter == letter(number)]) for number in (1, 2, 3)} == {50}
    assert len({stored.id for stored in left}) == 150


@settings(max_examples=150, deadline=None)
@given(place=st.floats(0, 1), bit=st.integers(0, 7), removed=st.sets(st.integers(1, 12)))
def test_a_flipped_bit_costs_one_letter_at_most(
    tmp_path_factory: pytest.TempPathFactory, place: float, bit: int, removed: set[int]
) -> None:
    directory = tmp_path_factory.mktemp("letters")
    letters = filled(directory, 12)
    letters.remove(removed)
    path = segments(directory)[int((len(segments(directory)) - 1) * place)]
    data = bytearray(path.read_bytes())
    data[min(int(len(data) * place), len(data) - 1)] ^= 1 << bit
    path.write_bytes(data)
    again = DeadLetters(directory, segment_bytes=500)
    found = {stored.id: stored.letter for stored in again.letters()}
    assert len(set(range(1, 13)) - removed - set(found)) <= 1
    assert found.items() <= {number: letter(number) for number in range(1, 13)}.items()
    [number] = again.add([letter(99)], NOW)
    added = again.get(number)
    assert added
    assert added.letter == letter(99)
    kept = set(found) | {number}
    assert again.remove(kept) == len(kept)
    assert ids(again) == []


@pytest.mark.parametrize("data", [b"", b"garbage", bytes(1000)])
def test_a_file_without_letters_stops_nobody_and_is_kept(tmp_path: Path, data: bytes) -> None:
    letters = filled(tmp_path, 12)
    newest = segments(tmp_path)[-1]
    newest.write_bytes(data)
    again = DeadLetters(tmp_path, segment_bytes=500)
    [number] = again.add([letter(50)], NOW)
    assert ids(letters)[-1] == number
    assert (tmp_path / "damaged" / newest.name).read_bytes() == data


def test_an_oldest_segment_that_the_disk_does_not_give_makes_room_and_no_letter_comes_twice(tmp_path: Path) -> None:
    """Whoever is told that a letter could not be kept adds it again each second."""
    filled(tmp_path, 12)
    oldest = segments(tmp_path)[0]
    letters = DeadLetters(tmp_path, max_bytes=500, segment_bytes=500)
    with bad_sector(oldest):
        [number] = letters.add([letter(50)], NOW)
    assert letters.bytes_on_disk <= 1000
    assert [stored.id for stored in letters.letters() if stored.letter == letter(50)] == [number]
    assert (tmp_path / "damaged" / oldest.name).exists()


def test_a_newest_segment_that_the_disk_does_not_give_keeps_no_letter_from_being_added(tmp_path: Path) -> None:
    filled(tmp_path, 12)
    newest = segments(tmp_path)[-1]
    with bad_sector(newest):
        [number] = DeadLetters(tmp_path, segment_bytes=500).add([letter(50)], NOW)
    again = DeadLetters(tmp_path, segment_bytes=500)
    assert ids(again) == [*range(1, 13), number]
    assert again.add([letter(51)], NOW) == range(number + 1, number + 2)


def filled(directory: Path, count: int) -> DeadLetters:
    letters = DeadLetters(directory, segment_bytes=500)
    for number in range(1, count + 1):
        letters.add([letter(number)], NOW)
    return letters
