"""Whether an endpoint takes arrays, learned from its answers."""

from __future__ import annotations

import pytest

from kong_metering.ingest.arrays import Arrays, Lesson
from kong_metering.trial.outcome import Delivered, Failed, Outcome, Rejected

URL = "https://ingest.test/events"
TAKEN = Delivered()
REFUSED = Rejected("answered 400: not an object")


def failed(kind: str, *, may_have_arrived: bool = False) -> Failed:
    return Failed(f"answered {kind}", kind, may_have_arrived=may_have_arrived)


def learned(*answers: tuple[str, Outcome]) -> list[bool]:
    """Give what each answer showed; the letters are the events of a request."""
    lesson = Lesson()
    return [lesson.note([letter.encode() for letter in letters], outcome) for letters, outcome in answers]


@pytest.mark.parametrize("refusal", [REFUSED, failed("415"), failed("404"), failed("406"), failed("413")])
def test_an_array_that_is_refused_and_gets_through_one_by_one_shows_it(refusal: Outcome) -> None:
    assert learned(("ab", refusal), ("a", TAKEN), ("b", TAKEN)) == [False, False, True]
    assert learned(("abc", refusal), ("a", TAKEN), ("c", TAKEN), ("b", TAKEN))[-1]


def test_it_is_told_once() -> None:
    assert learned(("ab", REFUSED), ("a", TAKEN), ("b", TAKEN), ("cd", REFUSED), ("c", TAKEN), ("d", TAKEN)) == [
        *[False, False, True],
        *[False, False, False],
    ]


@pytest.mark.parametrize(
    "answers",
    [
        # One of the two is to blame.
        [("ab", REFUSED), ("a", TAKEN), ("b", REFUSED), ("a", TAKEN)],
        # Arrays got through, before or in between.
        [("xy", TAKEN), ("ab", REFUSED), ("a", TAKEN), ("b", TAKEN)],
        [("ab", REFUSED), ("xy", TAKEN), ("a", TAKEN), ("b", TAKEN)],
        # Which of many was to blame is not known.
        [("abcdefgh", REFUSED), *[(letter, TAKEN) for letter in "abcdefgh"]],
        # Not about what was sent.
        [("ab", failed("401")), ("a", TAKEN), ("b", TAKEN)],
        [("ab", failed("429")), ("a", TAKEN), ("b", TAKEN)],
        [("ab", failed("503", may_have_arrived=True)), ("a", TAKEN), ("b", TAKEN)],
        [("ab", failed("ConnectionRefusedError")), ("a", TAKEN), ("b", TAKEN)],
        # The two came before.
        [("a", TAKEN), ("b", TAKEN), ("ab", REFUSED)],
    ],
)
def test_nothing_else_shows_it(answers: list[tuple[str, Outcome]]) -> None:
    assert not any(learned(*answers))


def test_no_more_is_remembered_than_a_few_arrays() -> None:
    lesson = Lesson()
    for number in range(100):
        lesson.note([b"%d" % number, b"other %d" % number], REFUSED)
    assert [lesson.note([event], TAKEN) for event in (b"0", b"other 0", b"99", b"other 99")] == [*[False] * 3, True]


def test_it_is_known_of_one_url() -> None:
    arrays = Arrays()
    answers: list[tuple[list[bytes], Outcome]] = [([b"a", b"b"], REFUSED), ([b"a"], TAKEN), ([b"b"], TAKEN)]
    assert [arrays.note(URL, events, outcome) for events, outcome in answers] == [False, False, True]
    assert arrays.are_refused_by(URL)
    assert not arrays.are_refused_by(URL + "/other")
