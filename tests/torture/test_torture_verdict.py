"""The torture test's verdict can fail: each rule, with evidence that breaks it and evidence that does not."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from kong_metering_torture.events import Name, Put, digest, event_of
from kong_metering_torture.verdict import NOTING_SECONDS, Arrival, Evidence, Fate, judge

if TYPE_CHECKING:
    from collections.abc import Sequence

KILLED_AT = 100.0
BAD = next(number for number in range(100) if Name("a0", 0, number).is_bad)


def put(number: int, at: float = 50.0, process: str = "a0") -> Put:
    return Put(Name(process, 0, number), at)


def arrival(  # noqa: PLR0913 - all that there is to say of one
    number: int,
    start: float,
    end: float | None = None,
    *,
    process: str = "a0",
    fate: Fate = Fate.TAKEN,
    content: bytes | None = None,
    queue: int = 0,
) -> Arrival:
    name = Name("a0", queue, number)
    return Arrival(name, content or content_of(name), process, start, start + 0.1 if end is None else end, 0, fate)


def content_of(name: Name) -> bytes:
    return digest(event_of(name))


def evidence(arrivals: Sequence[Arrival], *, puts: Sequence[Put] | None = None, **others: object) -> Evidence:
    """Make evidence of a process that put five events and was killed, and of others that follow it."""
    puts = [put(number) for number in range(5)] if puts is None else puts
    whole = Evidence(
        puts=puts,
        contents={one.name: content_of(one.name) for one in puts},
        arrivals=arrivals,
        letters=[],
        kills={"a0": KILLED_AT},
    )
    return replace(whole, **others)  # type: ignore[arg-type]


def wrong(of: Evidence) -> dict[str, list[str]]:
    return {rule: list(found) for rule, found in judge(of).wrong.items() if found}


FIVE = [arrival(number, 60.0 + number) for number in range(5)]


def test_all_that_was_put_and_taken_once_in_order_is_well() -> None:
    assert judge(evidence(FIVE)).holds


def test_an_event_that_is_neither_taken_nor_a_dead_letter_is_lost() -> None:
    verdict = judge(evidence([*FIVE[:4], arrival(4, 64.0, fate=Fate.UNANSWERED)]))
    assert not verdict.holds
    assert verdict.wrong["accepted events lost"] == ["a0.0.4, put 50000.00 ms before the SIGKILL"]


def test_a_refused_event_is_lost_unless_it_is_a_dead_letter() -> None:
    puts = [put(number) for number in range(BAD + 1)]
    refused = [
        *(arrival(number, 60.0 + number) for number in range(BAD)),
        arrival(BAD, 60.0 + BAD, fate=Fate.REFUSED),
    ]
    assert list(wrong(evidence(refused, puts=puts))) == ["accepted events lost"]
    name = Name("a0", 0, BAD)
    assert not wrong(evidence(refused, puts=puts, letters=[(name, content_of(name))]))


@pytest.mark.parametrize(
    ("before", "allowance", "is_lost"), [(0.009, 0.01, False), (0.011, 0.01, True), (0.0, 0.0, True)]
)
def test_only_what_was_put_within_the_allowance_before_the_kill_may_be_missing(
    before: float, allowance: float, *, is_lost: bool
) -> None:
    puts = [*(put(number) for number in range(4)), put(4, KILLED_AT - before)]
    found = wrong(evidence(FIVE[:4], puts=puts, allowance=allowance))
    assert ("accepted events lost" in found) == is_lost


def test_what_a_process_put_that_was_not_killed_may_not_be_missing() -> None:
    assert "accepted events lost" in wrong(evidence(FIVE[:4], kills={}, allowance=0.01))


@pytest.mark.parametrize("where", ["arrival", "letter"])
def test_an_id_with_two_contents_is_found(where: str) -> None:
    other = b"another"
    found = (
        wrong(evidence([*FIVE[:4], arrival(4, 64.0, content=other)]))
        if where == "arrival"
        else wrong(evidence(FIVE, letters=[(Name("a0", 0, 4), other)]))
    )
    assert found["ids with two contents"] == ["a0.0.4"]


def test_an_event_that_nobody_put_is_found_but_for_the_one_that_was_under_way() -> None:
    assert not wrong(evidence([*FIVE, arrival(5, 66.0)]))
    assert wrong(evidence([*FIVE, arrival(6, 66.0)]))["events that nobody put"] == ["a0.0.6"]


def test_an_event_in_flight_by_two_processes_at_a_time_is_found() -> None:
    hanging = arrival(4, 64.0, 67.0, fate=Fate.UNANSWERED)
    at_once = arrival(4, 66.0, process="b0")
    assert wrong(evidence([*FIVE[:4], hanging, at_once])) == {
        "events in flight by two processes at a time": ["a0.0.4, by a0 and b0 for 1000.00 ms"]
    }
    assert not wrong(evidence([*FIVE[:4], hanging, arrival(4, 67.5, process="b0")]))


def test_a_request_ends_with_the_death_of_its_process() -> None:
    hanging = arrival(4, 64.0, 101.0, fate=Fate.UNANSWERED)
    assert not wrong(evidence([*FIVE[:4], hanging, arrival(4, KILLED_AT + 0.1, process="b0")]))


def test_what_was_taken_long_before_the_kill_may_not_come_again() -> None:
    again = arrival(4, KILLED_AT + 1, process="b0")
    assert list(wrong(evidence([*FIVE, again]))) == ["taken again, though it was noted"]


def test_the_same_process_may_not_send_again_what_was_taken() -> None:
    late = arrival(4, KILLED_AT - NOTING_SECONDS / 2)
    again = arrival(4, KILLED_AT - NOTING_SECONDS / 3)
    assert list(wrong(evidence([*FIVE[:4], late, again]))) == ["taken again, though it was noted"]


def test_what_was_taken_right_before_the_kill_may_come_again() -> None:
    late = arrival(4, KILLED_AT - NOTING_SECONDS / 2)
    assert not wrong(evidence([*FIVE[:4], late, arrival(4, KILLED_AT + 1, process="b0")]))


def test_what_stands_behind_an_event_that_waits_may_come_again() -> None:
    waits = [arrival(0, 60.0, fate=Fate.FAILED), *FIVE[1:], arrival(0, KILLED_AT + 1, process="b0")]
    again = [arrival(number, KILLED_AT + 2 + number, process="b0") for number in range(1, 5)]
    assert not wrong(evidence([*waits, *again]))


def test_the_first_that_comes_again_is_found_though_those_behind_it_may() -> None:
    again = [arrival(number, KILLED_AT + 2 + number, process="b0") for number in range(1, 5)]
    found = wrong(evidence([*FIVE, *again]))["taken again, though it was noted"]
    assert found == ["a0.0.1, taken 38900 ms before the SIGKILL of a0"]


def test_an_event_that_arrives_first_behind_more_than_may_be_tried_ahead_is_out_of_order() -> None:
    late = [*(arrival(number, 60.0 + number) for number in range(1, 5)), arrival(0, 65.0)]
    assert wrong(evidence(late)) == {"out of order": ["a0.0.0 arrived after 4 newer ones, 4 among them"]}
    assert not wrong(evidence(late, unordered=frozenset({0})))
    assert not wrong(evidence([arrival(0, 59.0, fate=Fate.FAILED), *late]))
    few = [arrival(0, 60.0), *(arrival(number, 60.0 + number) for number in range(2, 5)), arrival(1, 65.0)]
    assert not wrong(evidence(few))


def test_a_dead_letter_of_an_event_that_nobody_refuses_is_found() -> None:
    name = Name("a0", 0, 4)
    assert wrong(evidence(FIVE, letters=[(name, content_of(name))])) == {"dead letters that nobody refused": ["a0.0.4"]}


def test_what_waits_and_what_cannot_be_read_is_wrong() -> None:
    assert list(wrong(evidence(FIVE, waiting=1))) == ["still waiting"]
    assert list(wrong(evidence(FIVE, unreadable=1))) == ["unreadable requests"]
